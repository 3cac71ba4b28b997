"""`python -m launch.job begin|admit|early|end|leave RUN`: what the script of a SLURM job asks, on its first machine.

Everything is decided from the run directory: torchrun and srun exit with statuses of their own.
"""

from __future__ import annotations

import itertools
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

from checkpointing import Generation, load_store, newest, open_storage
from launch.health import OPTIONS, reports
from trainer.elastic.preemption import AGAIN
from trainer.outcome import DIRECTORY, Outcome, read

ATTEMPTS = "attempts.jsonl"
BEGUN = "begun"  # holds the number of a job that has saved something of its own
REQUEUE_S = 60.0  # a controller that is started again answers by then
EXCLUDE_S = 20.0  # below the time that SLURM leaves a script which it ends


@dataclass(frozen=True)
class Decision:
    """The decision about a job after an attempt."""

    again: bool
    status: int
    why: str


def decide(outcome: Outcome | None, attempts: Sequence[Mapping[str, Any]], step: int, most: int) -> Decision:
    """`attempts` are those so far, the one that has just ended included; `step` is the newest committed one."""
    if outcome is not None and outcome.status == 0:
        return Decision(False, 0, "finished")
    if outcome is not None and outcome.final:
        return Decision(False, 1, f"failed for good: {outcome.why}")
    if outcome is None:
        why = "ended without a word, as of SIGKILL or a lost machine"
    else:
        why = outcome.why if outcome.status == AGAIN else f"failed: {outcome.why}"
    if (tries := in_vain(attempts, step)) > most:
        return Decision(False, 1, f"{why}. Gives up after {tries} attempts in a row without a new committed step")
    return Decision(True, 0, why)


def in_vain(attempts: Sequence[Mapping[str, Any]], step: int) -> int:
    """The last attempts that began where the run still is, whatever ended them."""
    return len(list(itertools.takewhile(lambda one: one.get("step") == step, reversed(attempts))))


