"""Whether a checkpoint holds what is asked for, and all of it is asked for. Pure; what does not match is raised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import gcd

import numpy as np
import torch

from checkpointing.errors import LayoutError, MismatchError, first_few
from checkpointing.format import Manifest
from checkpointing.geometry import Box, External, Piece, find_hole
from checkpointing.plan import Row
from checkpointing.tensors import DTYPE_NAMES, DTYPES, can_cast, keeps_values


def check_nothing_left(layouts: Sequence[Sequence[Row]], manifest: Manifest) -> None:
    """Raise `MismatchError` if all ranks together do not ask for everything that is stored."""
    stored = manifest.tensors
    asked: dict[str, set[Box]] = defaultdict(set)
    for rows in layouts:
        for name, _, _, _, offset, size, _ in rows:
            asked[manifest.stored_name(name)].add(Box(tuple(offset), tuple(size)))
    if left_over := sorted(stored.keys() - asked.keys()):
        raise MismatchError(
            f"the checkpoint holds {len(left_over)} tensors that nothing asks for: {first_few(left_over)}; "
            "pass `only` to load less than everything"
        )
    holes = [(name, hole) for name, tensor in stored.items() if (hole := find_hole(asked[name], tensor.shape))]
    if holes:
        parts = [f"{name} at {hole.offset} of size {hole.size}" for name, hole in holes]
        raise MismatchError(
            f"the checkpoint holds parts of {len(holes)} tensors that nothing asks for: {first_few(parts)}; "
            "pass `only` to load less than everything"
        )


def check_targets(pieces: Sequence[Piece]) -> None:
    """`LayoutError` unless every piece can be filled without changing what another holds, but for the very same memory.

    Views may interleave, as the rows of a fused projection do, so those whose ranges of memory meet are looked at
    element by element.
    """
    spans: dict[tuple[object, ...], tuple[int, int, torch.Tensor, str]] = {}
    for piece in pieces:
        tensor = piece.tensor.detach()
        if not tensor.numel():
            continue
        if tensor.is_conj() or tensor.is_neg():
            raise LayoutError(f"{piece.name}: a conjugate or negative view cannot be loaded into; resolve it before")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise LayoutError(
                f"{piece.name}: several elements of an expanded tensor share their memory; copy it before"
            )
        last = sum((size - 1) * stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        start = tensor.data_ptr()
        spans.setdefault(piece.memory, (start, start + (last + 1) * tensor.element_size(), tensor, piece.name))
    group: list[tuple[int, int, torch.Tensor, str]] = []
    end = 0
    for span in sorted(spans.values(), key=lambda span: span[:2]):
        if group and (span[0] >= end or span[2].device != group[0][2].device):
            _check_apart(group)
            group, end = [], 0
        group.append(span)
        end = max(end, span[1])
    _check_apart(group)


def _check_apart(group: Sequence[tuple[int, int, torch.Tensor, str]]) -> None:
    """Tensors whose ranges of memory meet must still have no byte in common."""
    if len(group) < 2:
        return
    start, stop = group[0][0], max(end for _, end, _, _ in group)
    unit = gcd(*(t.element_size() for _, _, t, _ in group), *(begin - start for begin, _, _, _ in group))
    taken = np.zeros((stop - start) // unit, dtype=bool)
    for begin, _, tensor, name in group:
        words = tensor.element_size() // unit
        strides = tuple(stride * words for stride in tensor.stride())
        for word in range(words):
            view = np.lib.stride_tricks.as_strided(
                taken[(begin - start) // unit + word :], tuple(tensor.shape), strides
            )
            if view.any():
                raise LayoutError(f"{name} shares memory with another piece, which would be loaded over it")
            view[...] = True


def check_complete(pieces: Sequence[Piece], manifest: Manifest, cast: bool) -> None:
    """Raise `MismatchError` if this rank asks for what the checkpoint lacks, or has in another shape or finer dtype."""
    names = {p.name: manifest.stored_name(p.name) for p in pieces}
    if elsewhere := sorted(name for name in names if name in manifest.external):
        sources = [f"{name} (from {manifest.external[name].source})" for name in elsewhere]
        raise MismatchError(
            f"the checkpoint does not hold the bytes of {len(elsewhere)} external tensors: {first_few(sources)}; "
            "fill them from there and pass an External of each in place of its pieces"
        )
    if missing := sorted(name for name, stored in names.items() if stored not in manifest.tensors):
        raise MismatchError(
            f"the checkpoint does not hold {len(missing)} of the tensors asked for: {first_few(missing)}"
        )
    wrong, losing = set(), set()
    for piece in pieces:
        tensor = manifest.tensors[names[piece.name]]
        dtype = DTYPE_NAMES.get(piece.tensor.dtype, str(piece.tensor.dtype))
        if tensor.shape != piece.global_shape:
            wrong.add(
                f"{piece.name} ({tensor.dtype} {list(tensor.shape)} stored, {dtype} {list(piece.global_shape)} here)"
            )
        elif not can_cast(DTYPES[tensor.dtype], piece.tensor.dtype):
            wrong.add(f"{piece.name} ({tensor.dtype} stored, {dtype} here, which is another kind of number)")
        elif not (cast or keeps_values(DTYPES[tensor.dtype], piece.tensor.dtype)):
            losing.add(f"{piece.name} ({tensor.dtype} stored, {dtype} here)")
    if wrong:
        raise MismatchError(f"the checkpoint's tensors are of another shape or kind: {first_few(sorted(wrong))}")
    if losing:
        raise MismatchError(
            f"{len(losing)} tensors would lose values in another dtype: {first_few(sorted(losing))}; "
            "pass cast=True to round them"
        )


def without_other_names(pieces: Sequence[Piece], manifest: Manifest) -> list[Piece]:
    """The pieces to fill: a tensor that is tied here, and stored under one name by another library, is filled once."""
    stored = {p.memory for p in pieces if manifest.stored_name(p.name) in manifest.tensors}
    return [
        piece
        for piece in pieces
        if manifest.stored_name(piece.name) in manifest.tensors
        or piece.name in manifest.external
        or piece.memory not in stored
    ]


def check_external(given: Sequence[External], manifest: Manifest, *, all_of_them: bool = True) -> None:
    """Raise `MismatchError` unless the same tensors are external here, with the same content."""
    for here in given:
        if (there := manifest.external.get(here.name)) is None:
            where = "holds its bytes, so ask for them" if here.name in manifest.tensors else "knows nothing of it"
            raise MismatchError(f"{here.name} is external here, and the checkpoint {where}")
        if (there.dtype, there.shape, there.sha256) != (DTYPE_NAMES.get(here.dtype), here.shape, here.sha256):
            raise MismatchError(
                f"{here.name} from {here.source} is not what the checkpoint was saved with, which came from "
                f"{there.source}: {DTYPE_NAMES.get(here.dtype)} {list(here.shape)} SHA-256 {here.sha256} here, "
                f"{there.dtype} {list(there.shape)} SHA-256 {there.sha256} there"
            )
    if all_of_them and (missing := sorted(manifest.external.keys() - {here.name for here in given})):
        sources = [f"{name} (from {manifest.external[name].source})" for name in missing]
        raise MismatchError(
            f"the checkpoint counts on {len(missing)} external tensors that are not declared here: "
            f"{first_few(sources)}; fill them from there and pass an External of each"
        )
