"""Tensor parallelism: every rank keeps a share of the heads, of the inner width and of the vocabulary of each layer.

After Shoeybi et al. 2019 (arXiv:1909.08053), with whole heads and shares of different sizes, so that no dimension has
to be divisible and nothing is padded. Which tensors are cut is told by `families.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from checkpointing import Held, Interval, Piece, parameter_names, pieces_of
from trainer.errors import Refused
from trainer.models import blocks
from trainer.models.families import FAMILIES, INNER, KV, QKV, Family, Units
from trainer.parallel.shares import Share, balanced, share_of

logger = logging.getLogger(__name__)


@runtime_checkable
class Cuttable(Protocol):
    """A linear layer that a method computes in its own way, and that may be cut."""

    def take_share(self, share: Held) -> None:
        """Learn what is left of the weight on this tensor-parallel rank."""

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's output without its bias, of the share of the inputs that this rank has."""


@runtime_checkable
class Adapted(Protocol):
    """A layer that a method has put others into, which are cut as it is."""

    def follows(self) -> Mapping[str, Literal["rows", "columns", "whole"]]:
        """How each child is cut, by its name: its rows as the layer's outputs, its columns as the layer's inputs,
        or it stays whole. Children that are not named are the layer itself."""


@dataclass
class Cuts:
    """This rank's parts after the cut, by the logical names of parameters."""

    held: dict[str, Held] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)  # of whose gradient every rank has only its share's part
    copied: dict[str, list[Interval]] = field(default_factory=dict)  # ranges that another rank holds and counts as well
    dims: dict[str, int] = field(default_factory=dict)
    # Ranges in a fused tensor that several ranks hold, beside other ranges of different lengths: what shards it further
    # cuts them at other places on each rank.
    fused: dict[str, list[Interval]] = field(default_factory=dict)
    holders: dist.ProcessGroup | None = None  # all ranks that hold parts of the same layers

    def described(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Describe pieces of fused ranges row by row: only equal boxes may be held twice."""
        found: list[Piece] = []
        for piece in pieces:
            name = piece.name.partition("/")[2]
            name = name if name in self.fused else name.rpartition("/")[0]
            dim = self.dims.get(name, 0)
            ranges = self.fused.get(name, ()) if piece.tensor.dim() > dim else ()
            if any(start <= piece.offset[dim] < start + length for start, length in ranges):
                for row in range(piece.tensor.shape[dim]):
                    offset = tuple(n + row if d == dim else n for d, n in enumerate(piece.offset))
                    found.append(replace(piece, tensor=piece.tensor.detach().narrow(dim, row, 1), offset=offset))
            else:
                found.append(piece)
        return found

    def counted(self, name: str, gradient: torch.Tensor, first: bool) -> Iterator[torch.Tensor]:
        """The parts of a gradient that this rank, of all that hold them, counts in the norm."""
        if name not in self.held:
            if first:
                yield gradient
        elif name not in self.copied:
            yield gradient
        else:
            dim = self.dims[name]
            for piece in pieces_of(name, gradient, self.held[name]):
                if not any(start <= piece.offset[dim] < start + length for start, length in self.copied[name]):
                    yield piece.tensor

    def finish(self, gradients: Mapping[str, torch.Tensor]) -> Collection[str]:
        """Give every rank the whole gradient of what it holds; `counted` says whose norm is whose."""
        names = [name for name in gradients if name in self.summed]
        if not names:
            return ()
        shapes = {name: self.held[name].shape if name in self.held else tuple(gradients[name].shape) for name in names}
        sizes = [prod(shapes[name]) for name in names]
        whole = torch.zeros(sum(sizes), dtype=gradients[names[0]].dtype, device=gradients[names[0]].device)
        parts: list[tuple[torch.Tensor, Piece]] = []
        for name, flat in zip(names, torch.split(whole, sizes), strict=True):
            target = flat.view(shapes[name])
            for piece in pieces_of(name, gradients[name], self.held.get(name)):
                parts.append((target[piece.box.slices((0,) * target.dim())], piece))
                parts[-1][0].add_(piece.tensor)
        dist.all_reduce(whole, group=self.holders)
        for part, piece in parts:
            piece.tensor.copy_(part)
        return ()


def check_splittable(model: Any, size: int) -> None:
    """`Refused` for families without a plan, for too few heads, and for dropout inside of layers. Not collective."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise Refused(
            f"There is no plan to split a {kind} model over tensor-parallel ranks (there is one for "
            f"{', '.join(sorted(FAMILIES))}). Type parallel.tp=1, and parallel.dp_shard=-1 to shard it instead."
        )
    for at in range(size):
        _share(model.config, size, at)
    uncut = [model.get_input_embeddings(), model.get_output_embeddings()]
    for block in blocks(model):
        uncut += [block.get_submodule(path.rpartition(".")[0]) for path in FAMILIES[kind].tensors]
        for path in FAMILIES[kind].regions:
            _refuse_dropout(block.get_submodule(path), size)
    if any(isinstance(module, Adapted) for module in uncut):
        raise Refused(
            f"parallel.tp={size} does not go with adapters on experts, embeddings or the output. Name other layers in "
            "method.target_modules, such as [q_proj,v_proj], or type parallel.tp=1."
        )


