"""How a process of ours ends: with its status, whatever other threads do."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from checkpointing.printing import shown, spell_out


class Lenient:
    """A stream that drops what cannot be written: a full disk under a log, or `| head`, is no reason not to train."""

    def __init__(self, stream: TextIO, translate: Callable[[str], str] = str) -> None:
        self._stream, self._translate = stream, translate
        spell_out(stream)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(self._translate(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """`main`, and the end of the process with its status, without tearing the interpreter down.

    A thread that is in C++ while Python tears itself down, and then wants something of Python, aborts the process, and
    what succeeded would end with status 134. Such threads are gloo's, where FSDP2's caches keep a process group alive,
    and the one in which torchrun waits for other machines.
    """
    status = 1  # of an exception that nobody caught

    # What steers a terminal is our own display's, on stdout.
    sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr, shown)

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # the first to register is the last to be called: wandb and the others have left by then
    try:
        status = main()
    except SystemExit as error:  # of `--help` and its kin
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
