"""What keeps a run the same on any number of processes: keyed randomness and constant work."""
