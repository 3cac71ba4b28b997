"""`python -m trainer.report RUN [OUT]`: one HTML page of a run, from its directory alone (RUN/report.html).

Loss with resumes and failures marked, speed, what training waited for, how old the newest snapshot was, memory. The
page needs nothing from anywhere else. Exit status 2: refused.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

from checkpointing.printing import spell_out
from checkpointing.small_files import read_text
from trainer.errors import Refused
from trainer.track.files import read_lines

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 920, 240, 74, 16, 12, 30
POINTS = 1500  # of a line at most: of more the lowest and the highest of every stretch
MARKS = {"resume": "resumed", "failure": "failed", "preempt": "preempted", "resize": "other number of processes"}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; --ink: #1c2733; --faint: #8a97a5; --line: #d8dfe6; --paper: #fff;
  --a: #2463c5; --b: #d9730d; --bad: #c62828; --good: #2e7d32 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #dde4ec; --faint: #7d8a98; --line: #2f3a46; --paper: #131a21;
  --a: #78a9ff; --b: #ffab5e; --bad: #ff8a80; --good: #81c784 }} }}
body {{ margin: 2rem auto; max-width: 960px; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }}
h1 {{ margin: 0; font-size: 1.6rem }} h2 {{ margin: 2rem 0 .3rem; font-size: 1.05rem }} p {{ margin: .2rem 0 }}
dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; margin: 1.2rem 0 }}
dt {{ color: var(--faint); font-size: .8rem }}
dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }}
svg {{ width: 100%; height: auto; display: block }} text {{ fill: var(--faint); font-size: 11px }}
.grid {{ stroke: var(--line) }} .a {{ stroke: var(--a) }} .b {{ stroke: var(--b) }} .lost {{ stroke: var(--faint);
  opacity: .6 }} polyline {{ fill: none; stroke-width: 1.5; stroke-linejoin: round }}
circle.b {{ fill: var(--b) }} circle.lost {{ fill: var(--faint) }}
.mark {{ stroke-dasharray: 3 3; stroke: var(--good) }} .failure, .preempt {{ stroke: var(--bad) }}
.key {{ font-size: .8rem; color: var(--faint) }} .key span {{ margin-right: 1.2rem }} .key b {{ font-weight: 600 }}
b.a {{ color: var(--a) }} b.b {{ color: var(--b) }} b.lost {{ color: var(--faint) }} b.mark {{ color: var(--good) }}
b.failure {{ color: var(--bad) }} table {{ border-collapse: collapse; width: 100%; font-size: .85rem }}
td {{ padding: .2rem .6rem .2rem 0; border-top: 1px solid var(--line); vertical-align: top }}
pre {{ overflow-x: auto; font-size: .8rem }} summary {{ cursor: pointer }}
</style>
<h1>{title}</h1><p>{about}</p><dl>{figures}</dl>{charts}
<h2>What happened</h2><table>{events}</table>
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{config}</pre></details></html>
"""


@dataclass(frozen=True)
class Line:
    name: str
    style: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class RunPage:
    """A run as its directory tells it."""

    directory: Path
    rows: list[dict[str, Any]]
    lost: list[dict[str, Any]]  # steps that were rolled back
    events: list[dict[str, Any]]
    config: str

    @staticmethod
    def read(directory: Path) -> RunPage:
        rows, events = read_lines(directory / "metrics.jsonl"), read_lines(directory / "events.jsonl")
        if not events and not rows:
            raise Refused(
                f"{directory} is no run: it has no metrics.jsonl and no events.jsonl. Type a run's directory, such as "
                "runs/main."
            )
        config = directory / "config.yaml"
        text = ""
        with contextlib.suppress(OSError, ValueError):
            text = read_text(config)
        return RunPage(directory, rows, read_lines(directory / "metrics.discarded.jsonl"), events, text)

    def of(self, key: str, rows: Iterable[dict[str, Any]] | None = None, scale: float = 1) -> list[tuple[float, float]]:
        """(step, value) where there is one."""
        found = []
        for row in self.rows if rows is None else rows:
            step, value = row.get("step"), row.get(key)
            if is_number(step) and is_number(value):
                found.append((float(step), value * scale))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="default: RUN/report.html")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run / "report.html"
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    try:
        if arguments.out is None and out.is_symlink():
            raise Refused(f"{out} is a link to {os.readlink(out)}. Type another file: python -m trainer.report RUN OUT")
        text = page(RunPage.read(arguments.run))
        out.write_text(text, encoding="utf-8")
    except Refused as error:
        print(f"trainer.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"trainer.report: {out} cannot be written: {error.strerror}. Name another file.", file=sys.stderr)
        return 2
    print(out)
    return 0


def page(run: RunPage) -> str:
    marks = [(e["step"], e["event"]) for e in run.events if e.get("event") in list(MARKS) and is_number(e.get("step"))]
    charts = [
        (
            "Loss",
            [
                Line("training", "a", run.of("loss")),
                Line("rolled back", "lost", run.of("loss", run.lost)),
                Line("held out", "b", run.of("eval_loss"), dots=True),
            ],
            number,
        ),
        ("Tokens a second", [Line("tokens/s", "a", run.of("tokens_per_s"))], short),
        (
            "Waiting for checkpoints, milliseconds",
            [Line("ms", "a", run.of("blocked_s", scale=1e3))],
            number,
        ),
        ("Age of the newest snapshot, seconds", [Line("s", "a", run.of("snapshot_age_s"))], number),
        (
            "Memory, GB",
            [
                Line("the process of rank 0", "a", run.of("memory_bytes", scale=1e-9)),
                Line("snapshots on its machine", "b", run.of("snapshot_bytes", scale=1e-9)),
            ],
            number,
        ),
        ("Learning rate", [Line("lr", "a", run.of("lr"))], lambda value: f"{value:.2g}"),
    ]
    return PAGE.format(
        title=html.escape(f"{run.directory.name}: a run of Evershard"),
        about=html.escape(state(run)),
        figures="".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in figures(run).items()),
        charts="".join(chart(title, drawn, marks, write, zero=title != "Loss") for title, drawn, write in charts),
        events="".join(event(one) for one in run.events if one.get("event") not in ("snapshot", "commit")),
        config=html.escape(run.config),
    )


