"""The commands of `python -m checkpointing` that read tensors: inspect, verify, diff, export and import.

Each prints and returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from math import isfinite
from typing import Any

import torch

from checkpointing.diff import compare
from checkpointing.errors import (
    BaseNeededError,
    CheckpointError,
    ConfigNeededError,
    DamagedError,
    LayoutError,
    NotFoundError,
    UnreadableError,
    first_few,
)
from checkpointing.export import export_hugging_face, export_torch
from checkpointing.export_dcp import export_dcp
from checkpointing.foreign import IMPORTED, describe_foreign
from checkpointing.generations import Generation, check_readable, scan
from checkpointing.lease import hold
from checkpointing.listing import state_of, when
from checkpointing.place import Place
from checkpointing.printing import unprinted
from checkpointing.reader import GenerationReader
from checkpointing.saving import save
from checkpointing.storage import FileStorage, Storage
from checkpointing.stores import open_storage
from checkpointing.tensors import DTYPES, scalar_from_hex
from checkpointing.tree import human_bytes, render_boxes, render_tree

PROGRESS_BYTES = 16 * 1024 * 1024  # checked between one sign of progress and the next


def open_newest(place: Place) -> GenerationReader:
    """Open the newest sound generation of a place; what is damaged and newer is said."""
    storage, found = place.storage, place.generations
    check_readable(g for g in found if not g.abandoned)
    generation = next((g for g in found if g.sound and not g.abandoned), None) or next(
        (g for g in found if g.sound), None
    )
    for other in found:
        if other.damage and (generation is None or other.order >= generation.order or other.manifest is None):
            print(f"checkpointing: {other.name} is damaged and not shown: {other.damage}", file=sys.stderr)
    if generation is None or generation.manifest is None:
        why = "; ".join(f"{g.name}: {state_of(g)}" for g in found)
        raise DamagedError(f"nothing in {storage} can be inspected ({why})")
    return GenerationReader(storage, generation.manifest)


def inspect(reader: GenerationReader, as_json: bool, tensor: str | None = None) -> int:
    if tensor is not None:
        return _inspect_tensor(reader, tensor, as_json)
    manifest = reader.manifest
    writers: dict[str, list[int]] = {name: [] for name in manifest.tensors}
    for writer, index in zip(manifest.writers, reader.indexes, strict=True):
        for name in {b.name for b in index.boxes} | index.scalars.keys():
            writers[name].append(writer.rank)
    if as_json:
        tensors = {
            name: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes, "written_by": writers[name]}
            for name, t in manifest.tensors.items()
        }
        print(json.dumps({**asdict(manifest), "tensors": tensors, "objects": reader.objects}))
        return 0
    parameters = sum(t.nbytes // t.itemsize for n, t in manifest.tensors.items() if n.startswith("model/"))
    print(f"{manifest.generation}  ({reader.storage})")
    print(f"  step {manifest.step}, incarnation {manifest.incarnation}, saved {when(manifest.created)}")
    print(f"  by {manifest.world_size} ranks, {len(manifest.writers)} of them writing")
    print(f"  {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}")
    print(f"  {len(manifest.tensors)} tensors, {human_bytes(manifest.nbytes)}; model {parameters:,} elements")
    print("\ntensors")
    print("\n".join(render_tree(manifest.tensors, writers)))
    if manifest.aliases:
        print("\ntied")
        print("\n".join(f"  {name} is {stored}" for name, stored in manifest.aliases.items()))
    if manifest.external:
        print("\nexternal")
        for name, t in manifest.external.items():
            print(f"  {name}  {t.dtype} {_by(t.shape)}  from {t.source}  SHA-256 {t.sha256}")
    print("\nobjects")
    print("\n".join(_object_lines(reader.objects)))
    return 0


def _inspect_tensor(reader: GenerationReader, name: str, as_json: bool) -> int:
    manifest = reader.manifest
    name = manifest.stored_name(name)
    if name not in manifest.tensors:
        close = get_close_matches(name, manifest.tensors, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        hint = f"; its bytes lie in {manifest.external[name].source}" if name in manifest.external else hint
        raise NotFoundError(f"{manifest.generation} holds no tensor {name}{hint}")
    tensor = manifest.tensors[name]
    indexes = list(zip((writer.rank for writer in manifest.writers), reader.indexes, strict=True))
    boxes = [(stored.box, rank) for rank, index in indexes for stored in index.boxes if stored.name == name]
    value = next((index.scalars[name] for _, index in indexes if name in index.scalars), None)
    if as_json:
        held = [{"offset": box.offset, "size": box.size, "rank": rank} for box, rank in boxes]
        described = {"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "value": value, "boxes": held}
        print(json.dumps(described))
        return 0
    print(f"{name}  {tensor.dtype} {_by(tensor.shape)}, {human_bytes(tensor.nbytes)}, in {len(boxes)} boxes")
    if value is not None:
        print(f"  {scalar_from_hex(value, DTYPES[tensor.dtype], name).item()}")
    print("\n".join(f"  {line}" for line in render_boxes(tensor, boxes)))
    return 0


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def diff(first: Place, second: Place, as_json: bool) -> int:
    """Compare the newest sound generations of two directories."""
    a, b = open_newest(first), open_newest(second)
    with hold(a.storage, a.manifest.generation), hold(b.storage, b.manifest.generation):
        return _diff(a, b, as_json)


def _diff(a: GenerationReader, b: GenerationReader, as_json: bool) -> int:
    found = list(compare(a, b))
    differing = [d for d in found if d.state != "equal"]
    names = [f"{reader.storage}/{reader.manifest.generation}" for reader in (a, b)]
    if as_json:
        report = [{**asdict(d), "max_abs": _finite(d.max_abs), "max_rel": _finite(d.max_rel)} for d in found]
        print(json.dumps({"a": names[0], "b": names[1], "equal": not differing, "tensors": report}))
        return int(bool(differing))
    print(f"a  {names[0]}\nb  {names[1]}")
    for d in differing:
        by = f"  max abs {d.max_abs:.3g}  max rel {d.max_rel:.3g}" if d.max_abs is not None else ""
        print(f"  {d.name}: {d.state}{by}")
    print(f"{len(found) - len(differing)} of {len(found)} tensors are equal, bit for bit")
    return int(bool(differing))


# What to type where an export needs more than a generation has: the library itself knows no commands.
_NEXT = {
    BaseNeededError: "`python -m trainer.methods merge RUN DIR` puts it into its base.",
    ConfigNeededError: "Type --config DIR with a directory of that model; `python -m trainer.methods merge RUN DIR` "
    "writes a run's as transformers does.",
}


def export(reader: GenerationReader, arguments: argparse.Namespace) -> int:
    try:
        with hold(reader.storage, reader.manifest.generation):
            count = _write_out(reader, arguments)
    except (BaseNeededError, ConfigNeededError) as error:
        raise type(error)(f"{error}. {_NEXT[type(error)]}") from error
    told = {"generation": reader.manifest.generation, "step": reader.manifest.step, "parameters": count}
    if arguments.json:
        print(json.dumps({**told, "out": str(arguments.out)}))
    else:
        print(f"{count:,} parameters of step {reader.manifest.step} in {arguments.out}")
    return 0


def _write_out(reader: GenerationReader, arguments: argparse.Namespace) -> int:
    """Write the model in the form that was asked for; how many parameters it has."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.dtype)
    if arguments.to == "torch":
        return export_torch(reader, arguments.out, dtype=dtype)
    if arguments.to == "dcp":
        return export_dcp(reader, arguments.out, dtype=dtype)
    description, storage = arguments.config, reader.storage
    if description is None and isinstance(storage, FileStorage):
        description = storage.root.parent / "hf"  # a run leaves there what model it trains
    if description is None:
        raise NotFoundError(
            f"{storage} is in a store, and nothing beside it says what model this is. Type --config DIR, such as a "
            "run's hf."
        )
    return export_hugging_face(reader, arguments.out, description, dtype=dtype)


