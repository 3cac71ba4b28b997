"""A process's place among the others."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import Refused
from trainer.parallel.world import World, pick_device


def test_alone_without_a_launcher() -> None:
    assert World.from_environment({}) == World(0, 1, 0, 1)


def test_what_torchrun_says() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert World.from_environment(given) == World(5, 8, 1, 4)
    for missing in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(Refused, match="only in part"):
            World.from_environment({k: v for k, v in given.items() if k != missing})
    with pytest.raises(Refused, match="only in part"):
        World.from_environment({**given, "WORLD_SIZE": "many"})


def test_what_the_launcher_of_deepspeed_says() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert World.from_environment(given) == World(5, 8, 1, 4)
    assert World.from_environment({**given, "LOCAL_WORLD_SIZE": "2"}).local_size == 2


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(Refused, match=r"srun started 2 tasks of this command.*python -m launch slurm"):
        World.from_environment(step)
    # One task, the shell of an salloc, and what a launcher started in a step.
    assert World.from_environment({**step, "SLURM_STEP_NUM_TASKS": "1"}) == World()
    assert World.from_environment({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "9"}) == World()
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert World.from_environment({**step, **ranks}) == World()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(World(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(Refused, match="3 processes on this machine share 2 GPUs"):
        pick_device(World(2, 3, 2, 3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(World(2, 3, 2, 3)) == torch.device("cpu")
