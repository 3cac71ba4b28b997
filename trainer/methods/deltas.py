"""Differences of fine-tuned models from their base: small files, put into a model and taken out again bit for bit.

Values are added to what the base has at their entries, and the sum replaces it; the originals are kept, so that going
back replaces as well. Differences compose by addition (Ansell et al. 2022, arXiv:2110.07560).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from checkpointing import parameter_names
from checkpointing.errors import first_few
from trainer.errors import Refused
from trainer.methods.entries import Entries, added, index_dtype

FORMAT = "evershard-delta-1"
_PARTS = ("indices", "values", "originals")
DESCRIBED = ("chat_template.jinja", "generation_config.json")  # what was trained beside weights
LONGEST = 2**20  # characters of one of these


@dataclass
class LowRank:
    """`B A` on top of a weight: A is (rank, inputs), B (outputs, rank); of a `transposed` weight across."""

    A: torch.Tensor
    B: torch.Tensor
    transposed: bool = False

    def product(self) -> torch.Tensor:
        whole = self.B.float() @ self.A.float()
        return whole.t() if self.transposed else whole


@dataclass
class Delta:
    """A difference by the names of parameters. Indices are flat, row-major and sorted; `described` are small files."""

    entries: dict[str, Entries] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    method: str = ""
    described: dict[str, str] = field(default_factory=dict)
    before: dict[str, str | None] = field(default_factory=dict)  # what the base had in their places; None for none

    @property
    def count(self) -> int:
        return sum(entries.indices.numel() for entries in self.entries.values())

    def save(self, path: str | Path) -> None:
        tensors = {f"{n}/{part}": getattr(e, part).contiguous() for n, e in self.entries.items() for part in _PARTS}
        for name, pair in self.low_rank.items():
            tensors |= {f"{name}/A": pair.A.contiguous(), f"{name}/B": pair.B.contiguous()}
        told = {
            "shapes": self.shapes,
            "method": self.method,
            "described": self.described,
            "before": self.before,
            "transposed": [name for name, pair in self.low_rank.items() if pair.transposed],
        }
        save_file(tensors, path, {"format": FORMAT, "delta": json.dumps(told)})
        as_any_new_file(Path(path))

    @staticmethod
    def load(path: str | Path) -> Delta:
        """`Refused` for a file that is none, or whose tensors do not fit together."""
        try:
            with safe_open(path, "pt") as opened:
                about = opened.metadata() or {}
                if about.get("format") != FORMAT:
                    raise Refused(
                        f"{path} is no file of differences ({FORMAT}). `python -m trainer.methods delta` writes one."
                    )
                told = json.loads(about["delta"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return _checked(told, tensors, str(path))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} cannot be read as a file of differences: {error}. Export it again.") from None


def _checked(told: dict[str, object], tensors: Mapping[str, torch.Tensor], path: str) -> Delta:
    shapes: dict[str, list[int]] = told["shapes"]  # type: ignore[assignment]
    found = Delta(method=str(told["method"]), described=_described(told.get("described", {})))
    before: Any = told.get("before", {})
    _described({name: text for name, text in before.items() if text is not None})
    found.before = {name: before.get(name) for name in found.described}
    for name, shape in shapes.items():
        found.shapes[name] = tuple(int(n) for n in shape)
        if f"{name}/A" in tensors:
            transposed = name in told["transposed"]  # type: ignore[operator]
            found.low_rank[name] = LowRank(tensors[f"{name}/A"], tensors[f"{name}/B"], transposed)
            continue
        entries = Entries(*(tensors[f"{name}/{part}"] for part in _PARTS))
        indices = entries.indices.long()
        count = indices.numel()
        if entries.values.shape != (count,) or entries.originals.shape != (count,):
            raise ValueError(f"{name} has {count} indices and other numbers of values or originals")
        if count and not (
            int(indices[0]) >= 0 and int(indices[-1]) < math.prod(shape) and bool((indices.diff() > 0).all())
        ):
            raise ValueError(f"{name} has indices that are not sorted, or beyond its shape")
        found.entries[name] = entries
    return found


def _described(given: Any) -> dict[str, str]:
    """Check the small files in a difference, which somebody else may have written."""
    if not (given.keys() <= {*DESCRIBED} and all(isinstance(t, str) and len(t) <= LONGEST for t in given.values())):
        raise ValueError("it describes more than a template and how to generate")
    return dict(given)


class Applied:
    """A delta in a model; `undo` gives back the base, bit for bit."""

    def __init__(self, model: nn.Module, delta: Delta) -> None:
        """`Refused`, with nothing changed, unless the model is the delta's base at every entry."""
        names = parameter_names(model)
        _check_base(names, delta)
        self._names, self._delta = names, delta
        self._dense = {name: names[name].detach().clone() for name in delta.low_rank}
        with torch.no_grad():
            for name, entries in delta.entries.items():
                originals = _in_dtype(entries.originals, names[name])
                names[name].view(-1)[entries.indices.long()] = added(originals, entries.values)
            for name, pair in delta.low_rank.items():
                names[name].copy_((names[name].float() + pair.product()).to(names[name].dtype))

    def undo(self) -> None:
        take_out(self._names, self._delta)
        with torch.no_grad():
            for name, before in self._dense.items():
                self._names[name].copy_(before)


