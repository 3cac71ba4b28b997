"""`parallel=auto`: the simplest layout whose memory fits, found by trying them in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from trainer.errors import Refused
from trainer.footprint import Footprint, plan_memory
from trainer.options.config import Config
from trainer.plan import Topology, plan_batch

USABLE = 0.9  # of a device's memory: the rest is for the allocator, the libraries and communication


@dataclass(frozen=True)
class Cluster:
    """How many processes there are, how many on a machine, and the bytes that each may use."""

    size: int
    local_size: int
    budget: int


def choose(
    config: Config,
    of: Footprint,
    cluster: Cluster,
    possible: Callable[[Topology], bool],
    suitable: Callable[[Topology], bool] = lambda _: True,
) -> tuple[Config, list[str]]:
    """The configuration with the first layout that fits, and why it was taken. `Refused` if none does.

    `possible` tells whether the model can be taken apart by these degrees, and `suitable` whether the optimizer accepts
    them.
    """
    if not of.known:
        raise Refused(
            "parallel=auto goes by memory, and what this model keeps of a forward cannot be told beforehand. Type the "
            "layout instead, such as parallel=fsdp."
        )
    usable, best = int(USABLE * cluster.budget), 0
    tried: list[tuple[str, int]] = []
    for topology, checkpointing in layouts(cluster, possible):
        if not suitable(topology):
            continue
        chosen = with_layout(config, topology, checkpointing)
        need = plan_memory(chosen, of, topology, plan_batch(chosen, topology.data_size).rounds).total
        if need <= usable:
            said = f"{topology}{', activation checkpointing' if checkpointing else ''}"
            lines = [f"parallel=auto takes the first layout that fits {_gb(usable)} a process: {said}, {_gb(need)}"]
            lines += [f"tried before: {tried[0][0]}, {_gb(tried[0][1])}"] if tried else []
            return chosen, lines
        tried.append((str(topology), need))
        best = min(best or need, need)
    if not tried:
        raise Refused(
            f"parallel=auto finds no layout of {cluster.size} process(es) that this optimizer accepts. Type "
            "optimizer=adamw, or the layout instead."
        )
    raise Refused(
        f"parallel=auto finds no layout of {cluster.size} process(es) that fits: the model needs {_gb(best)} a process "
        f"at least, and {_gb(usable)} of {_gb(cluster.budget)} may be used. Start "
        f"{-(-best // max(1, usable)) * cluster.size} processes, or type method=lora or parallel.local_batch=1."
    )


def layouts(cluster: Cluster, possible: Callable[[Topology], bool]) -> Iterator[tuple[Topology, bool]]:
    """Layouts from the fastest to the thriftiest, each with or without activation checkpointing.

    Whole copies; shards within a machine, which gather over its fast links, then across machines; layers computed
    twice; split layers, within a machine; and stages.
    """
    size = cluster.size
    within, across = _divisors(size, upto=cluster.local_size), _divisors(size)
    shards = [n for n in across if n in within or n == size or n % cluster.local_size == 0]
    for shard in shards:
        yield Topology(dp_replicate=size // shard, dp_shard=shard), False
    yield Topology(dp_shard=size), True
    tensor = [n for n in within if n > 1 and possible(Topology(tp=n))]
    for tp in tensor:
        yield Topology(dp_shard=size // tp, tp=tp), True
    for pp in (n for n in across if n > 1 and possible(Topology(pp=n))):
        for tp in [1, *(n for n in tensor if size % (n * pp) == 0)]:
            yield Topology(dp_shard=size // (pp * tp), tp=tp, pp=pp), True


def with_layout(config: Config, topology: Topology, checkpointing: bool) -> Config:
    parallel = replace(
        config.parallel,
        **asdict(topology),
        activation_checkpointing=checkpointing or config.parallel.activation_checkpointing,
    )
    return replace(config, parallel=parallel)


def memory_of(device: torch.device, local_size: int) -> int:
    """Bytes that a process may use: those of its GPU, or its share of the machine's or the container's memory.

    Not what is free just now, which every process would see otherwise.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits) // local_size


def _divisors(size: int, upto: int | None = None) -> list[int]:
    return [n for n in range(1, min(size, upto or size) + 1) if size % n == 0]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
