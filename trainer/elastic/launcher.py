"""Whether whoever started this process is still there: no trainer goes on without somebody who watches over it.

`python -m launch` says in the environment who it is; torchrun is the parent of its processes. A trainer that neither
started, by a shell or a scheduler, is watched over by nobody, and is not ended.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from checkpointing import Holder, pid_space

LAUNCHER = "EVERSHARD_LAUNCHER"
LOOK_S = 1.0


def this_launcher() -> str:
    """The launcher's mark in the environment of the processes that it starts."""
    return json.dumps(asdict(Holder.this_process()))


def find_launcher(environment: Mapping[str, str] = os.environ) -> Callable[[], bool] | None:
    """Tells whether the launcher lives; None where none of this machine is known."""
    try:
        launcher = Holder(**json.loads(environment[LAUNCHER]))
        if launcher.machine == pid_space():
            return lambda: launcher.lives
    except (KeyError, ValueError, TypeError):
        pass
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in environment and parent > 1:
        return lambda: os.getppid() == parent
    return None


@contextmanager
def watching(
    say: Callable[[], None], leave: Callable[[], None], environment: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Call `say` and `leave` once, in another thread, when the launcher is not there any more.

    Where another process has seen it first, and all have left together, `say` alone is called at the end.
    """
    lives, ended = find_launcher(environment), threading.Event()
    seen = False

    def watch() -> None:
        nonlocal seen
        while lives is not None and not seen and not ended.wait(LOOK_S):
            if not lives():
                seen = True
                say()
                leave()

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if lives is not None and not seen and not lives():
            say()
