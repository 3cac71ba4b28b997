"""The errors that end a run on purpose."""

from __future__ import annotations


class Refused(ValueError):
    """Configuration, data or a directory that cannot be used. One paragraph: what, why, and what to type next."""


class AlsoRefused(Refused):
    """What another process has refused for all, and says."""


class TrainingFailed(RuntimeError):
    """Training cannot go on, such as a loss that is not finite; what was saved stays as it is."""
