"""A generation as torch.distributed.checkpoint reads it: the model and its optimizer's state, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from checkpointing.errors import LayoutError
from checkpointing.export import BUFFER, MODEL, whole_directory
from checkpointing.export import parameters as parameters_of
from checkpointing.reader import GenerationReader
from checkpointing.stream import read_whole
from checkpointing.tensors import DTYPES

OPTIM = "optim/"


def export_dcp(reader: GenerationReader, directory: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write `model.<fqn>` and `optim.state.<fqn>.<key>`, as torch's get_state_dict names them, tied names included.

    `dtype` is what the model's floating-point tensors are rounded to, the optimizer's state is not. This takes the
    memory of the largest tensor. Returns how many numbers the model has. What the options of param groups are, such as
    the learning rate, is not in it: load it with `DefaultLoadPlanner(allow_partial_load=True)`. `LayoutError` for a
    directory that is not empty, `MismatchError` for a generation that does not hold a whole model.
    """
    tensors, manifest = parameters_of(reader), reader.manifest
    optimizer = [name for name in manifest.tensors if name.startswith(OPTIM)]
    stored = {name: name for name in [*tensors, *optimizer]}
    stored |= {name: other for name, other in manifest.aliases.items() if other in stored}
    state: dict[str, Any] = {"model": {}, "optim": {"state": {}}}
    sources: dict[str, tuple[str, torch.dtype]] = {}
    for name, source in stored.items():
        about = manifest.tensors[source]
        own = DTYPES[about.dtype]
        group, _, rest = name.partition("/")
        if name.startswith((MODEL, BUFFER)):
            own = dtype if dtype is not None and own.is_floating_point else own
            state["model"][rest] = torch.empty(about.shape, dtype=own, device="meta")
            sources[f"model.{rest}"] = source, own
        else:
            fqn, _, key = rest.rpartition("/")
            state[group]["state"].setdefault(fqn, {})[key] = torch.empty(about.shape, dtype=own, device="meta")
            sources[f"optim.state.{fqn}.{key}"] = source, own
    if not optimizer:
        del state["optim"]
    with whole_directory(directory) as draft:
        writer = FileSystemWriter(draft, thread_count=1, overwrite=False)
        try:
            save(state, storage_writer=writer, planner=_Reading(reader, sources), no_dist=True)
        except CheckpointException as error:  # torch's own, around what went wrong
            raise next(failure for failure, _ in error.failures.values()) from None
    return sum(manifest.tensors[name].nbytes // manifest.tensors[name].itemsize for name in tensors)


class _Reading(DefaultSavePlanner):
    """Gives the writer each tensor when it is about to be written; until then the state has none of its numbers."""

    def __init__(self, reader: GenerationReader, sources: dict[str, tuple[str, torch.dtype]]) -> None:
        super().__init__()
        self.reader, self.sources = reader, sources

    def resolve_data(self, write_item: WriteItem) -> Any:
        if (source := self.sources.get(write_item.index.fqn)) is None:
            raise LayoutError(f"{write_item.index.fqn} is not what was to be written")
        name, dtype = source
        return read_whole(self.reader, name).to(dtype)
