"""Snapshots of the sharded state in CPU memory, taken while training goes on."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpointing import format, replicas
from checkpointing.collective import Team, as_team
from checkpointing.commit import agree_to_save, begin_save, check_save, versions
from checkpointing.errors import CheckpointError, DamagedError, LayoutError
from checkpointing.format import Manifest, digest, index_name
from checkpointing.geometry import External, Piece
from checkpointing.memory.arena import ARENA, MappedShard, arena_name
from checkpointing.memory.client import LOG, Client
from checkpointing.memory.image import Image, copy_part
from checkpointing.memory.keeper import KEEP_S
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import VERSION, Message, make_directory
from checkpointing.memory.room import check_room
from checkpointing.plan import RankPlan
from checkpointing.reader import num_threads
from checkpointing.storage import FileStorage

logger = logging.getLogger("checkpointing")

ASK_S = 1.0  # how long the keeper may take to give an arena before the snapshot is given up
START_S = 60.0  # to start
SETTLE_S = 10.0  # and to commit one that was copied, before it counts as one that hangs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a snapshot: `generation` where it was committed on every node, otherwise why not."""

    step: int
    generation: str = ""
    why: str = ""
    taken: float = 0.0  # when it was begun, by the monotonic clock
    memory: int = 0  # bytes that the run takes on this node
    backlog: int = 0  # generations that wait to become durable


@dataclass(slots=True)
class Durable:
    """What became of a generation that was to become durable."""

    step: int
    generation: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    why: str = ""


@dataclass
class _Snapshot:
    """One on its way."""

    serial: int
    step: int
    pieces: list[Piece]
    manifest: Manifest
    objects: dict[str, Any]
    durable: bool
    last: bool
    everywhere: int
    asked: float = field(default_factory=time.monotonic)
    arena: str = ""
    # Set once nothing of the state is read any more, and once it is known what became of it.
    copied: threading.Event = field(default_factory=threading.Event)
    settled: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)
    open: bool = False  # the fence was waited for: what is written from now on is of the next step
    why: str = ""
    generation: str = ""
    told: Message = field(default_factory=dict)
    sources: str = ""  # with `check_fence`: the digest of the state as it was copied


