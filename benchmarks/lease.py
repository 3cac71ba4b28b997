"""The lease's protocol in a million orders of three processes, with pauses, crashes, releases and stale listings.

    python -m benchmarks.lease [--orders N] [--seed N] [--json]

In no order may a process write after another one has come to hold the directory. Each control takes a part of the
protocol away, the first the numbers that only grow, as an earlier protocol was, and must fail in some of its orders.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from benchmarks.report import absolute, cores, finish, options_of
from tests.harness import lease_model

QUICK = {"orders": 20_000}
BATCH = 2_000


def batch(control: str, first: int) -> tuple[int, int, int]:
    """Count, in `BATCH` orders, those in which two wrote, the writes and the replacements."""
    variant = lease_model.CONTROLS[control] if control else lease_model.Variant()
    worlds = [lease_model.run(seed, variant) for seed in range(first, first + BATCH)]
    return sum(bool(w.wrong) for w in worlds), sum(w.writes for w in worlds), sum(w.replaced for w in worlds)


def campaign(pool: ProcessPoolExecutor, control: str, orders: int, seed: int) -> tuple[int, int, int]:
    batches = pool.map(partial(batch, control), range(seed, seed + orders, BATCH))
    wrong, writes, replaced = zip(*batches, strict=True)
    return sum(wrong), sum(writes), sum(replaced)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease", description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=1_000_000, help="how many (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other orders (default 0)")
    arguments = options_of(parser, QUICK)
    with ProcessPoolExecutor(cores()) as pool:
        wrong, writes, replaced = campaign(pool, "", arguments.orders, arguments.seed)
        rows = [
            absolute(f"two write at once, in {arguments.orders:,} orders", "orders", wrong, better="lower", bar=0),
            absolute("writes in them", "writes", writes, better="higher", bar=arguments.orders),
            absolute("holders replaced in them", "holders", replaced, better="higher", bar=arguments.orders / 10),
        ]
        for control in lease_model.CONTROLS:
            wrong, _, _ = campaign(pool, control, min(arguments.orders, 20_000), arguments.seed)
            rows.append(absolute(f"control: {control}, in 20,000 orders", "orders", wrong, better="higher", bar=1))
    return finish("lease", rows, as_json=arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
