"""A world of processes that many tests share: importing torch in every process is what costs, so it is done once.

`WORLD.run(function, size, *arguments)` calls a module-level function on the first `size` processes, inside a fresh
gloo process group, and returns what each returned. `environment=True` only sets what torchrun would set.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

NUM_PROCESSES = 4
WAIT_S = 180
LEAVE_S = 20
# Threads of process groups that a process may have left: they wake up a hundred times a second. torch and DeepSpeed
# keep some groups alive, and processes with too many are replaced.
MOST_LEFT = 40


class World:
    """The processes, started at the first use."""

    def __init__(self) -> None:
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, environment: bool = False) -> list[Any]:
        """Every rank's result. An exception on any rank fails the test, with that rank's trace."""
        self._start()
        port = _free_port()
        for rank in range(size):
            self._pipes[rank].send((function, size, port, arguments, environment))
        replies: list[tuple[str, Any, int]] = []
        for rank in range(size):
            if not self._pipes[rank].poll(WAIT_S):
                self.stop()
                raise AssertionError(f"rank {rank} did not answer within {WAIT_S} s; the others said {replies}")
            replies.append(self._pipes[rank].recv())
        if max(left for _, _, left in replies) > MOST_LEFT:
            self.stop()
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text, _) in enumerate(replies) if kind == "error"]
        assert not failures, "\n".join(failures)
        return [value for _, value, _ in replies]

    def stop(self) -> None:
        """They leave by themselves, so that what they registered goes with them; who does not is killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(LEAVE_S)
            process.kill()
            process.join(LEAVE_S)
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        for rank in range(NUM_PROCESSES):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)


WORLD = World()


def _serve(rank: int, pipe: multiprocessing.connection.Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            function, size, port, arguments, environment = pipe.recv()
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
                dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT_S / 2))
            reply: tuple[str, Any] = ("ok", function(*arguments))
        except BaseException:  # also what would end the process: the test must hear of it
            reply = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _let_go()
        pipe.send((*reply, _threads_of_groups()))


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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train(overrides: list[str]) -> str:
    """Run the trainer in this process as it is placed; returns what it printed."""
    from trainer.compose import compose
    from trainer.run import run

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run(compose(overrides)) == 0
    return output.getvalue()
