"""docs/adopt.md: each adapter, killed on two processes, goes on alone from memory, as an undisturbed loop would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.generations import scan
from checkpointing.storage import FileStorage
from tests.harness.processes import ROOT, kill_tree, wait_for
from tests.harness.runs import environment

pytestmark = pytest.mark.usefixtures("processes")

STEPS, KILLED, EVERY, BATCH = 9, 7, 4, 6
COMMON, TORCH, TRAINER, ACCELERATE, LIGHTNING = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "adopt.md").read_text(), re.DOTALL
)

# A model that writes down the loss of every step, and the second process's kills itself in the middle of one.
BEFORE = f"""
import json, os, signal, sys
import torch
from torch import nn
torch.set_num_threads(1)
STEPS, BATCH = {STEPS}, {BATCH}
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    def forward(self, x, y, step):
        loss = (self.layers(x) - y).square().mean()
        with open(f"losses-{{size}}-{{rank}}", "a") as file:
            print(json.dumps([int(step[0]), float(loss)]), file=file)
        if size > 1 and rank == 1 and int(step[0]) == {KILLED}:
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"loss": loss}}

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * BATCH
    def __getitem__(self, i):
        drawn = torch.Generator().manual_seed(i)
        return {{"x": torch.randn(7, generator=drawn), "y": torch.randn(1, generator=drawn), "step": i // BATCH + 1}}

def batch_of(step):
    items = [Items()[i] for i in range((step - 1) * BATCH, step * BATCH)][rank::size]
    return torch.utils.data.default_collate(items)

def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
"""
AFTER = {
    "torch": """
if size > 1:
    torch.distributed.init_process_group("gloo")
model = Model()
if size > 1:
    model = nn.parallel.DistributedDataParallel(model)
train(model, optimizer_of(model), batch_of, STEPS)
""",
    "trainer": """
from transformers import TrainingArguments
arguments = TrainingArguments(
    "out", per_device_train_batch_size=BATCH // size, learning_rate=0.05, max_grad_norm=0, weight_decay=0.0,
    num_train_epochs=1, lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True,
    train_sampling_strategy="sequential", disable_tqdm=True, logging_strategy="no",
)
UniversalTrainer(Model(), arguments, train_dataset=Items()).train()
""",
    "accelerate": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = Model()
train(accelerator, model, optimizer_of(model), torch.utils.data.DataLoader(Items(), BATCH // size))
""",
    "lightning": """
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()
    def training_step(self, batch):
        return self.model(**batch)["loss"]
    def configure_optimizers(self):
        return optimizer_of(self.model)
class Stream(torch.utils.data.IterableDataset):
    start = 0
    def __iter__(self):
        return (batch_of(step) for step in range(self.start + 1, STEPS + 1))
data = Stream()
trainer = lightning.Trainer(
    accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", max_steps=STEPS, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Universal(data)],
)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
""",
}
ADAPTERS = {"torch": TORCH, "trainer": TRAINER, "accelerate": ACCELERATE, "lightning": LIGHTNING}


def losses(directory: Path, size: int) -> dict[int, float]:
    """The mean over the ranks, of every step that all have computed."""
    ranks = []
    for rank in range(size):
        lines = (directory / f"losses-{size}-{rank}").read_text().splitlines()
        ranks.append(dict(json.loads(line) for line in lines))
    return {step: sum(rank[step] for rank in ranks) / size for step in ranks[0] if all(step in rank for rank in ranks)}


def run(script: Path, size: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script)],
        cwd=script.parent,
        env=environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        kill_tree(process.pid)
    return subprocess.CompletedProcess([], process.returncode, output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """A loop without any of it."""
    directory = tmp_path_factory.mktemp("alone")
    loop = "for step in range(1, STEPS + 1):\n    model(**batch_of(step))['loss'].backward()\n"
    loop = f"model = Model()\noptimizer = optimizer_of(model)\n{loop}    optimizer.step()\n    optimizer.zero_grad()\n"
    (directory / "script.py").write_text(BEFORE + loop)
    assert run(directory / "script.py", 1).returncode == 0
    return losses(directory, 1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_killed_and_resumed_alone(name: str, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    memory = tmp_path / "memory"
    common = COMMON.replace('"/dev/shm/my-run"', f'"{memory}"').replace("EVERY = 100", f"EVERY = {EVERY}")
    assert str(memory) in common and f"= {EVERY}" in common
    (tmp_path / "script.py").write_text(BEFORE + common + ADAPTERS[name] + AFTER[name])
    killed = run(tmp_path / "script.py", 2)
    assert killed.returncode != 0, killed.stdout
    durable = scan(FileStorage(tmp_path / "checkpoints"))
    assert [g.step for g in durable if g.committed] == [EVERY]
    if name == "torch":
        control(tmp_path, undisturbed)
    done = run(tmp_path / "script.py", 1)
    assert done.returncode == 0, done.stdout
    before, after = losses(tmp_path, 2), losses(tmp_path, 1)
    # From memory, which is newer than the disk, and nothing twice.
    assert min(after) in (KILLED - 1, KILLED) and max(after) == STEPS, (list(before), list(after))
    for found in (before, after):
        assert found == pytest.approx({step: undisturbed[step] for step in found}, abs=1e-6)
    steps = [g.step for g in scan(FileStorage(tmp_path / "checkpoints")) if g.committed]
    assert steps == [2 * EVERY, EVERY]
    wait_for(lambda: not memory.exists(), 30)


@pytest.mark.parametrize("name", ADAPTERS)
def test_two_that_end_well_do_not_abort(name: str, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """On one core, where threads of gloo are most likely to be behind when Python ends."""
    memory = tmp_path / "memory"
    one_core = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nimport torch\n"
    before = BEFORE.replace("import torch\n", one_core, 1)
    assert one_core in before
    before = before.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass")
    after = AFTER[name] + (
        "" if name == "torch" else "torch.distributed.destroy_process_group()\n"
    )  # what it lent is enough
    (tmp_path / "script.py").write_text(
        before + COMMON.replace('"/dev/shm/my-run"', f'"{memory}"') + ADAPTERS[name] + after
    )
    done = run(tmp_path / "script.py", 2)
    assert done.returncode == 0 and "terminate called" not in done.stdout, done.stdout
    assert losses(tmp_path, 2) == pytest.approx(undisturbed, abs=1e-6)
    wait_for(lambda: not memory.exists(), 30)


def control(directory: Path, undisturbed: dict[int, float]) -> None:
    """From the disk and without the moments, the same comparison fails."""
    other = directory / "control"
    shutil.copytree(directory / "checkpoints", other / "checkpoints")
    script = (directory / "script.py").read_text()
    weights_alone = script.replace(
        "newest(describe(model, optimizer))", "newest(describe(model, optimizer), only=['model/'])"
    )
    assert weights_alone != script
    (other / "script.py").write_text(weights_alone.replace(str(directory / "memory"), str(other / "memory")))
    done = run(other / "script.py", 1)
    assert done.returncode == 0, done.stdout
    found = losses(other, 1)
    assert min(found) == EVERY + 1
    assert found != pytest.approx({step: undisturbed[step] for step in found}, abs=1e-6)
