"""One run in one process: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import trainer.run as run_module
from checkpointing.generations import newest, scan
from checkpointing.storage import FileStorage
from tests.harness.processes import ROOT
from tests.harness.runs import SMALL, assert_same_run, events, rows
from trainer import starting
from trainer.compose import compose
from trainer.errors import Refused, TrainingFailed
from trainer.progress import LossScale
from trainer.run import run

BASE = [*SMALL, "train.steps=12", "checkpoint.every=4", "eval.every=5", "data.log_ids=true"]


def go(run_dir: Path, *overrides: str) -> list[dict]:
    assert run(compose([*BASE, f"run.dir={run_dir}", *overrides])) == 0
    return rows(run_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished, made once: copied by whoever goes on with it, read by the others."""
    run_dir = tmp_path_factory.mktemp("trained")
    go(run_dir)
    return run_dir


@pytest.fixture
def finished(tmp_path: Path, trained: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "finished"))


class Killed(BaseException):
    """What no part of a run catches."""


def interrupt(run_dir: Path, last: int, *overrides: str) -> None:
    """A run whose process dies right after this step's line is written."""

    def die(step: int) -> None:
        if step > last:
            raise Killed

    with pytest.raises(Killed):
        run(compose([*BASE, f"run.dir={run_dir}", *overrides]), before_step=die)


def test_what_a_run_writes(trained: Path) -> None:
    metrics = rows(trained)
    assert sorted(p.name for p in trained.iterdir() if not p.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "hf",
        "metrics.jsonl",
    ]
    assert [row["step"] for row in metrics] == list(range(1, 13))
    contract = [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "samples",
        "tokens_per_s",
        "step_s",
        "blocked_s",
        "world_size",
    ]
    assert all(list(row)[: len(contract)] == contract for row in metrics)
    assert [row["step"] for row in metrics if "eval_loss" in row] == [5, 10, 12]
    assert [row["samples"] for row in metrics] == [8 * s for s in range(1, 13)]
    assert metrics[-1]["tokens"] == 12 * 8 * 16
    assert all((row["blocked_s"] > 0) == (row["step"] in (5, 9)) for row in metrics)
    assert events(trained) == [("start", 0), ("commit", 4), ("commit", 8), ("commit", 12), ("finish", 12)]
    assert [g.step for g in scan(FileStorage(trained / "checkpoints"))] == [12, 8]
    assert yaml.safe_load((trained / "config.yaml").read_text())["train"]["steps"] == 12


@pytest.mark.smoke
@pytest.mark.usefixtures("long")
def test_an_interrupted_run_goes_on_as_if_nothing_happened(tmp_path: Path, trained: Path) -> None:
    undisturbed = rows(trained)
    interrupt(tmp_path, 7)
    assert rows(tmp_path)[-1]["step"] == 7
    resumed = go(tmp_path)
    assert assert_same_run(undisturbed, resumed, 12) == 0.0  # the same process count: bit for bit
    assert [row["tokens"] for row in resumed] == [row["tokens"] for row in undisturbed]
    assert [r["step"] for r in rows(tmp_path, "metrics.discarded.jsonl")] == [5, 6, 7]
    assert ("resume", 4) in events(tmp_path)


