"""`python -m launch.job begin|admit|end|leave RUN`: what the script of a SLURM job asks, on its first machine.

Everything is decided from the run directory: torchrun and srun exit with statuses of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.generations import newest
from checkpointing.storage import FileStorage
from launch.health import reports
from trainer.elastic.preemption import AGAIN
from trainer.outcome import DIRECTORY, Outcome, read

ATTEMPTS = "attempts.jsonl"
EXCLUDE_S = 20.0  # below the time that SLURM leaves a script which it ends


@dataclass(frozen=True)
class Decision:
    """What becomes of a job after an attempt."""

    again: bool
    status: int
    why: str


def decide(outcome: Outcome | None, attempts: Sequence[Mapping[str, Any]], step: int, most: int) -> Decision:
    """`attempts` are those so far, the one that has just ended included; `step` is the newest committed one."""
    if outcome is not None and outcome.status == 0:
        return Decision(False, 0, "finished")
    if outcome is not None and outcome.final:
        return Decision(False, 1, f"failed for good: {outcome.why}")
    if outcome is not None and outcome.status == AGAIN:
        return Decision(True, 0, outcome.why or "preempted")
    why = f"failed: {outcome.why}" if outcome is not None else "ended without a word, as of SIGKILL or a lost machine"
    if (tries := in_vain(attempts, step)) > most:
        return Decision(False, 1, f"{why}. Gives up after {tries} attempts in a row without a new committed step")
    return Decision(True, 0, why)


def in_vain(attempts: Sequence[Mapping[str, Any]], step: int) -> int:
    """The last attempts that began where the run still is. One that was preempted could not help it."""
    count = 0
    for one in reversed(attempts):
        if one.get("step") != step:
            break
        count += not str(one.get("ended", "")).startswith("preempted")
    return count


@dataclass(frozen=True)
class Job:
    run: Path
    environment: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """What `python -m launch slurm` left for its job."""
        found: dict[str, Any] = json.loads((self.run / "launch" / "job.json").read_text(encoding="utf-8"))
        return found

    @property
    def number(self) -> str:
        return self.environment["SLURM_JOB_ID"]

    def attempts(self) -> list[dict[str, Any]]:
        path = self.run / "launch" / ATTEMPTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        path = self.run / "launch" / ATTEMPTS
        path.with_suffix(".new").write_text("".join(f"{json.dumps(one)}\n" for one in attempts), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def step(self) -> int:
        """The newest committed one; 0 without any."""
        found = newest(FileStorage(Path(self.options["checkpoints"])))
        return 0 if found is None else found.step

    def begin(self) -> int:
        attempts, step = self.attempts(), self.step()
        if (tries := in_vain(attempts, step)) > self.options["max_requeues"]:
            self.say(f"gives up after {tries} attempts in a row without a new committed step (step {step})")
            return 1
        nodes = self.environment.get("SLURM_JOB_NODELIST", "")
        attempts.append(
            {"attempt": len(attempts) + 1, "job": self.number, "nodes": nodes, "step": step, "time": time.time()}
        )
        self.note(attempts)
        Path(self.environment[DIRECTORY]).mkdir(parents=True, exist_ok=True)
        self.say(f"attempt {len(attempts)} on {nodes}, from step {step}")
        return 0

    def admit(self) -> int:
        """Whether every machine is healthy; if not, the job goes on without those that are not."""
        bad = {node: why for node, why in reports(Path(self.environment[DIRECTORY]), self.nodes()).items() if why}
        if not bad:
            return 0
        for node, why in bad.items():
            self.say(f"{node} is not healthy and is excluded: {why}")
        attempts = self.attempts()
        attempts[-1] |= {"ended": "unhealthy", "excluded": bad}
        self.note(attempts)
        known = {node for one in attempts for node in one.get("excluded", {})}
        if len(bad) == len(self.nodes()) > 1:  # what all have in common is rather to be mended
            self.say("no machine is healthy: nothing is started, and nothing is excluded")
            return 1
        if in_vain(attempts, self.step()) > self.options["max_requeues"]:
            self.say("gives up: too many attempts in a row without a new committed step")
            return 1
        given = [node for node in self.options["exclude"].split(",") if node]
        self.requeue(",".join([*given, *sorted(known)]))
        return 1

    def nodes(self) -> list[str]:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", self.environment["SLURM_JOB_NODELIST"]], capture_output=True, text=True
        )
        return names.stdout.split()

    def end(self) -> int:
        outcome, attempts, step = read(Path(self.environment[DIRECTORY])), self.attempts(), self.step()
        decision = decide(outcome, attempts, step, self.options["max_requeues"])
        attempts[-1] |= {"ended": decision.why, "reached": step, "again": decision.again}
        self.note(attempts)
        self.say(f"{decision.why}; step {step} is saved" + ("; the job is requeued" if decision.again else ""))
        if decision.again:
            self.requeue()
        return decision.status

    def leave(self) -> int:
        """SLURM ends the job, and whether it comes back is not for the script to say."""
        outcome, attempts, step = read(Path(self.environment[DIRECTORY])), self.attempts(), self.step()
        why = outcome.why if outcome is not None and outcome.why else "no rank said how it ended"
        attempts[-1] |= {"ended": why, "reached": step, "again": False}
        self.note(attempts)
        self.say(f"ended by SLURM, {why}; step {step} is saved")
        return 1

    def requeue(self, exclude: str = "") -> None:
        """SLURM ends the script of a job that it requeues, and only then lets machines be excluded."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["scontrol", "requeue", self.number])
        deadline = time.monotonic() + EXCLUDE_S
        while exclude and time.monotonic() < deadline:
            done = subprocess.run(
                ["scontrol", "update", f"JobId={self.number}", f"ExcNodeList={exclude}"], capture_output=True
            )
            if done.returncode == 0:
                return
            time.sleep(0.2)

    def say(self, text: str) -> None:
        print(f"launch: job {self.number}: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    command, run = (sys.argv[1:] if argv is None else argv)[:2]
    job = Job(Path(run), os.environ)
    return {"begin": job.begin, "admit": job.admit, "end": job.end, "leave": job.leave}[command]()


if __name__ == "__main__":
    sys.exit(main())
