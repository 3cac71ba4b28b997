"""Pipeline parallelism: every rank computes some of the layers; the pipeline's micro-batches are the logical ones.

A stage is the model of transformers itself, in which what other stages compute is replaced by nothing, so that names,
masks and position embeddings are what they are in the whole model. Scheduling is torch.distributed.pipelining's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from checkpointing import Piece, parameter_names
from trainer.errors import Refused
from trainer.models import blocks
from trainer.models.families import FAMILIES
from trainer.options.parallel import PipelineSchedule
from trainer.parallel.computing import BatchPart, Draws, computed_in, summed_loss
from trainer.parallel.shares import balanced

INTERLEAVED = 2  # stages a rank has then


@dataclass(frozen=True)
class Shape:
    """The shape of the micro-batches that pass through the stages: all have the same."""

    samples: int
    positions: int


class Absent(nn.Module):
    """A stand-in for a layer, or a norm, that another stage has: the input is the output."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class Nothing(nn.Module):
    """A stand-in for position embeddings that the first stage has added already."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


def inside(model: nn.Module) -> PreTrainedModel:
    """The model of transformers, inside peft's wrapper if there is one."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def check_stages(model: nn.Module, size: int, schedule: PipelineSchedule) -> None:
    """`Refused` where a stage would have no layer or nothing to train, and for families that are not known in stages.

    Not collective.
    """
    settings: Any = model.config
    if settings.model_type not in FAMILIES:
        raise Refused(
            f"A {settings.model_type} model is not known to compute the same in stages (those that are: "
            f"{', '.join(sorted(FAMILIES))}). Type parallel.pp=1, and parallel.dp_shard=-1 to shard it instead."
        )
    num_layers, num_stages = len(blocks(model)), stages_of(size, schedule)
    if num_stages > num_layers:
        raise Refused(
            f"parallel.pp={size} with parallel.pp_schedule={schedule.name} makes {num_stages} stages of the model's "
            f"{num_layers} layers. Type parallel.pp={max(1, num_layers * size // num_stages)}."
        )
    for at in range(size):
        indices = range(at, num_stages, size)
        layers = [n for index in indices for n in _dealt(num_layers, num_stages, index)]
        part = cut_out(inside(model), layers, first=0 in indices, last=num_stages - 1 in indices)
        if not any(parameter.requires_grad for parameter in part.parameters()):
            raise Refused(
                f"parallel.pp={size} leaves process {at} of a pipeline without anything to train. Name layers of all "
                "stages in method.target_modules, or type parallel.pp=1."
            )


def _dealt(num_layers: int, num_stages: int, index: int) -> range:
    start, length = balanced(num_layers, num_stages, index)
    return range(start, start + length)


def stages_of(size: int, schedule: PipelineSchedule) -> int:
    return size * (INTERLEAVED if schedule is PipelineSchedule.interleaved else 1)


def cut_out(model: PreTrainedModel, layers: Sequence[int], *, first: bool, last: bool) -> PreTrainedModel:
    """The model with some of its layers, the embeddings if it is the first, the norm and the head if it is the last.

    What it has it shares with the model that is given.
    """
    repeated = set(blocks(model))
    top, base_name = _shallow(model), model.base_model_prefix
    base = _shallow(getattr(model, base_name))
    setattr(top, base_name, base)
    found = False
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and repeated & set(child):
            kept = [block if number in layers else Absent() for number, block in enumerate(child)]
            setattr(base, name, nn.ModuleList(kept))
            found = True
        elif not found and not first:
            setattr(base, name, _without(child, model))
        elif found and not last and any(True for _ in child.parameters()):
            setattr(base, name, Absent())
    if not last:
        for name, _ in top.named_children():
            if name != base_name:
                setattr(top, name, Absent())
    return top


def _without(child: nn.Module, model: PreTrainedModel) -> nn.Module:
    """The stand-in for a module before the layers, on a stage that gets hidden states."""
    if child is model.get_input_embeddings() or isinstance(child, nn.Dropout):
        return Absent()
    if isinstance(child, nn.Embedding):
        return Nothing()
    if any(True for _ in child.parameters()):
        raise Refused(
            f"A {type(child).__name__} comes before the layers of a {model.config.model_type} model, and no stage of a "
            "pipeline is known for it. Type parallel.pp=1."
        )
    return child


