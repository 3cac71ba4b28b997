"""Whether a run may go on: what is free to change, what is refused, and what cannot be resumed from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, save
from checkpointing.format import digest
from checkpointing.memory.directory import make_directory
from tests.harness.models import save_tiny_model
from tests.harness.runs import SMALL
from trainer.allowed_changes import check_state
from trainer.compose import compose
from trainer.errors import Refused
from trainer.identity import NAME
from trainer.methods import build
from trainer.models import architecture
from trainer.options.stored import as_json
from trainer.resume import (
    Start,
    become_itself,
    decide,
    make_memory_directory,
    memory_directory,
    own_tiers,
    turn_away_from,
)
from trainer.run import run

BASE = [*SMALL, "train.steps=4", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    assert run(compose([*BASE, f"run.dir={directory}"])) == 0
    return directory


@pytest.fixture(scope="module")
def fingerprint(saved: Path) -> str:
    from checkpointing.generations import newest, read_index
    from checkpointing.storage import FileStorage

    storage = FileStorage(saved / "checkpoints")
    found = newest(storage)
    assert found and found.manifest
    return str(read_index(storage, found.manifest, 0).objects["trainer"]["fingerprint"])


def decision(saved: Path, fingerprint: str, *overrides: str) -> Start:
    config = compose([*BASE, f"run.dir={saved}", *overrides])
    return decide(config, fingerprint, build(config, "meta"))


def test_unchanged_it_goes_on(saved: Path, fingerprint: str) -> None:
    start = decision(saved, fingerprint)
    assert (start.step, start.incarnation) == (4, 2)
    assert not any("changed" in line for line in start.lines)


def test_a_run_of_a_release_without_choices_of_optimizers_goes_on(saved: Path, fingerprint: str) -> None:
    config = compose([*BASE, f"run.dir={saved}"])
    model = build(config, "meta")
    state = {"config": as_json(config), "fingerprint": fingerprint, "architecture": architecture(model)}
    del state["config"]["choices"]["optimizer"]
    assert check_state(config, state, fingerprint, model) == {}


@pytest.mark.parametrize(
    "override",
    [
        "parallel.dp_shard=-1",
        "parallel.local_batch=1",  # without dropout it changes nothing
        "train.steps=9",
        "checkpoint.every=1",
        "checkpoint.keep=7",
        "eval.every=2",
        "tracking=wandb",
        "data.log_ids=true",
        "train.deterministic=true",
    ],
)
def test_free_to_change_and_printed(saved: Path, fingerprint: str, override: str) -> None:
    start = decision(saved, fingerprint, override)
    assert any("changed since: " in line for line in start.lines)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.seed=1", "train.seed"),
        ("train.global_batch=4", "train.global_batch"),
        ("train.micro_batch=4", "train.micro_batch"),
        ("train.seq_len=8", "train.seq_len"),
        ("train.steps=3", "train.steps"),
        ("optimizer.lr=0.5", "optimizer.lr"),
        ("optimizer.betas=[0.9,0.99]", "optimizer.betas"),
        ("schedule=linear", "schedule.curve"),
        ("precision=bf16", "precision.compute"),
        ("model.dropout=0.1", "model.dropout"),
        ("method=lora", "method"),
    ],
)
def test_what_alters_the_result_is_refused_unless_named(saved: Path, fingerprint: str, override: str, key: str) -> None:
    with pytest.raises(Refused, match=rf"would not give its result: {key} .*type resume_allow=\[{key}\]"):
        decision(saved, fingerprint, override)
    if key != "method":  # that one is another model as well
        assert decision(saved, fingerprint, override, f"resume_allow=[{key}]").step == 4
    assert key == "method" or decision(saved, fingerprint, override, f"resume_allow=[{key.split('.')[0]}]").step == 4


def test_what_is_to_be_typed_works(saved: Path, fingerprint: str) -> None:
    changes = ["train.seed=1", "optimizer.lr=0.5"]
    with pytest.raises(Refused) as refused:
        decision(saved, fingerprint, *changes)
    typed = str(refused.value).split("type ")[1].split(" ")[0]
    assert decision(saved, fingerprint, *changes, typed).step == 4


def test_other_data_is_refused_by_content(saved: Path, fingerprint: str) -> None:
    with pytest.raises(Refused, match=r"data \(what it holds has changed\)"):
        decision(saved, "another fingerprint")
    assert decision(saved, "another fingerprint", "resume_allow=[data]").step == 4


@pytest.mark.usefixtures("long")
def test_splitting_a_micro_batch_is_refused_where_there_is_dropout(tmp_path: Path) -> None:
    overrides = [*BASE, f"run.dir={tmp_path}", "model.dropout=0.1"]
    assert run(compose(overrides)) == 0
    with pytest.raises(Refused, match=r"parallel\.local_batch \(the model has dropout"):
        run(compose([*overrides, "parallel.local_batch=1"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=2"], r"it lacks \d+ of this model's tensors, such as model/model\.layers\.1"),
        (
            ["model.hidden_size=8"],
            r"differ in shape, such as model/lm_head\.weight: \(256, 16\) there, \(256, 8\) here",
        ),
        (["method=lora"], r"it lacks \d+ of this model's tensors, such as model/model.layers.0"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: Path, fingerprint: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(Refused, match=f"is of another model: .*{message}"):
        decision(saved, fingerprint, *overrides, "resume_allow=[model,method]")


def test_paths_that_hold_nothing_are_refused(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not a directory"):
        decision(saved, fingerprint, f"resume={tmp_path / 'absent'}")
    with pytest.raises(Refused, match="holds no committed generation"):
        decision(saved, fingerprint, f"resume={tmp_path}")


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize(("file", "who"), [("latest", "DeepSpeed"), (".metadata", "torch.distributed.checkpoint")])
def test_another_librarys_checkpoint_is_named(
    saved: Path, fingerprint: str, tmp_path: Path, file: str, who: str
) -> None:
    other = tmp_path / "other"
    (other / "global_step1").mkdir(parents=True)
    (other / file).write_text("global_step1")
    with pytest.raises(Refused, match=rf"is a checkpoint of {who}\..*checkpointing import .* --trust-pickle"):
        decision(saved, fingerprint, f"resume={other}")


def test_a_directory_where_everything_is_damaged_is_refused(tmp_path: Path, fingerprint: str) -> None:
    overrides = [*BASE, f"run.dir={tmp_path}"]
    assert run(compose(overrides)) == 0
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(Refused, match=r"Every generation in .* is damaged.*resume=none"):
        run(compose(overrides))
    assert run(compose([*overrides, "resume=none"])) == 0
    for shard in (tmp_path / "checkpoints").glob("*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(Refused, match=r"Every generation in .* has 5000 bytes.*resume=none"):
        run(compose(overrides))


def test_a_checkpoint_that_is_not_the_trainers_is_refused(tmp_path: Path, fingerprint: str) -> None:
    save(tmp_path / "checkpoints", 3, [Piece("model/w", torch.ones(3), (0,), (3,))], {"mine": 1})
    with pytest.raises(Refused, match="was not written by this trainer"):
        decision(tmp_path, fingerprint)


def test_where_a_run_lies_is_no_change_worth_printing(saved: Path, fingerprint: str) -> None:
    start = decision(saved, fingerprint, "run.name=renamed", "dry_run=true", f"resume={saved}")
    assert not any("changed since: " in line for line in start.lines)


def test_what_only_one_index_lacks_is_passed_over(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    index = next((tmp_path / "run" / "checkpoints").glob("step-00000004-*/index-00000.json"))
    data = bytearray(index.read_bytes())
    data[50] ^= 1
    index.write_bytes(data)
    start = decision(tmp_path / "run", fingerprint)
    assert start.step == 2 and any("passing over step-00000004" in line for line in start.lines)


def test_what_a_newer_release_saved_is_refused_and_left_alone(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    manifest = next((tmp_path / "run" / "checkpoints").glob("step-00000004-*/manifest.json"))
    text = manifest.read_bytes().replace(b'"version":1', b'"version":2')
    manifest.write_bytes(text)
    (manifest.parent / "COMMIT").write_text(digest(text))
    with pytest.raises(Refused, match=r"has format version 2.*Or type resume=GENERATION"):
        decision(tmp_path / "run", fingerprint)
    older = next((tmp_path / "run" / "checkpoints").glob("step-00000002-*"))
    start = decision(tmp_path / "run", fingerprint, f"resume={older}")
    turn_away_from(own_tiers(compose([f"run.dir={tmp_path / 'run'}"])), start, 2)
    assert not list((tmp_path / "run").rglob("ABANDONED"))


def test_checkpoints_out_of_sight_do_not_start_a_run_over(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(
        Refused, match=r"has saved checkpoints before, and .* holds none\. Put them back, or type resume=none"
    ):
        decision(tmp_path / "run", fingerprint)
    assert decision(tmp_path / "run", fingerprint, "resume=none").step == 0
    (tmp_path / "elsewhere").rename(tmp_path / "run" / "checkpoints")
    assert decision(tmp_path / "run", fingerprint).step == 4


def test_every_start_is_an_incarnation_of_its_own(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    """Also one that was gone before it saved anything."""
    shutil.copytree(saved, tmp_path / "run")
    assert decision(tmp_path / "run", fingerprint).incarnation == 2
    with open(tmp_path / "run" / "events.jsonl", "a") as events:
        events.write('{"event": "resume", "step": 4, "incarnation": 2}\n{"event": "resu')
    assert decision(tmp_path / "run", fingerprint).incarnation == 3


def test_the_run_has_one_directory_in_memory(tmp_path: Path) -> None:
    config = compose([f"run.dir={tmp_path / 'run'}", "run.name=a b/../c"])
    assert memory_directory(config) is None
    (tmp_path / "run").mkdir()
    made = make_memory_directory(config)
    assert made == make_memory_directory(config) == memory_directory(config)
    assert made.parent == Path(f"/dev/shm/evershard-{os.getuid()}") and made.name.startswith("a-b-..-c-")
    elsewhere = compose([f"run.dir={tmp_path / 'run'}", f"checkpoint.memory.dir={tmp_path}"])
    assert memory_directory(elsewhere) == tmp_path / made.name
    (tmp_path / "run" / "memory-id").unlink()  # a run that starts over under the same name does not see the old one's
    assert make_memory_directory(config) != made


@pytest.mark.parametrize(
    "content", ["", "\n", ".", "..", "../x-0123456789ab", "/x-0123456789ab", "a-0123456789ab/b", "\0"]
)
def test_a_broken_name_is_no_directory_in_memory(content: str, tmp_path: Path) -> None:
    """As of a disk that was full: all runs' directory, or another one, is not to be taken for this run's."""
    run, memory = tmp_path / "run", tmp_path / "memory"
    run.mkdir()
    config = compose([f"run.dir={run}", f"checkpoint.memory.dir={memory}"])
    (run / "memory-id").write_text(content)
    assert memory_directory(config) is None
    made = make_memory_directory(config)
    assert made.parent == memory and made == memory_directory(config)


def test_a_full_disk_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    config = compose([f"run.dir={tmp_path / 'run'}"])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "write", full)
        make_memory_directory(config)
    assert list((tmp_path / "run").iterdir()) == [] and memory_directory(config) is None


def test_a_copy_is_a_run_of_its_own(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    own = [f"checkpoint.memory.dir={tmp_path / 'memory'}"]
    first, copy = tmp_path / "first", tmp_path / "copy"
    shutil.copytree(saved, first)
    (first / NAME).unlink()
    config, other = (compose([*BASE, f"run.dir={run}", *own]) for run in (first, copy))
    run_id = become_itself(config, True, "r1")
    memory = make_memory_directory(config)
    in_memory(saved, memory)
    shutil.copytree(first, copy)
    assert run_id == "r1" and not any("another run" in line for line in decision(first, fingerprint, *own).lines)
    start = decision(copy, fingerprint, *own)
    assert start.own and start.memory is None and start.step == 4
    assert any(line.startswith(f"copied or moved from {first}: it goes on as another run") for line in start.lines)
    theirs = become_itself(other, True, "r1")
    assert theirs != "r1" and become_itself(other, True, "r1") == theirs  # also before it has saved under it
    assert make_memory_directory(other) != memory == make_memory_directory(config)
    assert become_itself(config, True, "r1") == "r1"
    assert become_itself(config, False, None) != "r1"  # one that begins


def in_memory(saved: Path, memory: Path) -> None:
    """What `saved` has on its disk, as a keeper has it in memory."""
    make_directory(memory)
    shutil.copytree(saved / "checkpoints", memory, dirs_exist_ok=True)
    os.chmod(memory, 0o700)


def test_memory_that_others_may_write_is_not_looked_at(
    saved: Path, fingerprint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = ["checkpoint.memory.dir=" + str(tmp_path / "memory")]
    (tmp_path / "run").mkdir()
    memory = make_memory_directory(compose([*BASE, f"run.dir={tmp_path / 'run'}", *own]))
    in_memory(saved, memory)
    shutil.copy(saved / "events.jsonl", tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert decision(tmp_path / "run", fingerprint, *own).step == 4
    os.chmod(memory, 0o777)
    with pytest.raises(Refused, match="has saved checkpoints before"):
        decision(tmp_path / "run", fingerprint, *own)
    assert "is not this user's alone" in caplog.text


def test_what_memory_lost(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    """A run that had nothing but snapshots starts over, and says so; leavings in memory hide no lost disk."""
    own = ["checkpoint.memory.dir=" + str(tmp_path / "memory")]
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text(
        '{"event": "start", "run_id": "r", "incarnation": 1}\n{"event": "snapshot", "step": 1, "skipped": "busy"}\n'
    )
    assert decision(run, fingerprint, *own).lines == ["from scratch"]
    with open(run / "events.jsonl", "a") as events:
        events.write('{"event": "snapshot", "step": 2, "generation": "g"}\n{"event": "snapshot", "step": 3, "skip')
    lines = decision(run, fingerprint, *own).lines
    assert lines == ["from scratch", "snapshots up to step 2 were in memory, which is gone, and none was durable"]
    with open(run / "events.jsonl", "a") as events:
        events.write('\n{"event": "commit", "step": 2, "generation": "g"}\n')
    memory = make_memory_directory(compose([*BASE, f"run.dir={run}", *own]))
    in_memory(saved, memory)
    for generation in memory.glob("step-*"):
        (generation / "ABANDONED").touch()
    with pytest.raises(Refused, match="has saved checkpoints before"):
        decision(run, fingerprint, *own)


def test_the_newest_over_memory_and_disk(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    own = ["checkpoint.memory.dir=" + str(tmp_path / "memory")]
    shutil.copytree(saved, tmp_path / "run")
    memory = make_memory_directory(compose([*BASE, f"run.dir={tmp_path / 'run'}", *own]))
    in_memory(saved, memory)
    disk = tmp_path / "run" / "checkpoints"
    start = decision(tmp_path / "run", fingerprint, *own)
    assert (start.step, start.memory, start.directories, start.own) == (4, str(memory), [str(memory), str(disk)], True)
    assert any(f"{memory}/step-00000004" in line for line in start.lines)  # of two that are the same the faster
    shutil.rmtree(next(memory.glob("step-00000004-*")))
    start = decision(tmp_path / "run", fingerprint, *own)
    assert start.step == 4 and any(f"{disk}/step-00000004" in line for line in start.lines)
    turn_away_from(own_tiers(compose([f"run.dir={tmp_path / 'run'}", *own])), start, 1)
    assert len(list(memory.rglob("ABANDONED"))) == 1 and len(list(disk.rglob("ABANDONED"))) == 2


def test_memory_of_another_run_is_passed_over(saved: Path, fingerprint: str, tmp_path: Path) -> None:
    own = ["checkpoint.memory.dir=" + str(tmp_path / "memory")]
    shutil.copytree(saved, tmp_path / "run")
    memory = make_memory_directory(compose([*BASE, f"run.dir={tmp_path / 'run'}", *own]))
    assert run(compose([*BASE, f"run.dir={tmp_path / 'other'}", "train.steps=9"])) == 0
    in_memory(tmp_path / "other", memory)
    start = decision(tmp_path / "run", fingerprint, *own)
    assert (start.step, start.memory) == (4, None)
    assert any("passing over what is in memory" in line and "is of another run" in line for line in start.lines)


def test_options_that_a_later_release_adds_do_not_keep_an_old_run_from_going_on(
    saved: Path, fingerprint: str, tmp_path: Path
) -> None:
    config = compose([*BASE, f"run.dir={saved}"])
    model = build(config, "meta")
    state = decision(saved, fingerprint).state
    for group, key in (("optimizer", "eps"), ("model", "dropout"), ("schedule", "final")):
        del state["config"][group][key]  # as a release without that option saved it
    assert check_state(config, state, fingerprint, model) == {}
    other = compose([*BASE, f"run.dir={saved}", "optimizer.eps=1e-3"])
    with pytest.raises(Refused, match=r"optimizer\.eps \(was 1e-08, is 0\.001\)"):
        check_state(other, state, fingerprint, model)


def test_another_configuration_under_a_new_model_path_is_refused(tmp_path: Path) -> None:
    records = tmp_path / "text"
    records.write_text("abcdefgh" * 100)
    common = ["model=hf", "data=text", f"data.path={records}", "train.steps=2", "train.seq_len=8", "tracking=none"]
    common += [f"run.dir={tmp_path / 'run'}", "eval.generate_tokens=0", "train.global_batch=2"]
    save_tiny_model(tmp_path / "model")
    assert run(compose([*common, f"model.path={tmp_path / 'model'}"])) == 0
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    moved = [*common, f"model.path={tmp_path / 'moved'}", "train.steps=3"]
    assert run(compose([*moved, "dry_run=true"])) == 0
    settings = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    with pytest.raises(Refused, match=r"model \(its configuration has changed\)"):
        run(compose(moved))
