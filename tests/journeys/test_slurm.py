"""Runs under a real SLURM of two nodes on this machine: requeued, warned, losing a node, with a node that is not well.

Needs Debian's slurm-wlm, which `.ci/run` installs as root; elsewhere these tests are reported as not run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.status import POINTS
from tests.harness.cluster import Cluster
from tests.harness.processes import ROOT, wait_for
from tests.harness.runs import SMALL, assert_same_run, environment, events, rows, train

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("processes")]
RUN = [*SMALL, "data.log_ids=true", "eval.every=0", "schedule=constant"]
WAIT_S = 240


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(tmp_path_factory.mktemp("slurm"), cpus=2, kill_wait=30) as found:
        yield found
    assert not found.processes()


class Place:
    """Where commands of a cluster are typed."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        self.cluster, self.run = cluster, run
        self.environment = {**cluster.environment, **environment(), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self.environment["SLURM_CONF"] = cluster.environment["SLURM_CONF"]

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *words]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=WAIT_S)

    def submit(self, overrides: list[str], *flags: str) -> str:
        done = self.launch("slurm", *flags, "--nproc=1", "--", *overrides, f"run.dir={self.run}")
        assert done.returncode == 0, done.stderr
        return (self.run / "launch" / "job").read_text().strip()

    def follow(self) -> subprocess.CompletedProcess[str]:
        return self.launch("follow", str(self.run))

    def attempts(self) -> list[dict[str, Any]]:
        return rows(self.run / "launch", "attempts.jsonl")

    def log(self, job: str) -> str:
        path = self.run / "launch" / f"job-{job}.log"
        return path.read_text() if path.exists() else ""

    def reach(self, step: int, job: str) -> None:
        """Until the run has done a step, letting a requeued job start at once."""

        def there() -> bool:
            self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return bool(rows(self.run)) and rows(self.run)[-1]["step"] >= step

        wait_for(there, WAIT_S)


def test_requeued_warned_and_losing_a_node_it_is_the_same_run(cluster: Cluster, tmp_path: Path) -> None:
    """Of two nodes, with snapshots in memory whose keepers and arenas do not survive a requeue; in one wandb run."""
    a, place = tmp_path / "a", Place(cluster, tmp_path / "b")
    own = [
        *RUN,
        "tracking=wandb",
        "train.steps=1000",
        "checkpoint.every=250",
        f"checkpoint.memory.dir={tmp_path}/memory",
    ]
    own = [*own, "checkpoint.memory.every=5"]
    memory = Path("/dev/shm") / f"evershard-slurm-{os.getpid()}"
    own[-2] = f"checkpoint.memory.dir={memory}"
    try:
        job = place.submit(own, "--nodes=2")
        place.reach(30, job)
        assert any("launch.keeper" in command(pid) for pid in cluster.processes())
        cluster.run("scontrol", "requeue", job)
        wait_for(lambda: not any("trainer/__main__" in command(pid) for pid in cluster.processes()), 60)
        keepers = [pid for pid in cluster.processes() if "launch.keeper" in command(pid)]
        for pid in keepers:
            os.kill(pid, 9)
        shutil.rmtree(memory, ignore_errors=True)
        preempted = events(place.run)[-1]
        assert preempted[0] == "preempt" and preempted[1] >= 30
        place.reach(preempted[1] + 30, job)
        assert ("resume", preempted[1]) in events(place.run)

        cluster.run("scancel", "--signal=USR1", "--batch", job)
        wait_for(lambda: len(place.attempts()) > 1 and "ended" in place.attempts()[1], 90)
        assert place.attempts()[1]["ended"].startswith("preempted") and place.attempts()[1]["again"]
        warned = [event for event in rows(place.run, "events.jsonl") if event["event"] == "preempt"][-1]
        assert warned["signal"] == "SIGUSR1"
        place.reach(warned["step"] + 30, job)
        assert ("resume", warned["step"]) in events(place.run)

        cluster.kill_node("n2", noticed=True)
        wait_for(lambda: "RUNNING" not in cluster.run("squeue", "-h", "-j", job, "-o", "%T").stdout, 90)
        cluster.start_node("n2")
        done = place.follow()
        assert done.returncode == 0, place.log(job)
    finally:
        shutil.rmtree(memory, ignore_errors=True)
    last = rows(place.run)[-1]["step"]
    train([*RUN, "train.steps=1000", "checkpoint.every=0", f"run.dir={a}"])
    assert_same_run(rows(a), rows(place.run), last=last)
    ids = {path.name.rpartition("-")[2] for path in (place.run / "wandb").glob("*run-*")}
    assert len(ids) == 1 and last == 1000
    assert {row["world_size"] for row in rows(place.run)} == {2}
    status = place.launch("status", str(place.run)).stdout
    assert "state      finished" in status and "restarts   3" in status


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_node_that_is_not_well_is_excluded_and_reported(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(cluster, tmp_path / "run")
    flags = ["--nodes=1-2", '--health=test "$SLURMD_NODENAME" != n1']
    job = place.submit([*RUN, "train.steps=20"], *flags)
    done = place.follow()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n1 is not healthy and is excluded: command: test" in place.log(job)
    first, second = place.attempts()
    assert "n1" in first["excluded"] and second["nodes"] == "n2" and second["ended"] == "finished"


def test_a_job_without_progress_stops_after_its_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """Its trainers are killed by a bug in the fourth step of every attempt."""
    place = Place(cluster, tmp_path / "run")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, signal, threading, time\n"
        "def die():\n"
        "    while not os.path.exists(os.environ['EVERSHARD_TEST_METRICS']): time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if 'RANK' in os.environ: threading.Thread(target=die, daemon=True).start()\n"
    )
    place.environment |= {"PYTHONPATH": str(site), "EVERSHARD_TEST_METRICS": str(place.run / "metrics.jsonl")}
    job = place.submit([*RUN, "train.steps=100000"], "--max-requeues=1")
    done = place.follow()
    assert done.returncode == 1
    assert [one["step"] for one in place.attempts()] == [0, 0]
    assert "Gives up after 2 attempts in a row without a new committed step" in place.log(job)
    assert "is not finished" in done.stderr and "Gives up" in done.stderr