class Snapshotter:
    """Takes snapshots of one run on this rank. Collective: all ranks make one and call it alike.

    `memory` is the run's own directory on a tmpfs, the same path on every node. Snapshots lie there as generations like
    those that `save` writes, and outlive this process. Those taken with `durable=True` are written to `directory` in
    the background. At most `arenas` snapshots take room at a time. `check_fence` compares the state right
    after the copy with that when the fence opens, which finds writes outside `mutating()` between the two and costs as
    much as the copy.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        memory: str | os.PathLike[str],
        group: dist.ProcessGroup | Team | None = None,
        *,
        run_id: str = "",
        incarnation: int | None = None,
        arenas: int = 3,
        keep_s: float = KEEP_S,
        rate: float = 0,
        threads: int | None = None,
        check_fence: bool = False,
    ) -> None:
        self._team = as_team(group)
        self._directory = None if directory is None else Path(directory).resolve()
        self.memory = Path(memory).resolve()  # the keeper has a working directory of its own
        self._run_id, self._arenas = run_id, arenas
        self.check_fence = check_fence
        self.keeper_pid = 0
        self.blocked_s = 0.0  # that training waited for snapshots, in all
        team = self._team
        places = [tuple(place) for place in team.together(lambda: [socket.gethostname(), str(self.memory)])]
        nodes = sorted(set(places), key=places.index)
        self._node, self._num_nodes = nodes.index(places[team.rank]), len(nodes)
        self._local = [rank for rank, place in enumerate(places) if place == places[team.rank]]
        secret = ""

        def make() -> None:  # read by each rank for itself: it does not travel
            nonlocal secret
            secret = make_directory(self.memory)

        team.together(make)
        session, start = team.together(lambda: self._look(incarnation) if team.rank == 0 else None)[0]
        self._session, self._start = session, start
        self._serial = self._everywhere = start["serial"] - 1
        self._parent = start["parent"]
        self._image: Image | None = None
        self._layout: tuple[RankPlan | None, str, str] = None, "", ""  # its part of the manifest, under its digest
        self._sent_layout = ""
        self._shards: dict[int, MappedShard] = {}
        self._current: _Snapshot | None = None
        self._durable: dict[int, int] = {}  # serials that are to become durable, and their steps
        self._durables: list[Durable] = []
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(threads or num_threads(), thread_name_prefix="snapshot-copy")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        greeting = {
            "kind": "hello",
            "version": VERSION,
            "secret": secret,
            "session": session,
            "run_id": run_id,
            "rank": team.rank,
            "ranks": self._local,
            "nodes": [self._node, self._num_nodes],
            "arenas": arenas,
            "keep_s": keep_s,
            "durable": None if self._directory is None else str(self._directory),
            "rate": rate,
        }
        first = team.rank == self._local[0]
        self._client = Client(self.memory, greeting, self._heard, starts=first, keep_s=keep_s, lost=self._keeper_lost)
        team.together(self._wait_for_keeper)

    def _look(self, incarnation: int | None) -> tuple[str, dict[str, Any]]:
        """On rank 0: where serials go on from, over all tiers."""
        tiers: list[FileStorage] = [MappedStorage(self.memory)]
        if self._directory is not None:
            tiers.append(FileStorage(self._directory))
        starts = [begin_save(tier, incarnation) for tier in tiers]
        return secrets.token_hex(16), asdict(max(starts, key=lambda start: start.serial))

    def _wait_for_keeper(self) -> None:
        if not self._client.connected.wait(START_S):
            raise CheckpointError(
                f"the keeper of {self.memory} does not answer. What it last said is in {self.memory / LOG}; "
                "kill it if it hangs, and start the run again."
            )

    # The run's thread.

    def prepare(self, pieces: Sequence[Piece | External]) -> None:
        """Allocate the arenas that snapshots of these pieces need. Collective.

        `LayoutError` with the arithmetic where they do not fit. Otherwise the first snapshot does it.
        """
        plan, mine = agree_to_save(self._team, pieces, lambda: None, [])
        if self._image is None or self._image.plan is not plan:
            self._lay_out(plan, mine.pieces)

    def snapshot(
        self,
        step: int,
        pieces: Sequence[Piece | External],
        objects: dict[str, Any] | None = None,
        *,
        durable: bool = False,
        last: bool = False,
        wait: bool = False,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Begin a snapshot of the pieces of all ranks; they are copied until the next `mutating()`. Collective.

        Objects and volatile pieces are taken at once. With `durable` it is also written to the directory in the
        background, unless the one before still is; `last` waits its turn instead. With `wait` this returns when all is
        copied. `LayoutError` where it could not be read again, or does not fit into memory.
        """
        began = time.perf_counter()
        self.settle()
        objects, metrics = objects or {}, metrics or {}

        def check() -> None:
            check_save(step, self._run_id, self._start["incarnation"], objects, metrics)

        plan, mine = agree_to_save(self._team, pieces, check, [f"step {step}", f"durable={durable}", f"last={last}"])
        if self._image is None or self._image.plan is not plan:
            self._lay_out(plan, mine.pieces)
        written = [replace(p, tensor=p.tensor.clone()) if p.volatile else p for p in mine.pieces]
        written = replicas.averaged(self._team, plan, written)
        self._serial += 1
        save_id = digest(f"{self._session} {self._serial}".encode())
        manifest = Manifest(
            step=step,
            save_id=save_id,
            parent=self._parent,
            run_id=self._run_id,
            incarnation=self._start["incarnation"],
            serial=self._serial,
            created=time.time(),
            world_size=self._team.size,
            versions=versions(),
            metrics=metrics,
            writers=[],
            tensors=plan.tensors,
            aliases=plan.aliases,
            external=mine.external,
        )
        own = json.loads(json.dumps(objects)) if self._team.rank == self._local[0] else {}
        snapshot = _Snapshot(self._serial, step, written, manifest, own, durable, last, self._everywhere)
        if durable:
            with self._changed:
                self._durable[self._serial] = step
        self._current = snapshot
        assert self._image is not None
        self._worker.submit(self._work, snapshot, self._image)
        self.blocked_s += time.perf_counter() - began
        if wait:
            self.fence()

    @contextmanager
    def mutating(self) -> Iterator[None]:
        """Wait until the snapshot under way has been copied. To be entered before anything writes to the state."""
        self.fence()
        yield

    def fence(self) -> None:
        """Wait as `mutating` does, for hooks that fire before a write. Again without a snapshot it returns at once."""
        snapshot = self._current
        if snapshot is None or snapshot.open:
            return
        began = time.perf_counter()
        while not snapshot.copied.wait(0.02):
            if not snapshot.answered.is_set() and time.monotonic() - snapshot.asked > ASK_S:
                snapshot.answered.set()  # with no arena: a keeper that does not answer must not keep training waiting
        snapshot.open = True
        if self.check_fence and snapshot.sources and snapshot.sources != self._digest(snapshot.pieces):
            snapshot.why = "the state was written outside mutating() while it was copied"
            raise DamagedError(
                f"The state of step {snapshot.step} was written while its snapshot was copied: something changes "
                "parameters or optimizer state outside `with snapshotter.mutating():`."
            )
        self.blocked_s += time.perf_counter() - began

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of an optimizer wait as `mutating` does."""
        optimizer.register_step_pre_hook(lambda *_: self.fence())

    def settle(self) -> Outcome | None:
        """What became of the last snapshot, on all nodes. Collective; None where there was none since the last call."""
        if (snapshot := self._current) is None:
            return None
        began = time.perf_counter()
        self.fence()
        if not snapshot.settled.wait(SETTLE_S):
            snapshot.why = f"the keeper did not commit it within {SETTLE_S:.0f} s"
            self._client.hang_up()
        self._current = None
        told = self._team.together(lambda: [snapshot.generation, snapshot.why])
        whys = [why for generation, why in told if not generation]
        self.blocked_s += time.perf_counter() - began
        if whys:
            with self._changed:
                self._durable.pop(snapshot.serial, None)
            return Outcome(snapshot.step, why=next((why for why in whys if why), "it was not committed"))
        self._everywhere, self._parent = snapshot.serial, snapshot.manifest.save_id
        memory, backlog = snapshot.told.get("memory", 0), snapshot.told.get("backlog", 0)
        return Outcome(snapshot.step, snapshot.generation, "", snapshot.asked, memory, backlog)

    def durables(self) -> list[Durable]:
        """What became durable on this node, or failed to, since the last call."""
        with self._changed:
            found, self._durables = self._durables, []
            return found

    def wait_durable(self, seconds: float) -> bool:
        """Wait until everything that was to become durable is, or has failed; whether it came to that."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._durable, seconds)

    def close(self, *, finished: bool = False) -> None:
        """Let go of the arenas. With `finished` the run needs no memory any more: the keeper frees it and ends."""
        snapshot = self._current
        self._worker.shutdown(wait=True)
        self._pool.shutdown(wait=True)
        if snapshot is not None:
            snapshot.settled.wait(ASK_S)
        if finished and self._team.rank == self._local[0]:
            self._client.send({"kind": "finish"})
        self._client.close()
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.settle()
        self.close(finished=kind is None)

    def _lay_out(self, plan: RankPlan, pieces: Sequence[Piece]) -> None:
        """Lay out this rank's file, and see that the arenas fit, before anything is copied. Collective."""
        self._image = None
        image: Image | None = None

        def lay_out() -> int:
            nonlocal image
            image = Image(plan, pieces, self._team.rank)
            return image.nbytes

        sizes = self._team.together(lay_out)
        assert image is not None
        nbytes = image.nbytes
        needed = sum(sizes[rank] for rank in self._local)

        def check() -> None:
            if self._team.rank != self._local[0]:
                return
            there = sum(f.stat().st_blocks * 512 for f in self.memory.rglob("shard-*"))
            more = self._arenas * needed - min(there, self._arenas * needed)
            check_room(
                self.memory,
                more,
                f"{self._arenas} snapshots of {needed / 1e9:.2f} GB by {len(self._local)} processes, of which "
                f"{there / 1e9:.2f} GB are there",
                pinned=self._pinned,
            )

        self._team.together(check)
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()
        told = self._team.together(lambda: self._missing_arenas() if self._team.rank == self._local[0] else [])

        def allocate() -> None:
            try:
                for arena in told[self._local[0]]:
                    self._shard(arena, nbytes)
            except OSError as error:  # as ours: the others must take it for the same thing as this rank does
                raise LayoutError(f"snapshots do not fit into {self.memory}: {error}") from error

        self._team.together(allocate)
        self._image = image

    def _missing_arenas(self) -> list[str]:
        """Names of the arenas that are free, and of as many new ones as there may be."""
        names = {path.name for path in self.memory.iterdir() if path.is_dir()}
        free = [name for name in names if ARENA.fullmatch(name)]
        more = (name for n in range(10_000) if (name := arena_name(n)) not in names)
        return free + [next(more) for _ in range(self._arenas - len(names))]

    @property
    def _pinned(self) -> bool:
        return torch.cuda.is_available()

    # The background.

    def _work(self, snapshot: _Snapshot, image: Image) -> None:
        try:
            self._copy(snapshot, image)
        except Exception as error:  # training goes on without this snapshot
            snapshot.why = f"{type(error).__name__}: {error}"
            logger.warning("the snapshot of step %d failed: %s", snapshot.step, snapshot.why)
            self._client.send({"kind": "failed", "serial": snapshot.serial, "why": snapshot.why})
            snapshot.settled.set()
        finally:
            snapshot.copied.set()

    def _copy(self, snapshot: _Snapshot, image: Image) -> None:
        begin = {"kind": "begin", "serial": snapshot.serial, "everywhere": snapshot.everywhere}
        if not self._client.send(begin):
            snapshot.why = "the keeper is away, and is started again"
        else:
            snapshot.answered.wait(SETTLE_S)
        if not snapshot.arena:
            if not snapshot.why:
                snapshot.why = "the keeper did not answer in time"
                self._client.send({"kind": "failed", "serial": snapshot.serial, "why": snapshot.why})
                self._client.hang_up()
            snapshot.answered.set()
            snapshot.settled.set()
            return
        shard = self._shard(snapshot.arena, image.nbytes)
        target = shard.bytes
        image.start(target, snapshot.manifest.save_id)
        list(self._pool.map(lambda part: copy_part(part, snapshot.pieces[part.piece], target), image.parts))
        if self.check_fence:
            snapshot.sources = self._digest(snapshot.pieces)
        rank = self._team.rank
        writer, index = image.finish(target, snapshot.pieces, snapshot.manifest.save_id, snapshot.objects)
        snapshot.copied.set()
        wrote = bool(image.plan.boxes or image.plan.scalars or rank == self._local[0])
        (self.memory / snapshot.arena / index_name(rank)).write_bytes(index)
        prepared: Message = {
            "kind": "prepared",
            "serial": snapshot.serial,
            "arena": snapshot.arena,
            "writer": asdict(writer) if wrote else None,
        }
        messages, layout = [prepared], ""
        if rank == self._local[0]:
            layout, text = self._layout_text(image, snapshot.manifest)
            if layout != self._sent_layout:
                messages.insert(0, {"kind": "layout", "layout": layout, "text": text})
            prepared |= {
                "manifest": _head(snapshot.manifest),
                "layout": layout,
                "durable": snapshot.durable,
                "last": snapshot.last,
            }
        if not self._client.send(*messages):
            raise CheckpointError("the keeper went away while the state was copied")
        self._sent_layout = layout

    def _shard(self, arena: str, nbytes: int) -> MappedShard:
        """This rank's file in an arena, mapped once."""
        path = self.memory / arena
        try:
            known = self._shards.get(os.stat(path / f"shard-{self._team.rank:05d}.safetensors").st_ino)
        except FileNotFoundError:
            known = None
        if known is None or known.nbytes != nbytes:
            known = MappedShard(path, self._team.rank, nbytes, pinned=self._pinned)
            self._shards[known.identity] = known
        return known

    def _layout_text(self, image: Image, manifest: Manifest) -> tuple[str, str]:
        if self._layout[0] is not image.plan:
            whole = asdict(manifest)
            constant = {name: whole[name] for name in ("tensors", "aliases", "external")}
            text = json.dumps(constant, separators=(",", ":"))
            self._layout = image.plan, digest(text.encode()), text
        return self._layout[1], self._layout[2]

    def _digest(self, pieces: Sequence[Piece]) -> str:
        return digest("".join(replicas.digest_of(piece) for piece in pieces).encode())

    def _heard(self, message: Message) -> None:
        """In the client's thread."""
        if message["kind"] == "welcome":
            self.keeper_pid = message["pid"]
            return
        kind, serial = message["kind"], message.get("serial", -1)
        snapshot = self._current
        if snapshot is not None and snapshot.serial == serial:
            if kind == "go":
                snapshot.arena = message["arena"]
                snapshot.answered.set()
            elif kind == "skipped":
                snapshot.why = message["why"]
                snapshot.answered.set()
                snapshot.settled.set()
            elif kind == "committed":
                snapshot.generation, snapshot.told = message["generation"], message
                snapshot.settled.set()
        if kind in ("durable", "undurable"):
            with self._changed:
                if (step := self._durable.pop(serial, None)) is not None:
                    if kind == "durable":
                        self._durables.append(
                            Durable(step, message["generation"], message["seconds"], message["bytes"])
                        )
                    else:
                        self._durables.append(Durable(step, why=message["why"]))
                self._changed.notify_all()

    def _keeper_lost(self) -> None:
        """In the client's thread: whatever it had been told is forgotten with it."""
        self._sent_layout = ""
        why = "the keeper went away, and is started again"
        if (snapshot := self._current) is not None and not snapshot.settled.is_set():
            snapshot.why = why
            snapshot.answered.set()
            snapshot.settled.set()
        with self._changed:
            self._durables += [Durable(step, why=why) for step in self._durable.values()]
            self._durable.clear()
            self._changed.notify_all()


def _head(manifest: Manifest) -> dict[str, Any]:
    """What differs between snapshots of one layout, as the manifest has it."""
    names = ("step", "save_id", "parent", "run_id", "incarnation", "serial", "created", "world_size", "versions")
    head = {name: getattr(manifest, name) for name in (*names, "metrics")}
    return {"format": format.FORMAT, "version": format.VERSION, **head}
