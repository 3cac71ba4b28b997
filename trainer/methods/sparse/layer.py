"""Linear layers of which some entries train: the forward is dense, and only values of the entries get a gradient.

A layer's weight is frozen and holds base plus values at the entries; nothing here changes it. Values are a parameter of
their own, so that every engine reduces, shards and steps them as it does any parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checkpointing import Held, Interval
from trainer.methods.entries import Entries, index_dtype
from trainer.methods.sparse.places import short
from trainer.options.method import Granularity, Reselection

VALUES, INDICES, ORIGINALS = "sparse_values", "sparse_indices", "sparse_originals"
# Above this share of entries a dense product costs less than one at the entries alone: measured on CPUs, where the
# latter is a dot product an entry. On GPUs the dense one is taken always.
DENSEST = 0.1

# What looks at a layer's backward: whether it is the first of a step on all ranks, gradient of the output, input.
Watch = Callable[[bool, torch.Tensor, torch.Tensor], None]


class SparseLayer(nn.Module):
    """A linear layer of which entries train. Values are the difference from the base, fp32, of one entry each."""

    weight: nn.Parameter
    sparse_values: nn.Parameter
    sparse_indices: torch.Tensor  # of entries: flat, sorted; of columns or rows: their numbers, sorted
    sparse_originals: torch.Tensor  # what the base has there, in its dtype
    granularity: Granularity
    shape: tuple[int, int]  # of the whole weight
    share: Held | None  # what this rank has of it under tensor parallelism
    watch: Watch | None
    calls: int  # of the forward, in this step
    first_here: bool  # whether the first of a step's micro-batches is computed on this rank
    penalty: Callable[[torch.Tensor], torch.Tensor] | None  # adds its gradient at the values, once a step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` times the weight, without bias."""
        first = self.first_here and self.calls == 0
        self.calls += 1
        found: torch.Tensor = _Product.apply(inputs, self.sparse_values, self, first)  # type: ignore[no-untyped-call]
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.product(inputs)
        bias: torch.Tensor | None = self.bias  # type: ignore[assignment]
        return outputs if bias is None else outputs + bias

    def take_share(self, share: Held) -> None:
        """Learn what is left of the weight on this tensor-parallel rank."""
        self.share = share
        self.forget()

    def forget(self) -> None:
        """Forget what was derived from entries that have changed."""
        self._support = None

    @property
    def support(self) -> Support:
        if self._support is None or self._support.rows.device != self.sparse_indices.device:  # it has moved since
            self._support = Support.of(self.sparse_indices, self.shape, self.granularity, self.share)
        return self._support

    _support: Support | None


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc]  # weights are never exchanged, only written to
    pass


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]  # transformers is not typed
    """GPT-2's, whose weight is (inputs, outputs)."""


def make_sparse(layer: nn.Module, granularity: Granularity, count: int) -> SparseLayer:
    """Turn a linear layer into a sparse one, in place, with room for `count` entries, columns or rows.

    `inputs` and `outputs` are those of the layer, whichever way its weight lies.
    """
    made: Any = layer
    transposed = isinstance(layer, Conv1D)
    made.__class__ = SparseConv1D if transposed else SparseLinear
    if transposed and granularity is not Granularity.element:
        flipped = {Granularity.inputs: Granularity.outputs, Granularity.outputs: Granularity.inputs}
        granularity = flipped[granularity]
    made.granularity, made.shape = granularity, tuple(made.weight.shape)
    made.share, made.watch, made.penalty = None, None, None
    made.calls, made.first_here = 0, False
    made.weight.requires_grad_(False)
    if made.bias is not None:
        made.bias.requires_grad_(False)
    resize(made, count)
    return made  # type: ignore[no-any-return]


def undo_sparse(layer: nn.Module) -> None:
    """The frozen linear layer again, with its weight as it is."""
    made: Any = layer
    if isinstance(layer, SparseLayer):
        made.__class__ = Conv1D if isinstance(layer, SparseConv1D) else nn.Linear
        del made.sparse_values, made.sparse_indices, made.sparse_originals