def test_what_fails_for_good_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(cluster, tmp_path / "run")
    words = ["train.steps=9", "optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup_steps=0"]
    job = place.submit([*RUN, *words], "--nodes=2")
    assert place.follow().returncode == 1
    assert len(place.attempts()) == 1 and "failed for good: Step" in place.log(job)


def test_a_sweep_of_three_points_as_jobs(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(cluster, tmp_path / "sweep")
    words = [*RUN, "train.steps=20", "optimizer.lr=1e-2,1e-3,1e-4", f"run.dir={place.run}"]
    done = place.launch("slurm", "--multirun", "--nproc=1", "--", *words)
    assert done.returncode == 0 and "3 points" in done.stdout, done.stderr
    wait_for(lambda: (place.run / "summary.txt").exists() and (place.run / "summary.txt").read_text() != "", WAIT_S)
    table = [line.split() for line in (place.run / "summary.txt").read_text().splitlines()]
    assert [line[1:3] for line in table[1:]] == [["finished", "20/20"]] * 3
    assert {line[-1] for line in table[1:]} == {"0.01", "0.001", "0.0001"}
    assert table[1][-1] == "0.01"  # the best held-out loss first
    assert len(json.loads((place.run / POINTS).read_text())) == 3


@pytest.mark.smoke
def test_what_slurm_refuses_and_what_does_not_compose(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(cluster, tmp_path / "run")
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--partition=nope", "--"], "invalid partition specified: nope"),
        (["--nodes=3", "--"], "sbatch says: "),
        (["--", "nokey=1"], "There is no option nokey"),
        (["--", f"run.dir={tmp_path}/file/run"], "cannot be written"),
    ):
        done = place.launch("slurm", *words, *([] if "run.dir" in words[-1] else [f"run.dir={place.run}"]))
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert cluster.run("squeue", "-h", "-n", "main").stdout == ""


def test_cancelled_and_checked_by_the_doctor(cluster: Cluster, tmp_path: Path) -> None:
    place = Place(cluster, tmp_path / "run")
    job = place.submit([*RUN, "train.steps=100000", "checkpoint.every=10"], "--nodes=2")
    place.reach(12, job)
    doctor = [sys.executable, "-m", "launch", "doctor", "--allocation", "--dir", str(tmp_path)]
    wrapped = subprocess.run(
        doctor,
        cwd=ROOT,
        env={**place.environment, "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]"},  # as in the shell of salloc
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    said = wrapped.stdout + wrapped.stderr
    assert "n1\n" in wrapped.stdout and "n2\n" in wrapped.stdout and wrapped.stdout.count("ok    backend") == 2, said
    assert wrapped.stdout.count("2 machines see each other's files") == 2, said
    assert wrapped.stdout.count("2 machines sum together") == 2, said
    assert place.launch("cancel", str(place.run)).returncode == 0
    assert place.follow().returncode == 1
    assert any(event == "commit" for event, _ in events(place.run))
