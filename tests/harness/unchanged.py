"""Whether a change of shape has changed a number: every layout and kind of method, recorded before and compared after.

    python -m tests.harness.unchanged record DIR [--layouts NAME ...] [--methods NAME ...]
    python -m tests.harness.unchanged compare DIR [the same]

Each pair trains a small Llama with dropout for four steps, saves, and trains on; a second engine loads the checkpoint
and trains on as well. `record` keeps the checkpoint and the losses. `compare` does the same with the code as it is now,
and resumes the recorded checkpoint too: losses and the checkpoints' tensors must be equal bit for bit. The exit status
is 1 where any differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpointing import load, save
from tests.harness.engines import LAYOUTS, Started, contents_differ, start
from tests.harness.worlds import SharedWorld, fresh_world

WAIT_S = 600
SAVED, LAST = 4, 6  # steps
SPARSE = ["method.density=0.05", "method.budget_rank=1", "method.rank=4"]
METHODS: dict[str, list[str]] = {
    "full": ["method=full"],
    "lora": ["method=lora"],
    "selective": ["method=selective", "method.parameters=[norm,embed]"],
    "once": ["method=s2ft", "method.densities=[o_proj:0.34,down_proj:0.1]"],
    "promoted": ["method=spt", *SPARSE, "method.promote_rank=2"],
    "renew": ["method=lift", *SPARSE, "method.every=3"],
    "regrow": ["method=spiel", *SPARSE, "method.every=3", "method.window=2"],
    "regrow by sm3": ["method=spiel_ma", *SPARSE, "method.every=3"],
    "narrow": ["method=sara", "method.threshold=0.005", "method.every=3"],
    "rewind": ["method=lt_sft", *SPARSE, "method.every=3"],
}


def overrides_of(method: str, layout: str) -> list[str]:
    words = [*METHODS[method], *LAYOUTS[layout][1], f"train.steps={2 * LAST}"]
    if any("tp" in word for word in words):  # dropout inside of a split layer is refused
        return words
    return [*words, "model.dropout=0.1", *(["method.dropout=0.1"] if method == "lora" else [])]


def trace(overrides: list[str], directory: Path, recorded: Path | None) -> dict[str, list[float]]:
    """The losses of one pair, by kind, on every rank. The checkpoint is left in `directory`."""
    started = start(overrides)
    losses = {"first": started.train(1, SAVED)}
    save(directory, SAVED, started.training.pieces())
    losses["then"] = started.train(SAVED + 1, LAST)
    started.training.close()
    losses["resumed"] = resumed(overrides, directory)
    if recorded is not None:
        losses["resumed from the recorded one"] = resumed(overrides, recorded)
    return losses


def resumed(overrides: list[str], source: Path) -> list[float]:
    started: Started = start(overrides, seed=0)
    load(source, started.training.pieces_for)
    started.training.publish()
    losses = started.train(SAVED + 1, LAST)
    started.training.close()
    return losses


def traces(
    world: SharedWorld, layouts: Sequence[str], methods: Sequence[str], top: Path, recorded: Path | None = None
) -> dict[str, dict[str, list[float]]]:
    """The losses of every pair, by kind."""
    found = {}
    for layout in layouts:
        for method in methods:
            pair = f"{method}, {layout}"
            before = None if recorded is None else recorded / pair
            found[pair] = world.run(trace, LAYOUTS[layout][0], overrides_of(method, layout), top / pair, before)[0]
            print(f"{pair}: {found[pair]['resumed'][-1]!r}", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, list[float]], after: dict[str, list[float]]) -> list[str]:
    """The losses of a pair that are not bit-equal, a line each kind."""
    return [
        f"losses {kind}: {expected} before, {losses} now"
        for kind, losses in after.items()
        if losses != (expected := before.get(kind, before["resumed"]))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.unchanged", description=__doc__)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which (default all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which (default all)")
    arguments = parser.parse_args(argv)
    top, file = arguments.directory, arguments.directory / "record.json"
    with fresh_world(WAIT_S) as world:
        if arguments.command == "record":
            found = traces(world, arguments.layouts, arguments.methods, top)
            file.write_text(json.dumps(found))
            print(f"{len(found)} pairs recorded in {top}")
            return 0
        known = json.loads(file.read_text())
        with tempfile.TemporaryDirectory() as directory:
            found = traces(world, arguments.layouts, arguments.methods, Path(directory), top)
            lines = {pair: differences(known[pair], losses) for pair, losses in found.items()}
            for pair in found:
                other = contents_differ(top / pair, Path(directory) / pair)
                lines[pair] += [f"{name} has another content in the checkpoint" for name in other]
    changed = {pair: told for pair, told in lines.items() if told}
    for pair, told in changed.items():
        print("\n  ".join([f"{pair}:", *told]))
    print(f"{len(found) - len(changed)} of {len(found)} pairs are unchanged")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
