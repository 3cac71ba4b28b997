"""The count of bytes asked for: lines of strace are read rightly, and a short run keeps its contract."""

from __future__ import annotations

import json

import pytest

from benchmarks.crash_ranks import why_no_strace
from benchmarks.reads import asked
from tests.harness.runs import trainer

TRACE = """\
11 read(3</tmp/x/2-ranks-0-to-1/step/manifest.json>, ""..., 4096) = 900
11 preadv(4</tmp/x/2-ranks-0-to-1/step/shard>, [{iov_base=""..., iov_len=70}, {iov_base=""..., iov_len=30}], 2, 0) = 100
12 preadv(5</tmp/x/2-ranks-1-to-0/step/shard>,  <unfinished ...>
11 read(9</usr/lib/python/os.py>, ""..., 99999) = 99999
13 preadv(5</elsewhere/file>,  <unfinished ...>
12 <... preadv resumed>[{iov_base=""..., iov_len=7}], 1, 4096) = 7
13 <... preadv resumed>[{iov_base=""..., iov_len=5}], 1, 4096) = 5
11 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3</usr/lib/libc.so>, 0) = 0x7f
"""


def test_calls_are_counted_by_what_they_ask_for() -> None:
    assert asked(TRACE, "/tmp/x") == {"2-ranks-0-to-1": 4196, "2-ranks-1-to-0": 7}


@pytest.mark.parametrize(
    "line",
    [
        "11 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3</tmp/x/2-ranks-0-to-1/step/shard>, 0) = 0x7f",
        "11 read(3</tmp/x/2-ranks-0-to-1/step/shard>, 0x7f) = -1 EFAULT",
        "11 read(3</tmp/x/2-ranks-0-to-1/step/shard>,  <unfinished ...>",
    ],
)
def test_what_cannot_be_counted_is_an_error(line: str) -> None:
    with pytest.raises(AssertionError):
        asked(line, "/tmp/x")


@pytest.mark.usefixtures("processes")
def test_a_short_run_counts_the_bytes_of_two_ranks() -> None:
    done = trainer("--json", "--largest", "2", module="benchmarks.reads")
    if why_no_strace():
        assert done.returncode == 1 and "Install it and run this again" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["ok"] for row in rows] == [True, True] and all(1.0 <= row["ours"] <= 1.05 for row in rows)
