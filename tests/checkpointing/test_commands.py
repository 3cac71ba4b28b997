"""Commands that read tensors: what a person sees, what a script reads, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing import Piece, describe, external_of, save
from checkpointing.__main__ import main
from tests.checkpointing.saved_run import generation, output


def test_inspect_tells_what_is_inside(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = output(capsys, "inspect", run_dir)
    assert status == 0
    flat = " ".join(text.split())
    assert f"{generation(run_dir, 20).name}" in flat
    assert "step 20, incarnation 0" in flat and "by 1 ranks" in flat
    assert "0 8.0 kB rank 0" not in flat  # sizes are those of the tensors: 200x8 and 200 floats
    assert "weight F32 200x8 6.4 kB rank 0" in flat
    assert "optim/exp_avg F32, tensors as in model" in flat
    assert "config: a 1" in flat
    _, text = output(capsys, "inspect", generation(run_dir, 10), "--json")
    described = json.loads(text)
    assert described["step"] == 10
    assert described["tensors"]["model/0.weight"] == {
        "dtype": "F32",
        "shape": [200, 8],
        "bytes": 6400,
        "written_by": [0],
    }


def test_verify_finds_damage_and_names_it(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = output(capsys, "verify", run_dir)
    assert status == 0 and text.count("sound") == 2
    shard = generation(run_dir, 20) / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[6000] ^= 4
    shard.write_bytes(data)
    status, text = output(capsys, "verify", run_dir)
    assert status == 1
    assert "DAMAGED" in text and "sound" in text
    assert "the checksum of bytes" in text and "they belong to" in text
    status, text = output(capsys, "verify", run_dir, "--json")
    assert status == 1
    assert [len(g["damage"]) for g in json.loads(text)["generations"]] == [1, 0]
    status, _ = output(capsys, "verify", generation(run_dir, 10))
    assert status == 0


def test_verify_finds_a_damaged_manifest_and_a_missing_shard(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (generation(run_dir, 20) / "manifest.json").write_text("{}")
    (generation(run_dir, 10) / "shard-00000.safetensors").unlink()
    status, text = output(capsys, "verify", run_dir)
    assert status == 1 and text.count("DAMAGED") == 2
    assert "is not the manifest that was committed" in text and "is missing" in text


def test_inspect_of_only_damaged_generations_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        (generation(run_dir, step) / "COMMIT").write_text("x")
    status, text = output(capsys, "inspect", run_dir)
    assert status == 1 and "nothing in" in text and "is not the manifest that was committed" in text


def test_what_was_never_committed_does_not_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (generation(run_dir, 20) / "COMMIT").unlink()
    assert output(capsys, "verify", generation(run_dir, 20))[0] == 1
    assert output(capsys, "verify", run_dir)[0] == 0
    (generation(run_dir, 10) / "COMMIT").unlink()
    assert output(capsys, "verify", run_dir)[0] == 1


def test_damage_is_said_by_every_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (generation(run_dir, 20) / "manifest.json").write_text("{}")
    status, text = output(capsys, "ls", run_dir)
    assert status == 1 and "damaged: step-00000020" in text
    status, text = output(capsys, "ls", run_dir, "--json")
    rows = {row["step"]: row for row in json.loads(text)["generations"]}
    assert rows[20]["state"] == "damaged" and "is not the manifest" in rows[20]["damage"] and not rows[10]["damage"]
    status, text = output(capsys, "inspect", run_dir)
    assert status == 0 and "step 10, incarnation" in text and "is damaged and not shown" in text
    index = generation(run_dir, 10) / "index-00000.json"
    index.write_bytes(index.read_bytes()[:-1] + b" ")
    status, text = output(capsys, "inspect", run_dir)
    assert status == 1 and "is not the index that was committed" in text


def test_inspect_of_one_tensor_draws_it(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = output(capsys, "inspect", run_dir, "--tensor", "model/0.weight")
    assert status == 0 and "model/0.weight  F32 200x8, 6.4 kB, in 1 boxes" in text and "00000000" in text
    status, text = output(capsys, "inspect", run_dir, "--tensor", "optim/0.weight/step", "--json")
    assert status == 0 and json.loads(text)["value"] == "00000000"
    status, text = output(capsys, "inspect", run_dir, "--tensor", "model/0.weigth")
    assert status == 2 and "did you mean model/0.weight" in text


def test_diff_tells_equal_from_different(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = output(capsys, "diff", generation(run_dir, 10), generation(run_dir, 20))
    assert status == 0 and "16 of 16 tensors are equal" in text
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8))
    save(run_dir / "other", 10, describe(model))
    status, text = output(capsys, "diff", run_dir, run_dir / "other")
    assert status == 1 and "model/0.weight: different  max abs" in text and "optim/0.weight/step: only in a" in text
    status, text = output(capsys, "diff", run_dir, run_dir / "other", "--json")
    report = json.loads(text)
    assert status == 1 and not report["equal"]
    assert {t["state"] for t in report["tensors"]} == {"different", "only in a"}
    assert output(capsys, "diff", run_dir, run_dir / "absent")[0] == 2


def test_verify_shows_its_progress_to_a_person(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.commands.PROGRESS_BYTES", 10_000)
    main(["verify", str(run_dir)])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main(["verify", str(run_dir)])
    signs = [sign for sign in capsys.readouterr().err.split("\r") if sign.strip()]
    assert len(signs) > 4 and all(" of 40.9 kB" in sign for sign in signs)


def test_tied_and_external_tensors_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = torch.ones(3, 2)
    pieces = [Piece(name, tied, (0, 0), (3, 2)) for name in ("model/embed", "model/head")]
    base = external_of("model/base", torch.ones(2), "org/base")
    save(tmp_path, 1, [*pieces, base])
    save(
        tmp_path, 2, [Piece("model/head", tied, (0, 0), (3, 2)), external_of("model/base", torch.zeros(2), "org/base")]
    )
    _, text = output(capsys, "inspect", next(tmp_path.glob("step-00000001-*")))
    assert "model/head is model/embed" in text
    assert f"model/base  F32 2  from org/base  SHA-256 {base.sha256}" in text
    assert (
        "F32 3x2, 24 B, in 1 boxes"
        in output(capsys, "inspect", next(tmp_path.glob("step-00000001-*")), "--tensor", "model/head")[1]
    )
    status, text = output(capsys, "inspect", tmp_path, "--tensor", "model/base")
    assert status == 2 and "its bytes lie in org/base" in text
    status, text = output(capsys, "diff", *sorted(tmp_path.glob("step-*")))
    assert status == 1
    assert "model/base: different" in text and "model/embed: only in a" in text and "model/head" not in text
