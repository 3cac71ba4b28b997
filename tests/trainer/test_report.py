"""The page of a run: well-formed, with what happened in it, whatever is in the files."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.report import Line, RunPage, chart, main, page, round_ticks, short, stretches, thinned

ROWS = [
    {"step": n, "loss": 6 / n, "tokens_per_s": 900.0 + n, "step_s": 0.1, "blocked_s": 0.01, "lr": 1e-3}
    for n in range(1, 41)
]
EVENTS = [
    {"event": "start", "step": 0, "time": 0},
    {"event": "failure", "step": 17, "reason": "<b>out of memory</b>", "time": 5},
    {"event": "resume", "step": 10, "tier": "memory", "time": 9},
    {"event": "snapshot", "step": 11, "time": 9},
    {"event": "finish", "step": 40, "time": 60},
]


def write(directory: Path, rows: list[Any], events: list[Any], lost: list[Any] = []) -> Path:  # noqa: B006
    directory.mkdir(exist_ok=True)
    for name, objects in (("metrics", rows), ("events", events), ("metrics.discarded", lost)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
    return directory


class Parsed(HTMLParser):
    """Checks that tags close, and keeps what the browser would draw."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert [tag for tag in self.open if tag not in ("html", "meta")] == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] == "meta":
            self.open.pop()
        assert self.open.pop() == tag

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_a_run_with_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "eval_loss": 1.5 - row["step"] / 100} if row["step"] % 10 == 0 else row for row in ROWS]
    run = write(tmp_path / "a&b", rows, EVENTS, ROWS[10:17])
    (run / "config.yaml").write_text("model: <tiny>\n")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    text = (run / "report.html").read_text()
    found = Parsed(text)
    assert len(found.of("svg")) == 4 and found.of("svg")[0]["aria-label"] == "Loss"
    assert {line["class"] for line in found.of("polyline")} == {"a", "b", "lost"}
    marks = [line["class"] for line in found.of("line") if line["class"] != "grid"]
    assert marks == ["mark failure", "mark resume"] * 4
    assert "<b>out of memory" not in text and "&lt;b&gt;out of memory" in text and "&lt;tiny&gt;" in text
    assert "failed at step 17" in text and ">finished; " in text and "a&amp;b: a run of Evershard" in text
    for figure, value in (("attempts", "2"), ("steps computed again", "7"), ("best held-out loss", "1.1 at 40")):
        assert f"<dt>{figure}</dt><dd>{value}</dd>" in text
    assert "0.4 s, 10.0%" in text


def test_nothing_and_almost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    Parsed(page(RunPage.read(write(tmp_path / "a", [], EVENTS[:1]))))
    Parsed(page(RunPage.read(write(tmp_path / "b", ROWS[:1], []))))
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert len(RunPage.read(tmp_path / "a").rows) == 1
    assert main([str(tmp_path / "a"), str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


values = st.none() | st.floats() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
objects = st.dictionaries(st.sampled_from(["step", "loss", "lr", "event", "time", "reason", "tokens", "x"]), values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(objects, max_size=5), st.lists(objects, max_size=5))
def test_whatever_is_in_the_files(tmp_path: Path, rows: list[Any], events: list[Any]) -> None:
    run = RunPage.read(write(tmp_path, [ROWS[0], *rows], [EVENTS[0], *events]))
    Parsed(page(run))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=50))
def test_lines_stay_inside(points: list[tuple[int, float]]) -> None:
    drawn = chart("x", [Line("x", "a", [(float(step), value) for step, value in points])], [(points[0][0], "resume")])
    svg = ET.fromstring(drawn[drawn.index("<svg") :])
    for line in svg.iter("polyline"):
        for pair in (line.get("points") or "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 920 and 0 <= y <= 240


@given(st.floats(-1e12, 1e12).map(lambda v: round(v, 6)), st.floats(0, 1e12).map(lambda v: round(v, 6)))
def test_ticks_are_few_and_around(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert ticks[0] <= low + abs(low) * 1e-6 + span * 1e-6 and ticks[-1] >= (low + span) - (abs(low) + span) * 1e-6


def test_of_many_points_the_outliers_stay() -> None:
    points = [(float(n), math.sin(n / 1000)) for n in range(100_000)]
    points[777] = (777.0, 50.0)
    found = thinned(points)
    assert len(found) < 1600 and (777.0, 50.0) in found and found == sorted(found)


def test_every_time_a_run_was_rolled_back_is_a_line_of_its_own() -> None:
    assert stretches([(3.0, 1), (4.0, 2), (9.0, 3), (4.0, 5)]) == [[(3.0, 1), (4.0, 2)], [(9.0, 3)], [(4.0, 5)]]


def test_short_numbers() -> None:
    assert [short(v) for v in (0.5, 1234, 5e6, 7.25e9)] == ["0.5", "1.234k", "5M", "7.25B"]
