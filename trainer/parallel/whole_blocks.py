"""Whether tensor-parallel ranks hold whole blocks of 8-bit moments: asked of the model's shapes, before it is read."""

from __future__ import annotations

from torch import nn

from checkpointing import parameter_names
from trainer.errors import Refused
from trainer.parallel.eight_bit import BLOCK, is_in_blocks
from trainer.parallel.tensor import is_splittable, shares_of


def check_blocks(model: nn.Module, size: int) -> None:
    """`Refused` if one of so many tensor-parallel ranks would hold a part of a block. Of a model on meta."""
    if (cut := cut_within(model, size)) is None:
        return
    name, at = cut
    smaller = [other for other in range(size - 1, 0, -1) if size % other == 0]  # which fit the same processes
    fits = next(other for other in smaller if other == 1 or _fits(model, other))
    raise Refused(
        f"8-bit moments have a scale for every {BLOCK} values of a row, and parallel.tp={size} cuts the rows of {name} "
        f"at {at}, within such a block. Type parallel.tp={fits}, or optimizer.implementation=fused."
    )


def _fits(model: nn.Module, size: int) -> bool:
    return is_splittable(model, size) and cut_within(model, size) is None


def cut_within(model: nn.Module, size: int) -> tuple[str, int] | None:
    """A parameter whose rows are cut within a block, and where."""
    trained = {name for name, parameter in parameter_names(model).items() if parameter.requires_grad}
    for cuts in shares_of(model, size) if size > 1 else ():
        for name, part in cuts.held.items():
            if name in trained and is_in_blocks(part.shape):
                for at in (n for start, length in part.ranges[-1] for n in (start, start + length)):
                    if at % BLOCK:
                        return name, at
    return None
