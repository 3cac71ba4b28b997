"""Text that somebody else wrote, printed: what would steer a terminal is spelled out."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_KEPT = "\t\n"
# Control characters, and those that change the order in which the characters after them are shown.
_STEERING = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: ascii(chr(code))[1:-1] for code in _STEERING if chr(code) not in _KEPT}


def shown(text: str) -> str:
    """The text with `\\\\x1b` and its kind as these four characters; lines stay lines."""
    return text.translate(_SHOWN)


class Printable:
    """A stream that spells out what would steer a terminal, and letters that its encoding does not have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        spell_out(stream)

    def write(self, text: str) -> int:
        return self._stream.write(shown(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_closed_streams() -> None:
    """Lead streams that a process was started without (`>&-`) nowhere, so that no file takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # as long as the process lives


def spell_out(stream: Any) -> None:
    """Have a stream write letters that its encoding does not have as `\\xe9`, where it would raise an error."""
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):  # of one that was made for a file, and is a pipe now
            stream.reconfigure(errors="backslashreplace")


def unprinted(stream: Any) -> Any:
    """The stream below, for what is our own, such as a line of progress that is written over."""
    return stream._stream if isinstance(stream, Printable) else stream


def quiet_libraries() -> None:
    """Have libraries say nothing that nobody here can act upon."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is checked and said here
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it
    # transformers warns of what peft calls in it, and imports torchao where that is, which warns of kernels for other
    # GPUs than this machine has, and torch of how torchao declares its types.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def printable_output() -> Iterator[None]:
    """All that is printed in the context, by `print` or as a warning."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Printable(sys.stdout), Printable(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept
