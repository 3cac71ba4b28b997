"""The trainer, stopped at a named moment of a step, for somebody to kill it there: a marker says that it got there.

`python -m torch.distributed.run ... -m benchmarks.kill_points POINT STEP MARKER [overrides]`. Rank 0 stops at that very
moment and writes the marker; the others go on, and wait for it where they need it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.memory import client, copying
from checkpointing.memory.snapshot import Snapshot
from trainer import cli, loop
from trainer.parallel import torch_engine
from trainer.process import run_as_process

POINTS = [
    "forward",
    "backward",
    "inside a collective",
    "inside the optimizer",
    "mid-copy",
    "between prepare and commit",
]


class Stop:
    """Stops for ever, once the step has come."""

    def __init__(self, step: int, marker: Path) -> None:
        self.step, self._marker = step, marker
        self.now = 0
        self.copied = 0  # the step whose snapshot is on its way; the one that computes may be the next already

    @property
    def due(self) -> bool:
        return self.now == self.step and os.environ["RANK"] == "0"

    @property
    def copy_due(self) -> bool:
        return self.copied == self.step and os.environ["RANK"] == "0"

    def mark(self, point: str) -> None:
        draft = self._marker.with_suffix(".draft")
        draft.write_text(f"{point} of step {self.step}")
        draft.rename(self._marker)

    def here(self, point: str) -> None:
        self.mark(point)
        time.sleep(3600)


def arm(point: str, stop: Stop) -> None:
    """Replace what runs at that moment by something that stops there."""
    train_step = loop.train_step

    def counted(config: Any, engine: Any, feed: Any, step: int, *rest: Any) -> Any:
        stop.now = step
        return train_step(config, engine, feed, step, *rest)

    def submitted(_: Any, snapshot: Snapshot) -> None:
        stop.copied = snapshot.step

    vars(loop)["train_step"] = counted
    _before(copying.Copier, "submit", submitted)
    if point == "forward":
        _before(torch_engine, "summed_loss", lambda *_: stop.here(point) if stop.due else None)
    elif point == "backward":
        summed_loss = vars(torch_engine)["summed_loss"]

        def hooked(*arguments: Any) -> Any:
            loss: Any = summed_loss(*arguments)
            if stop.due:
                loss.register_hook(lambda _: stop.here(point))
            return loss

        vars(torch_engine)["summed_loss"] = hooked
    elif point == "inside a collective":  # rank 0 waits inside of it for rank 1, which does not come
        all_reduce = dist.all_reduce

        def waits(*arguments: Any, **options: Any) -> Any:
            if stop.now == stop.step and os.environ["RANK"] == "1":
                time.sleep(3600)
            if stop.due:
                stop.mark(point)
            return all_reduce(*arguments, **options)

        dist.all_reduce = waits
    elif point == "inside the optimizer":  # some parameters are updated, and others are not
        step = torch.optim.AdamW.step

        def half(self: Any, *arguments: Any) -> Any:
            if stop.due:
                for group in self.param_groups:
                    group["params"] = group["params"][: len(group["params"]) // 2]
                step(self, *arguments)
                stop.here(point)
            return step(self, *arguments)

        setattr(torch.optim.AdamW, "step", half)  # noqa: B010  # its type is that of the original
    elif point == "mid-copy":
        copied = [0]

        def copies(*_: Any) -> None:
            copied[0] += 1
            if stop.copy_due and copied[0] % 2 == 0:
                stop.here(point)

        _before(copying, "copy_part", copies)
    elif point == "between prepare and commit":  # the other rank has told the keeper, this one has only copied

        def sends(_: Any, *messages: dict[str, Any]) -> None:
            if stop.copy_due and any(message["kind"] == "prepared" for message in messages):
                stop.here(point)

        _before(client.Client, "send", sends)


def _before(owner: Any, name: str, action: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, both)


if __name__ == "__main__":
    point, step, marker, *overrides = sys.argv[1:]
    if point != "none":
        arm(point, Stop(int(step), Path(marker)))
    sys.argv = ["trainer", *overrides]
    run_as_process(cli.main)
