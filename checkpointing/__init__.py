"""Save sharded training state under one layout and load it under any other, with no conversion step.

from checkpointing import Piece, describe, save, load

pieces = describe(model, optimizer)
save(directory, step, pieces, objects={"step": step})   # collective
objects = load(directory, pieces)                       # collective; fills the tensors in place
"""

from checkpointing.commit import save
from checkpointing.errors import (
    CheckpointError,
    DamagedError,
    LayoutError,
    LeaseHeldError,
    MismatchError,
    NotFoundError,
    PeerError,
    VersionError,
)
from checkpointing.geometry import Box, Piece
from checkpointing.layouts import describe, materialize, pieces_of
from checkpointing.restore import load
from checkpointing.retention import Keep, prune

__all__ = [
    "Box",
    "CheckpointError",
    "DamagedError",
    "Keep",
    "LayoutError",
    "LeaseHeldError",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "Piece",
    "VersionError",
    "describe",
    "load",
    "materialize",
    "pieces_of",
    "prune",
    "save",
]
