"""What every fine-tuning method must do, under every engine. A method is a file in conf/method; nothing is listed here.

Small overrides follow from the options that a method has, so that a new one needs no change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpointing import Piece, load, parameter_names, save
from checkpointing.generations import newest
from checkpointing.storage import FileStorage
from tests.harness.engines import LAYOUTS, Started, start
from tests.harness.processes import ROOT
from trainer.compose import compose
from trainer.methods.tuned_runs import Tuned
from trainer.models import build_model
from trainer.options.config import Config
from trainer.options.method import Reselection, Selective, Sparse
from trainer.options.stored import as_json
from trainer.parallel.computing import logits_of

GENERIC = ("sparse", "selective")  # what methods are made of, and none by themselves
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml") if path.stem not in GENERIC)
STEPS = 2  # under each engine
CHAIN = ["single", "ddp", "fsdp", "tp", "zero 2", "zero 3", "pp", "hsdp 2x2", "zero 1"]
LAST = STEPS * len(CHAIN)
BAR = 1e-5
LEARNING = ["train.micro_batch=2", f"train.steps={LAST}"]


def words_of(method: str) -> list[str]:
    """What a person types to choose a method."""
    path = Path(method)
    return [f"method={method}"] if "/" not in method else ["--config-dir", str(path.parents[1]), f"method={path.stem}"]


@functools.cache
def overrides(method: str) -> list[str]:
    """A method at the size of a model of a few thousand parameters, with several re-selections in a few steps.

    `method` is a name, or the path of a YAML outside of the project.
    """
    base = [*words_of(method), *LEARNING]
    options = compose(base).method
    if not isinstance(options, Sparse):
        return base
    base += ["method.density=0.05", "method.budget_rank=1", "method.rank=4", "method.threshold=0.005"]
    base += ["method.promote_rank=2"] if options.promote_rank else []
    if options.schedule in (Reselection.regrow, Reselection.renew):
        return [*base, "method.every=5", "method.window=2"]
    return base if options.schedule is Reselection.once else [*base, "method.every=7"]


def base_model(config: Config) -> nn.Module:
    model = build_model(config.model, seq_len=config.train.seq_len, seed=config.train.seed)
    return model.train(False)


def save_to(directory: Path, started: Started, step: int) -> None:
    state = {"config": as_json(started.config), "step": step}
    save(directory, step, started.training.pieces(), objects={"trainer": state})


def train_link(method: str, layout: str, before: Path | None, after: Path, first: int) -> list[float]:
    """One link of a chain: go on from where another engine left off, train, save. On every rank."""
    started = start([*overrides(method), *LAYOUTS[layout][1]])
    if before is not None:
        load(before, started.training.pieces_for)
        started.training.publish()
    losses = started.train(first, first + STEPS - 1)
    save_to(after, started, first + STEPS - 1)
    return losses


def train_alone(method: str, layout: str, steps: int) -> list[float]:
    return start([*overrides(method), *LAYOUTS[layout][1]]).train(1, steps)


@dataclass(frozen=True)
class Trained:
    """A method after some steps in one process, and what it left in a checkpoint."""

    started: Started
    base: nn.Module
    directory: Path

    @staticmethod
    def by(method: str, directory: Path, steps: int = 8) -> Trained:
        started = start(overrides(method))
        started.train(1, steps)
        save_to(directory, started, steps)
        return Trained(started, base_model(started.config), directory)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What the engine computes with, of the parameters that the base has."""
        inner: Any = self.started.training.engine
        names = parameter_names(self.base)
        return {name: p.detach() for name, p in parameter_names(inner._bare).items() if name in names}


def is_no_op_at_the_start(started: Started) -> bool:
    """The output is the base's, bit for bit."""
    return torch.equal(started.logits(), logits(base_model(started.config)))


def logits(model: nn.Module) -> torch.Tensor:
    """As `Started.logits` gives them."""
    model.train(False)
    with torch.no_grad():
        return logits_of(model, torch.arange(24).reshape(2, 12) * 7 % 257, low=None)[:, -1]


def furthest_merged(trained: Trained) -> float:
    """Between the logits of the engine and those of the merged model, read from the checkpoint."""
    merged = logits(Tuned.open(trained.directory).merged())
    return float((trained.started.logits() - merged).abs().max())


def reverts(trained: Trained) -> bool:
    """Whether originals, put back where the checkpoint says that something trained, give the base bit for bit."""
    delta = Tuned.open(trained.directory).delta()
    before = {name: p.detach().clone() for name, p in parameter_names(trained.base).items()}
    for name, tensor in trained.weights.items():
        if name in delta.entries:
            entries = delta.entries[name]
            tensor = tensor.clone()
            tensor.view(-1)[entries.indices.long()] = entries.originals
        if name not in delta.low_rank and not torch.equal(tensor, before[name]):
            return False
    return True


def trainable(trained: Trained) -> tuple[int, int, int]:
    """Elements that train: as the model declares them, as the optimizer keeps moments of, as are in the checkpoint."""
    found = newest(FileStorage(trained.directory))
    assert found is not None and found.manifest is not None
    inner: Any = trained.started.training.engine
    names = {n: p for n, p in parameter_names(inner._bare).items() if p.requires_grad}
    stored = found.manifest.tensors
    in_groups = sum(p.numel() for group in inner._optimizer.param_groups for p in group["params"])
    return (
        sum(p.numel() for p in names.values()),
        in_groups,
        sum(torch.Size(stored[f"model/{n}"].shape).numel() for n in names if f"model/{n}" in stored),
    )


def overhead(trained: Trained) -> float:
    """Bytes of a sparse checkpoint's tensors over those of indices, values, originals and moments."""
    found = newest(FileStorage(trained.directory))
    assert found is not None and found.manifest is not None
    total = own = 0
    for name, tensor in found.manifest.tensors.items():
        size = torch.Size(tensor.shape).numel() * 4
        total += size
        own += size if "sparse_" in name or "lora_" in name or "settled_" in name or "candidate_" in name else 0
        own += size if "sm3_" in name else 0
    return total / own


def is_exact(method: str) -> bool:
    """Whether the merged weights are the very ones that the engine computes with."""
    options = compose(overrides(method)).method
    return not (isinstance(options, Sparse) and options.promote_rank) and (
        isinstance(options, Sparse | Selective) or method == "full"
    )


def pieces_named(started: Started, ending: str) -> list[Piece]:
    return [p for p in started.training.pieces() if isinstance(p, Piece) and p.name.endswith(ending)]
