"""What the README says is so: its commands run as written, and a run writes the tree it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import checkpointing
from tests.harness.processes import ROOT, kill_tree
from tests.harness.runs import environment

README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block marked {marker}"
    return found[1]


def run_block(text: str, directory: Path) -> str:
    """Run a block as a person would type it, with this Python in place of the virtual environment's."""
    script = directory / "block.sh"
    script.write_text("set -e\n" + text.replace(".venv/bin/python", sys.executable))
    process = subprocess.Popen(
        ["bash", str(script)],
        cwd=directory,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 0, output
    return output


@pytest.mark.usefixtures("processes")
def test_the_demonstration_and_the_comparison(tmp_path: Path) -> None:
    output = run_block(block("demonstration"), tmp_path)
    assert "parallel.dp_shard was 1, is -1" in output and "saved by 2 processes" in output
    output = run_block(block("comparison"), tmp_path)
    assert float(output.split("largest difference of a loss:")[1]) < 1e-5
    shown = README.partition("## What a run writes")[2].partition("Look into")[0]
    for path in (tmp_path / "runs" / "killed").iterdir():
        assert path.name.startswith(".") or path.name in shown, path.name
    generation = next((tmp_path / "runs" / "killed" / "checkpoints").iterdir())
    for path in generation.iterdir():
        assert re.sub(r"\d{5}", "00000", path.name) in shown, path.name
    for line, more in re.findall(r"-m (checkpointing \w+) runs/main(.*)", README):
        other = " runs/killed/checkpoints" if line.endswith("diff") else more if line.endswith("export") else ""
        run_block(f".venv/bin/python -m {line} runs/killed{other}", tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "DIRECTORY", dtype="auto")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert exported.dtype == torch.bfloat16 and state.keys() == exported.state_dict().keys()
    assert all(torch.equal(state[name].bfloat16(), tensor) for name, tensor in exported.state_dict().items())
    # The comparison can fail.
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"sample_ids": [', '"sample_ids": [0, ', 1))
    with pytest.raises(AssertionError):
        run_block(block("comparison"), tmp_path)


@pytest.mark.usefixtures("processes")
def test_a_sparse_run_and_what_comes_out_of_it(tmp_path: Path) -> None:
    output = run_block(block("methods"), tmp_path)
    assert "selected   step 0: 73,984 entries of 28 weights" in output
    assert (tmp_path / "sparse.delta").stat().st_size < (tmp_path / "merged" / "model.safetensors").stat().st_size


def test_the_setup_commands_are_those_of_this_project() -> None:
    assert block("test").startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && ")
    assert block("main job").strip().endswith("-m launch local --nproc 2")
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text()


def test_the_launchers_are_started_as_the_journeys_start_them() -> None:
    deepspeed, accelerate = block("launchers").splitlines()
    assert "deepspeed --num_gpus 2 --module trainer parallel=zero2 " in deepspeed
    assert '"--num_gpus=2", "--module", "trainer", "parallel=zero2"' in source("test_deepspeed_launcher")
    assert "accelerate launch --multi_gpu --num_processes 2 -m trainer parallel=accelerate " in accelerate
    journey = source("test_accelerate_launch")
    assert all(part in journey for part in ('"--multi_gpu"', '"--num_processes=2"', '"parallel=accelerate"'))


def source(journey: str) -> str:
    return (ROOT / "tests" / "journeys" / f"{journey}.py").read_text()


def test_the_library_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## The checkpoint layer alone\n\n```python\n(.*?)```", README, re.DOTALL)
    assert code
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    scope = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "step": 4}
    exec(code[1], scope)  # the README's own lines
    assert scope["objects"] == {"step": 4} and torch.equal(model.weight, before)


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_paths_named_in_the_documents_exist() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(
            r"`((?:trainer|checkpointing|launch|conf|tests|benchmarks|docs)/[\w/.]*)`", document.read_text()
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_the_public_names_are_what_the_package_says() -> None:
    assert all(hasattr(checkpointing, name) for name in checkpointing.__all__)
