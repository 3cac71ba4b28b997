"""A team of ranks that does something together: gather small values, and fail together with one rank's reason."""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from checkpointing import errors
from checkpointing.errors import CheckpointError, LostError, PeerError
from checkpointing.patience import finish, patient_group, working

FRAME = 512  # bytes that travel with their length: most texts are short, and need one exchange rather than two


# What collectives were given. A thread of gloo lets go of it a moment after the call returned, on a busy machine much
# later, and needs Python for that; where Python is being torn down by then, that ends the thread, and with it the
# process ("terminate called without an active exception"). So what is lent is kept, and taken back before the teardown:
# ending the process group would not help, because a DDP model keeps it and its threads alive.
_lent: list[tuple[torch.Tensor, ...]] = []
TAKE_BACK_S = 2.0


def _lend(*tensors: torch.Tensor) -> None:
    _lent[:] = [*(lent for lent in _lent if not _is_back(lent)), tensors]


def _is_back(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether they are held here alone: not by C++, nor by a thread of it that is done and waits to tell Python so."""
    return all(tensor._use_count() == 1 for tensor in tensors) and max(_references(tensors)) <= _ALONE  # type: ignore[attr-defined]


def _references(tensors: tuple[torch.Tensor, ...]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


_ALONE = max(_references((torch.empty(0),)))  # how many Python counts of one that is in a tuple and nowhere else


@atexit.register
def take_back() -> None:
    """Wait until nobody holds what was lent. Not for what a failure that ended the process still holds."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    deadline = time.monotonic() + TAKE_BACK_S
    while not all(map(_is_back, _lent)) and time.monotonic() < deadline:
        time.sleep(0.001)  # there is nothing to wait on


class Team:
    """The ranks of a process group, or this process alone where there is none.

    Of the default group a rank waits for others as long as they get on (`patience.py`); of one that is given, as long
    as that one's timeout.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def together(self, action: Callable[[], Any], *, long: bool = False) -> list[Any]:
        """Run `action` on every rank; return every rank's result, in the order of the ranks.

        One that reads or writes much, or waits for a storage, is `long`: then the others wait as long as it gets on.

        Results travel as JSON. If `action` raises anywhere, every rank raises, and all for the same reason, so that
        they go the same way afterwards: the lowest rank that failed its own exception, the others one of the same
        type where it is ours, `PeerError` otherwise. No rank is left waiting. `LostError` where the ranks cannot reach
        each other: then none knows how the others went on.
        """
        failure = None
        self._exchanging()  # a group that is not there yet is made while nobody is slow
        try:
            with working() if long else nullcontext():
                mine = json.dumps({"value": action()})
        except Exception as error:  # whatever it is, the others must hear of it before it goes on
            failure = error
            mine = json.dumps({"kind": type(failure).__name__, "why": str(failure)})
        try:
            texts = self._gather(mine)
        except Exception as error:  # a timeout, a connection that broke
            raise LostError(f"rank {self.rank} cannot reach the others: {error}") from (failure or error)
        reports = [json.loads(text) for text in texts]
        for rank, report in enumerate(reports):
            if "why" not in report:
                continue
            if failure is not None and rank == self.rank:
                raise failure
            kind = getattr(errors, report["kind"], None)
            if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
                kind = PeerError
            raise kind(f"rank {rank}: {report['why']}") from failure
        return [report["value"] for report in reports]

    def to_first(self, text: str) -> list[str]:
        """Every rank's text, on rank 0 alone; the others get none. Collective."""
        try:
            return self._to_first(text)
        except Exception as error:
            raise LostError(f"rank {self.rank} cannot reach the others: {error}") from error

    def from_first(self, text_of: Callable[[int], str]) -> str:
        """Hand each rank rank 0's text for it, made when it is that rank's turn. Collective."""
        try:
            return self._from_first(text_of)
        except Exception as error:
            raise LostError(f"rank {self.rank} cannot reach the others: {error}") from error

    def _to_first(self, text: str) -> list[str]:
        if self.rank != 0:
            self._send(text, 0)
            return []
        return [text, *(self._receive(rank) for rank in range(1, self.size))]

    def _from_first(self, text_of: Callable[[int], str]) -> str:
        if self.rank != 0:
            return self._receive(0)
        for rank in range(1, self.size):
            self._send(text_of(rank), rank)
        return text_of(0)

    def _send(self, text: str, rank: int) -> None:
        payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self._device())
        size = torch.tensor([payload.numel()], device=payload.device)
        _lend(size, payload)
        for tensor in (size, payload):
            dist.send(tensor, self._global(rank), group=self.group)

    def _receive(self, rank: int) -> str:
        size = torch.zeros(1, dtype=torch.int64, device=self._device())
        _lend(size)
        dist.recv(size, self._global(rank), group=self.group)
        payload = torch.empty(int(size.item()), dtype=torch.uint8, device=size.device)
        _lend(payload)
        dist.recv(payload, self._global(rank), group=self.group)
        return bytes(payload.cpu().numpy()).decode()

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _gather(self, text: str) -> list[str]:
        """Every rank's text."""
        if self.size == 1:
            return [text]
        data = text.encode()
        first = self._gather_bytes((len(data).to_bytes(8, "little") + data)[:FRAME].ljust(FRAME))
        sizes = [int.from_bytes(frame[:8], "little") for frame in first]
        if (rest := max(sizes) - (FRAME - 8)) > 0:
            more = self._gather_bytes(data[FRAME - 8 :].ljust(rest))
            first = [frame + others for frame, others in zip(first, more, strict=True)]
        return [frame[8 : 8 + size].decode() for frame, size in zip(first, sizes, strict=True)]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, of which all have as many."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device())
        whole = mine.new_empty(self.size, len(data))
        rows = list(whole)
        _lend(mine, *rows)
        self._finish(dist.all_gather(rows, mine, group=self._exchanging(), async_op=True))
        return [bytes(row) for row in whole.cpu().numpy()]

    @property
    def _is_patient(self) -> bool:
        return not self.alone and self.size > 1 and self.group is None and "cpu" in dist.get_backend_config()

    def _exchanging(self) -> dist.ProcessGroup | None:
        return patient_group() if self._is_patient else self.group

    def _finish(self, work: Any) -> None:
        if self._is_patient:
            finish(work, self.rank, self.size)
        else:
            work.wait()

    def _device(self) -> torch.device:
        """A device whose tensors this group can gather: the CPU wherever the group has a backend for it."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def as_team(group: dist.ProcessGroup | Team | None) -> Team:
    return group if isinstance(group, Team) else Team(group)
