"""Tracking: metrics.jsonl and events.jsonl, the progress on the terminal, and wandb. Rank 0 only."""
