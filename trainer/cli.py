"""The command line of the trainer: compose, run, and turn what was refused into a paragraph and status 2."""

from __future__ import annotations

import logging
import os
import sys

from trainer.errors import Refused, TrainingFailed


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        from trainer.compose import compose_from_command_line

        config = compose_from_command_line()
        if config is None:
            return 0
        from trainer.run import run  # seconds of imports, which a refused command does not wait for

        return run(config)
    except Refused as error:
        say(f"trainer: {error}")
        return 2
    except TrainingFailed as error:
        say(f"trainer: {error}")
        return 1
    except KeyboardInterrupt:
        say("trainer: interrupted; the same command goes on from the last checkpoint")
        return 130


def say(text: str) -> None:
    """To stderr, once a machine: what is refused on one process is refused on its neighbours for the same reason."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
