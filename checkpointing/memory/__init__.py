"""Snapshots in CPU memory that outlive the trainer: copied while training goes on, kept and flushed by a keeper."""

from checkpointing.memory.pending_writes import Durable
from checkpointing.memory.snapshotter import SnapshotOutcome, Snapshotter

__all__ = ["Durable", "SnapshotOutcome", "Snapshotter"]
