"""Trackers of other programs: whatever goes wrong with one, training goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Guarded:
    """`alive` until something failed."""

    def __init__(self, name: str) -> None:
        self._name, self.alive = name, True

    def guard(self, action: Callable[[], object]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Exception as error:  # by intention anything: tracking must never stop training
            told = f"{type(error).__name__}: {error}"
            logger.warning("%s failed and is off for the rest of this run: %s", self._name, told)
            self.alive = False