@dataclass(frozen=True)
class BatchJob:
    run: Path
    environment: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """The options that the script tells its commands."""
        found: dict[str, Any] = json.loads(self.environment[OPTIONS])
        return found

    @property
    def number(self) -> str:
        return self.environment["SLURM_JOB_ID"]

    def attempts(self) -> list[dict[str, Any]]:
        path = self.run / "launch" / ATTEMPTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def own(self) -> list[dict[str, Any]]:
        """The attempts of this job: an earlier one of the run may have given up on what was mended since."""
        return [one for one in self.attempts() if one["job"] == self.number]

    def note(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        path = self.run / "launch" / ATTEMPTS
        path.with_suffix(".new").write_text("".join(f"{json.dumps(one)}\n" for one in attempts), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def newest(self) -> Generation | None:
        options = self.options
        if "store" in options:
            load_store(Path(options["store"]))
        return newest(open_storage(options["checkpoints"]))

    def step(self) -> int:
        """The newest committed one; 0 without any."""
        found = self.newest()
        return 0 if found is None else found.step

    def begin(self) -> int:
        attempts, own, found = self.attempts(), self.own(), self.newest()
        step = 0 if found is None else found.step
        if (tries := in_vain(own, step)) > self.options["max_requeues"]:
            return self.give_up(f"gives up after {tries} attempts in a row without a new committed step (step {step})")
        (self.run / "launch").mkdir(parents=True, exist_ok=True)
        if own and found is not None and found.manifest is not None and found.manifest.created > own[0]["time"]:
            # What this job has saved is what it goes on from, wherever it was told to start: the script looks for this.
            (self.run / "launch" / BEGUN).write_text(f"{self.number}\n", encoding="utf-8")
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
        nodes = self.nodes()
        bad, together = reports(Path(self.environment[DIRECTORY]), nodes)
        if not bad and not together:
            return 0
        everywhere = len(bad) == len(nodes) > 1  # what all have in common is rather to be mended
        for node, why in bad.items():
            self.say(f"{node} is not healthy{'' if everywhere else ' and is excluded'}: {why}")
        if not bad:
            self.say(f"every machine is well by itself, and they fail together: {together}")
        attempts = self.attempts()
        attempts[-1] |= {"ended": "unhealthy", "excluded": {} if everywhere else bad, "together": together}
        self.note(attempts)
        if everywhere:
            return self.give_up("no machine is healthy: nothing is started, and nothing is excluded")
        if (tries := in_vain(self.own(), self.step())) > self.options["max_requeues"]:
            return self.give_up(f"gives up after {tries} attempts in a row without a new committed step")
        known = {node for one in self.own() for node in one.get("excluded", {})}
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
        decision = decide(outcome, self.own(), step, self.options["max_requeues"])
        attempts[-1] |= {"ended": decision.why, "reached": step, "again": decision.again}
        self.note(attempts)
        self.say(f"{decision.why}; {saved(step)}" + ("; the job is requeued" if decision.again else ""))
        if decision.again and not self.requeue():
            return 1
        return decision.status

    def early(self) -> int:
        """The warning came before training did: nothing is lost, and there is no time for more."""
        attempts, step = self.attempts(), self.step()
        attempts[-1] |= {"ended": "preempted before training", "reached": step, "again": True}
        self.note(attempts)
        if (tries := in_vain(self.own(), step)) > self.options["max_requeues"]:
            return self.give_up(f"gives up after {tries} attempts in a row without a new committed step")
        self.say("preempted before training; the job is requeued")
        return 0 if self.requeue() else 1

    def give_up(self, why: str) -> int:
        """The job does not come back, and its last attempt says so."""
        attempts = self.attempts()
        attempts[-1] |= {"ended": why, "again": False}
        self.note(attempts)
        self.say(why)
        return 1

    def leave(self) -> int:
        """SLURM ends the job, and whether it comes back is not for the script to say."""
        outcome, attempts, step = read(Path(self.environment[DIRECTORY])), self.attempts(), self.step()
        if outcome is not None and outcome.status == 0:
            return self.end()
        why = outcome.why if outcome is not None and outcome.why else "no rank said how it ended"
        attempts[-1] |= {"ended": why, "reached": step, "again": False}
        self.note(attempts)
        self.say(f"ended by SLURM, {why}; {saved(step)}")
        return 1

    def requeue(self, exclude: str = "") -> bool:
        """Whether SLURM takes the job back. It ends the script of one, and only then lets machines be excluded."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        why = self._told(REQUEUE_S, "requeue", self.number)
        if why and not any(word in why.lower() for word in ("pending", "completing")):  # SLURM has it already
            self.say(f"SLURM does not requeue it ({why}). Type the command that submitted it again")
            attempts = self.attempts()
            attempts[-1] |= {"again": False, "requeue": why}
            self.note(attempts)
            return False
        if exclude and (why := self._told(EXCLUDE_S, "update", f"JobId={self.number}", f"ExcNodeList={exclude}")):
            self.say(f"SLURM does not exclude {exclude} ({why})")
        return True

    def _told(self, seconds: float, *words: str) -> str:
        """The last refusal of `scontrol`, tried for so long: its controller may be starting."""
        deadline = time.monotonic() + seconds
        while True:
            done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
            if done.returncode == 0:
                return ""
            final = any(word in done.stderr.lower() for word in ("disabled", "pending"))
            if final or time.monotonic() >= deadline:
                return done.stderr.strip() or f"status {done.returncode}"
            time.sleep(0.2)

    def say(self, text: str) -> None:
        print(f"launch: job {self.number}: {text}", flush=True)


def saved(step: int) -> str:
    return f"step {step} is saved" if step else "nothing is saved yet"


def main(argv: Sequence[str] | None = None) -> int:
    command, run = (sys.argv[1:] if argv is None else argv)[:2]
    job = BatchJob(Path(run), os.environ)
    return {"begin": job.begin, "admit": job.admit, "early": job.early, "end": job.end, "leave": job.leave}[command]()


if __name__ == "__main__":
    sys.exit(main())
