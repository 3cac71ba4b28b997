"""The weights of a model, read by one process of each machine, and lent to the others as memory that they map.

Without that, every process reads the whole model before it keeps its share: of 70 billion parameters 280 GB each. The
memory has no name, so nothing of it is left when the processes are gone.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from checkpointing import Team, pid_space

logger = logging.getLogger(__name__)

ALIGNED = 64  # bytes that a tensor starts at a multiple of
TURN_S = 5.0  # that a process waits for another one in a collective, whose own limit is shorter than a read may take

T = TypeVar("T")
Table = dict[str, tuple[int, str, list[int], bool]]  # by a tensor's name: where it begins, dtype, shape, requires_grad


def read_once(read: Callable[[], nn.Module], skeleton: Callable[[], nn.Module], team: Team) -> nn.Module:
    """Call `read` on one process of each machine only, and share its model. Collective.

    `skeleton` gives the same model on the device meta. Every process may write to its own: pages that it writes are
    copied for it. One that cannot map what another read reads by itself.
    """
    spaces = team.together(lambda: list(pid_space()))
    owner = spaces.index(spaces[team.rank])
    if len({tuple(space) for space in spaces}) == team.size:
        return read()
    owns, shares = owner == team.rank, spaces.count(spaces[team.rank]) > 1
    model = _while_others_wait(read if owns else None, team)
    lent = _while_others_wait((lambda: _lend(model)) if model is not None and shares else None, team)
    told = team.together(lambda: None if lent is None else lent.told())[owner]

    def borrow() -> nn.Module:
        try:
            if told is None:
                raise LookupError("the one that read it could not lend it")
            return borrowed(skeleton(), told)
        except Exception as error:  # of the system, or of a model that cannot be put together from its tensors
            logger.warning("this process reads the model by itself: %s", error)
        return read()

    borrows = _while_others_wait(None if owns else borrow, team)
    if lent is not None:
        os.close(lent.file)
    found = model if borrows is None else borrows
    assert found is not None
    return found


def _lend(model: nn.Module) -> Lent | None:
    try:
        return Lent.of(model)
    except Exception as error:  # such as a system that has no memory without a name, or tensors of a kind of their own
        logger.warning("every process reads the model by itself: %s", error)
        return None


def _while_others_wait(action: Callable[[], T] | None, team: Team) -> T | None:
    """Call `action` where there is one. Collective; a failure on one rank is one on all.

    It runs in a thread, so that nobody waits in one collective for as long as that takes. The thread is a daemon's: a
    process that fails meanwhile does not wait for it.
    """
    future: Future[T] = Future()

    def act() -> None:
        assert action is not None
        try:
            future.set_result(action())
        except BaseException as error:  # of a model's own code as well: the others must hear of it
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    if action is not None:
        threading.Thread(target=act, name="read-model", daemon=True).start()

    def is_done() -> bool:
        if action is None:
            return True
        wait([future], TURN_S)
        if future.done():
            future.result()  # raises what it failed with
        return future.done()

    while not all(team.together(is_done)):
        pass
    return None if action is None else future.result()


@dataclass(frozen=True)
class Lent:
    """The memory that holds a model's tensors: a file without a name, as long as this process has it open."""

    file: int
    table: Table

    @staticmethod
    def of(model: nn.Module) -> Lent:
        """Move a model's parameters there, one by one, so that little is held twice, and copy its buffers."""
        table: Table = {}
        starts: dict[int, int] = {}
        end = 0
        for name, tensor in _tensors(model):
            if id(tensor) not in starts:
                starts[id(tensor)] = end
                end = -(-(end + tensor.nbytes) // ALIGNED) * ALIGNED
            table[name] = starts[id(tensor)], str(tensor.dtype)[6:], list(tensor.shape), tensor.requires_grad
        file = os.memfd_create("model")
        try:
            os.truncate(file, max(end, 1))
            mapped = _map(file, end)
            shared = mmap.mmap(file, max(end, 1))
            seen = set()
            for name, tensor in _tensors(model):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    over(shared, table[name]).copy_(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = over(mapped, table[name])
        except BaseException:
            os.close(file)
            raise
        return Lent(file, table)

    def told(self) -> dict[str, Any]:
        """The description that processes of this machine map the memory by."""
        return {"pid": os.getpid(), "file": self.file, "inode": os.fstat(self.file).st_ino, "table": self.table}


def borrowed(skeleton: nn.Module, told: dict[str, Any]) -> nn.Module:
    """The skeleton with the tensors that another process of this machine lends.

    `OSError` where its memory cannot be opened, `LookupError` where the skeleton has other tensors than the model.
    """
    path = f"/proc/{told['pid']}/fd/{told['file']}"
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = os.fstat(file)
        if held.st_ino != told["inode"]:
            raise OSError(f"{path} is not the memory of a model")
        mapped = _map(file, held.st_size)
    finally:
        os.close(file)
    table: Table = told["table"]
    names = dict(_tensors(skeleton))
    if odd := sorted(names.keys() ^ table.keys()):
        raise LookupError(f"{odd[0]} is in the model or in its skeleton alone")
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    for inside, module in skeleton.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None:
                    continue
                name = f"{inside}.{key}" if inside else key
                start, _, shape, trains = table[name]
                values = over(mapped, table[name])
                # Tied ones lie in one place; those without elements begin where the next one does.
                place = (start, *shape, own is module._buffers, "" if values.numel() else name)
                if place not in made and own is module._buffers:
                    # They are small, and live as long as the model: as views they would keep all of the memory.
                    made[place] = values.clone()
                elif place not in made:
                    made[place] = nn.Parameter(values, requires_grad=trains)
                own[key] = made[place]
        if left := [name for name, value in vars(module).items() if _holds_nothing(value)]:
            raise LookupError(f"{inside}.{left[0]} has a tensor that is neither a parameter nor a buffer")
    return skeleton


def _holds_nothing(value: Any) -> bool:
    """Whether there is a tensor without values in it."""
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, dict):
        return any(map(_holds_nothing, value.values()))
    return isinstance(value, list | tuple | set) and any(map(_holds_nothing, value))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, those that are tied under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _map(file: int, nbytes: int) -> mmap.mmap:
    """Memory that reads as the file, and whose pages are this process's own once it has written to them."""
    return mmap.mmap(file, max(nbytes, 1), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def over(memory: mmap.mmap, where: tuple[int, str, list[int], bool]) -> torch.Tensor:
    start, name, shape, _ = where
    dtype: torch.dtype = getattr(torch, name)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
