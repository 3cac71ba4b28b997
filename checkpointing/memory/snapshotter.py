"""Snapshots of the sharded state in CPU memory, taken while training goes on."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from checkpointing import replicas
from checkpointing.collective import Team, as_team
from checkpointing.errors import CheckpointError, DamagedError, LayoutError
from checkpointing.format import Manifest, digest
from checkpointing.geometry import External, Piece
from checkpointing.lease import Lease
from checkpointing.memory.allocation import Arenas, Node
from checkpointing.memory.conversation import Conversation
from checkpointing.memory.copying import SETTLE_S, Copier
from checkpointing.memory.directory import FINISHED, KEEP_S, LOG, join_start, keeper_lock, make_directory, remove
from checkpointing.memory.image import Image
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import VERSION
from checkpointing.memory.pending_writes import Durable
from checkpointing.memory.snapshot import Snapshot
from checkpointing.plan import RankPlan
from checkpointing.saving import agree_to_save, begin_save, check_save, versions
from checkpointing.storage import Storage
from checkpointing.stores import file_of, open_storage, shared_place

logger = logging.getLogger("checkpointing")

START_S = 60.0  # that a keeper may take to start


@dataclass(frozen=True, slots=True)
class SnapshotOutcome:
    """How a snapshot ended: `generation` where it was committed on every node, otherwise why not."""

    step: int
    generation: str = ""
    why: str = ""
    taken: float = 0.0  # when it was begun, by the monotonic clock
    memory: int = 0  # bytes that the run takes on this node
    backlog: int = 0  # generations that wait to become durable
    durable: bool = False  # whether it was to become durable
    copy_s: float = 0.0  # that copying and hashing took on this rank, in the background


class Snapshotter:
    """Takes snapshots of one run on this rank. Collective: all ranks make one and call it alike.

    `memory` is the run's own directory on a tmpfs, the same path on every node. Snapshots lie there as generations like
    those that `save` writes, and outlive this process. Those taken with `durable=True` are written to `directory` in
    the background, at `rate` bytes a second where that is given. At most `arenas` snapshots take room at a time. With
    `check_fence` what was copied is compared with the state when the fence opens, and committed only then: that finds
    writes outside `mutating()`, and costs more than the copy. Of a directory that a rank holds a `lease` of, nothing is
    written once another process has it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage | None,
        memory: str | os.PathLike[str],
        group: dist.ProcessGroup | Team | None = None,
        *,
        run_id: str = "",
        incarnation: int | None = None,
        arenas: int = 3,
        keep_s: float = KEEP_S,
        start_s: float = START_S,
        rate: float = 0,
        check_fence: bool = False,
        lease: Lease | None = None,
    ) -> None:
        self._team = team = as_team(group)
        self._durable = None if directory is None else shared_place(open_storage(directory))
        if directory is not None and self._durable is None:
            raise LayoutError(f"snapshots are made durable by another process, which does not see {directory}")
        self.memory = Path(memory).resolve()  # the keeper has a working directory of its own
        self._run_id, self._start_s = run_id, start_s
        self.check_fence = check_fence
        self.blocked_s = 0.0  # that training waited for snapshots, in all
        node = Node.of(team, self.memory)
        self._first = team.rank == node.ranks[0]
        team.together(lambda: make_directory(self.memory) and None)  # its secret does not travel
        session, start = team.together(lambda: self._look(incarnation) if team.rank == 0 else None, long=True)[0]
        self._session, self._start = session, start
        self._serial, self._parent = start["serial"] - 1, start["parent"]
        self._everywhere = 0  # the last serial that was committed on all nodes
        self._busy = False  # whether any node still writes what is to become durable
        self._image: Image | None = None
        alive: list[IO[bytes]] = []
        team.together(lambda: alive.append(join_start(self.memory, session)))
        self._alive = alive[0]
        self._arenas = Arenas(team, node, self.memory, arenas)
        told = team.together(lambda: _as_told(lease, self._durable))
        greeting = {
            "kind": "hello",
            "version": VERSION,
            "session": session,
            "incarnation": start["incarnation"],
            "run_id": run_id,
            "rank": team.rank,
            "ranks": node.ranks,
            "nodes": [node.number, node.count],
            "arenas": arenas,
            "keep_s": keep_s,
            "durable": self._durable,
            "store": None if self._durable is None or (file := file_of(self._durable)) is None else str(file),
            "rate": rate,
            "everywhere": 0,
            "lease": next((one for one in told if one is not None), None),
        }
        self._keeper = Conversation(self.memory, greeting, starts=self._first, keep_s=keep_s)
        self._copier = Copier(self.memory, team.rank, self._first, self._arenas.shards, self._keeper)
        self._keeper.client.start()
        try:
            team.together(self._wait_for_keeper, long=True)
        except BaseException:
            self.close()
            raise

    def _look(self, incarnation: int | None) -> tuple[str, dict[str, Any]]:
        """Find where serials go on from, over all tiers. Rank 0 alone calls it."""
        tiers: list[Storage] = [MappedStorage(self.memory)]
        if self._durable is not None:
            tiers.append(open_storage(self._durable))
        starts = [begin_save(tier, incarnation) for tier in tiers]
        return secrets.token_hex(16), asdict(max(starts, key=lambda start: start.serial))

    def _wait_for_keeper(self) -> None:
        if not self._keeper.wait(self._start_s):
            raise CheckpointError(
                f"the keeper of {self.memory} did not answer within {self._start_s:g} s. What it last said is in "
                f"{self.memory / LOG}; kill it if it hangs, and start the run again."
            )

    @property
    def keeper_pid(self) -> int:
        """The process of the keeper; 0 before one has said welcome."""
        return self._keeper.keeper_pid

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
        check_replicas: bool = False,
    ) -> None:
        """Begin a snapshot of the pieces of all ranks; they are copied until the next `mutating()`. Collective.

        Objects and volatile pieces are taken at once. With `durable` it is also written to the directory in the
        background, unless the one before still is; `last` waits its turn instead. With `wait` this returns when all is
        copied. `LayoutError` where it could not be read again, or does not fit into memory. `check_replicas` compares
        what several ranks hold, while the run waits (`ReplicaError`).
        """
        began = time.perf_counter()
        self.settle()
        objects, metrics = objects or {}, metrics or {}

        def check() -> None:
            check_save(step, self._run_id, self._start["incarnation"], objects, metrics)
            if durable and self._durable is None:
                raise LayoutError("durable=True, and this Snapshotter was made without a directory to write to")

        plan, mine = agree_to_save(self._team, pieces, check, [f"step {step}", f"durable={durable}", f"last={last}"])
        if self._image is None or self._image.plan is not plan:
            self._lay_out(plan, mine.pieces)
        assert self._image is not None
        if check_replicas:
            replicas.check_replicas(self._team, plan, mine.pieces)
        written = [replace(p, tensor=p.tensor.clone()) if p.volatile else p for p in mine.pieces]
        written = replicas.averaged(self._team, plan, written)
        self._serial += 1
        manifest = Manifest(
            step=step,
            save_id=digest(f"{self._session} {self._serial}".encode()),
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
        if durable and self._busy and not last:  # as it was when the last one was settled
            self._weigh(self._team.together(self._keeper.durables.state))
        if durable and self._busy and not last:
            why = "the one before it is still being written: the disk is slower than durable ones are asked for"
            self._keeper.durables.fail(step, why)
            durable = False
        if durable:
            self._keeper.durables.expect(self._serial, step)
        self._keeper.current = Snapshot(
            self._serial,
            step,
            written,
            self._image,
            manifest,
            json.loads(json.dumps(objects)) if self._first else {},
            durable,
            self._everywhere,
            self.check_fence,
        )
        self._copier.submit(self._keeper.current)
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
        snapshot = self._keeper.current
        if snapshot is None or snapshot.opened.is_set():
            return
        began = time.perf_counter()
        snapshot.awaited = True
        snapshot.copied.wait()
        changed = snapshot.checked and not snapshot.is_as_copied()
        if changed:
            snapshot.why = "the state was written outside mutating() while it was copied"
        snapshot.opened.set()
        self.blocked_s += time.perf_counter() - began
        if changed:
            raise DamagedError(
                f"The state of step {snapshot.step} was written while its snapshot was copied: something changes "
                "parameters or optimizer state outside `with snapshotter.mutating():`."
            )

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of an optimizer wait as `mutating` does."""
        optimizer.register_step_pre_hook(lambda *_: self.fence())

    def settle(self) -> SnapshotOutcome | None:
        """Settle the last snapshot on all nodes. Collective; None where there was none since the last call."""
        if (snapshot := self._keeper.current) is None:
            return None
        began = time.perf_counter()
        self.fence()
        if not snapshot.settled.wait(SETTLE_S):
            snapshot.fail(f"the keeper did not commit it within {SETTLE_S:.0f} s")
            self._keeper.client.hang_up()
        self._keeper.current = None
        told = self._team.together(lambda: [self._keeper.durables.state(), snapshot.generation, snapshot.why])
        whys = [why for _, generation, why in told if not generation]
        self._weigh([state for state, *_ in told], {snapshot.serial} if whys else set())
        self.blocked_s += time.perf_counter() - began
        if whys:
            why = next((why for why in whys if why), "it was not committed")
            self._keeper.durables.forget(snapshot.serial)
            return SnapshotOutcome(snapshot.step, why=why, durable=snapshot.durable)
        self._everywhere, self._parent = snapshot.serial, snapshot.manifest.save_id
        self._keeper.committed_everywhere(snapshot.serial)
        memory, backlog = snapshot.told.get("memory", 0), snapshot.told.get("backlog", 0)
        return SnapshotOutcome(
            snapshot.step, snapshot.generation, "", snapshot.asked, memory, backlog, snapshot.durable, snapshot.copy_s
        )

    def _weigh(self, states: Sequence[Sequence[Sequence[int]]], failed: Set[int] = frozenset()) -> None:
        """Decide, from state that all ranks share, whether a durable write is still running.

        So every node starts or skips the next one alike.
        """
        failed = {*failed, *(serial for _, serials in states for serial in serials)}
        self._busy = any(set(serials) - failed for serials, _ in states)
        if self._first:
            for serial in failed:  # elsewhere: this node may have committed it, and waits for the others in vain
                self._keeper.cancel(serial)

    def durables(self) -> list[Durable]:
        """Take the durable writes of this node that ended since the last call, well or not."""
        return self._keeper.durables.take()

    def wait_durable(self, seconds: float) -> bool:
        """Wait until all that was to become durable is, or has failed, on all nodes; whether it came to that.

        Collective. What fails on one node is given up on the others; ranks look at each other every second.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._keeper.durables.wait(max(0.0, min(1.0, deadline - time.monotonic())))
            told = self._team.together(lambda: [self._keeper.durables.state(), time.monotonic() >= deadline])
            self._weigh([state for state, _ in told])
            if not any(serials for (serials, _), _ in told):
                return True
            if any(late for _, late in told):
                return False

    def close(self, *, finished: bool = False) -> None:
        """Let go of the arenas. With `finished` the run needs no memory any more: the keeper frees it and ends."""
        if (snapshot := self._keeper.current) is not None and not snapshot.opened.is_set():
            if snapshot.checked:
                snapshot.fail("it was given up")
            snapshot.opened.set()
        self._copier.close()
        if snapshot is not None:
            snapshot.settled.wait(SETTLE_S)
        if finished and self._first:
            try:
                (self.memory / FINISHED).touch()
            except FileNotFoundError:  # with the directory: there is nothing to free
                pass
            except OSError as error:  # all that was to be kept is: the memory goes when its time is over
                logger.warning(
                    "%s is freed later: its keeper does not hear that the run has ended: %s", self.memory, error
                )
        self._keeper.client.close()
        self._arenas.shards.close()
        self._alive.close()
        if finished and self._first:
            with suppress(OSError), keeper_lock(self.memory) as lock:  # the keeper may be deleting it
                if lock is not None:  # it died
                    remove(self.memory)

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        finished = False
        try:
            if kind is None:
                self.settle()
                finished = True
        finally:
            self.close(finished=finished)

    def _lay_out(self, plan: RankPlan, pieces: Sequence[Piece]) -> None:
        self._image = None  # in case there is no room for the new one
        self._image = self._arenas.lay_out(plan, pieces)


def _as_told(lease: Lease | None, durable: str | None) -> list[Any] | None:
    """A lease for keepers, which look whether it still holds; not of a store whose file they do not load."""
    if lease is None or (place := shared_place(lease.storage)) is None:
        return None
    if (file := file_of(place)) is not None and (durable is None or file_of(durable) != file):
        return None
    return [place, lease.number, lease.claim.decode()]
