"""The command line of the trainer: compose, run, and turn what was refused into a paragraph and status 2."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings

from trainer.errors import Refused, TrainingFailed


def main() -> int:
    """Run what `sys.argv` says; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # transformers warns of what peft calls in it: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        return _compose_and_run()
    except Refused as error:
        status = say(error, 2)
    except TrainingFailed as error:
        status = say(error, 1)
    except KeyboardInterrupt:
        status = say("interrupted; the same command goes on from the last checkpoint", 130)
    # What the trace of the error kept alive ends here and not with the interpreter: see process_group.
    gc.collect()
    return status


def _compose_and_run() -> int:
    from trainer.compose import compose_from_command_line

    config = compose_from_command_line()
    if config is None:
        return 0
    from trainer.run import run  # seconds of imports, which a refused command does not wait for

    return run(config)


def say(what: object, status: int) -> int:
    """To stderr, once a machine: what is refused on one process is refused on its neighbours for the same reason."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"trainer: {what}", file=sys.stderr, flush=True)
    return status