def take_in(arguments: argparse.Namespace) -> int:
    foreign = describe_foreign(arguments.source, trust_pickle=arguments.trust_pickle, ignored=arguments.ignore)
    step = arguments.step if arguments.step is not None else foreign.step
    if step is None:
        raise NotFoundError(f"{arguments.source} does not say which step is done. Type --step N (0 for none).")
    if scan(open_storage(arguments.dir)):
        raise LayoutError(f"{arguments.dir} holds generations already. Give another directory, or remove it.")
    told = {"kind": foreign.kind, "source": str(arguments.source), "step": step, "optimizer": foreign.has_optimizer}
    name = save(arguments.dir, step, foreign.pieces, {IMPORTED: told})
    if arguments.json:
        print(json.dumps({**told, "generation": name, "left_out": list(foreign.left_out)}))
        return 0
    count = sum(piece.tensor.numel() for piece in foreign.pieces if piece.name.startswith("model/"))
    moments = (
        "with its optimizer's state" if foreign.has_optimizer else "without an optimizer's state, which begins at 0"
    )
    print(f"{foreign.kind}: step {step}, {count:,} parameters {moments}, in {arguments.dir}/{name}")
    if foreign.left_out:
        print(f"left out: {first_few(list(foreign.left_out))}")
    return 0


