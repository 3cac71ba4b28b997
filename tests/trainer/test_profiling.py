"""A profile of the steps that were asked for, and of no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from trainer.errors import Refused
from trainer.options.train import window_of
from trainer.profiling import Window


def run(directory: Path, text: str, numbers: range) -> list[int]:
    """The sizes of the products in the trace; that of each step has its number."""
    window = Window(text, directory, 3)
    for number in numbers:
        with window.step(number):
            torch.ones(1, number) @ torch.ones(number, 1)
    window.close()
    path = directory / "rank-00003.json.gz"
    if not path.exists():
        return []
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    shapes = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]
    return [shape[0][1] for shape in shapes]


def test_only_the_window_is_recorded(tmp_path: Path) -> None:
    assert run(tmp_path, "3:5", range(1, 9)) == [3, 4, 5]
    assert run(tmp_path / "resumed", "3:5", range(4, 9)) == [4, 5]
    assert run(tmp_path / "short", "3:5", range(1, 5)) == [3, 4]  # the run ended
    assert run(tmp_path / "over", "3:5", range(6, 9)) == [] and run(tmp_path / "none", "", range(1, 3)) == []


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:2:3"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(Refused, match=r"Type one such as train\.profile=10:15"):
        window_of(text)
