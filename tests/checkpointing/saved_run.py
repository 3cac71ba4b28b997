"""A small run directory with two generations, and the command run on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing import describe, save
from checkpointing.__main__ import main


def save_run(directory: Path) -> Path:
    """Generations of steps 10 and 20 in `directory`/checkpoints."""
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (10, 20):
        objects = {"trainer": {"step": step, "config": {"a": 1}}}
        save(directory / "checkpoints", step, describe(model, optimizer), objects)
    return directory


def generation(run_dir: Path, step: int) -> Path:
    return next((run_dir / "checkpoints").glob(f"step-{step:08d}-*"))


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The status of `python -m checkpointing`, and what it printed."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err
