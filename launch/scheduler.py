"""SLURM's commands, and what they say."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from trainer.errors import Refused

WAIT_S = 60
# States that a job does not leave, and that of one that SLURM has forgotten.
OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("PREEMPTED", ""),
)


def ask(*words: str, check: bool = True, forgive: str = "") -> str:
    """Run a command of the scheduler's. `Refused` with its words where it fails, unless that is to be forgiven."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Refused(
            f"There is no {words[0]} on this machine, so it is no machine of a SLURM cluster. Type this command on "
            "one, or start with `python -m launch torchrun`."
        ) from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{words[0]} does not answer: SLURM's controller is away. Try again.") from None
    if check and done.returncode and not (forgive and forgive in done.stderr):
        raise Refused(f"{words[0]} says: {_said(done.stderr)}. Mend that, and type the same command.")
    return done.stdout.strip()


def _said(stderr: str) -> str:
    lines = [line.partition(": error: ")[2] or line.partition(": fatal: ")[2] or line for line in stderr.splitlines()]
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "nothing"


def submit(script: str, flags: Sequence[str] = ()) -> str:
    """Hand a script in; its job's number."""
    return ask("sbatch", "--parsable", *flags, script).partition(";")[0]


def state_of(job: str) -> tuple[str, str]:
    """The state and its reason, such as PENDING and BeginTime; of a job that SLURM has forgotten nothing."""
    out = ask("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T|%r", forgive="Invalid job id")
    lines = [line.partition("|") for line in out.splitlines()]
    # Of an array the task that is furthest from its end.
    order = ("RUNNING", "COMPLETING", "PENDING")
    lines.sort(key=lambda one: order.index(one[0]) if one[0] in order else len(order))
    return (lines[0][0], lines[0][2]) if lines else ("", "")


def release(job: str) -> None:
    """Let a job that was requeued start at once, rather than when SLURM has waited for two minutes."""
    ask("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
