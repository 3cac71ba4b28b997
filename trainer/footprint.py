"""How much memory a process needs under a layout, from the model's shapes alone; nothing is allocated for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional

from trainer.methods import method_of
from trainer.methods.method import Needs
from trainer.models import blocks
from trainer.models.families import FAMILIES
from trainer.optimizers import optimizer_of
from trainer.options.config import Config
from trainer.options.parallel import PipelineSchedule
from trainer.parallel.computing import LOW, computed_in, summed_loss
from trainer.parallel.deepspeed_options import engine_options
from trainer.parallel.pipeline import INTERLEAVED, cut_out, inside, stages_of
from trainer.parallel.shares import balanced
from trainer.plan import MemoryPlan, Topology

PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_used(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated so far, on the CPU what this process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


logger = logging.getLogger(__name__)

FP32 = 4
MAX_LIVE = 1_000_000_000  # parameters that ZeRO stage 3 holds whole at most, by default
PREFETCHED = 50_000_000  # and of those that it gathers ahead


@dataclass(frozen=True)
class Footprint:
    """The needs of a model, in bytes of fp32 and of activations of one part of a micro-batch."""

    layers: tuple[int, ...]  # parameters of each
    first: int  # parameters that the first stage has beside layers: embeddings
    last: int  # and the last: norm and head. What is tied to an embedding is counted with both
    tied: int
    total: int  # parameters of all
    trained: int  # and of those that train
    moments: int  # the optimizer's state of each of them
    kept: int  # of a layer's forward for its backward: what every tensor-parallel rank keeps whole
    cut: int  # and what it keeps its share of
    hidden: int  # what passes from layer to layer
    logits: int  # and what comes out, in fp32
    ends: int  # what is kept of the embedding, the norm, the head and the loss
    known: bool = True  # whether what a forward keeps could be told; it counts as nothing otherwise
    needs: Needs = field(default_factory=Needs)  # of the method beside all that

    @property
    def layer(self) -> int:
        """The largest."""
        return max(self.layers, default=0)


def footprint(config: Config, model: nn.Module) -> Footprint:
    """`model` is on the device meta."""
    size = [sum(p.numel() for p in layer.parameters()) for layer in blocks(model)]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(size)
    tied = embedding.weight.numel() if head is not None and head.weight is embedding.weight else 0
    at_end = 0 if head is None or tied else sum(p.numel() for p in head.parameters())
    samples, positions = config.parallel.local_batch or config.train.micro_batch, config.train.seq_len
    low = LOW.get(config.precision.compute)
    known = True
    try:
        one, two = (_kept(model, number, samples, positions, low) for number in (1, 2))
    except Exception:  # whatever a model's own code does with tensors that hold nothing
        logger.warning("what this model keeps of a forward cannot be told beforehand: the plan leaves it out")
        one = two = _Kept()
        known = False
    given: Any = model.config
    settings: Any = given.get_text_config() if hasattr(given, "get_text_config") else given
    tokens = samples * positions * FP32
    return Footprint(
        layers=tuple(n * FP32 for n in size),
        first=(rest - at_end) * FP32,
        last=at_end * FP32,
        tied=tied * FP32,
        total=total * FP32,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) * FP32,
        moments=_moments(config, model),
        kept=two.whole - one.whole,
        cut=two.cut - one.cut,
        hidden=tokens * int(getattr(settings, "hidden_size", 0) or 0),
        logits=tokens * int(getattr(settings, "vocab_size", 0) or 0),
        ends=max(0, 2 * one.whole - two.whole + 2 * one.cut - two.cut),
        known=known,
        needs=method_of(config).needs(model),
    )


def _moments(config: Config, model: nn.Module) -> int:
    kind = optimizer_of(config)
    return int(sum(kind.bytes_of(p.shape) for p in model.parameters() if p.requires_grad))


def plan_memory(config: Config, print_: Footprint, topology: Topology, rounds: int) -> MemoryPlan:
    """The plan of the stage that needs most; `rounds` are the micro-batches that a process computes in a step."""
    return max(
        (_plan_stage(config, print_, topology, rounds, stage) for stage in range(topology.pp)), key=lambda p: p.total
    )


def _plan_stage(config: Config, of: Footprint, topology: Topology, rounds: int, stage: int) -> MemoryPlan:
    pp, tp, parallel = topology.pp, topology.tp, config.parallel
    num_stages = stages_of(pp, parallel.pp_schedule) if pp > 1 else 1
    mine = range(stage, num_stages, pp)
    shares = [balanced(len(of.layers), num_stages, index) for index in mine]
    layers = sum(length for _, length in shares)
    first, last = 0 in mine, num_stages - 1 in mine
    ends = (of.first if first else 0) + (of.last if last else 0) + (of.tied if last and not first else 0)
    part = layers / max(1, len(of.layers))
    held = (sum(sum(of.layers[start : start + length]) for start, length in shares) + ends) // tp
    again = int(of.needs.values * part * (tp - 1) / tp)
    in_flight = _in_flight(parallel.pp_schedule, rounds, pp, stage)
    layer = of.kept + of.cut // tp
    kept = int(layers * (of.hidden if parallel.activation_checkpointing else layer) * in_flight)
    at_once = layer if parallel.activation_checkpointing else 0
    if last:
        kept, at_once = kept + of.ends, at_once + 2 * of.logits  # with their gradient
    plan = _plan_state(config, of, topology, held, again)
    forward = kept + at_once
    # DDP's gradients stay in its buckets. Others are there from the end of the first backward on: where no forward
    # follows that, most of what was kept is gone by then.
    in_buckets = topology.dp_replicate > 1 and topology.dp_shard == 1 and not parallel.zero_stage
    if rounds <= in_flight and not in_buckets:
        forward = max(forward - plan.gradients, int(forward * (in_flight - 1) / in_flight) + layer)
    if parallel.zero_stage in (1, 2):  # a bucket's gradients are joined, when most of what was kept is gone
        plan = replace(plan, buckets=plan.buckets + max(0, plan.buckets - forward))
    plan = replace(plan, activations=forward, entries=int(of.needs.places * part))
    kept = plan.parameters + plan.optimizer + plan.entries
    return replace(plan, selection=of.needs.beyond(plan.total, kept, plan.parameters))


def _plan_state(config: Config, of: Footprint, topology: Topology, held: int, again: int) -> MemoryPlan:
    """All but activations, of a process that would hold so many bytes of parameters without shards.

    `again` are those of trained ones that it holds beside its share of them.
    """
    zero, parallel, shards = config.parallel.zero_stage, config.parallel, topology.dp_shard
    trained, held = held * of.trained // of.total + again, held + again
    if zero:
        shards = topology.data_size if zero == 3 else 1
    gradients = -(-trained // (topology.data_size if zero >= 2 else shards))
    gathered = buckets = 0
    if shards > 1 and topology.pp > 1:
        # A pipeline gathers its stage once a step, and holds whole gradients until the last micro-batch.
        gathered, gradients = held, trained
    elif shards > 1:
        # One layer is gathered while one computes; one computed again has activations and gradients at a time.
        gathered = (3 if parallel.activation_checkpointing else 2) * of.layer // topology.tp
    if zero:
        sharding = engine_options(config, trained // FP32)["zero_optimization"]
        buckets = min(FP32 * int(sharding["reduce_bucket_size"]), trained)
        if zero == 3:
            # What it gathers ahead lies in one buffer before it is copied out of that, and it lets go of nothing below
            # a limit.
            gathered = max(gathered, min(FP32 * int(sharding.get("stage3_prefetch_bucket_size", PREFETCHED)), held))
            gathered += min(FP32 * int(sharding.get("stage3_max_live_parameters", MAX_LIVE)), held)
    return MemoryPlan(
        parameters=-(-held // shards),
        gradients=gradients,
        # AdamW's two moments, and DeepSpeed's masters beside the parameters; host memory with parallel.offload.
        optimizer=-(-3 * trained // topology.data_size)
        if zero
        else -(-trained * of.moments // (max(1, of.trained) * shards)),
        gathered=gathered,
        buckets=buckets,
    )


def _in_flight(schedule: PipelineSchedule, rounds: int, pp: int, stage: int) -> float:
    """Micro-batches that a process has begun before the first of them comes back."""
    if pp == 1:
        return 1
    if schedule is PipelineSchedule.gpipe:
        return rounds
    if schedule is PipelineSchedule.interleaved:  # of which it computes a part at a time
        parts = 1 + (INTERLEAVED - 1) * pp + 2 * (pp - 1 - stage)
        return min(rounds, parts / INTERLEAVED)
    return min(rounds, pp - stage)


@dataclass
class _Kept:
    whole: int = 0
    cut: int = 0


def _kept(model: nn.Module, num_layers: int, samples: int, positions: int, low: torch.dtype | None) -> _Kept:
    """Count what autograd keeps of a forward through so many of the layers, parameters left out."""
    part = cut_out(inside(model), range(num_layers), first=True, last=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in (*part.named_parameters(), *part.named_buffers())
        }
        tokens = torch.zeros(samples, positions, dtype=torch.int64)
        with (
            _grouped_by_shape(),
            _counting(part, list(state.values())) as kept,
            computed_in(low, torch.device("cpu")),
        ):
            logits = functional_call(part, state, kwargs={"input_ids": tokens, "use_cache": False}).logits
            summed_loss(logits, tokens)
    return kept


@contextmanager
def _grouped_by_shape() -> Iterator[None]:
    """Grouped matrix products of experts know no fake fp32 tensors: one product of the same shape instead."""
    name = "grouped_mm"
    before = getattr(functional, name, None)
    if before is None:
        yield
        return
    setattr(functional, name, lambda a, b, **_: a @ b[0])
    try:
        yield
    finally:
        setattr(functional, name, before)


@contextmanager
def _counting(part: Any, own: list[torch.Tensor]) -> Iterator[_Kept]:
    family = FAMILIES.get(part.config.model_type)
    inside_of, handles, kept = [0], [], _Kept()
    for block in blocks(part):
        for path in family.regions if family else ():
            region = block.get_submodule(path)
            handles.append(region.register_forward_pre_hook(lambda *_: inside_of.__setitem__(0, 1)))
            handles.append(region.register_forward_hook(lambda *_: inside_of.__setitem__(0, 0)))
    seen = {t.untyped_storage()._cdata: t.untyped_storage() for t in own}  # kept alive, so that no two are one
    width = getattr(part.config, "hidden_size", 0)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            if inside_of[0] and tensor.shape[-1:] != (width,):
                kept.cut += storage.nbytes()
            else:
                kept.whole += storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()
