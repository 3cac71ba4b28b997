"""Options of the evaluation: what is held out, and text that the model writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.errors import Refused
from trainer.options.field import option


@dataclass
class Eval:
    every: int = option(100, low=0)  # steps; 0: never. The last step is always evaluated
    patience: int = option(0, low=0)  # evaluations in a row without a better loss, after which the run ends; 0: never
    samples: int = option(128, low=0)  # held-out samples, spread evenly; 0: all of them
    sets: list[str] = field(default_factory=list)  # NAME@KIND:PATH, as data.sources has them; each apart
    generate_tokens: int = option(160, low=0)  # length of the text sampled at the end; 0: none
    generate_every: int = option(0, low=0)  # steps between such texts on the way; 0: at the end only

    def refuse(self) -> None:
        """Refuse intervals of what is never done."""
        if self.generate_every and not self.generate_tokens:
            raise Refused(
                "eval.generate_every asks for texts, and eval.generate_tokens=0 for none. Leave one of them out."
            )
        if self.patience and not self.every:
            raise Refused("eval.patience counts evaluations, and eval.every=0 makes none. Type eval.every=100 with it.")
