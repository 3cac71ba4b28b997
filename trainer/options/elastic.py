"""Options of how long others are waited for, and of what happens when machines will be taken away."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.elastic.preemption import warnings_of
from trainer.errors import Refused
from trainer.options.field import option


@dataclass
class Elastic:
    """How long others are waited for, and what happens when machines will be taken away."""

    grace_s: float = option(30, low=0)  # from the warning to the end: time to finish a step and to save it
    signal: str = "USR1"  # warns, as SIGTERM always does
    timeout_s: float = option(600, low=1)  # of a collective of the training, and of a process that says nothing
    patience_s: float = option(3600, low=1)  # that one may move no byte while it saves or loads: its storage hangs
    join_s: float = option(600, low=1)  # that machines may take to meet, where several are started by torchrun

    def refuse(self) -> None:
        """Refuse a signal that cannot warn."""
        try:
            warnings_of(self.signal)
        except ValueError:
            raise Refused(f"elastic.signal={self.signal} is no signal that can warn. Type USR1 or USR2.") from None
