"""Elasticity: a run is the same on any number of processes, by keyed randomness and constant work."""
