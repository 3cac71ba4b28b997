"""How many entries, columns or rows of each weight train: allocators. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import Refused
from trainer.options.method import Allocator, Granularity, Sparse


@dataclass(frozen=True)
class Target:
    """A weight, as it lies: its shape, and the width of a slice of it where whole heads are selected."""

    rows: int
    columns: int
    granularity: Granularity = Granularity.element  # of the weight: `inputs` are its columns
    width: int = 1

    @property
    def units(self) -> int:
        """The number of entries or slices that can be selected."""
        if self.granularity is Granularity.element:
            return self.rows * self.columns
        return (self.columns if self.granularity is Granularity.inputs else self.rows) // self.width


def counts_of(config: Sparse, targets: Mapping[str, Target]) -> dict[str, int]:
    """The units to select of each weight, at least one.

    Where it depends on the weights' content (`allocator=whole` and `threshold`), what each would get on average.
    """
    if config.allocator is Allocator.rank:
        shares = {n: config.budget_rank * (t.rows + t.columns) / (t.rows * t.columns) for n, t in targets.items()}
    elif config.allocator is Allocator.by_module:
        shares = _by_pattern(config.densities, targets)
    else:
        shares = dict.fromkeys(targets, config.density)
    return {name: min(max(1, round(shares[name] * t.units)), t.units) for name, t in targets.items()}


def together(config: Sparse, targets: Mapping[str, Target]) -> int:
    """The entries of all weights together (`allocator=whole`)."""
    return max(1, round(config.density * sum(target.units for target in targets.values())))


def _by_pattern(given: list[str], targets: Mapping[str, Target]) -> dict[str, float]:
    shares, unused = {}, set(range(len(given)))
    patterns = [densities_by_pattern(one) for one in given]
    for name in targets:
        match = next((i for i, (pattern, _) in enumerate(patterns) if re.search(pattern, name)), None)
        if match is None:
            raise Refused(
                f"method.densities has no pattern for {name}. Add one such as {name.rpartition('.')[2]}:0.01, or leave "
                "the layer out of method.target_modules."
            )
        unused.discard(match)
        shares[name] = patterns[match][1]
    if unused:
        raise Refused(
            f"method.densities names {given[min(unused)]}, which is found in no targeted layer. Leave it out."
        )
    return shares


def densities_by_pattern(given: str) -> tuple[str, float]:
    """`pattern:density`. `Refused` for anything else."""
    pattern, _, share = given.rpartition(":")
    try:
        re.compile(pattern)
        density = float(share)
        if pattern and 0 < density <= 1:
            return pattern, density
    except (re.error, ValueError):
        pass
    raise Refused(
        f"method.densities={given} is no pattern:density. Type one such as 'method.densities=[\"o_proj:0.05\"]'."
    )


def dense_hits(counts: Mapping[str, int], targets: Mapping[str, Target], rank: int, alpha: float) -> set[str]:
    """The weights that get a low-rank pair instead: those with at least `rank (rows + columns) / alpha` hits.

    After He et al. 2023 (SPT, arXiv:2303.08566).
    """
    if rank == 0:
        return set()
    return {n for n, t in targets.items() if counts[n] >= rank * (t.rows + t.columns) / alpha}
