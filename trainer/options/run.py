"""Options of the run: its name and its directory."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import Refused
from trainer.options.field import refuse_unprintable


@dataclass
class Run:
    name: str = "main"
    dir: str = "runs/${run.name}"  # everything a run writes, relative to where it is started

    def refuse(self) -> None:
        """Refuse names that are none."""
        if not self.name.strip() or not self.dir.strip():
            raise Refused("run.name and run.dir must not be empty. Type run.name=NAME.")
        refuse_unprintable("run.name", self.name)
        refuse_unprintable("run.dir", self.dir)
