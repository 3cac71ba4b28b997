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
    from checkpointing.collective import Team
    from checkpointing.errors import (
        BaseNeededError,
        CheckpointError,
        ConfigNeededError,
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
    from checkpointing.export import copy_description, leads_out
    from checkpointing.foreign import IMPORTED
    from checkpointing.foreign.recognise import who_wrote
    from checkpointing.format import Manifest
    from checkpointing.generations import Generation, abandon, candidates, newest, read_index, read_manifest, scan
    from checkpointing.geometry import Box, External, Interval, Piece, Slice
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
    from checkpointing.layouts.zero import held_in_partition
    from checkpointing.lease import Holder, Lease, holder_of, pid_space
    from checkpointing.lease_protocol import EXPIRY_S
    from checkpointing.loading import load
    from checkpointing.memory import Durable, SnapshotOutcome, Snapshotter
    from checkpointing.memory.client import ensure_keeper
    from checkpointing.memory.directory import DEFAULT_MEMORY, why_not_private
    from checkpointing.memory.mapped import MappedStorage
    from checkpointing.patience import PATIENCE
    from checkpointing.place import CHECKPOINTS, Place, find
    from checkpointing.reader import GenerationReader
    from checkpointing.retention import Keep, clear_leftovers, clear_released, prune
    from checkpointing.saving import save
    from checkpointing.storage import FileStorage, Storage
    from checkpointing.stores import (
        MemoryStorage,
        add_store,
        file_of,
        is_path,
        load_store,
        module_of,
        open_storage,
        same_place,
    )
    from checkpointing.tensors import DTYPES, external_of

__all__ = [
    "CHECKPOINTS",
    "DEFAULT_MEMORY",
    "DTYPES",
    "EXPIRY_S",
    "IMPORTED",
    "PATIENCE",
    "BaseNeededError",
    "Box",
    "CheckpointError",
    "ConfigNeededError",
    "DamagedError",
    "Durable",
    "External",
    "FileStorage",
    "Generation",
    "GenerationReader",
    "Held",
    "Holder",
    "Interval",
    "Keep",
    "LayoutError",
    "Lease",
    "LeaseHeldError",
    "LostError",
    "Manifest",
    "MappedStorage",
    "MemoryStorage",
    "MismatchError",
    "NotFoundError",
    "PeerError",
    "Piece",
    "Place",
    "ReplicaError",
    "Slice",
    "SnapshotOutcome",
    "Snapshotter",
    "Storage",
    "Team",
    "UnreadableError",
    "VersionError",
    "abandon",
    "add_store",
    "candidates",
    "clear_leftovers",
    "clear_released",
    "copy_description",
    "describe",
    "describe_zero",
    "ensure_keeper",
    "external_of",
    "file_of",
    "find",
    "held_in_partition",
    "holder_of",
    "is_path",
    "leads_out",
    "load",
    "load_store",
    "materialize",
    "module_of",
    "newest",
    "open_storage",
    "param_groups",
    "parameter_names",
    "pid_space",
    "pieces_of",
    "prune",
    "publish_zero",
    "read_index",
    "read_manifest",
    "restore_param_groups",
    "same_place",
    "save",
    "scan",
    "who_wrote",
    "why_not_private",
]

# The names of each module below this package.
_NAMES = {
    "collective": "Team",
    "errors": (
        "BaseNeededError CheckpointError ConfigNeededError DamagedError LayoutError LeaseHeldError LostError "
        "MismatchError NotFoundError PeerError ReplicaError UnreadableError VersionError"
    ),
    "export": "copy_description leads_out",
    "foreign": "IMPORTED",
    "foreign.recognise": "who_wrote",
    "format": "Manifest",
    "generations": "Generation abandon candidates newest read_index read_manifest scan",
    "geometry": "Box External Interval Piece Slice",
    "layouts": (
        "Held describe describe_zero materialize param_groups parameter_names pieces_of publish_zero "
        "restore_param_groups"
    ),
    "layouts.zero": "held_in_partition",
    "lease": "Holder Lease holder_of pid_space",
    "lease_protocol": "EXPIRY_S",
    "loading": "load",
    "memory": "Durable SnapshotOutcome Snapshotter",
    "memory.client": "ensure_keeper",
    "memory.directory": "DEFAULT_MEMORY why_not_private",
    "memory.mapped": "MappedStorage",
    "patience": "PATIENCE",
    "place": "CHECKPOINTS Place find",
    "reader": "GenerationReader",
    "retention": "Keep clear_leftovers clear_released prune",
    "saving": "save",
    "storage": "FileStorage Storage",
    "stores": "MemoryStorage add_store file_of is_path load_store module_of open_storage same_place",
    "tensors": "DTYPES external_of",
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
