"""Three processes that want one directory, in many orders: with pauses, crashes, releases and stale listings.

Every order is drawn from a seed, and runs the protocol of `checkpointing/lease_protocol.py`, or another one, in a world
of its own with a clock of its own. A process that holds the directory writes; it must never write after another one
has come to hold it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from checkpointing import lease_protocol as protocol
from checkpointing.lease_protocol import (
    GUARD_S,
    RELEASED,
    ClaimLostError,
    Create,
    Delete,
    HeldError,
    Now,
    Numbers,
    Put,
    ReadClaim,
    Steps,
    Verdict,
    WaitFor,
)

Acquire = Callable[[bytes, Callable[[bytes | None], Verdict]], Steps]


@dataclass
class World:
    """A directory and its past, who holds it, and what went wrong."""

    now: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    listings: list[tuple[int, ...]] = field(default_factory=lambda: [()])  # after every change of the claims
    held: dict[int, int] = field(default_factory=dict)  # the number that a process has come to hold
    dead: set[int] = field(default_factory=set)
    writes: int = 0
    replaced: int = 0  # holders that others took over from
    wrong: str = ""

    def changed(self) -> None:
        claims = (name[6:-5] for name in self.files if name.endswith(".json"))
        listing = tuple(sorted(int(number) for number in claims))
        if listing != self.listings[-1]:
            self.listings.append(listing)

    def write(self, process: int, number: int) -> None:
        self.writes += 1
        if any(other > number for owner, other in self.held.items() if owner != process):
            self.wrong = f"process {process} writes under claim {number}, of {self.held}, at {self.now:.1f} s"


@dataclass
class Process:
    number: int
    steps: Generator[Any, Any, None]
    answer: Any = None
    fresh: int = 0  # the listing after its own last write: it sees no older one
    until: float = 0.0  # it sleeps


class Checked:
    """What a holder knows, as `lease.Lease` does."""

    def __init__(self, world: World, process: int, number: int, claim: bytes, since: float, variant: Variant) -> None:
        self.world, self.process, self.number, self.claim = world, process, number, claim
        self.since, self.beats, self.variant = since, 0, variant

    def renew(self) -> Steps:
        self.beats += 1
        self.since = yield from self.variant.renew(self.number, self.claim, b"%d" % self.beats)

    def write(self) -> Steps:
        if (yield Now()) - self.since > self.variant.guard_s:
            yield from self.renew()
        # No operation lies between the last look at the clock and this: a pause there can be told by no protocol.
        if self.world.now - self.since <= self.variant.guard_s:
            self.world.write(self.process, self.number)


@dataclass(frozen=True)
class Variant:
    """A protocol: the one that is used, or one that a control takes something away from."""

    acquire: Callable[..., Steps] = protocol.acquire
    renew: Callable[..., Steps] = protocol.renew
    release: Callable[..., Steps] = protocol.release
    guard_s: float = GUARD_S


def life(world: World, number: int, variant: Variant, rng: random.Random) -> Steps:
    """A process: it wants the directory some times, works in it, and lets go in one way or another."""
    claim = b'{"process": %d}' % number

    def judge(content: bytes | None) -> Verdict:
        if content is None:
            return Verdict.unknown
        if content == RELEASED:
            return Verdict.free
        owner = int(content[12:-1])
        seen = number == owner or (number % 2 == owner % 2)  # two of the three are on one machine
        if owner == number:
            return Verdict.free  # of its own past
        return (Verdict.free if owner in world.dead else Verdict.held) if seen else Verdict.unknown

    for _ in range(2):
        try:
            found, since = yield from variant.acquire(claim, judge)
        except HeldError:
            yield WaitFor(rng.choice([1.0, 10.0, 40.0]), None)
            continue
        world.replaced += bool(world.held)
        world.held[number] = found
        holder = Checked(world, number, found, claim, since, variant)
        try:
            for _ in range(rng.randint(1, 4)):
                yield from holder.renew() if rng.random() < 0.5 else holder.write()
                yield WaitFor(rng.choice([0.5, 4.0, 14.0]), None)
        except ClaimLostError:
            world.held.pop(number)
            continue
        end = rng.random()
        if end < 0.2:
            world.dead.add(number)
            return
        world.held.pop(number)
        yield from variant.release(found)


def carry_out(world: World, process: Process, operation: Any, rng: random.Random) -> Any:
    if isinstance(operation, Numbers):
        process.fresh = rng.randint(process.fresh, len(world.listings) - 1)  # nor does time go back
        return world.listings[process.fresh]
    if isinstance(operation, ReadClaim):
        return world.files.get(operation.name)
    if isinstance(operation, Now):
        return world.now
    if isinstance(operation, WaitFor):
        process.until = world.now + operation.seconds
        return None
    done = True
    if isinstance(operation, Create):
        done = operation.name not in world.files
        if done:
            world.files[operation.name] = operation.data
    elif isinstance(operation, Put):
        world.files[operation.name] = operation.data
    elif isinstance(operation, Delete):
        for name in operation.names:
            world.files.pop(name, None)
    world.changed()
    process.fresh = len(world.listings) - 1
    return done


def run(seed: int, variant: Variant = Variant(), limit: int = 400) -> World:  # frozen
    """One order. `wrong` of the world says what happened that must not."""
    rng, world = random.Random(seed), World()
    processes = [Process(number, life(world, number, variant, rng)) for number in range(3)]
    for _ in range(limit):
        if not processes or world.wrong:
            break
        awake = [process for process in processes if process.until <= world.now]
        if not awake:
            world.now = min(process.until for process in processes)
            continue
        process = rng.choice(awake)
        if rng.random() < 0.05:  # it is stopped, at whatever it is about to do
            process.until = world.now + rng.choice([2.0, 16.0, 31.0, 50.0])
            continue
        if rng.random() < 0.1:
            world.now += rng.choice([0.1, 1.0, 5.0])
        try:
            operation = process.steps.send(process.answer)
        except StopIteration:
            processes.remove(process)
            continue
        process.answer = carry_out(world, process, operation, rng)
    return world


# Controls: what each part of the protocol is for shows where it is taken away.


def acquire_with_numbers_that_start_again(claim: bytes, judge: Callable[[bytes | None], Verdict]) -> Steps:
    """With claims that are deleted when they are given back, and a look at the listing instead of exclusive numbers."""
    while True:
        numbers = yield Numbers()
        last = max(numbers, default=0)
        if last:
            content = yield ReadClaim(protocol.claim_name(last))
            verdict = judge(content)
            if verdict is Verdict.held:
                raise HeldError(content or b"")
            if verdict is Verdict.unknown:
                first, deadline = (yield ReadClaim(protocol.beat_name(last))), (yield Now()) + protocol.EXPIRY_S
                while (yield Now()) < deadline:
                    if (yield ReadClaim(protocol.claim_name(last))) is None:
                        break
                    if (yield ReadClaim(protocol.beat_name(last))) != first:
                        raise HeldError(content or b"")
                    yield WaitFor(3.0, content)
        began = yield Now()
        if not (yield Create(protocol.claim_name(last + 1), claim)):
            continue
        if max((yield Numbers()), default=0) > last + 1:
            yield Delete([protocol.claim_name(last + 1)])
            continue
        yield Delete([name(number) for number in numbers for name in (protocol.claim_name, protocol.beat_name)])
        return last + 1, began


def release_by_deleting(number: int) -> Steps:
    yield Delete([protocol.claim_name(number), protocol.beat_name(number)])


def look_without_beating(number: int, claim: bytes, beat: bytes) -> Steps:
    began = yield Now()
    if max((yield Numbers()), default=0) > number or (yield ReadClaim(protocol.claim_name(number))) != claim:
        raise ClaimLostError
    return began


def acquire_without_a_second_look(claim: bytes, judge: Callable[[bytes | None], Verdict]) -> Steps:
    """The beat that came between the last look and the claim is not looked for."""
    steps = protocol.acquire(claim, judge)
    answer: Any = None
    looked = False
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as ended:
            return ended.value
        if looked and isinstance(operation, WaitFor):
            answer = None
            continue
        looked = isinstance(operation, Create) or (looked and isinstance(operation, ReadClaim))
        answer = yield operation


CONTROLS = {
    "numbers start again": Variant(
        acquire_with_numbers_that_start_again, look_without_beating, release_by_deleting, guard_s=0.0
    ),
    "looking without beating": Variant(renew=look_without_beating),
    "no second look": Variant(acquire=acquire_without_a_second_look),
    "a guard longer than the expiry": Variant(guard_s=40.0),
}
