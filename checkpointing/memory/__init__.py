"""Snapshots in CPU memory that outlive the trainer: copied while training goes on, kept and flushed by a keeper."""

from checkpointing.memory.snapshotter import Durable, Outcome, Snapshotter

__all__ = ["Durable", "Outcome", "Snapshotter"]