def resize(layer: SparseLayer, count: int) -> None:
    """Room for so many entries, columns or rows of a whole weight: the first ones, unchanged."""
    device, shape = layer.weight.device, values_shape(layer.shape, layer.granularity, count)
    layer.register_parameter(VALUES, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
    indices = torch.arange(count, dtype=index_dtype(layer.shape), device=device)
    layer.register_buffer(INDICES, indices)
    # What the weight has there, so that going back to the base changes nothing before others are chosen or loaded.
    layer.register_buffer(ORIGINALS, at(layer.weight, indices, layer.granularity).clone())
    layer.forget()


def values_shape(shape: tuple[int, int], granularity: Granularity, count: int) -> tuple[int, ...]:
    rows, columns = shape
    return {
        Granularity.element: (count,),
        Granularity.inputs: (rows, count),
        Granularity.outputs: (count, columns),
    }[granularity]


def choose(layer: SparseLayer, indices: torch.Tensor) -> None:
    """Train these, sorted, of a layer whose weight is whole and the base."""
    if indices.numel() != layer.sparse_indices.numel():
        resize(layer, indices.numel())
    with torch.no_grad():
        layer.sparse_indices.copy_(indices)
        layer.sparse_originals.copy_(at(layer.weight, layer.sparse_indices, layer.granularity))
    layer.forget()


def at(weight: torch.Tensor, indices: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Read a whole weight at the entries, columns or rows."""
    if granularity is Granularity.element:
        return weight.detach().reshape(-1).index_select(0, indices)
    return weight.detach().index_select(1 if granularity is Granularity.inputs else 0, indices)


def bytes_of_places(layer: SparseLayer, method: Any) -> int:
    """Bytes that a layer keeps of its entries beside values, gradient and moments."""
    count = layer.sparse_indices.numel()
    kept = layer.sparse_indices.nbytes + layer.sparse_originals.nbytes
    if method.schedule not in (Reselection.once, Reselection.rewind):
        kept += 4 * layer.sparse_values.numel()  # steps of each, in an optimizer of our own
    if layer.granularity is not Granularity.element:
        return kept
    kept += 12 * count  # where they lie: rows and columns for their gradient, and places in what is written to
    return kept + 8 * count if count <= DENSEST * layer.weight.numel() else kept  # and as a sparse matrix


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers by name, without the names of wrappers, as `checkpointing.describe` has them."""
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
    }


def locate(positions: torch.Tensor, ranges: list[Interval]) -> torch.Tensor:
    """Where logical positions lie among ranges that are held one after the other; -1 for those that are not held."""
    found, start = torch.full_like(positions, -1), 0
    for first, length in ranges:
        inside = (positions >= first) & (positions < first + length)
        found = torch.where(inside, positions - first + start, found)
        start += length
    return found


@dataclass(frozen=True)
class Support:
    """Where a layer's entries lie in the weight as this rank computes with it, and their gradient."""

    granularity: Granularity
    shape: tuple[int, ...]  # of all values
    local: tuple[int, int]  # of the weight here
    rows: torch.Tensor  # in the weight here: of every entry held, or of every row selected
    columns: torch.Tensor
    where: tuple[torch.Tensor, ...] | None  # among all values; None where all are held
    pattern: torch.Tensor | None  # entries as a sparse matrix

    @staticmethod
    def of(indices: torch.Tensor, shape: tuple[int, int], granularity: Granularity, share: Held | None) -> Support:
        ranges = [[(0, size)] for size in shape] if share is None else [list(runs) for runs in share.ranges]
        local = (sum(n for _, n in ranges[0]), sum(n for _, n in ranges[1]))
        indices = indices.long()
        whole = values_shape(shape, granularity, indices.numel())
        if granularity is Granularity.element:
            rows, columns = locate(indices // shape[1], ranges[0]), locate(indices % shape[1], ranges[1])
            where = ((rows >= 0) & (columns >= 0)).nonzero()[:, 0]
            rows, columns = short(rows[where], local[0]), short(columns[where], local[1])
            found = None if share is None else (short(where, indices.numel()),)
            return Support(granularity, whole, local, rows, columns, found, _pattern(rows, columns, local))
        dim = 1 if granularity is Granularity.inputs else 0
        places = locate(indices, ranges[dim])
        everywhere = torch.arange(indices.numel(), device=indices.device)
        # Where a plan computes with shapes alone, nothing can be looked for.
        kept = everywhere if share is None else (places >= 0).nonzero()[:, 0]
        across = torch.cat([torch.arange(a, a + n, device=indices.device) for a, n in ranges[1 - dim]])
        everything = torch.arange(local[1 - dim], device=indices.device)
        if dim == 1:
            pair = (across[:, None], kept[None])
            return Support(granularity, whole, local, everything, places[kept], pair if share else None, None)
        pair = (kept[:, None], across[None])
        return Support(granularity, whole, local, places[kept], everything, pair if share else None, None)

    def gradient(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The gradient of all values, zero where they are not held: `left' right` at the entries, in fp32 or wider.

        `left` is (positions, rows) and `right` (positions, columns), of the selected ones where those are whole.
        """
        if self.granularity is not Granularity.element:
            found = (left.t() @ right).to(_wide(left.dtype))
        elif self.pattern is not None and left.device.type == "cpu":
            left, right = left.to(_wide(left.dtype)), right.to(_wide(right.dtype))
            pattern = _with_dtype(self.pattern, left.dtype)
            found = torch.sparse.sampled_addmm(pattern, left.t(), right, beta=0.0).values()
        else:
            dense = left.t() @ right
            found = dense[self.rows, self.columns].to(_wide(left.dtype))
        if self.where is None:
            return found
        whole = found.new_zeros(self.shape)
        whole[self.where] = found
        return whole


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _pattern(rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    if rows.numel() > DENSEST * shape[0] * shape[1] or rows.device.type != "cpu":
        return None
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        zeros = torch.zeros(rows.numel())  # never read: the product takes the places only
        return torch.sparse_csr_tensor(starts, columns.int(), zeros, shape, check_invariants=False)


def _with_dtype(pattern: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return pattern if pattern.dtype is dtype else pattern.to(dtype)


class _Product(torch.autograd.Function):
    """`x W'` with the gradient of the entries of W alone; for the backward it keeps x, and of columns only theirs."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, values: torch.Tensor, layer: SparseLayer, first: bool) -> torch.Tensor:
        kind = inputs.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        x = inputs.to(low)
        # Not saved: the engine brings it back in place for the backward, wherever it has been meanwhile.
        ctx.weight, ctx.layer, ctx.first, ctx.kind = layer.weight, layer, first, inputs.dtype
        ctx.values = values if layer.penalty is not None and first else None
        ctx.transposed = isinstance(layer, SparseConv1D)
        selected = _selected_inputs(layer) if layer.watch is None else None
        ctx.whole = selected is None
        ctx.save_for_backward(x if selected is None else x.index_select(-1, selected))
        weight = layer.weight.detach().to(low)
        return x @ (weight if ctx.transposed else weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        layer: SparseLayer = ctx.layer
        (x,) = ctx.saved_tensors
        g, x2 = gradient.flatten(0, -2), x.flatten(0, -2)
        of_values = None
        if ctx.needs_input_grad[1]:
            if ctx.whole and layer.watch is not None:
                layer.watch(ctx.first, g, x2)
            of_values = _gradient(layer, g, x2, ctx.whole, ctx.transposed)
            if ctx.values is not None and layer.penalty is not None:
                of_values = of_values + layer.penalty(ctx.values)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight.detach().to(g.dtype)
            of_inputs = (gradient @ (weight.t() if ctx.transposed else weight)).to(ctx.kind)
        return of_inputs, of_values, None, None


def _selected_inputs(layer: SparseLayer) -> torch.Tensor | None:
    """The only inputs that the gradient of the values needs; None where that is all of them."""
    if isinstance(layer, SparseConv1D):
        return layer.support.rows if layer.granularity is Granularity.outputs else None
    return layer.support.columns if layer.granularity is Granularity.inputs else None


def _gradient(layer: SparseLayer, g: torch.Tensor, x: torch.Tensor, whole: bool, transposed: bool) -> torch.Tensor:
    support = layer.support
    left, right = (x, g) if transposed else (g, x)
    by_rows, by_columns = layer.granularity is Granularity.outputs, layer.granularity is Granularity.inputs
    if by_rows and (whole or not transposed):
        left = left.index_select(-1, support.rows)
    if by_columns and (whole or transposed):
        right = right.index_select(-1, support.columns)
    return support.gradient(left, right)


def flat_entries(
    indices: torch.Tensor,
    values: torch.Tensor,
    originals: torch.Tensor,
    granularity: Granularity,
    shape: tuple[int, int],
) -> Entries:
    """Entries one by one, where indices may be those of whole columns or rows."""
    if granularity is Granularity.element:
        return Entries(indices, values, originals)
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    if granularity is Granularity.inputs:
        columns = indices.long()
    else:
        rows = indices.long()
    flat = (rows[:, None] * shape[1] + columns[None]).reshape(-1)
    return Entries(flat.to(indices.dtype), values.reshape(-1), originals.reshape(-1))
