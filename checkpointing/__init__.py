"""Save sharded training state under one layout and load it under any other, with no conversion step.

from checkpointing import Piece, describe, save, load

pieces = describe(model, optimizer)
save(directory, step, pieces, objects={"step": step})   # collective
objects = load(directory, pieces)                       # collective; fills the tensors in place

A name is imported when it is first asked for: what only lists generations needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from checkpointing.geometry import Box, External, Piece, Slice
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
    from checkpointing.loading import load
    from checkpointing.place import Place, find
    from checkpointing.retention import Keep, prune
    from checkpointing.saving import save
    from checkpointing.storage import FileStorage, Storage
    from checkpointing.stores import MemoryStorage, open_storage
    from checkpointing.tensors import external_of

__all__ = [
    "Box",
    "CheckpointError",
    "DamagedError",
    "External",
    "FileStorage",
    "Held",
    "Keep",
    "LayoutError",
    "LeaseHeldError",
    "LostError",
    "MemoryStorage",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "Piece",
    "Place",
    "ReplicaError",
    "Slice",
    "Storage",
    "UnreadableError",
    "VersionError",
    "describe",
    "describe_zero",
    "external_of",
    "find",
    "load",
    "materialize",
    "open_storage",
    "param_groups",
    "parameter_names",
    "pieces_of",
    "prune",
    "publish_zero",
    "restore_param_groups",
    "save",
]

_ELSEWHERE = {
    "Box": "geometry",
    "External": "geometry",
    "FileStorage": "storage",
    "Keep": "retention",
    "MemoryStorage": "stores",
    "Piece": "geometry",
    "Place": "place",
    "Slice": "geometry",
    "Storage": "storage",
    "external_of": "tensors",
    "find": "place",
    "load": "loading",
    "open_storage": "stores",
    "prune": "retention",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name) or ("errors" if name.endswith("Error") else "layouts")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