def is_splittable(model: Any, size: int) -> bool:
    try:
        check_splittable(model, size)
    except Refused:
        return False
    return True


def _share(settings: Any, size: int, at: int) -> Share:
    heads = int(settings.num_attention_heads)
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    kv_heads = int(getattr(settings, "num_key_value_heads", None) or heads)
    return share_of(heads, kv_heads, int(head_size), size, at)


def cut(model: Any, group: dist.ProcessGroup, holders: dist.ProcessGroup | None) -> Cuts:
    """Leave this rank's share of a model, which computes together with the others' what the whole one did.

    `holders` are the ranks of `group` and those that shard what it holds further. Collective; `check_splittable` has
    accepted the model.
    """
    cutter = _Cutter(model, group, dist.get_world_size(group), dist.get_rank(group))
    cutter.cut()
    cutter.cuts.holders = holders
    return cutter.cuts


def shares_of(model: Any, size: int) -> list[Cuts]:
    """The parts that each of so many ranks would hold of a model on meta, which stays as it is. Not collective."""
    found = []
    for at in range(size):
        cutter = _Cutter(copy.deepcopy(model), None, size, at)
        cutter.cut()
        found.append(cutter.cuts)
    return found


class _Cutter:
    def __init__(self, model: Any, group: Any, size: int, at: int) -> None:
        self.model, self.group, self.size, self.at = model, group, size, at
        self.settings: Any = self.model.config
        self.family: Family = FAMILIES[self.settings.model_type]
        self.cuts = Cuts()
        self.all_names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in parameter_names(model).items():
            self.all_names.setdefault(parameter, []).append(name)
        self.replaced: dict[nn.Parameter, nn.Parameter] = {}
        self.share = _share(self.settings, self.size, self.at)

    def cut(self) -> None:
        for block in blocks(self.model):
            self._cut_block(block)
        self._cut_vocabulary()
        # Hooks keep this object, and it must not keep whole weights.
        self.all_names, self.replaced, self.model = {}, {}, None

    def _cut_block(self, block: nn.Module) -> None:
        family = self.family
        for path in family.regions:
            region = block.get_submodule(path)
            region.register_forward_pre_hook(self._enter_region, with_kwargs=True)
            self._tell_heads(region)
            for parameter in region.parameters():
                self._add_up(parameter)  # but for those that are cut below
        for path, units in family.outputs.items():
            self._cut_outputs(block.get_submodule(path), units)
        for path, units in family.inputs.items():
            self._cut_inputs(block.get_submodule(path), units)
        for path, (dim, units) in family.tensors.items():
            owner, _, name = path.rpartition(".")
            experts: Any = block.get_submodule(owner)
            self._cut_parameter(experts, name, dim, units)
            if getattr(experts, name).shape[dim] % 8:  # 16 bytes of bf16
                self._compute_one_by_one(experts)
        for path in family.partial:
            block.get_submodule(path).register_forward_hook(lambda _, __, output: _sum(output, self.group))

    def _compute_one_by_one(self, experts: Any) -> None:
        if experts.config._experts_implementation != "eager":
            experts.config = copy.copy(experts.config)
            experts.config._experts_implementation = "eager"
            if self.at == 0:
                logger.warning(
                    "the inner width of the experts, split into %d, is no multiple of 8, which grouped matrix products "
                    "need: experts are computed one by one, which is slower",
                    self.size,
                )

    def _tell_heads(self, region: Any) -> None:
        """Tell a family's attention of its share, as far as it reads more than shapes."""
        share = self.share
        (_, heads), (_, kv_heads) = share.heads, share.kv_heads
        local = {
            "num_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_key_value_groups": heads // kv_heads,
            "split_size": heads * share.head_size,
        }
        for name, value in local.items():
            if hasattr(region, name):
                setattr(region, name, value)
        if hasattr(region, "config"):
            region.config = copy.copy(region.config)
            region.config.num_attention_heads, region.config.num_key_value_heads = heads, kv_heads

    def _cut_outputs(self, layer: nn.Module, units: Units) -> None:
        for path, module in layer.named_modules():
            if _is_cut(layer, path, "rows") and isinstance(module, nn.Linear | Conv1D):
                dim = 1 if isinstance(module, Conv1D) else 0
                self._cut_parameter(module, "weight", dim, units)
                if module.bias is not None:
                    self._cut_parameter(module, "bias", 0, units)

    def _cut_inputs(self, layer: nn.Module, units: Units) -> None:
        """The outputs are added up, and only then the bias, which every rank holds whole."""
        bias: list[nn.Module] = []
        for path, module in layer.named_modules():
            if _is_cut(layer, path, "columns") and isinstance(module, nn.Linear | Conv1D):
                self._cut_parameter(module, "weight", 0 if isinstance(module, Conv1D) else 1, units)
                if module.bias is not None:
                    self._unsum(module.bias)
                    bias.append(module)
                    module.forward = _without_bias(module)  # type: ignore[method-assign]

        def add_up(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = _sum(output, self.group)
            for module in bias:
                output = output + module.bias  # type: ignore[operator]
            return output

        layer.register_forward_hook(add_up)

    def _cut_vocabulary(self) -> None:
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        start, length = balanced(embedding.num_embeddings, self.size, self.at)
        self._cut_parameter(embedding, "weight", 0, (INNER,))
        if embedding.padding_idx is not None:
            inside = start <= embedding.padding_idx < start + length
            embedding.padding_idx = embedding.padding_idx - start if inside else None
        masks: list[torch.Tensor] = []

        def look_up(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            local = inputs[0] - start
            masks.append((local < 0) | (local >= length))
            return local.masked_fill(masks[-1], 0)

        def add_up(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            return _sum(output.masked_fill(masks.pop()[..., None], 0), self.group)

        embedding.register_forward_pre_hook(look_up)
        embedding.register_forward_hook(add_up)
        self._cut_parameter(head, "weight", 0, (INNER,))
        if head.bias is not None:
            self._cut_parameter(head, "bias", 0, (INNER,))
        sizes = [balanced(embedding.num_embeddings, self.size, at)[1] for at in range(self.size)]
        head.register_forward_pre_hook(lambda _, inputs: (_enter(inputs[0], self.group), *inputs[1:]))
        head.register_forward_hook(lambda _, __, output: _gather(output, self.group, sizes))

    def _cut_parameter(self, module: nn.Module, name: str, dim: int, units: Units) -> None:
        old = getattr(module, name)
        if old in self.replaced:  # tied
            setattr(module, name, self.replaced[old])
            return
        runs, copied = self._runs(units, old.shape[dim])
        ranges: list[list[Interval]] = [[(0, size)] for size in old.shape]
        ranges[dim] = runs
        kept = torch.cat([old.detach().narrow(dim, start, length) for start, length in runs], dim)
        new = nn.Parameter(kept.clone(memory_format=torch.contiguous_format), old.requires_grad)
        for logical in self.all_names[old]:
            self.cuts.held[logical] = Held(tuple(old.shape), ranges)
            self.cuts.dims[logical] = dim
            if copied:
                self.cuts.copied[logical] = copied
        shared = KV in units and self.share.num_kv_heads < self.size
        if shared and len(units) > 1:
            fused = [run for unit, run in zip(units, runs, strict=True) if unit == KV]
            self.cuts.fused.update(dict.fromkeys(self.all_names[old], fused))
        if not shared:
            self._unsum(old)
        self.replaced[old] = new
        setattr(module, name, new)
        if isinstance(module, Cuttable) and name == "weight":
            module.take_share(Held(tuple(old.shape), ranges))
        if isinstance(module, Conv1D) and name == "weight":
            module.nx, module.nf = kept.shape  # which its forward reads

    def _runs(self, units: Units, size: int) -> tuple[list[Interval], list[Interval]]:
        """The ranges of a dimension that this rank keeps, and those of them that are not its to count."""
        share, runs, copied, start = self.share, [], [], 0
        for unit in units:
            if unit == INNER:
                total = size // len(units)
                first, length = balanced(total, self.size, self.at)
            else:
                count = share.num_kv_heads if unit == KV else share.num_heads
                width = share.head_size * (3 if unit == QKV else 1)
                total = count * width
                first, length = (n * width for n in (share.kv_heads if unit == KV else share.heads))
            runs.append((start + first, length))
            if unit == KV and not share.first:
                copied.append(runs[-1])
            start += total
        assert start == size, f"{units} make up {start} of {size}"
        return runs, copied

    def _add_up(self, parameter: nn.Parameter) -> None:
        self.cuts.summed.update(self.all_names[parameter])

    def _unsum(self, parameter: nn.Parameter) -> None:
        self.cuts.summed.difference_update(self.all_names[parameter])

    def _enter_region(self, _: nn.Module, arguments: Any, options: Any) -> Any:
        if arguments:
            return (_enter(arguments[0], self.group), *arguments[1:]), options
        entered = _enter(options["hidden_states"], self.group)
        return arguments, {**options, "hidden_states": entered}


def _refuse_dropout(region: nn.Module, size: int) -> None:
    """Inside a region every rank would draw for other heads and channels than one that holds all of them."""
    chances = [float(getattr(region, name, 0) or 0) for name in ("attention_dropout", "jitter_noise")]
    inner = [m.p for path, m in region.named_modules() if isinstance(m, nn.Dropout) and path in _INSIDE]
    adapted = (module for module in region.modules() if isinstance(module, Adapted))
    inner += [m.p for module in adapted for m in module.modules() if isinstance(m, nn.Dropout)]
    if any(chance > 0 for chance in (*chances, *inner)):
        raise Refused(
            f"parallel.tp={size} does not go with dropout inside of layers (on attention weights, or method.dropout) "
            "or jitter of routers: every rank would draw its own. Set it to 0, or type parallel.tp=1."
        )


_INSIDE = ("attn_dropout",)


def _is_cut(layer: nn.Module, path: str, along: Literal["rows", "columns"]) -> bool:
    """Whether a module inside of a layer that is cut along its rows or columns is cut with it."""
    children = layer.follows() if isinstance(layer, Adapted) else {}
    return children.get(path.partition(".")[0], along) == along


def _without_bias(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(module, Cuttable):
        return module.product

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        weight: Any = module.weight
        return functional.linear(inputs, weight.T if isinstance(module, Conv1D) else weight)

    return forward


def _enter(inputs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    entered: torch.Tensor = _Enter.apply(inputs, group)  # type: ignore[no-untyped-call]
    return entered


def _sum(inputs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total: torch.Tensor = _Sum.apply(inputs, group)  # type: ignore[no-untyped-call]
    return total


def _gather(inputs: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    whole: torch.Tensor = _Gather.apply(inputs, group, sizes)  # type: ignore[no-untyped-call]
    return whole


class _Enter(torch.autograd.Function):
    """A tensor that all ranks have in common enters the shares: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """The sum of the shares' outputs, which all ranks have in common."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = inputs.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """The shares of the last dimension side by side, of `sizes`."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
        at = dist.get_rank(group)
        ctx.start, ctx.length = sum(sizes[:at]), sizes[at]
        padded = inputs.new_zeros(*inputs.shape[:-1], max(sizes))
        padded[..., : sizes[at]] = inputs
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.narrow(-1, ctx.start, ctx.length).contiguous(), None, None
