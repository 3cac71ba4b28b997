"""What a checkpoint lacks, and what nothing asks for, is named; nothing else is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checkpointing import External, LayoutError, MismatchError, Piece
from checkpointing.completeness import (
    check_complete,
    check_external,
    check_nothing_left,
    check_targets,
    without_other_names,
)
from checkpointing.format import ExternalTensor, LogicalTensor, Manifest
from checkpointing.plan import layout_rows

MANIFEST = Manifest(
    step=1,
    save_id="ab" * 16,
    parent="",
    run_id="",
    incarnation=0,
    serial=1,
    created=0.0,
    world_size=1,
    versions={},
    metrics={},
    writers=[],
    tensors={"w": LogicalTensor("F32", (4,))},
    aliases={"tied": "w"},
    external={"base": ExternalTensor("BF16", (2,), "a hub id", "cd" * 32)},
)
BASE = External("base", torch.bfloat16, (2,), "a directory", "cd" * 32)


def whole(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Piece:
    return Piece(name, torch.zeros(shape, dtype=dtype), (0,) * len(shape), shape)


def test_missing_and_misshapen_tensors_are_named() -> None:
    with pytest.raises(MismatchError, match="does not hold 2 of the tensors asked for: a, b"):
        check_complete([whole("a", 1), whole("b", 1), whole("w", 4)], MANIFEST, cast=False)
    with pytest.raises(MismatchError, match=r"another shape or kind: w \(F32 \[4\] stored, F32 \[5\] here\)"):
        check_complete([whole("w", 5)], MANIFEST, cast=True)
    with pytest.raises(MismatchError, match=r"does not hold the bytes of 1 external tensors: base \(from a hub id\)"):
        check_complete([whole("base", 2)], MANIFEST, cast=False)
    check_complete([whole("tied", 4), whole("w", 4)], MANIFEST, cast=False)


def test_a_tied_tensor_may_be_stored_under_one_name() -> None:
    memory = torch.zeros(4)
    pieces = [Piece(name, memory, (0,), (4,)) for name in ("w", "head")]
    assert without_other_names(pieces, MANIFEST) == pieces[:1]
    apart = [pieces[0], whole("head", 4)]
    assert without_other_names(apart, MANIFEST) == apart  # which is then missed
    assert without_other_names(pieces[1:], MANIFEST) == pieces[1:]


def test_a_cast_that_loses_values_must_be_asked_for() -> None:
    check_complete([whole("w", 4, dtype=torch.float64)], MANIFEST, cast=False)
    with pytest.raises(MismatchError, match=r"w \(F32 stored, BF16 here\); pass cast=True"):
        check_complete([whole("w", 4, dtype=torch.bfloat16)], MANIFEST, cast=False)
    check_complete([whole("w", 4, dtype=torch.bfloat16)], MANIFEST, cast=True)


def test_what_nothing_asks_for_is_named() -> None:
    check_nothing_left([layout_rows([whole("tied", 4)])], MANIFEST)
    with pytest.raises(MismatchError, match="holds 1 tensors that nothing asks for: w"):
        check_nothing_left([[], []], MANIFEST)
    half = Piece("w", torch.zeros(2), (2,), (4,))
    with pytest.raises(MismatchError, match=r"parts of 1 tensors that nothing asks for: w at \(0,\) of size \(2,\)"):
        check_nothing_left([layout_rows([half])], MANIFEST)


def test_external_tensors_must_be_the_same_by_content() -> None:
    check_external([BASE], MANIFEST)
    for other in (
        replace(BASE, sha256="ee" * 32),
        replace(BASE, shape=(3,)),
        replace(BASE, dtype=torch.float32),
    ):
        with pytest.raises(MismatchError, match="base from a directory is not what the checkpoint was saved with"):
            check_external([other], MANIFEST)
    with pytest.raises(MismatchError, match=r"counts on 1 external tensors .* base \(from a hub id\)"):
        check_external([], MANIFEST)
    check_external([], MANIFEST, all_of_them=False)
    with pytest.raises(MismatchError, match="w is external here, and the checkpoint holds its bytes"):
        check_external([BASE, replace(BASE, name="w")], MANIFEST)
    with pytest.raises(MismatchError, match="x is external here, and the checkpoint knows nothing of it"):
        check_external([BASE, replace(BASE, name="x")], MANIFEST)


def test_casts_that_do_more_than_round_are_refused() -> None:
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(MismatchError, match="which is another kind of number"):
            check_complete([whole("w", 4, dtype=dtype)], MANIFEST, cast=True)


BUFFER = torch.zeros(12)
SHARED = {
    "an expanded tensor": [torch.zeros(1).expand(3)],
    "two ranges that overlap": [BUFFER[:3], BUFFER[1:4]],
    "a tensor and its transpose": [BUFFER.view(3, 4), BUFFER.view(3, 4).T],
    "a part of another": [BUFFER, BUFFER[4:6]],
    "strides that meet": [BUFFER[::2], BUFFER[::3]],
    "another dtype": [BUFFER[:4], BUFFER.view(torch.int16)[6:10]],
}
APART = {
    "rows that alternate": [BUFFER.view(6, 2)[0::2], BUFFER.view(6, 2)[1::2]],
    "columns": [BUFFER.view(3, 4)[:, :1], BUFFER.view(3, 4)[:, 1:]],
    "the very same": [BUFFER, BUFFER],
    "another dtype beside it": [BUFFER[:4], BUFFER.view(torch.int16)[8:12]],
    "nothing": [BUFFER[3:3], BUFFER],
}


def targets(tensors: list[torch.Tensor]) -> list[Piece]:
    return [Piece(f"t{n}", t, (0,) * t.dim(), tuple(t.shape)) for n, t in enumerate(tensors)]


@pytest.mark.parametrize("what", SHARED)
def test_targets_that_would_be_loaded_over_each_other_are_refused(what: str) -> None:
    for tensors in (SHARED[what], SHARED[what][::-1]):
        with pytest.raises(LayoutError, match=r"shares? (their )?memory"):
            check_targets(targets(tensors))


@pytest.mark.parametrize("what", APART)
def test_targets_that_interleave_or_are_tied_are_welcome(what: str) -> None:
    check_targets(targets(APART[what]))
