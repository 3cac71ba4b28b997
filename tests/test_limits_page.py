"""docs/limits.md says what the code does: every limit and every option in its table."""

from __future__ import annotations

import re

from checkpointing import lease_protocol, patience, small_files
from checkpointing.memory import client, copying, flush, keeper, snapshotter
from checkpointing.memory.directory import KEEP_S
from tests.harness.processes import ROOT
from trainer import saver
from trainer.compose import compose

PAGE = (ROOT / "docs" / "limits.md").read_text()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def seconds(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) s\b", cell)]


def test_every_option_of_the_table_has_the_default_it_says() -> None:
    config = compose([])
    of = {
        "elastic.patience_s": config.elastic.patience_s,
        "elastic.timeout_s": config.elastic.timeout_s,
        "elastic.join_s": config.elastic.join_s,
        "elastic.grace_s": config.elastic.grace_s,
        "checkpoint.memory.start_s": config.checkpoint.memory.start_s,
        "checkpoint.memory.keep_s": config.checkpoint.memory.keep_s,
    }
    named = {option for _, _, cell in TABLE[1:] for option in re.findall(r"`([\w.]+)`", cell)}
    assert named == {*of, "checkpoint.fail_after"}
    for what, limit, cell in TABLE[1:]:
        for option in set(re.findall(r"`([\w.]+)`", cell)) & set(of):
            assert of[option] in seconds(limit), f"{what}: {option} is {of[option]}"


def test_the_library_s_own_limits_are_those_of_the_options_and_of_the_table() -> None:
    config = compose([])
    assert patience.PATIENCE.seconds == config.elastic.patience_s and patience.WARN_S == 60
    assert (config.checkpoint.memory.keep_s, config.checkpoint.memory.start_s) == (KEEP_S, snapshotter.START_S)
    limits = {what: limit for what, limit, _ in TABLE[1:]}
    for start, value in {
        "the same, while nothing": flush.WAIT_S,
        "a keeper with nothing": keeper.EMPTY_S,
        "a keeper that is to commit": copying.SETTLE_S,
        "a read that fails": sum(small_files.RETRY_S),
        "that of the last step": sum(saver.LAST_WAITS_S),
        "the holder of a run directory": lease_protocol.EXPIRY_S,
    }.items():
        (limit,) = [limit for what, limit in limits.items() if what.startswith(start)]
        assert seconds(limit) == [value], start
    assert client.RESTART_S < snapshotter.START_S  # a keeper that dies while it starts is started again
