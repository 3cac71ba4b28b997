"""Sparse fine-tuning against peft's LoRA and sparse tuners, and against full fine-tuning.

    python -m benchmarks.methods [--json] [--pairs N] [--small] [--engines NAME ...]

A Llama of 134 million parameters, one sequence of 128 tokens, fp32, AdamW, clipping. Sides take one step each in turn.
peft's sparse tuners train the very entries that ours trains, and their losses are asserted equal to ours; against LoRA
the selected entries' gradients are asserted equal to dense autograd's. Then, under every engine on two processes, what
a step sends (bytes over the connections between them) against full fine-tuning, and a search for tensors of the size
of a weight that are none.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from peft.tuners.supertuning.config import SupertuningConfig
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import Row, absolute, compared, finish, options_of
from checkpointing import Piece, save
from tests.harness.engines import feed_for, local_of, training_here
from tests.harness.peak import Peak, parts_of
from tests.harness.worlds import on_ranks
from trainer.compose import compose
from trainer.data.dataset import Batch, Windows
from trainer.loop import optimize
from trainer.methods import build
from trainer.methods.sparse.layer import SparseLayer, sparse_layers
from trainer.models import build_model
from trainer.options.config import Config
from trainer.training import Training

MODEL = [
    "model.hidden_size=768",
    "model.intermediate_size=2048",
    "model.num_layers=12",
    "model.num_heads=12",
    "model.num_kv_heads=12",
    "model.vocab_size=32000",
]
SMALL = [
    "model.hidden_size=64",
    "model.intermediate_size=160",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.vocab_size=257",
]
TRAINING = ["train.seq_len=128", "train.global_batch=1", "train.micro_batch=1", "optimizer.weight_decay=0"]
TCP_BYTES, TCP_BYTES_AT = "QQ", 120  # tcpi_bytes_acked and tcpi_bytes_received of Linux's struct tcp_info
DENSITY, LR, WARMUP, WAIT_S = 0.01, 1e-3, 3, 600
ENGINES = {
    "DDP": ["parallel=ddp"],
    "FSDP2": ["parallel=fsdp"],
    "TP": ["parallel=tp"],
    "PP": ["parallel=pp"],
    "ZeRO-1": ["parallel=zero1"],
    "ZeRO-2": ["parallel=zero2"],
    "ZeRO-3": ["parallel=zero3"],
}
PAIRED = ["method=sparse", "method.selector=magnitude", f"method.density={DENSITY}"]
SHIRA = ["method=random_sparse", "method.budget_rank=4"]


class Ours:
    """One of our methods in one process."""

    def __init__(self, overrides: Sequence[str], model: Sequence[str]) -> None:
        self.config = compose([*model, *TRAINING, *overrides])
        self.training = training_here(self.config)
        inner: Any = self.training.engine
        self.bare: Any = inner._bare
        self._optimizer = inner._optimizer

    def step(self, batch: Batch) -> float:
        count = int((batch.labels >= 0).sum())
        loss = self.training.accumulate([(0, batch)], 1 / count)
        self.training.step(LR)
        return float(loss) / count

    def loss(self, batch: Batch) -> torch.Tensor:
        return summed(self.bare, batch)

    def held(self) -> list[torch.Tensor]:
        return [piece.tensor for piece in self.training.pieces() if isinstance(piece, Piece)] + list(
            self.bare.parameters()
        )


class Peft:
    """One of peft's tuners, as one would use it by hand: the same loss, clipping and optimizer."""

    def __init__(self, model: Any) -> None:
        self.bare = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        )

    def step(self, batch: Batch) -> float:
        count = int((batch.labels >= 0).sum())
        loss = summed(self.bare, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()) / count

    def loss(self, batch: Batch) -> torch.Tensor:
        return summed(self.bare, batch)

    def held(self) -> list[torch.Tensor]:
        state = [t for values in self._optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
        return [*self.bare.parameters(), *self.bare.buffers(), *state]


Side = Ours | Peft


def summed(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum")


def plain(model: Sequence[str]) -> Any:
    config = compose([*model, *TRAINING])
    return build_model(config.model, seq_len=128, seed=0)


def make_sides(model: Sequence[str]) -> dict[str, Side]:
    ours, paired = Ours(PAIRED, model), Ours(SHIRA, model)
    chosen = {name: layer.sparse_indices.long() for name, layer in sparse_layers(paired.bare).items()}
    turn = iter(chosen.items())

    def mask(base_layer: nn.Linear, r: int, **_: Any) -> torch.Tensor:
        found = torch.zeros_like(base_layer.weight)
        found.view(-1)[next(turn)[1]] = 1
        return found

    shira = ShiraConfig(r=4, target_modules=[*chosen])
    shira.mask_fn = mask
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    supertuning = SupertuningConfig(sparsity=1 - DENSITY, target_modules=[*chosen])
    return {
        "ours": ours,
        "ours for ShiRA": paired,
        "S2FT": Ours(["method=s2ft"], model),
        "full": Ours(["method=full", "method.weight_decay=0"], model),
        "LoRA": Peft(get_peft_model(plain(model), lora)),
        "ShiRA": Peft(get_peft_model(plain(model), shira)),
        "SuperTuning": Peft(get_peft_model(plain(model), supertuning)),
    }


def batches(model: Sequence[str], count: int) -> list[Batch]:
    size = compose([*model]).model.vocab_size  # type: ignore[attr-defined]
    tokens = np.random.default_rng(0).integers(0, size, (count, 129))
    return [Batch(torch.tensor(t[None, :-1]), torch.tensor(t[None, 1:]), np.zeros(1, np.int64)) for t in tokens]


def take_turns(sides: dict[str, Side], data: Sequence[Batch]) -> dict[str, list[float]]:
    """Seconds of every step after the first. Losses of sides that train the same entries are asserted equal."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, batch in enumerate(data):
        losses = {}
        for name, side in sides.items():
            began = time.perf_counter()
            losses[name] = side.step(batch)
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
        for ours, peer in (("ours", "SuperTuning"), ("ours for ShiRA", "ShiRA")):
            apart = abs(losses[ours] - losses[peer]) / losses[peer]
            assert apart < 1e-4, f"{ours} and {peer} train the same entries, and differ by {apart:.1e} at step {number}"
    return seconds


def saved_bytes(side: Side, batch: Batch) -> int:
    """What autograd keeps for the backward, parameters of the model left out; each storage once."""
    own = {p.untyped_storage()._cdata for p in side.bare.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = side.loss(batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def peak_bytes(side: Side, batch: Batch) -> int:
    """The most that tensors have at a time in a step, without the base's weights."""
    gc.collect()
    added = ("lora_", "sparse_", "shira_", "supertuning_")
    base = sum(p.nbytes for name, p in side.bare.named_parameters() if not any(word in name for word in added))
    with Peak(side.held()) as peak:
        side.step(batch)
    return int(peak.most - base)


def check_gradients(model: Sequence[str], batch: Batch) -> None:
    """The gradient of selected entries is dense autograd's there."""
    ours = Ours(PAIRED, model)
    dense = plain(model)
    summed(dense, batch).backward()  # type: ignore[no-untyped-call]
    summed(ours.bare, batch).backward()  # type: ignore[no-untyped-call]
    named = dict(dense.named_modules())
    for name, layer in sparse_layers(ours.bare).items():
        expected = named[name].weight.grad.view(-1)[layer.sparse_indices.long()]
        apart = float((layer.sparse_values.grad - expected).norm() / expected.norm())
        assert apart < 1e-5, f"{name}: gradients differ by {apart:.1e} of their norm"


def checkpoint_ratio(side: Ours) -> float:
    """Bytes of a generation over those of its indices, values, originals and moments."""
    entries = sum(layer.sparse_indices.numel() for layer in sparse_layers(side.bare).values())
    with tempfile.TemporaryDirectory() as directory:
        save(directory, 1, side.training.pieces())
        stored = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    return stored / (entries * 5 * 4)


# ---- under every engine ----


class Weightlike(TorchDispatchMode):
    """Counts results of operations that have the shape of a targeted weight, or of a shard of one, and are no view."""

    def __init__(self, shapes: set[tuple[int, ...]], known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes, self.known = shapes, {t.untyped_storage()._cdata for t in known}
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {part.untyped_storage()._cdata for part in dense_parts((args, kwargs))}
        outputs = function(*args, **(kwargs or {}))
        for part in dense_parts(outputs):
            storage = part.untyped_storage()._cdata
            if tuple(part.shape) in self.shapes and storage not in inputs and storage not in self.known:
                self.found.append(str(function))
        return outputs


def dense_parts(tree: Any) -> list[torch.Tensor]:
    plain = [t for t in tree_leaves(tree) if type(t) in (torch.Tensor, nn.Parameter)]
    return [part for t in plain for part in parts_of(t)]


def on_rank(overrides: list[str], model: list[str], steps: int) -> dict[str, Any]:
    """Measure on one of two ranks: bytes that travel between them in a step, and tensors as large as a weight."""
    warnings.simplefilter("ignore")
    config: Config = compose([*model, *TRAINING, "train.global_batch=2", *overrides])
    engine = training_here(config)
    size = config.model.vocab_size  # type: ignore[attr-defined]
    tokens = Windows(np.random.default_rng(0).integers(0, size, 4000).astype(np.uint16), 128)
    feed = feed_for(engine, config, tokens, seed=0)

    def step(number: int) -> None:
        optimize(engine, feed.step(number), LR, number)

    for number in range(1, WARMUP + 1):
        step(number)
    torch.distributed.barrier()
    before = bytes_of_connections()
    for number in range(WARMUP + 1, WARMUP + 1 + steps):
        step(number)
    torch.distributed.barrier()
    sent = (bytes_of_connections() - before) / steps
    weightlike = search(engine, config, lambda: step(WARMUP + 1 + steps)) if "method=full" not in overrides else []
    return {"sent": sent, "weightlike": weightlike}


def search(training: Training, config: Config, step: Any) -> list[str]:
    """Tensors as large as a targeted weight or its shard that are neither: of a step, and what stays after it."""
    whole = {layer.shape for layer in sparse_layers(build(config, "meta")).values()}
    shapes: set[tuple[int, ...]] = {*whole}
    for m, n in whole:
        shapes |= {(m // 2, n), (m, n // 2)}
    inner: Any = training.engine
    weights = [layer.weight for layer in inner._bare.modules() if isinstance(layer, SparseLayer)]
    known = [piece.tensor for piece in inner.pieces()] + [w for w in weights if type(w) is nn.Parameter]
    with Weightlike(shapes, known) as watching:
        step()
    sizes = {m * n for m, n in shapes}
    allowed = {t.untyped_storage()._cdata for t in known} | {
        p.untyped_storage()._cdata for p in map(local_of, inner._bare.parameters())
    }
    stays = list[str]()
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter) and one.layout is torch.strided and one.device.type == "cpu":
            storage = one.untyped_storage()
            if one.numel() in sizes and storage.nbytes() >= one.nbytes and storage._cdata not in allowed:
                stays.append(f"{tuple(one.shape)} {one.dtype}")
    found: list[str] = watching.found + stays
    return found


def bytes_of_connections() -> int:
    """What went over this process's TCP connections so far, both ways; nothing of what else the machine does."""
    total = 0
    for path in [path for path in Path("/proc/self/fd").iterdir() if path.is_socket()]:
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += sum(struct.unpack_from(TCP_BYTES, information, TCP_BYTES_AT))
    return total


def under(engine: str, method: list[str], model: list[str], steps: int) -> dict[str, Any]:
    found: dict[str, Any] = on_ranks(on_rank, 2, [*ENGINES[engine], *method], model, steps, wait_s=WAIT_S)[0]
    return found


QUICK = {"small": True, "pairs": 2, "engines": ["DDP", "FSDP2"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="steps of every side")
    parser.add_argument("--small", action="store_true", help="a tiny model: nothing is judged")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=[*ENGINES], metavar="NAME")
    arguments = options_of(parser, QUICK, argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    model, full = (SMALL, False) if arguments.small else (MODEL, True)
    with redirect_stdout(sys.stderr):  # what engines say is no part of the report
        rows = measure_one_process(model, arguments.pairs, full)
        # What travels is a ratio, which a third of the layers has as well.
        rows += measure_engines(arguments.engines, [*model, "model.num_layers=4"] if full else model, full)
    return finish("methods", rows, as_json=arguments.json)


def measure_one_process(model: list[str], pairs: int, full: bool) -> list[Row]:
    data = batches(model, pairs + WARMUP)
    check_gradients(model, data[0])
    sides = make_sides(model)
    seconds = take_turns(sides, data)
    saved = {name: saved_bytes(side, data[0]) for name, side in sides.items()}
    peaks = {name: peak_bytes(side, data[0]) for name, side in sides.items()}
    extra = {name: max(0, count - saved["full"]) for name, count in saved.items()}

    def step(ours: str, peer: str, bar: float | None) -> Row:
        return compared(f"step, {ours} against {peer}", "s", seconds[ours], seconds[peer], peer, bar=bar, full=full)

    def single(name: str, unit: str, ours: float, peer: float, peer_name: str, bar: float | None) -> Row:
        return compared(name, unit, [ours] * 2, [peer] * 2, peer_name, bar=bar, full=full)

    paired = sides["ours"]
    assert isinstance(paired, Ours)
    return [
        single(
            "extra bytes saved for the backward",
            "MB",
            extra["ours for ShiRA"] / 1e6,
            extra["ShiRA"] / 1e6,
            "ShiRA",
            0.05,
        ),
        single("and against SuperTuning", "MB", extra["ours"] / 1e6, extra["SuperTuning"] / 1e6, "SuperTuning", None),
        single("peak without the base, 1 % density", "MB", peaks["ours"] / 1e6, peaks["LoRA"] / 1e6, "LoRA r=16", 1.05),
        single("and against full fine-tuning", "MB", peaks["ours"] / 1e6, peaks["full"] / 1e6, "full", None),
        step("ours", "LoRA", 1.10),
        step("S2FT", "LoRA", 1.0),
        step("ours for ShiRA", "ShiRA", None),
        step("ours", "SuperTuning", None),
        step("ours", "full", None),
        absolute(
            "checkpoint over its entries' state", "ratio", checkpoint_ratio(paired), better="lower", bar=1.02, full=full
        ),
    ]


def measure_engines(engines: Sequence[str], model: list[str], full: bool) -> list[Row]:
    rows = []
    for engine in engines:
        sparse = under(engine, PAIRED, model, 4)
        dense = under(engine, ["method=full"], model, 2)
        bar = 2 * DENSITY if engine == "DDP" else None
        name = f"bytes a step, {engine}"
        rows.append(
            compared(name, "MB", [sparse["sent"] / 1e6] * 2, [dense["sent"] / 1e6] * 2, "full", bar=bar, full=full)
        )
        found = sparse["weightlike"]
        if found:
            print(f"{engine}: {statistics.multimode(found)[0]} and {len(found) - 1} more", file=sys.stderr)
        rows.append(
            absolute(f"tensors like a weight, {engine}", "tensors", len(found), better="lower", bar=0, full=full)
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
