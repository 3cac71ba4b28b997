"""A part of the corpus, and that the judgement sees each thing that it is there to see."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import hostile
from benchmarks.hostile import Material, judged
from benchmarks.hostile_corpus import READING, RESUMING, SECRET, USING, Case, Scene, corpus

pytestmark = pytest.mark.usefixtures("processes")

# One of each kind of harm; all of them, and half an hour of changes, are the command's.
CHOSEN = (
    *("a pipe for 'events.jsonl'", "a terabyte for 'checkpoints/hold-x.read-y.json'"),
    *("a link for the directory 'checkpoints'", "a link for 'hf/tokenizer.json'", "deep JSON in 'hf/config.json'"),
    *("a pickle that runs, believed", "a checkpoint that says its model's code may run", "memory of '../victim'"),
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    yield Material(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", CHOSEN)
def test_what_an_enemy_made_is_data(name: str, material: Material) -> None:
    (case,) = [case for case in corpus() if case.name == name]
    assert material.run(case) == []


def test_every_command_succeeds_on_what_nobody_has_changed(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one that is mistyped would pass for one that refuses."""
    monkeypatch.setattr(hostile, "STATUSES", (0,))
    commands = [*READING, *RESUMING, *USING]
    assert material.run(Case("untouched", lambda scene: None, commands)) == []


def harm(words: list[str]) -> int:
    """What the judgement is shown, by its name."""
    top = Path.cwd()
    if words[0] == "runs":
        (top / "ran").touch()
    elif words[0] == "deletes":
        shutil.rmtree(top / "victim")
    elif words[0] == "copies":
        (top / "exported").mkdir()
        shutil.copy(top / "victim" / "key", top / "exported" / "tokenizer.json")
    elif words[0] == "prints":
        print((top / "victim" / "key").read_text())
    elif words[0] == "steers":
        print("\x1b[2J")
    elif words[0] == "hangs":
        time.sleep(60)
    elif words[0] == "breaks":
        raise KeyError("model")
    elif words[0] == "floods":
        _ = bytearray(8 * hostile.MEMORY_BYTES)
    elif words[0] == "fills":
        (top / "large").write_bytes(bytes(hostile.WRITTEN_BYTES + 1))
    print("nothing", file=sys.stderr)
    return 0


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        *(("runs", "runs"), ("deletes", "changes or deletes"), ("copies", "copies out"), ("prints", "copies out")),
        *(("steers", "prints an escape"), ("hangs", "hangs"), ("breaks", "a traceback"), ("floods", "a traceback")),
        *(("fills", "ends with"), ("nothing", "")),
    ],
)
def test_every_harm_is_seen(what: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hostile.COMMANDS, "harm", harm)
    monkeypatch.setattr(hostile, "CASE_S", 1.0 if what == "hangs" else 30.0)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "key").write_text(SECRET)
    found = judged(Scene(tmp_path), ["harm", what], tmp_path)
    assert any(one.startswith(seen) for one in found) if seen else found == []


def test_a_case_is_prepared_anew_for_each_command(material: Material) -> None:
    prepared = []
    case = Case("two commands", lambda scene: prepared.append(scene.top), (["ckpt", "ls", "RUN"],) * 2)
    assert material.run(case) == [] and len(set(prepared)) == 2 and not any(top.exists() for top in prepared)
