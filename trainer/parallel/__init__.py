"""How one model trains on many processes: the engine protocol, and one file an engine."""
