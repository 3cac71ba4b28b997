"""Every layout once as a source and once as a target; the whole matrix is the benchmark."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.matrix import sources_of
from checkpointing import Piece, save
from tests.harness.engines import BARS, LAYOUTS, STEPS, contents_differ, furthest, resume, start, train_and_save
from tests.harness.processes import ROOT
from tests.harness.worlds import SharedWorld

NAMES = list(LAYOUTS)


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    return start([]).train(1, 2 * STEPS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, uninterrupted: list[float], world: SharedWorld) -> Path:
    top = tmp_path_factory.mktemp("matrix")
    for name, (size, overrides) in LAYOUTS.items():
        for found in world.run(train_and_save, size, overrides, top / name):
            assert furthest(found["losses"], uninterrupted[:STEPS]) <= BARS["fp32"], name
            assert found["wrong"] == [] and (found["gathered"] > 0) == (name in GATHERED), name
    return top


GATHERED = {"fsdp", "fsdp on 3", "hsdp 2x2", *(name for name in NAMES if name.startswith("zero"))}  # by their own API


def test_the_benchmark_resumes_each_layout_from_two_and_each_is_resumed_by_two() -> None:
    sources = {name: sources_of(NAMES, name, every_pair=False) for name in NAMES}
    assert all(len(set(those) - {name}) == 2 for name, those in sources.items())
    assert Counter(source for those in sources.values() for source in those) == dict.fromkeys(NAMES, 2)
    assert all(set(sources_of(NAMES, name, every_pair=True)) == {*NAMES} - {name} for name in NAMES)
    assert sources_of(["ddp"], "ddp", every_pair=False) == ["ddp"]
    assert set(sources_of(["ddp", "tp", "pp"], "tp", every_pair=False)) == {"ddp", "pp"}


# A ring through all of them, and what lacks for every pair of engines in both directions.
PAIRS = [
    *((NAMES[n - 1], name) for n, name in enumerate(NAMES)),
    ("accelerate", "fsdp on 3"),
    ("zero 3", "accelerate"),
    ("fsdp x tp", "zero 2"),
    ("zero 1", "pp"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)
def test_what_one_layout_saved_another_goes_on_with(
    trained: Path, uninterrupted: list[float], source: str, target: str, tmp_path: Path, world: SharedWorld
) -> None:
    size, overrides = LAYOUTS[target]
    control = NAMES.index(target) % 5 == 0
    for found in world.run(resume_under, size, overrides, trained / source, tmp_path, control):
        assert found["same_forward"]
        assert furthest(found["losses"], uninterrupted[STEPS:]) <= BARS["fp32"]
        if control:
            assert furthest(found["control"], uninterrupted[STEPS:]) > 10 * BARS["fp32"]
    assert contents_differ(trained / source, tmp_path) == []


def resume_under(overrides: list[str], source: Path, again: Path, control: bool) -> dict:
    return resume(overrides, source, again, control=control)


def test_a_single_different_bit_is_found(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    other = one.clone()
    other.view(torch.int32)[3] ^= 1
    for name, tensor in (("a", one), ("b", other)):
        save(tmp_path / name, 1, [Piece("model/w", tensor, (0,), (6,))])
    assert contents_differ(tmp_path / "a", tmp_path / "b") == ["model/w"]
    assert contents_differ(tmp_path / "a", tmp_path / "a") == []


def test_bf16_is_told_from_bf16_without_moments(tmp_path: Path, world: SharedWorld) -> None:
    """The bar is wide there, and the control must be seen beyond it."""
    bf16 = ["precision=bf16"]
    whole = start(bf16).train(1, 2 * STEPS)
    world.run(train_and_save, 2, [*bf16, "parallel=fsdp"], tmp_path / "a")
    for found in world.run(resume_under, 2, [*bf16, "parallel=zero2"], tmp_path / "a", tmp_path / "b", True):
        assert found["same_forward"] and furthest(found["losses"], whole[STEPS:]) <= BARS["bf16"]
        assert furthest(found["control"], whole[STEPS:]) > 10 * BARS["bf16"]
    assert contents_differ(tmp_path / "a", tmp_path / "b") == []


def test_the_document_has_every_layout() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text()
    for name, (size, overrides) in LAYOUTS.items():
        assert f"| {name} | {size} | {'`' + ' '.join(overrides) + '`' if overrides else ''} |" in text, name