def _shallow(module: Any) -> Any:
    """A copy that has the same children, which can be replaced without changing the original."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


class Stage(nn.Module):
    """One stage as it is called: token ids or hidden states in, hidden states or logits out."""

    def __init__(
        self, model: PreTrainedModel, draws: Draws, *, first: bool, last: bool, low: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.first, self.last, self.low = model, first, last, low
        self._draws = draws
        self._coming: Iterator[BatchPart] = iter(())
        self.positions: torch.Tensor | None = None  # of an evaluation's rows that hold several samples

    def expect(self, parts: Sequence[BatchPart]) -> None:
        """Expect the parts of a step; every schedule hands them to a stage in this order."""
        self._coming = iter(parts)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        positions = self.positions
        if (part := next(self._coming, None)) is not None:  # none in an evaluation, which draws nothing
            self._draws.start(part)
            positions = part.batch.positions
        given: dict[str, Any] = {"input_ids" if self.first else "inputs_embeds": inputs, "use_cache": False}
        if positions is not None:
            given["position_ids"] = positions
        with computed_in(self.low, inputs.device):
            if self.last:
                logits: torch.Tensor = self.model(**given).logits
                return logits
            hidden: torch.Tensor = getattr(self.model, self.model.base_model_prefix)(**given).last_hidden_state
            return hidden


class Pipeline:
    """This rank's stages, and how micro-batches pass through all of them."""

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        schedule: PipelineSchedule,
        shape: Shape,
        device: torch.device,
        *,
        low: torch.dtype | None,
    ) -> None:
        self.group, self.at, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._schedule, self._shape, self._device = schedule, shape, device
        self.num_stages = stages_of(self.size, schedule)
        self.indices = list(range(self.at, self.num_stages, self.size))
        self._whole, self._low = inside(model), low
        names: dict[nn.Parameter, list[str]] = {}  # not kept: it would keep what other stages have
        for name, parameter in parameter_names(model).items():
            names.setdefault(parameter, []).append(name)
        self.tied = next((found for found in names.values() if len(found) > 1), [])
        self._num_layers = len(blocks(model))
        self.model = self._cut([n for index in self.indices for n in self._layers(index)], self.indices)
        self.stages: list[Stage] = []
        self.called: list[nn.Module] = []
        self._schedules: dict[int, Any] = {}
        self._weight, self._total = 1.0, torch.zeros(1, device=device, dtype=torch.float64)

    def _layers(self, index: int) -> range:
        return _dealt(self._num_layers, self.num_stages, index)

    def _cut(self, layers: Sequence[int], indices: Sequence[int]) -> PreTrainedModel:
        return cut_out(self._whole, layers, first=0 in indices, last=self.num_stages - 1 in indices)

    def make_stages(self, draws: Draws, distribute: Callable[[nn.Module], nn.Module]) -> None:
        """Make the stages, sharded or replicated, when the layers are what they will be."""
        for index in self.indices:
            model = cut_out(self.model, self._layers(index), first=index == 0, last=index == self.num_stages - 1)
            stage = Stage(model, draws, first=index == 0, last=index == self.num_stages - 1, low=self._low)
            self.stages.append(stage)
            self.called.append(distribute(stage))
        del self._whole

    def accumulate(self, parts: Sequence[BatchPart], weight: float) -> torch.Tensor:
        """Do what `TrainingEngine.accumulate` says."""
        rows, width = self._shape.samples, self._shape.positions
        parts = [BatchPart(part.batch.widened(rows, width), part.key, part.number) for part in parts]
        least = self.num_stages if self._schedule is not PipelineSchedule.interleaved else self.size
        while len(parts) < least or (self._schedule is PipelineSchedule.interleaved and len(parts) % self.size):
            parts.append(BatchPart(parts[0].batch.without_targets(), parts[0].key, parts[0].number))
        for stage in self.stages:
            stage.expect(parts)
        self._weight = weight
        self._total.zero_()
        inputs = (torch.cat([part.batch.inputs for part in parts]),) if 0 in self.indices else ()
        last = self.num_stages - 1 in self.indices
        self._scheduled(len(parts)).step(
            *inputs,
            target=torch.cat([part.batch.labels for part in parts]) if last else None,
            losses=[] if last else None,
            return_outputs=False,
        )
        return self._total.clone()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = summed_loss(logits, labels)
        self._total += loss.detach()
        return loss * self._weight

    def _scheduled(self, count: int) -> Any:
        """The schedule for so many micro-batches."""
        if count not in self._schedules:
            kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
            stages: Any = [self._stage(called, index) for called, index in zip(self.called, self.indices, strict=True)]
            single = self._schedule is not PipelineSchedule.interleaved
            self._schedules[count] = kinds[self._schedule.name](
                stages[0] if single else stages, count, loss_fn=self._loss, scale_grads=False
            )
        return self._schedules[count]

    def _stage(self, called: nn.Module, index: int) -> PipelineStage:
        """A stage that knows the shapes that pass through it, so that none has to ask another."""
        settings: Any = self.model.config
        tokens = (self._shape.samples, self._shape.positions)
        ids = torch.empty(tokens, dtype=torch.int64, device="meta")
        hidden = torch.empty(*tokens, settings.hidden_size, device="meta", requires_grad=True)
        kind = self._low or torch.float32
        logits = torch.empty(*tokens, settings.vocab_size, dtype=kind, device="meta", requires_grad=True)
        return PipelineStage(
            called,
            index,
            self.num_stages,
            self._device,
            input_args=ids if index == 0 else hidden,
            output_args=logits if index == self.num_stages - 1 else hidden,
            group=self.group,
        )

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor | None:
        """A forward through all stages, on the last of them; None elsewhere. `tokens` are the same on all ranks."""
        hidden: torch.Tensor = tokens
        for index in range(self.num_stages):
            if index % self.size != self.at:
                continue
            stage = self.stages[self.indices.index(index)]
            if index > 0 and self.size > 1:
                width = stage.model.config.hidden_size
                hidden = torch.empty(*tokens.shape, width, device=self._device)
                dist.recv(hidden, group=self.group, group_src=(index - 1) % self.size)
            stage.positions = positions
            hidden = stage(hidden)
            if index < self.num_stages - 1:
                dist.send(hidden.float().contiguous(), group=self.group, group_dst=(index + 1) % self.size)
        return hidden if self.num_stages - 1 in self.indices else None

    def from_last(self, logits: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
        """The last stage's logits on all ranks."""
        found = torch.empty(*shape, device=self._device) if logits is None else logits.float().contiguous()
        dist.broadcast(found, group=self.group, group_src=(self.num_stages - 1) % self.size)
        return found

    def finish(self, gradients: dict[str, torch.Tensor]) -> Collection[str]:
        """Give both stages that hold a tied tensor its whole gradient; the name of the copy that does not count."""
        ends = (0, (self.num_stages - 1) % self.size)
        if not self.tied or ends[0] == ends[1] or self.at not in ends:
            return ()
        name = next((name for name in self.tied if name in gradients), None)
        if name is None:  # frozen
            return ()
        mine = gradients[name]
        local = mine.to_local() if isinstance(mine, DTensor) else mine
        other = torch.empty_like(local)
        peer = ends[1] if self.at == ends[0] else ends[0]
        first = self.at == ends[0]
        for sending in (first, not first):
            if sending:
                dist.send(local.contiguous(), group=self.group, group_dst=peer)
            else:
                dist.recv(other, group=self.group, group_src=peer)
        local.add_(other)
        return () if first else (name,)

    def reshard(self) -> None:
        """Leave FSDP2's parameters as shards: its roots are the stages, which the model does not know of."""
        for stage in self.called:
            if isinstance(stage, FSDPModule):
                stage.reshard()

    def described(self, pieces: Sequence[Piece]) -> list[Piece]:
        """A tied tensor is described by both of its names on both stages that hold it."""
        found = list(pieces)
        for piece in pieces:
            kind, _, rest = piece.name.partition("/")
            for name in self.tied:
                if rest == name or rest.startswith(f"{name}/"):
                    others = [other for other in self.tied if other != name]
                    found += [_renamed(piece, f"{kind}/{other}{rest.removeprefix(name)}") for other in others]
        known = {(piece.name, piece.box): piece for piece in reversed(found)}
        return list(known.values())


def _renamed(piece: Piece, name: str) -> Piece:
    return Piece(name, piece.tensor, piece.offset, piece.global_shape, piece.divisor, piece.mean)