@pytest.mark.smoke
@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("broken", ["moments", "cursor"])
def test_the_comparison_fails_when_something_is_lost(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    interrupt(tmp_path, 7)
    original = starting.restore

    def restore(engine: object, *rest: object) -> dict:
        state = original(engine, *rest)  # type: ignore[arg-type]
        for piece in engine.pieces():  # type: ignore[attr-defined]
            if broken == "moments" and "/exp_avg" in piece.name:
                piece.tensor.zero_()
        return state

    monkeypatch.setattr(starting, "restore", restore)
    if broken == "cursor":
        step = run_module.Feed.step
        monkeypatch.setattr(run_module.Feed, "step", lambda self, number: step(self, number + 1))
    resumed = go(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(rows(trained), resumed, 12)


@pytest.mark.usefixtures("long")
def test_killed_before_the_first_checkpoint_it_starts_again(tmp_path: Path, trained: Path) -> None:
    interrupt(tmp_path, 3)
    assert_same_run(rows(trained), go(tmp_path), 12)
    assert [e for e, _ in events(tmp_path)].count("start") == 2


def test_a_finished_run_has_nothing_to_do(finished: Path) -> None:
    before = rows(finished)
    assert go(finished) == before
    assert events(finished)[-2:] == [("resume", 12), ("finish", 12)]


def test_more_steps_go_on_and_say_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [r["step"] for r in go(finished, "train.steps=15")] == list(range(1, 16))
    output = capsys.readouterr().out
    assert "changed since: train.steps was 12, is 15" in output and "follows the new train.steps" in output


@pytest.mark.usefixtures("long")
def test_starting_over_sets_the_old_aside_until_there_is_as_much_new(finished: Path) -> None:
    first = rows(finished)
    again = go(finished, "resume=none", "train.seed=5", "train.steps=3")
    assert [r["step"] for r in again] == [1, 2, 3] and again[0]["loss"] != first[0]["loss"]
    assert len(rows(finished, "metrics.discarded.jsonl")) == 12
    # The abandoned generations are later by step, and are not chosen.
    assert [(g.step, g.abandoned) for g in scan(FileStorage(finished / "checkpoints"))] == [
        (3, False),
        (12, True),
        (8, True),
    ]
    assert go(finished, "train.seed=5", "train.steps=4")[-1]["step"] == 4
    assert ("resume", 3) in events(finished)
    assert [(g.step, g.abandoned) for g in scan(FileStorage(finished / "checkpoints"))] == [(4, False), (3, False)]


def test_going_back_to_a_named_generation(finished: Path) -> None:
    undisturbed = rows(finished)
    directory = next((finished / "checkpoints").glob("step-00000008-*"))
    assert_same_run(undisturbed, go(finished, f"resume={directory}"), 12)
    assert ("resume", 8) in events(finished)


@pytest.mark.usefixtures("long")
def test_going_on_in_another_directory(tmp_path: Path, trained: Path) -> None:
    undisturbed = rows(trained)
    directory = next((trained / "checkpoints").glob("step-00000008-*"))
    branch = go(tmp_path / "b", f"resume={directory}")
    assert [r["step"] for r in branch] == [9, 10, 11, 12]
    assert [r["loss"] for r in branch] == [r["loss"] for r in undisturbed[8:]]
    assert go(tmp_path / "c", f"resume={trained}", "train.steps=13")[-1]["step"] == 13
    # A branch is a run of its own, also in wandb.
    ids = {
        newest(FileStorage(run_dir / "checkpoints")).manifest.run_id  # type: ignore[union-attr]
        for run_dir in (trained, tmp_path / "b", tmp_path / "c")
    }
    assert len(ids) == 3


def test_damage_is_passed_over_by_rolling_back_further(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = rows(finished)
    shard = next((finished / "checkpoints").glob("step-00000012-*/shard-00000.safetensors"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert_same_run(undisturbed, go(finished), 12)
    assert ("resume", 8) in events(finished)
    assert "could not be read: going on from step 8" in capsys.readouterr().out


def test_a_dry_run_of_a_resume_says_where_and_what_changed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))
    assert run(compose([*BASE, f"run.dir={trained}", "dry_run=true", "eval.samples=3"])) == 0
    output = capsys.readouterr().out
    assert "step 12 of 12 is done, saved by 1 process" in output
    assert "changed since: eval.samples was 4, is 3" in output
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*")) == before


@pytest.mark.parametrize("where", ["/proc/nowhere", "/sys/nowhere"])
def test_a_directory_that_cannot_be_written_is_refused(where: str) -> None:
    with pytest.raises(Refused, match=r"cannot be written: .*\. Make it writable, or type run\.dir="):
        go(Path(where))


def test_a_file_where_the_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(Refused, match="cannot be written"):
        go(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path: Path) -> None:
    go(tmp_path, "train.steps=4")
    with pytest.raises(TrainingFailed, match=r"Lower optimizer\.lr"):
        go(tmp_path, "optimizer.lr=1e30", "optimizer.clip=0", "resume_allow=[optimizer.lr,optimizer.clip]")
    assert [e["event"] for e in rows(tmp_path, "events.jsonl")][-1] == "failure"
    assert scan(FileStorage(tmp_path / "checkpoints"))[0].step == 4
    assert all(json.dumps(row, allow_nan=False) for row in rows(tmp_path))


@pytest.mark.usefixtures("long")
def test_odd_sizes(tmp_path: Path) -> None:
    odd = ["model.vocab_size=257", "model.hidden_size=2", "model.num_heads=1", "model.intermediate_size=1"]
    metrics = go(tmp_path, *odd, "train.seq_len=1", "train.global_batch=1", "train.micro_batch=1", "train.steps=3")
    assert [r["tokens"] for r in metrics] == [1, 2, 3]
    assert (
        go(tmp_path, *odd, "train.seq_len=1", "train.global_batch=1", "train.micro_batch=1", "train.steps=5")[-1][
            "step"
        ]
        == 5
    )


@pytest.mark.usefixtures("long")
def test_a_resumed_run_is_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, project: str, name: str, run_id: str, directory: Path, config: dict, *_: object) -> None:
            started.append((run_id, config["run"]["name"]))

        def step(self, row: dict) -> None: ...

        def close(self, exit_code: int) -> None: ...

    monkeypatch.setattr("trainer.track.tracker.WandbRun", Recorder)
    for total in ("train.steps=4", "train.steps=6", "train.steps=8"):
        go(tmp_path / "a", "tracking=wandb", total)
    go(tmp_path / "b", "tracking=wandb", "train.steps=2")
    ids = [run_id for run_id, _ in started]
    assert len(set(ids[:3])) == 1 and ids[3] != ids[0]


def test_deterministic_algorithms_on_request(tmp_path: Path) -> None:
    try:
        go(tmp_path, "train.deterministic=true", "train.steps=2")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_space_that_cannot_be_freed_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(storage: object, keep: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("trainer.saver.prune", fail)
    assert go(tmp_path)[-1]["step"] == 12
    assert "cannot be deleted: not yours" in caplog.text


def test_a_model_that_cannot_write_is_worth_a_warning_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise NotImplementedError("no cache")

    monkeypatch.setattr("trainer.evaluation.sample_text", fail)
    go(tmp_path, "eval.generate_tokens=3")
    assert caplog.text.count("no text can be sampled from this model: NotImplementedError: no cache") == 1
    assert events(tmp_path)[-1] == ("finish", 12)


@pytest.mark.usefixtures("long")
def test_what_it_is_evaluated_on_and_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"text": "line {n} of it"}}\n' for n in range(9)))
    sets = f"eval.sets=[lines@jsonl:{tmp_path}/lines.jsonl,own@text:{ROOT}/trainer/run.py]"
    found = go(
        tmp_path / "run",
        sets,
        "eval.every=4",
        "eval.generate_tokens=3",
        "eval.generate_every=5",
        "tracking.peak_tflops=1",
    )
    assert "eval_loss/lines on 9 samples" in capsys.readouterr().out
    for row in found:
        measured = {"eval_loss", "eval_perplexity", "eval_loss/lines", "eval_loss/own"}
        assert measured & row.keys() == (measured if row["step"] % 4 == 0 else set())
        assert 0 < row["mfu"] < 1
    assert found[-1]["eval_perplexity"] == pytest.approx(math.exp(found[-1]["eval_loss"]))
    assert len({found[-1][key] for key in ("eval_loss", "eval_loss/lines", "eval_loss/own")}) == 3
    samples = rows(tmp_path / "run", "samples.jsonl")
    assert [sample["step"] for sample in samples] == [5, 10, 12] and all(sample["prompt"] for sample in samples)
    # What is watched changes nothing of the training.
    plain = go(tmp_path / "plain", "eval.every=0", "eval.generate_tokens=0")
    assert [row["loss"] for row in plain] == [row["loss"] for row in found] and "mfu" not in plain[0]
    for given in ("eval.sets=[lines]", f"eval.sets=[a@text:{ROOT}/trainer/run.py,a@stdlib:]", "eval.sets=[a@what:x]"):
        with pytest.raises(Refused, match=r"eval\.sets: .* is no"):
            go(tmp_path / "refused", given)


def test_what_stays_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest, every eighth, and the one with the lowest held-out loss of those saved where it was evaluated."""
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr("trainer.evaluation.evaluate", lambda engine, share: next(losses))
    options = ["checkpoint.every=2", "eval.every=4", "checkpoint.keep=1", "checkpoint.keep_every=8"]
    go(tmp_path, *options, "checkpoint.keep_best=1")
    assert {g.step for g in scan(FileStorage(tmp_path / "checkpoints"))} == {12, 8, 4}


@pytest.mark.usefixtures("long")
def test_the_loss_scale_of_fp16_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 2)
    fp16 = ["precision=fp16", "train.steps=6", "checkpoint.every=1"]
    whole = go(tmp_path / "whole", *fp16)
    scales = [row["loss_scale"] for row in whole]
    assert len(set(scales)) == 3  # it grows, so that one that started again would be seen
    interrupt(tmp_path / "killed", 3, *fp16)
    again = go(tmp_path / "killed", *fp16)
    assert [row["loss_scale"] for row in again] == scales
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
