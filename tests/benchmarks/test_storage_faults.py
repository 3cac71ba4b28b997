"""A short version of the campaign, one fault for each kind of promise, and that it would see what it looks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.storage_faults import COLUMNS, Campaign, Cell, Place, cells_of, stalls_of
from tests.harness.faulty import READS, Call, Fault
from tests.harness.runs import rows

pytestmark = pytest.mark.usefixtures("processes")

SHARD = "run/checkpoints/step-#-#/shard-#.safetensors"
CELLS = [
    Cell("memory", Fault(Call("keeper", "serve", "fsync", SHARD), "EIO", times=1)),
    Cell("memory", Fault(Call("keeper", "serve", "create", SHARD), "ENOSPC")),
    Cell("memory", Fault(Call("trainer", "train", "write", "run/metrics.jsonl"), "EDQUOT", after=2)),
    Cell("memory", Fault(Call("trainer", "start", "fsync", "run"), "ESTALE", times=1)),
    Cell("memory", Fault(Call("keeper", "serve", "write", SHARD), stall_s=3, times=1)),
    Cell("disk", Fault(Call("trainer", "train", "create", "run/checkpoints/step-#-#/COMMIT"), "EROFS", times=1)),
    Cell("resumed", Fault(Call("trainer", "start", "preadv", SHARD), "ESTALE", times=1)),
    Cell("resumed", Fault(Call("trainer", "start", "scandir", "run/checkpoints"), "EIO", times=1)),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("campaign"))
    assert len(campaign.record(["memory"])["memory"]) > 150
    yield campaign


def test_runs_go_on_past_a_storage_that_fails(campaign: Campaign) -> None:
    tried = [campaign.run(cell) for cell in CELLS]
    assert [(str(one.cell), one.wrong) for one in tried if one.wrong] == []
    ended = [str(one.cell) for one in tried if one.statuses[0]]
    assert ended == [str(CELLS[3])]  # a start
    assert sum(bool(one.hits) for one in tried) >= len(CELLS) - 1  # a commit is a link, where there are links


def test_every_kind_of_call_is_tried_with_every_error_that_it_may_give() -> None:
    calls = {
        "memory": {Call("trainer", "train", "fsync", "run"): 3, Call("keeper", "serve", "read", "memory"): 1},
        "disk": {Call("trainer", "train", "fsync", "run"): 5},  # known from the first
        "launched": {Call("launcher", "start", "mkdir", "run"): 1, Call("trainer", "train", "write", "run"): 1},
    }
    cells = cells_of(calls, random.Random(0))
    assert len(cells) == len({str(cell) for cell in cells}) == 2 * (5 + 2 + 5)
    assert {cell.fault.error for cell in cells if cell.fault.call.name in READS} == {"EIO", "ESTALE"}
    stalls = stalls_of(cells, (45.0, 120.0), random.Random(0))
    assert sorted({(cell.fault.stall_s, cell.fault.times) for cell in stalls}) == [(45.0, 1), (120.0, 1)]
    assert len(stalls) == 2 * 2  # a tmpfs does not stall


@pytest.mark.parametrize("what", ["lost", "rows", "state", "status"])
def test_what_is_wrong_is_seen(campaign: Campaign, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same judgement of a run that was tampered with before it is compared."""
    cell = Cell("disk", Fault(Call("trainer", "train", "fsync", "run/nowhere"), "EIO", times=1))
    inner = Place.run

    def run(place: Place, *arguments: object) -> tuple[int, str]:
        status, said = inner(place, *arguments)  # type: ignore[arg-type]
        if what == "lost":
            (shard,) = place.checkpoints.glob("step-*9-*/shard-*")
            shard.write_bytes(shard.read_bytes()[:-8] + b"\xff" * 8)
        elif what == "rows":
            lines = (place.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
            (place.run_dir / "metrics.jsonl").write_text("".join(lines[:4] + lines[5:]))
        elif what == "state":
            campaign.state = {name: tensor + 1 for name, tensor in campaign.state.items()}
        else:
            status = 3
        return status, said

    monkeypatch.setattr(Place, "run", run)
    monkeypatch.setattr(campaign, "state", dict(campaign.state))
    assert what in COLUMNS and what in {column for column, _ in campaign.run(cell).wrong}


def test_what_was_reported_durable_is_read_from_the_events(campaign: Campaign) -> None:
    assert [row["step"] for row in campaign.rows] == list(range(1, 10))
    assert rows(Path("/nowhere")) == []
