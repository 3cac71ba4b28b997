"""The corpus: many kinds, told apart by their names, and changes at random that can be drawn again."""

from __future__ import annotations

import random

from benchmarks.hostile_corpus import changed_at_random, corpus


def test_the_corpus_is_of_many_kinds_and_its_names_tell_them_apart() -> None:
    names = [case.name for case in corpus()]
    assert len(names) == len(set(names)) > 80
    assert changed_at_random(random.Random(1)).name == changed_at_random(random.Random(1)).name
