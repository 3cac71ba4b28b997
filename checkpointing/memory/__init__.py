"""Snapshots in CPU memory that outlive the trainer: copied while training goes on, kept and flushed by a keeper."""

from checkpointing.memory.durables import Durable
from checkpointing.memory.snapshotter import SnapshotOutcome, Snapshotter

__all__ = ["Durable", "SnapshotOutcome", "Snapshotter"]