def state(run: RunPage) -> str:
    ends = [e for e in run.events if e.get("event") in ("start", "resume", "finish", "preempt", "failure")]
    words = {"finish": "finished", "preempt": "preempted", "failure": "failed"}
    word = words.get(ends[-1]["event"], "") if ends else ""
    why = f" ({ends[-1]['reason']})" if ends and ends[-1].get("reason") else ""
    return f"{word or 'not finished'}{why}; {run.directory}"


def figures(run: RunPage) -> dict[str, str]:
    losses, tokens = run.of("loss"), run.of("tokens")
    held_out, speed = run.of("eval_loss"), sorted(value for _, value in run.of("tokens_per_s"))
    attempts = sum(e.get("event") in ("start", "resume") for e in run.events)
    waited = sum(value for _, value in run.of("blocked_s"))
    computed = sum(value for _, value in run.of("step_s"))
    found = {"step": f"{losses[-1][0]:,.0f}", "loss": number(losses[-1][1])} if losses else {"step": "0"}
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        found["best held-out loss"] = f"{number(best)} at {step:.0f}"
        found["perplexity there"] = number(math.exp(min(best, 700)))
    if speed:
        found["tokens a second, middle"] = short(speed[len(speed) // 2])
    if tokens:
        found["tokens"] = short(tokens[-1][1])
    found["attempts"] = str(attempts)
    found["steps computed again"] = f"{len(run.lost):,}"
    found["waited for checkpoints"] = f"{waited:.1f} s" + (f", {waited / computed:.1%}" if computed else "")
    return found


def chart(
    title: str,
    lines_: Sequence[Line],
    marks: Sequence[tuple[int, str]],
    write: Callable[[float], str] = str,
    *,
    zero: bool = False,
) -> str:
    """An SVG of lines over steps, with zero in it if asked; nothing where there is nothing to show."""
    lines_ = [line for line in lines_ if line.points]
    values = [value for line in lines_ for _, value in line.points]
    if not values:
        return ""
    low, high = min(0.0, *values) if zero else min(values), max(values)
    ticks = round_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = (end(step for line in lines_ for step, _ in line.points) for end in (min, max))

    def x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{html.escape(write(t))}</text>'
        for t in ticks
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{t:,.0f}</text>'
        for t in round_ticks(first, last)
        if first <= t <= last and t == int(t)
    ]
    shown = [(step, event_) for step, event_ in marks if first <= step <= last]
    parts += [
        f'<line class="mark {event_}" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{MARKS[event_]} at step {step}</title></line>"
        for step, event_ in shown
    ]
    for line in lines_:
        for points in map(thinned, stretches(line.points) if line.style == "lost" else [line.points]):
            drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="{line.style}" points="{drawn}"/>')
            if line.dots or len(points) == 1:
                parts += [f'<circle class="{line.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5"/>' for s, v in points]
    key = [f'<span><b class="{line.style}">—</b> {line.name}</span>' for line in lines_] if len(lines_) > 1 else []
    key += [
        f'<span><b class="{"failure" if kind in ("failure", "preempt") else "mark"}">┆</b> {MARKS[kind]}</span>'
        for kind in dict.fromkeys(event_ for _, event_ in shown)
    ]
    label = html.escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<h2>{label}</h2><p class="key">{"".join(key)}</p>{svg}'


def stretches(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Points in stretches of rising steps: a run that was rolled back has several."""
    found: list[list[tuple[float, float]]] = []
    for point in points:
        if not found or point[0] != found[-1][-1][0] + 1:
            found.append([])
        found[-1].append(point)
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Thin points out to about `most`, the lowest and the highest of every stretch among them."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)))
    span = span if span > 1e-300 else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f * count >= span)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(start, max(end, start + 1) + 1)]


def event(one: dict[str, Any]) -> str:
    facts = ", ".join(f"{k} {v}" for k, v in one.items() if k not in ("event", "time", "monotonic", "step"))
    when = ""
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
        when = datetime.fromtimestamp(one["time"], timezone.utc).strftime("%Y-%m-%d %H:%M:%S") if "time" in one else ""
    cells = (when, str(one.get("event", "")), f"step {one['step']}" if "step" in one else "", facts)
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def is_number(value: object) -> TypeGuard[float]:
    """One that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def number(value: float) -> str:
    return f"{value:.4g}"


def short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
