"""Whether a checkpoint holds what is asked for, and all of it is asked for. Pure; what does not match is raised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from checkpointing.errors import MismatchError, first_few
from checkpointing.format import DTYPE_NAMES, DTYPES, Manifest
from checkpointing.geometry import Box, External, Piece, find_hole
from checkpointing.plan import Row
from checkpointing.tensors import keeps_values


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
        elif not (cast or keeps_values(DTYPES[tensor.dtype], piece.tensor.dtype)):
            losing.add(f"{piece.name} ({tensor.dtype} stored, {dtype} here)")
    if wrong:
        raise MismatchError(f"the checkpoint's tensors are of another shape: {first_few(sorted(wrong))}")
    if losing:
        raise MismatchError(
            f"{len(losing)} tensors would lose values in another dtype: {first_few(sorted(losing))}; "
            "pass cast=True to round them"
        )


def check_external(given: Sequence[External], manifest: Manifest, *, all_of_them: bool = True) -> None:
    """Raise `MismatchError` unless the same tensors are external here, with the same content."""
    for here in given:
        if (there := manifest.external.get(here.name)) is None:
            where = "holds its bytes, so ask for them" if here.name in manifest.tensors else "knows nothing of it"
            raise MismatchError(f"{here.name} is external here, and the checkpoint {where}")
        if (there.dtype, there.shape, there.sha256) != (DTYPE_NAMES.get(here.dtype), here.shape, here.sha256):
            raise MismatchError(
                f"{here.name} from {here.source} is not what the checkpoint was saved with, which came from "
                f"{there.source}: SHA-256 {here.sha256} here, {there.sha256} there"
            )
    if all_of_them and (missing := sorted(manifest.external.keys() - {here.name for here in given})):
        sources = [f"{name} (from {manifest.external[name].source})" for name in missing]
        raise MismatchError(
            f"the checkpoint counts on {len(missing)} external tensors that are not declared here: "
            f"{first_few(sources)}; fill them from there and pass an External of each"
        )
