"""How one of several processes becomes, and stays, the one writer of a directory. Pure: it asks for operations.

Each function is a generator of operations, which whoever runs it carries out: `lease.py` on storage, and
`tests/harness/lease_model.py` in every order it can think of.

A claim is a file with a number, and numbers only grow. To claim is to create the number after the last one, which a
storage lets one process do, whatever it has seen before. A holder beats. Whoever wants the directory and cannot tell
whether the holder lives watches the beat for `EXPIRY_S`, and claims when it stands still. A holder relies on having
looked for at most `GUARD_S`, which is less: then it beats and looks again before it writes anything.

Assumed of a storage: creation is exclusive; a file is read as it is; a listing may be as old as the last write of the
same process (so NFS caches directories). Clocks run alike, and go on while a process is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import Enum
from typing import Any, NamedTuple

HEARTBEAT_S = 5.0
GUARD_S = 15.0  # for so long a holder relies on its last look
EXPIRY_S = 30.0  # a holder elsewhere whose beat stands still for so long is replaced
RELEASED = b'{"released": true}'  # a claim of nobody


class Numbers(NamedTuple):
    """The numbers of all claims."""


class ReadClaim(NamedTuple):
    """A file, or None without it."""

    name: str


class Create(NamedTuple):
    """A file unless it exists; whether this created it."""

    name: str
    data: bytes


class Put(NamedTuple):
    name: str
    data: bytes


class Delete(NamedTuple):
    names: list[str]


class Now(NamedTuple):
    """Seconds on a clock that never stands still."""


class WaitFor(NamedTuple):
    seconds: float
    claim: bytes | None  # whose holder is watched meanwhile


Operation = Numbers | ReadClaim | Create | Put | Delete | Now | WaitFor
Steps = Generator[Operation, Any, Any]


class Verdict(Enum):
    """The state of a claim's holder."""

    free = 0  # given back, or dead
    held = 1  # alive
    unknown = 2  # it cannot be told from here


class HeldError(Exception):
    """Somebody else holds the directory: `claim` says who."""

    def __init__(self, claim: bytes) -> None:
        super().__init__(claim)
        self.claim = claim


class ClaimLostError(Exception):
    """Somebody else has claimed the directory, or it is gone."""


def claim_name(number: int) -> str:
    return f"lease-{number:06d}.json"


def beat_name(number: int) -> str:
    return f"lease-{number:06d}.beat"


def acquire(claim: bytes, judge: Callable[[bytes | None], Verdict], expiry_s: float = EXPIRY_S) -> Steps:
    """Claim the directory: the number, and the time from which `GUARD_S` count. `HeldError` if its holder lives."""
    watched: tuple[int, bytes | None] | None = None
    since = 0.0
    while True:
        last = max((yield Numbers()), default=0)
        verdict, beat = Verdict.free, None
        if last:
            content = yield ReadClaim(claim_name(last))
            verdict = judge(content)
            if verdict is Verdict.held:
                raise HeldError(content or b"")
            if verdict is Verdict.unknown:
                before = yield Now()
                beat = yield ReadClaim(beat_name(last))
                after = yield Now()
                if watched is None or watched[0] != last:
                    watched, since = (last, beat), after
                elif beat != watched[1]:
                    raise HeldError(content or b"")
                if before - since < expiry_s:
                    yield WaitFor(min(0.2, expiry_s / 10), content)
                    continue
        began = yield Now()
        if not (yield Create(claim_name(last + 1), claim)):
            continue
        if verdict is Verdict.unknown and (yield ReadClaim(beat_name(last))) != beat:
            # It lives after all, and may have looked right before this claim: it looks again when its guard is over.
            yield WaitFor(GUARD_S, content)
        numbers = yield Numbers()
        if max(numbers, default=0) > last + 1:  # this one slept while others came, whose claims up to here are deleted
            continue
        if old := [number for number in numbers if number <= last]:
            yield Delete([name(number) for number in old for name in (claim_name, beat_name)])
        return last + 1, began


def renew(number: int, claim: bytes, beat: bytes) -> Steps:
    """Beat, and look; returns the time from which `GUARD_S` count. `ClaimLostError` where it is somebody else's now."""
    began = yield Now()
    yield Put(beat_name(number), beat)
    if max((yield Numbers()), default=0) > number or (yield ReadClaim(claim_name(number))) != claim:
        raise ClaimLostError
    return began


def release(number: int) -> Steps:
    """Give the directory back. Nothing may be written after it."""
    yield Create(claim_name(number + 1), RELEASED)
    yield Delete([claim_name(number), beat_name(number)])
