"""torch.distributed.checkpoint: chunks of tensors by the keys of a state dict.

The directory's `.metadata` is a pickle that says which chunk of which tensor lies where in which file, and what path a
key had in the nested state dict. A chunk is a file of torch.save inside that file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import DamagedError, MismatchError, VersionError, first_few
from checkpointing.foreign.archive import Mapped, read_archive, read_pickle
from checkpointing.foreign.state import Foreign, as_buffers_too, bare
from checkpointing.geometry import Piece

METADATA = ".metadata"
# Of an optimizer's state dict, nested or flattened, by the names of parameters and not by their numbers.
_STATE = re.compile(r"(?:^|\.)state\.(?P<name>.+)\.(?P<key>[^.]+)$")
Path_ = tuple[Any, ...]  # of a value in a nested state dict


def describe_dcp(directories: Sequence[Path], ignored: Sequence[str] = ()) -> Foreign:
    """One or several directories together, such as a model's and its optimizer's.

    What lies under one of the paths `ignored` (dotted) is left out. `MismatchError` where names do not tell one model
    and its optimizer.
    """
    found: dict[Path_, list[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]]] = {}
    left_out, writers = [], 0
    for directory in directories:
        metadata = read_pickle(directory / METADATA)
        paths = dict(_get(metadata, "planner_data", dict, directory, optional=True) or {})
        entries = _get(metadata, "state_dict_metadata", dict, directory)
        files: dict[str, Mapped] = {}
        for index, info in _get(metadata, "storage_data", dict, directory).items():
            entry = entries[index.fqn]
            path = tuple(paths.get(index.fqn, (index.fqn,)))
            dotted = ".".join(map(str, path))
            if not hasattr(entry, "chunks") or any(dotted == one or dotted.startswith(f"{one}.") for one in ignored):
                left_out.append(dotted)
                continue
            if getattr(info, "transform_descriptors", None):
                raise VersionError(f"{directory}: {dotted} is stored through an extension, such as a compression")
            name = str(info.relative_path)
            if Path(name).name != name:
                raise DamagedError(f"{directory / METADATA} names {name}, which lies elsewhere")
            if name not in files:
                files[name] = Mapped.of(directory / name)
            tensor = read_archive(files[name], info.offset, info.length)
            if not isinstance(tensor, torch.Tensor):
                raise DamagedError(f"{directory / name}: {dotted} is no tensor")
            shape = tuple(entry.size)
            offset = tuple(getattr(index, "offset", None) or (0,) * len(shape))
            found.setdefault(path, []).append((tensor, offset, shape))
        writers += len(files)
    names = _named(list(found))
    pieces = [
        Piece(names[path], tensor, offset, shape) for path, chunks in found.items() for tensor, offset, shape in chunks
    ]
    steps = [p.tensor.item() for p in pieces if p.name.startswith("optim/") and p.name.endswith("/step")]
    kind = f"torch.distributed.checkpoint, {writers} file{'s' * (writers != 1)}"
    return Foreign(kind, int(max(steps)) if steps else None, as_buffers_too(pieces), sorted(set(left_out)))


def _get(metadata: Any, name: str, kind: type, directory: Path, *, optional: bool = False) -> Any:
    value = getattr(metadata, name, None)
    if isinstance(value, kind) or (optional and value is None):
        return value
    raise DamagedError(f"{directory / METADATA} has no {name}: it is no metadata of torch.distributed.checkpoint")


def _named(paths: Sequence[Path_]) -> dict[Path_, str]:
    """Our names. The model's parameters are the last part of their paths, and its optimizer's state names them."""
    states = {path: match for path in paths if (match := _STATE.search(".".join(map(str, path))))}
    models = [path for path in paths if path not in states]
    tops = {path[:-1] for path in models}
    # A part of a model may be called `state`.
    models += [path for path in states if path[:-1] in tops]
    states = {path: match for path, match in states.items() if path[:-1] not in tops}
    if len(tops) > 1:
        names_of = sorted(".".join(map(str, top)) or "no path" for top in tops)
        shortest = sorted((len(path), ".".join(map(str, path))) for path in models)[0][1]
        raise MismatchError(
            f"There are tensors under {first_few(names_of)} that are no optimizer's, and one model is read at a time. "
            f"Type --ignore PATH for each that is not to be imported, such as --ignore {shortest}."
        )
    inner = [str(path[-1]) for path in models]
    names = {path: f"model/{bare(str(path[-1]), inner)}" for path in models}
    known = set(names.values())
    strangers = []
    every = [match["name"] for match in states.values()]
    for path, match in states.items():
        name = bare(match["name"], every)
        if f"model/{name}" not in known:
            strangers.append(".".join(map(str, path)))
        names[path] = f"optim/{name}/{match['key']}"
    if strangers:
        numbered = all(str(_STATE.search(one)["name"]).isdigit() for one in strangers)  # type: ignore[index]
        why = (
            "numbers its parameters, which tells nothing of their names: save it with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
            if numbered
            else "is of parameters that the model lacks"
        )
        raise MismatchError(
            f"The optimizer's state {why} ({first_few(strangers, 3)}). Or type --ignore "
            f"{strangers[0].split('.')[0]} to take the model alone, with moments that begin at zero."
        )
    return names
