"""The contents of a checkpoint of another library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from checkpointing.geometry import Piece

IMPORTED = "imported"  # the object of a generation that says where it came from

# What wrappers by name put into the names of parameters, anywhere; DDP and DeepSpeed put `module.` in front.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_FRONT = "module."


@dataclass(frozen=True)
class Foreign:
    """`pieces` are named as `describe` names those of a model and its optimizer, and lie in memory-mapped files."""

    kind: str  # for people, such as "DeepSpeed ZeRO stage 2, 4 ranks"
    step: int | None  # of the optimizer; None where nothing says it
    pieces: Sequence[Piece]
    left_out: Sequence[str] = field(default_factory=list)  # what it holds beside that

    @property
    def has_optimizer(self) -> bool:
        return any(piece.name.startswith("optim/") for piece in self.pieces)


def bare(name: str, names: Sequence[str]) -> str:
    """A parameter's name without those of wrappers; `module.` only where all of `names` begin so."""
    return _WRAPPERS.sub("", name.removeprefix(_FRONT) if all(one.startswith(_FRONT) for one in names) else name)


def as_buffers_too(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, and once more under the names of buffers what has no optimizer's state: a state dict does not tell a
    buffer from a parameter that does not train."""
    trained = {piece.name.split("/")[1] for piece in pieces if piece.name.startswith("optim/")}
    found = list(pieces)
    for piece in pieces:
        group, _, name = piece.name.partition("/")
        if group == "model" and name not in trained:
            found.append(replace(piece, name=f"buffer/{name}"))
    return found


def under_all_names(pieces: Sequence[Piece], tied: Mapping[str, str]) -> list[Piece]:
    """The pieces, and those of tied parameters once more: `tied` has the other name of a stored one."""
    others: dict[str, list[str]] = {}
    for other, stored in tied.items():
        others.setdefault(stored, []).append(other)
    found = list(pieces)
    for piece in pieces:
        group, _, rest = piece.name.partition("/")
        name, slash, key = rest.partition("/")
        found += [replace(piece, name=f"{group}/{other}{slash}{key}") for other in others.get(name, ())]
    return found
