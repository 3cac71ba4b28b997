"""The weights of a model, read by one process of each machine, and lent to the others as memory that they map.

Without that, every process reads the whole model before it keeps its share: of 70 billion parameters 280 GB each. The
memory has no name, so nothing of it is left when the processes are gone.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpointing.collective import Team
from checkpointing.lease import pid_space

logger = logging.getLogger(__name__)

ALIGNED = 64  # bytes that a tensor starts at a multiple of
TURN_S = 5.0  # that a process waits for another one in a collective, whose own limit is shorter than a read may take

Table = dict[str, tuple[int, str, list[int], bool]]  # by a tensor's name: where it begins, dtype, shape, requires_grad


def read_once(read: Callable[[], nn.Module], skeleton: Callable[[], nn.Module], team: Team) -> nn.Module:
    """What `read` gives, called on one process of each machine only. Collective.

    `skeleton` gives the same model on the device meta. Every process may write to its own: pages that it writes are
    copied for it. One that cannot map what another read reads by itself.
    """
    spaces = team.together(lambda: list(pid_space()))
    owner = spaces.index(spaces[team.rank])
    if len({tuple(space) for space in spaces}) == team.size:
        return read()
    model = _read_while_others_wait(read if owner == team.rank else None, team)
    lent: list[Lent] = []

    def lend() -> dict[str, Any] | None:
        if model is None or spaces.count(spaces[team.rank]) == 1:
            return None
        try:
            lent.append(Lent.of(model))
        except (OSError, AttributeError) as error:  # such as a system that has no memory without a name
            logger.warning("every process reads the model by itself: %s", error)
            return None
        return lent[0].told()

    told = team.together(lend)[owner]

    def borrow() -> None:
        nonlocal model
        if model is not None:
            return
        try:
            if told is None:
                raise LookupError("the one that read it could not lend it")
            model = borrowed(skeleton(), told)
        except (OSError, LookupError) as error:
            logger.warning("this process reads the model by itself: %s", error)
            model = read()

    team.together(borrow)
    for one in lent:
        os.close(one.file)
    assert model is not None
    return model


def _read_while_others_wait(read: Callable[[], nn.Module] | None, team: Team) -> nn.Module | None:
    """What `read` gives where there is one. A read that fails fails on all."""
    with ThreadPoolExecutor(1) as pool:
        reading = None if read is None else pool.submit(read)

        def is_done() -> bool:
            if reading is None:
                return True
            wait([reading], TURN_S)
            return reading.done() and bool(reading.result())

        while not all(team.together(is_done)):
            pass
        return None if reading is None else reading.result()


@dataclass(frozen=True)
class Lent:
    """The memory that holds a model's tensors: a file without a name, as long as this process has it open."""

    file: int
    nbytes: int
    table: Table

    @staticmethod
    def of(model: nn.Module) -> Lent:
        """Move a model's parameters and buffers there, one by one, so that little is held twice."""
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
                    tensor.data = over(mapped, table[name])
        except BaseException:
            os.close(file)
            raise
        return Lent(file, end, table)

    def told(self) -> dict[str, Any]:
        """To processes of this machine."""
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
    for path, module in skeleton.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    start, dtype, shape, trains = table[f"{path}.{key}" if path else key]
                    place = (start, dtype, *shape, kind is module._buffers)
                    if place not in made:
                        plain = over(mapped, (start, dtype, shape, trains))
                        made[place] = plain if kind is module._buffers else nn.Parameter(plain, requires_grad=trains)
                    kind[key] = made[place]
        if left := [name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]:
            raise LookupError(f"{path}.{left[0]} is a tensor that is neither a parameter nor a buffer")
    return skeleton


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
