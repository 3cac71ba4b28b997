"""How far a run is: what a checkpoint holds of the trainer beside tensors and settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


@dataclass
class LossScale:
    """The factor of an fp16 loss, so that small gradients do not vanish (Micikevicius et al. 2018,
    arXiv:1710.03740); a step whose gradient overflows is left out, and the scale is halved."""

    factor: float = 2.0**16
    good_steps: int = 0  # since the scale changed

    GROWTH_STEPS = 2000  # as torch's GradScaler

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step. Every rank sees the same norm, so all have the same scale."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self.good_steps == self.GROWTH_STEPS:
            self.factor, self.good_steps = 2 * self.factor, 0


@dataclass
class Progress:
    """The step is the cursor of the data as well."""

    step: int = 0
    tokens: int = 0
    loss_scale: LossScale | None = None  # of fp16 only
    best_loss: float | None = None  # of those on held-out samples
    since_best: int = 0  # evaluations

    def evaluated(self, loss: float) -> None:
        if isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.since_best = loss, 0
        else:
            self.since_best += 1

    def gives_up(self, patience: int) -> bool:
        """Whether so many evaluations in a row were no better; never for 0."""
        return 0 < patience <= self.since_best

    @staticmethod
    def of(state: dict[str, Any], *, scaled: bool) -> Progress:
        """Progress that `as_state` saved, empty from scratch; `scaled` is whether this run scales its loss."""
        scale = LossScale(**(state.get("loss_scale") or {})) if scaled else None
        best, since = state.get("best_loss"), state.get("since_best", 0)
        return Progress(state.get("step", 0), state.get("tokens", 0), scale, best, since)

    def as_state(self) -> dict[str, Any]:
        return asdict(self)
