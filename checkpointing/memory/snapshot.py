"""One snapshot on its way, with the events by which the run, the copying thread and the client wait for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpointing.format import Manifest
from checkpointing.geometry import Piece
from checkpointing.memory.image import Image, is_as_copied
from checkpointing.memory.messages import Message


@dataclass
class Snapshot:
    """One on its way."""

    serial: int
    step: int
    pieces: Sequence[Piece]
    image: Image
    manifest: Manifest
    objects: dict[str, Any]
    durable: bool
    everywhere: int
    checked: bool  # whether what was copied is compared with the state when the fence opens
    asked: float = field(default_factory=time.monotonic)
    ready: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)  # when the state is complete on each GPU
    awaited: bool = False  # training waits at the fence
    arena: str = ""
    why: str = ""
    generation: str = ""
    told: Message = field(default_factory=dict)
    target: memoryview | None = None
    copy_s: float = 0.0
    answered: threading.Event = field(default_factory=threading.Event)  # by the keeper, or it is waited for no more
    copied: threading.Event = field(default_factory=threading.Event)  # nothing of the state is read any more
    opened: threading.Event = field(
        default_factory=threading.Event
    )  # the fence: what is written now is the next step's
    settled: threading.Event = field(default_factory=threading.Event)  # what became of it is known

    def __post_init__(self) -> None:
        for device in {piece.tensor.device for piece in self.pieces if piece.tensor.is_cuda}:
            self.ready[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.ready[device].record(torch.cuda.current_stream(device))

    def fail(self, why: str) -> None:
        """The first reason stays."""
        self.why = self.why or why
        self.answered.set()
        self.settled.set()

    def is_as_copied(self) -> bool:
        """Whether the state is still what the arena holds."""
        if self.target is None:
            return True  # it was not copied
        target = self.target
        return all(is_as_copied(part, self.pieces[part.piece], target) for part in self.image.parts)
