"""Whatever kind of layout a tensor was saved under, it loads into whatever other kind, bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, product

import pytest
import torch

from checkpointing import Piece, load, save
from checkpointing.collective import Team
from checkpointing.stores import MemoryStorage
from tests.checkpointing.layout_kinds import (
    ANY_SHAPE,
    ARITHMETIC_KINDS,
    KINDS,
    SHAPES,
    Hand,
    Kind,
    holds,
    lay_out,
    random_tensor,
)
from tests.harness.threads import all_of, on_ranks

CASES = 2000
BY_HAND = 100_000
TENSORS = 3  # of a case
MOST_RANKS = 8


class Seen:
    """Which kinds, pairs and shapes the cases were of: each case counts once for a kind, every tensor for a pair."""

    def __init__(self) -> None:
        self.cases = 0
        self.kinds: Counter[Kind] = Counter()
        self.pairs: Counter[tuple[Kind, Kind]] = Counter()
        self.shapes: Counter[str] = Counter()


def pairs_without_end(rng: random.Random) -> Iterator[tuple[Kind, Kind]]:
    """All ordered pairs in a random order, again and again: each comes up as often as any other."""
    every = list(product(KINDS, KINDS))
    while True:
        rng.shuffle(every)
        yield from every


def run_case(rng: random.Random, pairs: Iterator[tuple[Kind, Kind]], seen: Seen) -> None:
    sources, targets = rng.randint(1, MOST_RANKS), rng.randint(1, MOST_RANKS)
    saved: list[Hand] = []
    loaded: list[Hand] = []
    kinds: set[Kind] = set()
    shapes: set[str] = set()
    for number, (source, target) in enumerate(islice(pairs, TENSORS)):
        anything = source in ANY_SHAPE and target in ANY_SHAPE
        shape = SHAPES[0] if anything and rng.random() < 0.5 else rng.choice(SHAPES[1:])
        arithmetic = bool({source, target} & ARITHMETIC_KINDS)
        logical = random_tensor(rng, f"t{number}", shape, arithmetic=arithmetic)
        saved.append(lay_out(rng, source, logical, sources, fill=True))
        loaded.append(lay_out(rng, target, logical, targets, fill=False))
        kinds |= {source, target}
        shapes.add(shape)
        seen.pairs[source, target] += 1
    storage = MemoryStorage()
    on_all(sources, saved, lambda team, pieces: save(storage, 1, pieces, group=team))
    names = {name for hand in saved for pieces in hand.ranks for name in (p.name for p in pieces)}
    for hand in loaded:  # a second name is only there if it was saved
        hand.ranks = [[p for p in pieces if p.name in names] for pieces in hand.ranks]
    on_all(targets, loaded, lambda team, pieces: load(storage, pieces, group=team))
    assert all(map(holds, loaded)), [hand.logical.name for hand in loaded if not holds(hand)]
    seen.cases += 1
    seen.kinds.update(kinds)
    seen.shapes.update(shapes)


def on_all(size: int, hands: list[Hand], action: Callable[[Team, list[Piece]], object]) -> None:
    """One rank needs no threads."""
    layouts = [[piece for hand in hands for piece in hand.ranks[rank]] for rank in range(size)]
    if size == 1:
        action(Team(), layouts[0])
    else:
        all_of(on_ranks(size, lambda team: action(team, layouts[team.rank])))


def run_cases(count: int, seed: int) -> Seen:
    seen = Seen()
    pairs = pairs_without_end(random.Random(seed))
    for number in range(count):
        state = random.Random(f"{seed} {number}")
        try:
            run_case(state, pairs, seen)
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {error!r}") from error
    return seen


def check(seen: Seen, count: int) -> None:
    assert seen.cases == count
    assert all(seen.kinds[kind] >= 0.05 * count for kind in KINDS)
    assert all(seen.pairs[pair] >= 20 for pair in product(KINDS, KINDS))
    assert all(seen.shapes[shape] >= 0.05 * count for shape in SHAPES)


@pytest.mark.usefixtures("long")
def test_every_kind_loads_into_every_kind() -> None:
    check(run_cases(CASES, seed=0), CASES)


@pytest.mark.soak
def test_every_kind_loads_into_every_kind_at_length() -> None:
    check(run_cases(BY_HAND, seed=1), BY_HAND)


def test_a_case_can_fail() -> None:
    """Two heads in each other's place, and a value of the padding's: the comparison sees both."""
    logical = random_tensor(random.Random(3), "t", "prime", arithmetic=True)
    shape = logical.shape
    for swapped in (False, True):
        storage = MemoryStorage()
        source = lay_out(random.Random(0), KINDS[0], logical, 1, fill=True)
        save(storage, 1, source.ranks[0])
        target = lay_out(random.Random(0), KINDS[0], logical, 1, fill=False)
        (piece,) = target.ranks[0]
        heads = [Piece("t", piece.tensor[r : r + 1], (r, *(0 for _ in shape[1:])), shape) for r in range(shape[0])]
        if swapped:
            first, second, *rest = heads
            exchanged = [Piece("t", a.tensor, b.offset, shape) for a, b in ((first, second), (second, first))]
            heads = [*exchanged, *rest]
        load(storage, heads)
        assert holds(target) is not swapped
    padded = next(kind for kind in KINDS if kind.__name__ == "padded")
    hand = lay_out(random.Random(1), padded, logical, 3, fill=True)
    assert holds(hand)
    made, held = next((made, held) for made, held in hand.buffers if not held.all())
    made[~held] = torch.zeros((), dtype=made.dtype)
    assert not holds(hand)
