"""How an option is declared: its default, its bounds, and whether a run may go on with another value."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from trainer.errors import Refused


def option(default: Any, low: float, high: float = float("inf"), *, free: bool = False) -> Any:
    """A number with its default and its bounds, both included; and whether it is `free`."""
    return field(default=default, metadata={"low": low, "high": high, "free": free})


def free(default: Any) -> Any:
    """An option that does not change the result: a run may go on with another value of it.

    A class is called for its default.
    """
    metadata = {"free": True}
    made = isinstance(default, type)
    return field(default_factory=default, metadata=metadata) if made else field(default=default, metadata=metadata)


def bound(default: Any) -> Any:
    """An option that changes the result, in a group whose others are free."""
    return field(default=default, metadata={"bound": True})


def is_bound_field(owner: type, name: str) -> bool:
    """Whether an option of a group is not free although its group is."""
    return any(one.name == name and one.metadata.get("bound") for one in fields(owner))


def is_free_field(owner: type, name: str) -> bool:
    """Whether an option of a group, or of a choice of it, is free."""
    return any(one.name == name and one.metadata.get("free") for one in fields(owner))


def refuse_unprintable(key: str, name: str) -> None:
    """Refuse a name that would be more than a name in a job's script, a log or a terminal."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise Refused(f"{key}={name!r} cannot be read as text under this locale. Put LC_ALL=C.UTF-8 in front.")
    if not name.isprintable():
        raise Refused(f"{key}={name!r} holds a line break or a control character. Type {key}=NAME without it.")
