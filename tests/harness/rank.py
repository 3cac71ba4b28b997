"""One rank of a world: a process that calls what it is sent, until nobody is there to send.

`python -m tests.harness.rank RANK DESCRIPTOR [MODULE]`; MODULE is the main module of whoever sends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.harness.processes import leave


def serve(rank: int, pipe: Connection) -> None:
    """Call what comes, each inside a fresh process group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    while True:
        try:
            function, size, port, arguments, environment, wait_s = pickle.loads(pipe.recv_bytes())  # noqa: S301  # from our own world
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            if not environment:
                dist.init_process_group("gloo", timeout=timedelta(seconds=wait_s / 2))
            reply: tuple[str, Any] = ("ok", function(*arguments))
        except BaseException:  # also what would end the process: whoever asked must hear of it
            reply = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _let_go()
        pipe.send_bytes(pickle.dumps((*reply, _threads_of_groups())))


def _let_go() -> None:
    """Free what a call leaves in cycles: process groups have threads that wake up a hundred times a second.

    Engines of DeepSpeed hang on hooks that torch keeps, out of the collector's sight, and hold their groups.
    """
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import groups

        alive = [one for one in gc.get_objects() if type(one) in (DeepSpeedEngine, DeepSpeedZeRoOffload) and vars(one)]
        for one in alive:
            if type(one) is DeepSpeedEngine:
                with contextlib.suppress(Exception):  # one that a test has broken
                    one.destroy()
                for parameter in one.parameters():
                    vars(parameter).clear()
                vars(one.optimizer).clear()
        for one in alive:
            vars(one).clear()
        groups._release_process_group_references()
    gc.collect()


def _threads_of_groups() -> int:
    return sum(task.read_text().startswith("gloo") for task in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    number, descriptor, *main = sys.argv[1:]
    if main:  # the functions of a benchmark that is run by `python -m` belong to this module for whoever sends them
        sys.modules["__main__"] = importlib.import_module(main[0])
    serve(int(number), Connection(int(descriptor)))
    leave()
