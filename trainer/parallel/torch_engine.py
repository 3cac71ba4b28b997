"""The engine of plain torch: DDP, FSDP2, HSDP, tensor and pipeline parallelism, and their products.

They are put together outside the model, in this order: tensor-parallel ranks keep their share of every layer, the
pipeline's stages are cut out, layers are checkpointed, and what is left is sharded or replicated over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from checkpointing import Piece, Slice, describe, parameter_names, pieces_of
from trainer.data.dataset import Batch
from trainer.errors import Refused
from trainer.models import blocks
from trainer.options.config import Config
from trainer.parallel.axes import TakenApart, refuse_layout
from trainer.parallel.compiling import Compiled
from trainer.parallel.computing import LOW, Draws, MakeOptimizer, logits_of, parts_of, set_lr, summed_loss
from trainer.parallel.data import distribute
from trainer.parallel.mesh import Mesh
from trainer.parallel.pipeline import Pipeline, Shape
from trainer.parallel.reducing import make_reducer
from trainer.parallel.tensor import Cuts, cut
from trainer.parallel.world import World
from trainer.plan import Topology


class TorchEngine:
    """Parameters stay fp32 masters and low precision is autocast in every layout, so that a run computes the same
    wherever it goes on."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        topology: Topology,
        world: World,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        distribute_by: Callable[[nn.Module, Mesh, torch.device], nn.Module] | None = None,
    ) -> None:
        self.device, self.world_size = device, world.size
        self._mesh = Mesh.of(topology, world.rank, device)
        self.data_rank, self.data_size = self._mesh.data_rank, topology.data_size
        self._local_batch = config.parallel.local_batch
        self._clip = config.optimizer.clip
        self._low = self.low = LOW.get(config.precision.compute)
        refuse_layout(model, topology, config)
        whole = next_token(model) if topology.tp * topology.pp > 1 else None
        order = {block: number for number, block in enumerate(blocks(model))}
        self._cuts, self._taken_apart = Cuts(), list[TakenApart]()
        if (tensor_group := self._mesh.group("tp")) is not None:
            self._cuts = cut(model, tensor_group, self._mesh.group("dp_shard", "tp"))
            self._taken_apart.append(self._cuts)
        self._pipeline: Pipeline | None = None
        if (stages_group := self._mesh.group("pp")) is not None:
            shape = Shape(self._local_batch or config.train.micro_batch, config.train.seq_len)
            schedule = config.parallel.pp_schedule
            self._pipeline = Pipeline(model, stages_group, schedule, shape, device, low=self._low)
            model = self._pipeline.model
            self._taken_apart.append(self._pipeline)
        if config.parallel.activation_checkpointing:
            checkpoint_blocks(model)
        self._draws = Draws(model, {layer: order[unwrapped(layer)] for layer in blocks(model)})
        self._bare = self._model = model
        self._reducer = make_reducer(config.parallel, self._mesh)

        def distributed(part: nn.Module) -> nn.Module:
            called = (distribute_by or distribute)(part, self._mesh, device)
            self._reducer.attach(called)
            return called

        if self._pipeline is not None:
            self._pipeline.make_stages(self._draws, distributed)
        else:
            self._model = distributed(model)
        self._optimizer = make_optimizer(model, self._cuts.held)
        if whole is not None:
            self._check_same(whole, topology)
        self._compiled: Compiled | None = None
        if config.parallel.compile:
            layers = [unwrapped(layer) for layer in blocks(model)]
            self._compiled = Compiled(layers, config.parallel.compile_backend)

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        parts = list(parts_of(micro_batches, self._local_batch, self.device))
        if self._pipeline is not None:
            return self._pipeline.accumulate(parts, weight)
        total = torch.zeros(1, device=self.device, dtype=torch.float64)
        for turn, part in enumerate(parts, start=1):
            self._draws.start(part)
            with self._synchronise(turn == len(parts)):
                batch = part.batch
                loss = summed_loss(logits_of(self._model, batch.inputs, batch.positions, low=self.low), batch.labels)
                (loss * weight).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def step(
        self, lr: float, loss_scale: float | None = None, before_update: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        named = {p: name for name, p in reversed(parameter_names(self._bare).items())}  # a tied one once
        gradients = {name: p.grad for p, name in named.items() if p.grad is not None}
        self._reducer.finish(gradients)
        copied = {name for part in self._taken_apart for name in part.finish(gradients)}
        # Reduced gradients are the mean over ranks; put right before the backward, fp16 would overflow sooner on many.
        factor: Any = self.data_size / (loss_scale or 1.0)
        norm = self._norm({name: gradient for name, gradient in gradients.items() if name not in copied}).mul(factor)
        if loss_scale is None or norm.isfinite():
            if self._clip > 0:
                factor = factor * (self._clip / (norm + 1e-6)).clamp(max=1.0)
            if gradients and (self._clip > 0 or factor != 1.0):
                torch._foreach_mul_([local_of(gradient) for gradient in gradients.values()], factor)
            before_update()
            set_lr(self._optimizer.param_groups, lr)
            self._optimizer.step()
        self._clear()
        self._say_what_was_compiled()
        return norm

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        total = torch.zeros(1, device=self.device, dtype=torch.float64)
        with self._evaluating():
            for part in parts_of([(0, batch) for batch in batches], self._local_batch, self.device):
                if (logits := self._forward(part.batch.inputs, part.batch.positions)) is not None:
                    total += summed_loss(logits, part.batch.labels)
        self._say_what_was_compiled()
        return total

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return self._reducer.sum(values, "pp", "dp_replicate", "dp_shard")

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._evaluating():
            logits = self._forward(tokens)
            if self._pipeline is not None:
                settings: Any = self._bare.config
                return self._pipeline.from_last(logits, (*tokens.shape, settings.vocab_size))[:, -1]
        assert logits is not None
        return logits[:, -1]

    def pieces(self) -> list[Piece]:
        if self._pipeline is not None:
            self._pipeline.reshard()
        here = parameter_names(self._bare)
        held = {name: held for name, held in self._cuts.held.items() if name in here}
        pieces: Sequence[Piece] = describe(self._bare, self._optimizer, logical=held)
        for part in self._taken_apart:
            pieces = part.described(pieces)
        return list(pieces)

    def publish(self) -> None:
        """Nothing here is derived from the pieces: masters are what computes."""

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        return self._mesh.group("dp_replicate", "dp_shard", "tp")

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        return self._mesh.group("tp")

    @property
    def tensor_rank(self) -> int:
        return self._mesh.at("tp")

    def parameter_names(self) -> Collection[str]:
        return parameter_names(self._bare).keys()

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        group = self._mesh.group("dp_shard")
        if group is None or not any(isinstance(p, DTensor) for p in parameters):
            return [p.detach() for p in parameters]
        return gather_rows(parameters, group, dist.get_world_size(group))

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is gathered between steps."""

    def held_of(self, tensor: torch.Tensor) -> list[Slice]:
        """A shard has whole rows. What tensor-parallel ranks hold a part of is told by their pieces alone."""
        pieces = pieces_of("", tensor)
        start = pieces[0].offset[0] * prod(tensor.shape[1:]) if pieces and tensor.dim() else 0
        return [Slice(tensor, start, local_of(tensor).numel(), 0)]

    def close(self) -> None:
        """Nothing but this object holds the model."""

    def _check_same(self, whole: torch.Tensor, topology: Topology) -> None:
        """`Refused`, on all ranks, if the parts together do not compute what the whole model did."""
        with self._in_fp32():
            parts = self.next_logits(tokens_to_compare(whole.shape[-1]).to(self.device)).float().cpu()
        worst, scale = float((parts - whole).abs().max()), float(whole.abs().max())
        if not worst <= 1e-3 * scale:
            raise Refused(
                f"Under parallel.tp={topology.tp} parallel.pp={topology.pp} this model computes something else than it "
                f"did whole: logits of up to {scale:.3g} differ by {worst:.3g}. How it is taken apart does not "
                "fit it. Type parallel.tp=1 parallel.pp=1, and parallel.dp_shard=-1 to shard it instead."
            )

    def _clear(self) -> None:
        """DDP's gradients lie in its buckets and stay there: what is accumulated before they are reduced would be in
        memory of its own otherwise."""
        called = [self._model] if self._pipeline is None else self._pipeline.called
        self._optimizer.zero_grad(set_to_none=not any(isinstance(one, DistributedDataParallel) for one in called))

    def _say_what_was_compiled(self) -> None:
        """Once, and whenever something was compiled again; of the ranks that have the same layers one speaks."""
        if self._compiled is None or not (news := self._compiled.news()):
            return
        if self.data_rank == 0 and self._mesh.at("tp") == 0:
            stage = f"pipeline rank {self._mesh.at('pp')}: " if self._pipeline is not None else ""
            print(f"  {'compiled':10} {stage}{news}", flush=True)

    def _norm(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The norm of the whole gradient, of which every rank counts its part."""
        first = self._mesh.at("tp") == 0
        parts = [local_of(part) for name, g in gradients.items() for part in self._cuts.counted(name, g, first)]
        norms = torch._foreach_norm(parts) if parts else []
        squares = torch.stack([torch.zeros((), device=self.device, dtype=torch.float64), *norms]).square().sum()
        return self._reducer.sum(squares, "pp", "dp_shard", "tp").sqrt().float()

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor | None:
        """The logits in evaluation; None on ranks that do not compute the last layer."""
        if self._pipeline is not None:
            return self._pipeline.logits(tokens, positions)
        return logits_of(self._bare, tokens, positions, low=self.low)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluate by the bare model: DDP has nothing to add, and FSDP2 lives inside the module itself."""
        self._bare.eval()
        with torch.no_grad():
            yield
        self._bare.train()

    @contextmanager
    def _in_fp32(self) -> Iterator[None]:
        """Rounding to low precision would hide what is small but wrong."""
        for computing in (self, *(self._pipeline.stages if self._pipeline is not None else ())):
            computing.low = None
        yield
        for computing in (self, *(self._pipeline.stages if self._pipeline is not None else ())):
            computing.low = self._low

    def _synchronise(self, now: bool) -> AbstractContextManager[object]:
        """DDP reduces gradients once a step. FSDP2 reduces them each time, so that only shards of them are kept."""
        if isinstance(self._model, DistributedDataParallel) and not now:
            return self._model.no_sync()
        return nullcontext()


def tokens_to_compare(vocabulary: int) -> torch.Tensor:
    return torch.arange(1, 9)[None] % vocabulary


def next_token(model: Any) -> torch.Tensor:
    """The logits of one token after a few others, by the model as it is."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = logits_of(model, tokens_to_compare(model.config.vocab_size), low=None)[:, -1]
    model.train(training)
    return logits


def gather_rows(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """DTensors that are sharded by rows over a group, whole, by one exchange. Collective."""
    chunks = [-(-p.shape[0] // size) for p in parameters]
    widths = [prod(p.shape[1:]) for p in parameters]
    lengths = [chunk * width for chunk, width in zip(chunks, widths, strict=True)]
    mine = torch.zeros(sum(lengths), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, part in zip(parameters, torch.split(mine, lengths), strict=True):
        local = local_of(p.detach()).reshape(-1)
        part[: local.numel()] = local
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine, group=group)
    split = [torch.split(part, lengths) for part in parts]
    return [
        torch.cat([part[number] for part in split])[: p.numel()].view(p.shape) for number, p in enumerate(parameters)
    ]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint_blocks(model: nn.Module) -> None:
    """Compute each layer again in its backward (Chen et al. 2016, arXiv:1604.06174)."""
    layers = set(blocks(model))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in layers:
                setattr(parent, name, checkpoint_wrapper(child))


def unwrapped(layer: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(layer, "_checkpoint_wrapped_module", layer)
    return inner
