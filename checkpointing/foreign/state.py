"""What was found in a checkpoint of another library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from checkpointing.geometry import Piece

IMPORTED = "imported"  # the object of a generation that says where it came from

# What wrappers put into the names of parameters.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


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
    if not all(_WRAPPERS.match(one) for one in names):
        return re.sub(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", "", name)
    return _WRAPPERS.sub("", name)


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
