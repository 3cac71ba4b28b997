"""How options are declared."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from trainer.errors import Refused
from trainer.options.field import free, is_bound_field, is_free_field, option, refuse_unprintable
from trainer.options.parallel import Parallel


@dataclass
class Group:
    size: int = option(3, low=1, high=9)
    words: list[str] = free(list)
    rate: float = option(0.5, low=0, free=True)
    path: str = free("x")
    plain: int = 1


def test_a_free_option_says_so_and_has_its_default() -> None:
    assert Group() == Group(3, [], 0.5, "x", 1) and Group().words is not Group().words
    told = [name for name in ("size", "words", "rate", "path", "plain", "other") if is_free_field(Group, name)]
    assert told == ["words", "rate", "path"]


@pytest.mark.parametrize(("name", "why"), [("a\nb", "holds a line break"), ("\udcc3\udcbc", "under this locale")])
def test_a_name_that_is_more_than_a_name_is_refused(name: str, why: str) -> None:
    refuse_unprintable("run.name", "größe 1")
    with pytest.raises(Refused, match=why):
        refuse_unprintable("run.name", name)


def test_of_a_free_group_an_option_may_be_bound() -> None:
    assert is_bound_field(Parallel, "reducer") and not is_bound_field(Parallel, "tp")
