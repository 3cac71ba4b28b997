"""Copying one snapshot into the arena that the keeper gives for it, in the background, while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from checkpointing.errors import CheckpointError
from checkpointing.format import Manifest, digest, index_name
from checkpointing.manifest_parts import encode_layout, head_of
from checkpointing.memory.arena import Shards
from checkpointing.memory.conversation import Conversation
from checkpointing.memory.image import ImagePart, copy_part
from checkpointing.memory.messages import Message
from checkpointing.memory.snapshot import Snapshot
from checkpointing.plan import RankPlan

logger = logging.getLogger("checkpointing")

ASK_S = 3.0  # how long training waits for a keeper that gives no arena
SETTLE_S = 10.0  # how long one may take that nobody waits for, or to commit, before it counts as one that hangs
# Threads that copy from a GPU: some parts are hashed meanwhile. On the CPU torch uses all of this process's anyway.
HELPERS = 2


class Copier:
    """One rank's thread that copies snapshots, one at a time, with helpers."""

    def __init__(self, memory: Path, rank: int, first: bool, shards: Shards, keeper: Conversation) -> None:
        self._memory, self._rank, self._first, self._shards = memory, rank, first, shards
        self._keeper, self._client = keeper, keeper.client
        # A thread's first GPU would be number 0, whichever is this rank's.
        on = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else (None, ())
        self._pool = ThreadPoolExecutor(HELPERS, "snapshot-copy", *on)
        self._worker = ThreadPoolExecutor(1, "snapshot", *on)
        self._streams = threading.local()
        self._layout: tuple[RankPlan | None, str, str] = None, "", ""  # its part of the manifest, under its digest

    def submit(self, snapshot: Snapshot) -> None:
        self._worker.submit(self._work, snapshot)

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        self._pool.shutdown(wait=True)

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._copy(snapshot)
        except Exception as error:  # training goes on without this snapshot
            logger.warning("the snapshot of step %d failed: %s: %s", snapshot.step, type(error).__name__, error)
            why = f"{type(error).__name__}: {error}"
            snapshot.why = snapshot.why or why  # first: the keeper says it back to every rank, in its own words
            self._client.send({"kind": "failed", "serial": snapshot.serial, "why": why})
            snapshot.fail(why)
        finally:
            snapshot.copied.set()

    def _copy(self, snapshot: Snapshot) -> None:
        if not self._ask(snapshot):
            return
        began, image = time.perf_counter(), snapshot.image
        target = self._shards.of(snapshot.arena, image.nbytes).bytes
        image.start(target, snapshot.manifest.save_id)

        def copy(parts: Sequence[ImagePart]) -> None:
            with self._beside(snapshot):
                for part in parts:
                    copy_part(part, snapshot.pieces[part.piece], target)

        if snapshot.ready:
            list(self._pool.map(copy, [image.parts[number::HELPERS] for number in range(HELPERS)]))
        else:
            copy(image.parts)
        with self._beside(snapshot):
            writer, index = image.finish(target, snapshot.pieces, snapshot.manifest.save_id, snapshot.objects)
        snapshot.target, snapshot.copy_s = target, time.perf_counter() - began
        snapshot.copied.set()
        (self._memory / snapshot.arena / index_name(self._rank)).write_bytes(index)
        wrote = bool(image.plan.boxes or image.plan.scalars or self._first)
        prepared: Message = {
            "kind": "prepared",
            "serial": snapshot.serial,
            "arena": snapshot.arena,
            "writer": asdict(writer) if wrote else None,
        }
        messages, layout = [prepared], ""
        if self._first:
            layout, text = self._layout_text(image.plan, snapshot.manifest)
            if layout != self._keeper.known_layout:
                messages.insert(0, {"kind": "layout", "layout": layout, "text": text})
            prepared |= {"manifest": head_of(snapshot.manifest), "layout": layout, "durable": snapshot.durable}
        if snapshot.checked:
            snapshot.opened.wait()  # nothing is committed before it was compared
            if snapshot.why:
                raise CheckpointError(snapshot.why)
        # First: by the time the message is sent the keeper may be gone, and its layouts with it.
        self._keeper.known_layout = layout
        if not self._client.send(*messages):
            self._keeper.known_layout = ""
            raise CheckpointError("the keeper went away while the state was copied")

    def _ask(self, snapshot: Snapshot) -> bool:
        """Ask for an arena; whether there is one."""
        begin = {"kind": "begin", "serial": snapshot.serial, "everywhere": snapshot.everywhere}
        if not self._client.send(begin):
            snapshot.fail("the keeper is away, and is started again")
            return False
        while not snapshot.answered.wait(0.02):
            if time.monotonic() - snapshot.asked > (ASK_S if snapshot.awaited else SETTLE_S):
                snapshot.fail("the keeper did not answer in time")
                self._client.send({"kind": "failed", "serial": snapshot.serial, "why": snapshot.why})
                self._client.hang_up()
        return not snapshot.why

    @contextmanager
    def _beside(self, snapshot: Snapshot) -> Iterator[None]:
        """Copy on streams of this thread's own, which wait for the state and for nothing after it."""
        with ExitStack() as entered:
            for device, ready in snapshot.ready.items():
                if (stream := getattr(self._streams, f"of_{device.index}", None)) is None:
                    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                    setattr(self._streams, f"of_{device.index}", stream)
                stream.wait_event(ready)
                entered.enter_context(torch.cuda.stream(stream))
            yield

    def _layout_text(self, plan: RankPlan, manifest: Manifest) -> tuple[str, str]:
        if self._layout[0] is not plan:
            text = encode_layout(manifest)
            self._layout = plan, digest(text.encode()), text
        return self._layout[1], self._layout[2]
