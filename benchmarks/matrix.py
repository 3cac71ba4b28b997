"""Layouts into each other: trained and saved under one, resumed under another, and nothing is different.

    python -m benchmarks.matrix [--json] [--layouts NAME ...] [--precision fp32 bf16] [--every-pair]

Each layout trains a small Llama for six steps and saves. Under every layout two of these, or with --every-pair all of
the others, which takes several times as long, are then loaded and
  - saved again at once: the contents are bit-equal;
  - called: the logits are bit-equal to those of a fresh engine built from the same full tensors;
  - trained on: the next six losses are those of a run in one process that was never interrupted, within 1e-5 in fp32
    and 1e-2 in bf16. A control without Adam's moments misses that bar tenfold.
What was saved is also compared with what the engine's own API gathers, where it has one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import Row, absolute, finish, options_of
from tests.harness.engines import BARS, LAYOUTS, STEPS, contents_differ, furthest, resume, start, train_and_save
from tests.harness.worlds import fresh_world

WAIT_S = 600
STEPS_AWAY = (1, 5)  # in the list of layouts: which ones a layout is resumed from


def sources_of(names: list[str], target: str, every_pair: bool) -> list[str]:
    """The layouts that a layout is resumed from; of one alone that one."""
    at = names.index(target)
    away = range(1, len(names)) if every_pair else sorted({step % len(names) for step in STEPS_AWAY} - {0})
    return [names[(at + step) % len(names)] for step in away] or [target]


def work(top: Path, target: str, sources: list[str], precision: str) -> dict[str, Any]:
    """One layout as the source, or as the target of several."""
    warnings.filterwarnings("ignore")
    overrides, directory = [*LAYOUTS[target][1], f"precision={precision}"], top / precision
    if not sources:
        return train_and_save(overrides, directory / target)
    return {
        source: resume(overrides, directory / source, directory / f"{source} to {target}", control=number == 0)
        for number, source in enumerate(sources)
    }


def run(names: list[str], precision: str, every_pair: bool = False) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """A row a property, and for every pair of layouts how far its losses were."""
    uninterrupted = start([f"precision={precision}"]).train(1, 2 * STEPS)
    pairs, different, gathered, wrong, other_forward = {}, 0, 0, 0, 0
    trained, controls = [], []
    with tempfile.TemporaryDirectory() as directory, fresh_world(WAIT_S) as world:
        top = Path(directory)

        def on_ranks(target: str, sources: list[str]) -> dict[str, Any]:
            found: dict[str, Any] = world.run(work, LAYOUTS[target][0], top, target, sources, precision)[0]
            return found

        for name in names:
            found = on_ranks(name, [])
            trained.append(furthest(found["losses"], uninterrupted[:STEPS]))
            gathered, wrong = gathered + found["gathered"], wrong + len(found["wrong"])
        for target in names:
            sources = sources_of(names, target, every_pair)
            found = on_ranks(target, sources)
            pairs[target] = {s: furthest(found[s]["losses"], uninterrupted[STEPS:]) for s in sources}
            other_forward += sum(not found[source]["same_forward"] for source in sources)
            controls.append(furthest(found[sources[0]]["control"], uninterrupted[STEPS:]))
            for source in sources:
                different += len(contents_differ(top / precision / source, top / precision / f"{source} to {target}"))
            print(f"{precision}, into {target}: losses within {max(pairs[target].values()):.1e}", file=sys.stderr)
    bar, count = BARS[precision], sum(map(len, pairs.values()))
    furthest_pair = max(max(by_source.values()) for by_source in pairs.values())
    what = f"{precision}, {len(names)} layouts, {count} pairs"
    figures = [
        ("losses while training, from those of one process", "nats", max(trained), "lower", bar),
        ("losses after loading, from the uninterrupted run's", "nats", furthest_pair, "lower", bar),
        ("the same without Adam's moments", "nats", min(controls), "higher", 10 * bar),
        ("tensors that a re-save has otherwise", "tensors", different, "lower", 0),
        ("first forwards other than a fresh engine's", "forwards", other_forward, "lower", 0),
        (f"of {gathered} tensors stored otherwise than gathered", "tensors", wrong, "lower", 0),
    ]
    rows = [absolute(f"{what}: {name}", unit, x, better=better, bar=limit) for name, unit, x, better, limit in figures]
    return [replace(row, ok=row.ok if len(names) == len(LAYOUTS) else None) for row in rows], pairs


QUICK = {"layouts": ["ddp", "fsdp", "tp", "zero 2"], "precision": ["fp32"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which (default all)")
    parser.add_argument("--precision", nargs="+", choices=BARS, default=list(BARS), help="which (default both)")
    parser.add_argument("--every-pair", action="store_true", help="every layout into every other")
    arguments = options_of(parser, QUICK)
    rows = [
        row for precision in arguments.precision for row in run(arguments.layouts, precision, arguments.every_pair)[0]
    ]
    return finish("matrix", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
