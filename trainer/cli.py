"""The command line of the trainer: compose, run, and turn what was refused into a paragraph and status 2."""

from __future__ import annotations

import logging
import os
import sys
import time

from checkpointing import CheckpointError
from checkpointing.printing import shown
from trainer.elastic.preemption import listen_no_more, was_warned
from trainer.errors import OF_STORAGE, AlsoRefused, Refused, TrainingFailed
from trainer.outcome import Outcome, leave

PATIENCE_S = 10  # far more than a launcher takes to end its processes after the first has failed


def main() -> int:
    """Run what `sys.argv` says; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        status = _compose_and_run()
    except AlsoRefused:
        return 2
    except BaseException as error:
        leave(Outcome.of(error))
        listen_no_more()
        return _explain(error)
    if status == 0:  # one that was preempted has said so
        leave(Outcome(0, final=True))
    return status


def _explain(error: BaseException) -> int:
    """Say in one paragraph what a user can do about it; returns the exit status."""
    if isinstance(error, Refused):
        return say(error, 2)
    if isinstance(error, TrainingFailed | CheckpointError):
        return say(error, 1)
    if isinstance(error, OSError) and error.errno in OF_STORAGE:
        return say(
            f"{error.filename or 'A file'} cannot be written or read: {error.strerror}. What was saved stays as it is: "
            "start the same command again when its storage works.",
            1,
        )
    if isinstance(error, KeyboardInterrupt):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "trainer: interrupted; "
                "with resume=auto, the default, the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
        return 130
    raise error


def _compose_and_run() -> int:
    from trainer.compose import compose_from_command_line

    sys.argv[1:] = without_local_rank(sys.argv[1:])

    config = compose_from_command_line()
    if config is None:
        return 0
    from trainer.run import run  # seconds of imports, which a refused command does not wait for

    return run(config)


def without_local_rank(arguments: list[str]) -> list[str]:
    """DeepSpeed's launcher adds `--local_rank=N`, which is in the environment too."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            next(rest, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def say(what: object, status: int) -> int:
    """Print to stderr, once a machine: what is refused on one process is mostly refused on its neighbours as well.

    The others let the first one speak, whose end makes the launcher end them too, or has done so already. Who is still
    there after that says what it has to say itself.
    """
    if (rank := os.environ.get("LOCAL_RANK", "0")) != "0":
        if was_warned():
            return status
        time.sleep(PATIENCE_S)
        what = f"local rank {rank}: {what}"
    print(f"trainer: {shown(str(what))}", file=sys.stderr, flush=True)
    return status
