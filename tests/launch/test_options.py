"""Flags are options of a dataclass, and come back from Hydra as they were typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.__main__ import parse
from launch.options import TARGETS, Call, bounds, check_sizes, is_choice, is_override, quote, read
from trainer.compose import compose
from trainer.errors import Refused
from trainer.options.launch import LocalLaunch, SlurmLaunch, TorchrunLaunch


def called(*words: str) -> Call:
    cut = words.index("--") if "--" in words else len(words)
    flags = parse(words[:cut])
    return read(flags.command, flags, words[cut + 1 :])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0$"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.usefixtures("long")
@settings(deadline=None, max_examples=40)
@given(TEXT, st.lists(TEXT, max_size=3))
def test_whatever_is_typed_arrives(one: str, several: list[str]) -> None:
    words = ["launch=slurm", f"launch.partition={quote(one)}", f"launch.setup={quote(several)}"]
    options = compose(words).launch
    assert isinstance(options, SlurmLaunch)
    assert options.partition == one and options.setup == several


@pytest.mark.parametrize("target", TARGETS)
def test_every_option_is_a_flag(target: str) -> None:
    assert type(called(target).config.launch) is TARGETS[target]
    assert called(target, "--nproc", "3").config.launch.nproc == 3
    assert called(target, "--nproc", "3", "--dry-run").dry_run


def test_flags_win_over_overrides_and_an_experiment_carries_everything() -> None:
    call = called("slurm", "--nodes", "2-4", "--setup", "module load a", "--setup=x", "--", "launch.nproc=4")
    assert call.config.launch == SlurmLaunch(nproc=4, nodes="2-4", setup=["module load a", "x"])
    assert call.overrides == ["launch=slurm", "launch.nproc=4"]
    assert call.flags == ["--nodes=2-4", "--setup=module load a", "--setup=x"]
    assert called("local", "--", "experiment=stdlib_lora").config.launch == LocalLaunch(2)
    assert called("slurm", "--", "experiment=stdlib_lora").config.launch == SlurmLaunch(2)
    assert called("slurm", "--nproc=5", "--", "experiment=stdlib_lora").config.launch == SlurmLaunch(5)


def test_a_job_starts_torchrun_with_the_overrides_of_its_own_launch() -> None:
    words = ["launch=slurm", "launch.partition=gpu", "run.name=x", "launch.nproc=8"]
    options = called("torchrun", "--nodes=2", "--endpoint=localhost:1", "--", *words).config.launch
    assert options == TorchrunLaunch(8, "2", "localhost:1", "x", 3, "runs/x/logs")
    with pytest.raises(Refused, match="A flag of torchrun does not fit"):
        called("torchrun", "--restarts=often", "--", *words)


@pytest.mark.parametrize("words", [["nokey=1"], ["launch.nodes=2"], ["experiment=none_such"], ["train.steps=x"]])
def test_what_does_not_compose_is_refused(words: list[str]) -> None:
    with pytest.raises(Refused):
        called("local", "--", *words)


def test_words_that_are_overrides_and_those_that_span_a_sweep() -> None:
    words = ["a=1", "~a", "+a.b=2", "--cfg", "job", "--x=1"]
    assert [word for word in words if is_override(word)] == ["a=1", "~a", "+a.b=2"]
    spans = ["a=1,2", "a=[1,2]", "a=range(3)", "a=choice(x,y)", "a='1,2'"]
    assert [is_choice(word) for word in spans] == [True, False, True, True, False]


@pytest.mark.parametrize(("text", "found"), [("2", (2, 2)), ("1:4", (1, 4)), ("1-4", (1, 4))])
def test_numbers_of_machines(text: str, found: tuple[int, int]) -> None:
    assert bounds(text, "launch.nodes") == found


@pytest.mark.parametrize("text", ["", "0", "4:1", "two", "1:2:3", "-1"])
def test_what_is_no_number_of_machines(text: str) -> None:
    with pytest.raises(Refused, match="no number of machines"):
        bounds(text, "launch.nodes")


def test_every_size_must_fit() -> None:
    config = compose(["parallel.dp_shard=2"])
    check_sizes(config, [2, 4])
    with pytest.raises(Refused, match="does not divide the 3"):
        check_sizes(config, [2, 3, 4])


def test_flags_count_and_are_checked_whatever_an_experiment_says() -> None:
    experiment = ["experiment=stdlib_lora"]
    assert called("local", "--nproc=3", "--", *experiment).config.launch.nproc == 3
    for flags in (["local", "--nproc=abc"], ["local", "--nproc=0"], ["slurm", "--warn-s=1"]):
        with pytest.raises(Refused):
            called(*flags, "--", *experiment)
    with pytest.raises(Refused, match=r"launch\.warn_s=1 must be at least 10"):
        called("slurm", "--warn-s=1", "--", "launch=local")


def test_a_launcher_composes_what_the_trainer_will(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 77\n")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        call = called("local", "--nproc=2", "--", *flag, "experiment=mine", "run.name=a")
        assert call.config.train.steps == 77 and call.overrides[: len(flag)] == flag
