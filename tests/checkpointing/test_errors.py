"""What is said of a library's error."""

from __future__ import annotations

import pytest
from omegaconf.errors import ConfigKeyError

from checkpointing.errors import first_few, reason_of


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such thing"), "no such thing"),
        (ValueError("no such thing\nLook it up at our site"), "no such thing"),
        (ValueError("\n\n  no such thing\n"), "no such thing"),
        (
            ValueError("Field 'size' is wrong:\n    TypeError:\n  expected int"),
            "Field 'size' is wrong: TypeError: expected int",
        ),
        (ValueError("it ends here:"), "it ends here:"),
        (ValueError(), "ValueError()"),
        (KeyError("size"), "KeyError('size')"),
        (ConfigKeyError("no key a\n    full_key: a"), "no key a"),
    ],
)
def test_the_line_holds_the_reason(error: Exception, said: str) -> None:
    assert reason_of(error) == said


def test_the_first_few_of_many() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(list("abcdefg"), 3) == "a, b, c and 4 more"
