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
    LostError,
    MismatchError,
    NotFoundError,
    PeerError,
    ReplicaError,
    UnreadableError,
    VersionError,
)
from checkpointing.geometry import Box, External, Piece
from checkpointing.layouts import (
    Held,
    describe,
    describe_zero,
    materialize,
    param_groups,
    parameter_names,
    pieces_of,
    publish_zero,
    restore_param_groups,
)
from checkpointing.restore import load
from checkpointing.retention import Keep, prune
from checkpointing.tensors import external_of

__all__ = [
    "Box",
    "CheckpointError",
    "DamagedError",
    "External",
    "Held",
    "Keep",
    "LayoutError",
    "LeaseHeldError",
    "LostError",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "Piece",
    "ReplicaError",
    "UnreadableError",
    "VersionError",
    "describe",
    "describe_zero",
    "external_of",
    "load",
    "materialize",
    "param_groups",
    "parameter_names",
    "pieces_of",
    "prune",
    "publish_zero",
    "restore_param_groups",
    "save",
]
