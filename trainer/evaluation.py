"""Evaluation of a model between steps: losses on held-out sets, and text that it writes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpointing import Team
from trainer.data.dataset import Dataset
from trainer.data.feed import Feed, StepShare
from trainer.data.tokenizer import Tokenizer
from trainer.errors import TrainingFailed
from trainer.sample import sample_text
from trainer.training import Training

logger = logging.getLogger(__name__)


@dataclass
class TextWriter:
    """Has the model go on with a prompt of a dataset. A model that cannot write is no failure of a run."""

    training: Training
    tokenizer: Tokenizer
    dataset: Dataset
    num_tokens: int
    seed: int
    room: int  # positions of the model
    last: tuple[str, str] | None = None  # the prompt, and how it went on

    def write(self) -> tuple[str, str] | None:
        """Collective. None where it failed on all ranks, which is said once; `TrainingFailed` where on some of them."""
        why = ""
        try:
            self.last = sample_text(self.training, self.tokenizer, self.dataset, self.num_tokens, self.seed, self.room)
        except Exception as error:  # of models' own code
            why = f"{type(error).__name__}: {error}"
        told = Team().together(lambda: why)
        if failed := [rank for rank, one in enumerate(told) if one]:
            self.last, self.num_tokens = None, 0
            if len(failed) < len(told):  # who knows where the others were in a step that all compute together
                raise TrainingFailed(
                    f"Text could be sampled on some ranks, and not on {failed}: {told[failed[0]]}. What was saved "
                    "stays as it is. Type eval.generate_tokens=0 to go on without."
                )
            if Team().rank == 0:
                logger.warning("no text can be sampled from this model: %s", why)
        return self.last


@dataclass
class Evaluation:
    """`held_out` gives eval_loss and eval_perplexity, and each of `sets` an eval_loss/NAME."""

    held_out: Dataset
    samples: int  # of each set, spread evenly; 0: all
    sets: Mapping[str, Dataset] = field(default_factory=dict)
    writer: TextWriter | None = None

    def measure(self, training: Training, feed: Feed) -> dict[str, float]:
        """Collective; empty where nothing is held out."""
        found = {}
        if len(self.held_out):
            found["eval_loss"] = evaluate(training, feed.evenly(self.held_out, self.samples))
            found["eval_perplexity"] = math.exp(min(found["eval_loss"], 700.0))  # the largest that a float holds
        for name, dataset in self.sets.items():
            found[f"eval_loss/{name}"] = evaluate(training, feed.evenly(dataset, self.samples))
        if (wrong := [name for name, loss in found.items() if not math.isfinite(loss)]) and Team().rank == 0:
            logger.warning(
                "%s: the held-out loss is no number, and counts as no better. Some sample there overflows the model; "
                "training goes on.",
                ", ".join(wrong),
            )
        return found

    def write(self) -> tuple[str, str] | None:
        """Collective; None where no text is asked for, or none can be written."""
        return self.writer.write() if self.writer is not None and self.writer.num_tokens else None


def evaluate(training: Training, share: StepShare) -> float:
    """The mean loss over the targets of a share's samples, on all ranks."""
    total = training.loss([batch for _, batch in share.micro_batches])
    return float(training.reduce(total).item()) / share.num_targets