def _finite(value: float | None) -> float | str | None:
    return str(value) if value is not None and not isfinite(value) else value


def verify(place: Place, as_json: bool) -> int:
    """Check every committed generation of a place; of one that was named that one."""
    storage, found = place.storage, place.generations
    report = [_verify_one(storage, g) for g in found if g.committed]
    skipped = [g.name for g in found if not g.committed]
    damaged, unreadable = any(r["damage"] for r in report), any(r["unreadable"] for r in report)
    status = 1 if damaged or not report else 2 * unreadable
    if as_json:
        print(json.dumps({"directory": str(storage), "generations": report, "not_committed": skipped}))
        return status
    for row in report:
        state = "DAMAGED" if row["damage"] else "UNREADABLE" if row["unreadable"] else "sound"
        print(f"{row['generation']}: {state}, {human_bytes(row['bytes'])} checked")
        for line in [*row["damage"], *([row["unreadable"]] if row["unreadable"] else [])]:
            print(f"  {line}")
    for name in skipped:
        print(f"{name}: not committed, so it is no generation; nothing to verify")
    if damaged:
        print("Loading without naming a step passes over damaged generations and takes the next older sound one.")
    if unreadable:
        print("What cannot be read may be sound: mend the storage and verify again. Loading passes over none for it.")
    return status


def _verify_one(storage: Storage, generation: Generation) -> dict[str, Any]:
    damage: list[str] = []
    unreadable, checked, shown = None, 0, -PROGRESS_BYTES
    try:
        if generation.manifest is None:
            raise generation.damage or DamagedError(f"{generation.name} has no manifest")
        with hold(storage, generation.name):
            for _, nbytes, error in GenerationReader(storage, generation.manifest).verify():
                if isinstance(error, UnreadableError):
                    raise error  # every further try would take as long
                checked += nbytes
                if error is not None and str(error) not in damage:
                    damage.append(str(error))
                if sys.stderr.isatty() and checked >= shown + PROGRESS_BYTES:
                    shown = checked
                    progress = f"{human_bytes(checked)} of {human_bytes(generation.manifest.nbytes)}"
                    print(f"\r{progress}", end="\r", file=unprinted(sys.stderr))
    except UnreadableError as error:
        unreadable = str(error)
    except CheckpointError as error:
        damage.append(str(error))
    return {"generation": generation.name, "bytes": checked, "damage": damage, "unreadable": unreadable}


def _object_lines(value: dict[str, Any], indent: str = "  ") -> list[str]:
    """Nested objects indented; one whose values are all plain on a single line."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and any(isinstance(v, dict) for v in item.values()):
            lines += [f"{indent}{_key(key)}", *_object_lines(item, indent + "  ")]
        elif isinstance(item, dict):
            plain = ", ".join(f"{_key(k)} {json.dumps(v)}" for k, v in item.items())
            lines.append(f"{indent}{_key(key)}: {plain or '-'}")
        else:
            lines.append(f"{indent}{_key(key)}: {json.dumps(item)}")
    return lines


def _key(text: str) -> str:
    """A key on one line, whatever it says."""
    return text.replace("\n", "\\n").replace("\t", "\\t")