def take_out(names: Mapping[str, nn.Parameter], delta: Delta) -> None:
    """Put the originals back at a delta's entries, whatever is there."""
    with torch.no_grad():
        for name, entries in delta.entries.items():
            names[name].view(-1)[entries.indices.long()] = _in_dtype(entries.originals, names[name])


def _in_dtype(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(device=like.device, dtype=like.dtype)


def _check_base(names: Mapping[str, nn.Parameter], delta: Delta) -> None:
    if strangers := [n for n, s in delta.shapes.items() if n not in names or tuple(names[n].shape) != s]:
        raise Refused(
            f"The model has no {first_few(sorted(strangers))} of the delta's shape. Give the model that was fine-tuned."
        )
    for name, entries in delta.entries.items():
        here = names[name].detach().view(-1)[entries.indices.long().to(names[name].device)]
        there = entries.originals.to(here.device)
        if not torch.equal(here.to(there.dtype), there) or not torch.equal(there.to(here.dtype), here):
            raise Refused(
                f"{name} is not what the delta was trained on: give the base, without another delta in it. "
                "`python -m trainer.methods compose` adds deltas of one base."
            )


def compose(deltas: Sequence[Delta]) -> Delta:
    """The sum of differences from one base.

    `Refused` where their originals differ, and where one has entries of a weight and another a low-rank pair.
    """
    total = Delta(method="+".join(delta.method for delta in deltas))
    for name in DESCRIBED:
        if len(texts := {delta.described[name] for delta in deltas if name in delta.described}) == 1:
            total.described[name] = texts.pop()
            total.before[name] = next(delta.before.get(name) for delta in deltas if name in delta.described)
    for delta in deltas:
        for name, shape in delta.shapes.items():
            if total.shapes.setdefault(name, shape) != shape:
                raise Refused(f"{name} has other shapes in the deltas. Compose those of one base.")
        for name, pair in delta.low_rank.items():
            if name in total.low_rank:
                before = total.low_rank[name]
                pair = LowRank(torch.cat([before.A, pair.A]), torch.cat([before.B, pair.B], 1), pair.transposed)
            total.low_rank[name] = pair
        for name, entries in delta.entries.items():
            total.entries[name] = _sum(name, total.entries[name], entries) if name in total.entries else entries
    if both := sorted(total.entries.keys() & total.low_rank.keys()):
        raise Refused(f"{both[0]} has a low-rank pair in one delta and entries in another: they have no common form.")
    return total


def _sum(name: str, left: Entries, right: Entries) -> Entries:
    indices, places = torch.unique(torch.cat([left.indices, right.indices]), return_inverse=True)
    values = torch.zeros(indices.numel(), dtype=torch.float32)
    values.index_add_(0, places, torch.cat([left.values, right.values]))
    originals = torch.empty(indices.numel(), dtype=left.originals.dtype)
    originals[places[: left.indices.numel()]] = left.originals
    originals[places[left.indices.numel() :]] = right.originals.to(left.originals.dtype)
    if not torch.equal(originals[places[: left.indices.numel()]], left.originals):
        raise Refused(f"{name} has another base in each of the deltas. Compose those of one base.")
    return Entries(indices, values, originals)


def difference(base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], method: str) -> Delta:
    """Where tensors differ, of those that both have; base plus value is what was tuned, up to rounding of fp32."""
    found = Delta(method=method)
    for name, before in base.items():
        if name not in tuned:
            continue
        flat, after = before.detach().reshape(-1), tuned[name].detach().reshape(-1)
        places = (flat != after).nonzero()[:, 0]
        if not places.numel():
            continue
        shape = tuple(before.shape)
        kind = index_dtype((before.numel(), 1))
        values = after[places].float() - flat[places].float()
        found.shapes[name] = shape
        found.entries[name] = Entries(places.to(kind), values, flat[places].clone())
    return found


def as_any_new_file(path: Path) -> None:
    """Give a file the mode that the umask has for new ones: safetensors has only its owner read what it writes."""
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)
