"""`python -m checkpointing ls|inspect|verify|diff|export|import ...`: look at checkpoints, take models out and in.

DIR is a run directory, a directory of generations, or one generation. Exit status: 0 sound, 1 damage found, nothing
to verify, or (diff) a difference, 2 DIR cannot be used. With --json an error is an object too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from checkpointing.commit import save
from checkpointing.diff import compare
from checkpointing.errors import (
    CheckpointError,
    DamagedError,
    LayoutError,
    NotFoundError,
    UnreadableError,
    VersionError,
    first_few,
)
from checkpointing.export import export_hugging_face, export_torch
from checkpointing.export_dcp import export_dcp
from checkpointing.foreign import IMPORTED, describe_foreign
from checkpointing.format import DTYPES
from checkpointing.generations import Generation, check_readable, scan
from checkpointing.lease import hold
from checkpointing.printing import printable_output, unprinted
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from checkpointing.tensors import scalar_from_hex
from checkpointing.tree import human_bytes, render_boxes, render_tree

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    # transformers, which export and import ask for names, imports torchao where that is: it warns of kernels for other
    # GPUs than this machine has, and torch of how it declares its types.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="python -m checkpointing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("ls", "list the generations, newest first"),
        ("inspect", "show what one generation holds (the newest, or a generation's own directory)"),
        ("verify", "read everything and check every checksum"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("dir", type=Path, metavar="DIR")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    commands.choices["inspect"].add_argument("--tensor", metavar="NAME", help="show where one tensor lies instead")
    command = commands.add_parser("diff", help="compare two generations tensor by tensor, however they were sharded")
    for side in ("a", "b"):
        command.add_argument(side, type=Path, metavar=side.upper())
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command = commands.add_parser(
        "export", help="write the model for other programs, whatever layout it was saved under"
    )
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument(
        "--to",
        choices=("hf", "torch", "dcp"),
        default="hf",
        help="a Hugging Face directory, a torch file, or a directory of torch.distributed.checkpoint with moments",
    )
    command.add_argument("out", type=Path, metavar="OUT")
    command.add_argument("--dtype", choices=tuple(KINDS), help="round to this type (default: as it was trained)")
    command.add_argument("--config", type=Path, metavar="DIR", help="where config.json and the tokenizer are (hf)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command = commands.add_parser("import", help="make a generation of a checkpoint that another library wrote")
    command.add_argument("source", type=Path, metavar="SOURCE", help="of DeepSpeed, torch's DCP or Hugging Face")
    command.add_argument("dir", type=Path, metavar="DIR", help="of generations; give it to resume=DIR")
    command.add_argument("--trust-pickle", action="store_true", help="read descriptions that are pickles")
    command.add_argument("--step", type=int, metavar="N", help="which step is done (default: as the checkpoint says)")
    command.add_argument(
        "--ignore", action="append", default=[], metavar="PATH", help="leave out what lies under PATH (DCP; repeatable)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args(argv)
    with printable_output():
        return _answer(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    """The exit status; what went wrong is one paragraph."""
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left for the exit to write
        return 1
    except (CheckpointError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        print(f"checkpointing: {error}", file=sys.stderr)
        return 1 if isinstance(error, DamagedError | VersionError) else 2


def run(arguments: argparse.Namespace) -> int:
    if arguments.command == "diff":
        a, b = open_newest(*find(arguments.a)), open_newest(*find(arguments.b))
        with hold(a.storage, a.manifest.generation), hold(b.storage, b.manifest.generation):
            return diff(a, b, arguments.json)
    if arguments.command == "import":
        return take_in(arguments)
    storage, found = find(arguments.dir)
    if arguments.command == "export":
        return export(open_newest(storage, found), arguments)
    if arguments.command == "inspect":
        return inspect(open_newest(storage, found), arguments.json, arguments.tensor)
    return {"ls": ls, "verify": verify}[arguments.command](storage, found, arguments.json)


def find(directory: Path) -> tuple[FileStorage, list[Generation]]:
    """The generations that DIR means, newest first."""
    if not directory.is_dir():
        raise NotFoundError(f"{directory} is not a directory; give a run, a checkpoint directory or a generation")
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    directory = directory.resolve()
    found = scan(FileStorage(directory))
    if found:
        return FileStorage(directory), found
    parent = FileStorage(directory.parent)
    found = [g for g in scan(parent) if g.name == directory.name]
    if not found:
        raise NotFoundError(f"{directory} holds no generation (directories named step-XXXXXXXX-<save id>)")
    return parent, found


def ls(storage: FileStorage, found: list[Generation], as_json: bool) -> int:
    rows: list[dict[str, Any]] = [
        {
            "generation": g.name,
            "step": g.step,
            "incarnation": g.manifest.incarnation if g.manifest else None,
            "ranks": g.manifest.world_size if g.manifest else None,
            "bytes": g.stored_bytes,
            "saved": g.manifest.created if g.manifest else None,
            "state": _state(g),
            "damage": str(g.damage) if g.damage else None,
        }
        for g in found
    ]
    damaged = int(any(g.damage for g in found))
    if as_json:
        print(json.dumps({"directory": str(storage), "generations": rows}))
        return damaged
    print(f"{'generation':24} {'step':>8} {'incarnation':>11} {'ranks':>5} {'size':>9}  {'saved':19}  state")
    for row in rows:
        print(
            f"{row['generation']:24} {row['step']:>8} {_or_dash(row['incarnation']):>11} {_or_dash(row['ranks']):>5} "
            f"{human_bytes(row['bytes']):>9}  {_when(row['saved']):19}  {row['state']}"
            + (f": {row['damage']}" if row["damage"] else "")
        )
    return damaged


def open_newest(storage: FileStorage, found: list[Generation]) -> GenerationReader:
    """The newest sound generation found; what is damaged and newer is said."""
    check_readable(g for g in found if not g.abandoned)
    generation = next((g for g in found if g.sound and not g.abandoned), None) or next(
        (g for g in found if g.sound), None
    )
    for other in found:
        if other.damage and (generation is None or other.order >= generation.order or other.manifest is None):
            print(f"checkpointing: {other.name} is damaged and not shown: {other.damage}", file=sys.stderr)
    if generation is None or generation.manifest is None:
        why = "; ".join(f"{g.name}: {_state(g)}" for g in found)
        raise DamagedError(f"nothing in {storage} can be inspected ({why})")
    return GenerationReader(storage, generation.manifest)


def inspect(reader: GenerationReader, as_json: bool, tensor: str | None = None) -> int:
    if tensor is not None:
        return inspect_tensor(reader, tensor, as_json)
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
    print(f"  step {manifest.step}, incarnation {manifest.incarnation}, saved {_when(manifest.created)}")
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


def inspect_tensor(reader: GenerationReader, name: str, as_json: bool) -> int:
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


def diff(a: GenerationReader, b: GenerationReader, as_json: bool) -> int:
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


def export(reader: GenerationReader, arguments: argparse.Namespace) -> int:
    dtype = KINDS[arguments.dtype] if arguments.dtype else None
    with hold(reader.storage, reader.manifest.generation):
        if arguments.to == "torch":
            count = export_torch(reader, arguments.out, dtype=dtype)
        elif arguments.to == "dcp":
            count = export_dcp(reader, arguments.out, dtype=dtype)
        else:
            # A run leaves beside its checkpoints what model it trains.
            beside = Path(str(reader.storage)).parent / "hf"
            count = export_hugging_face(reader, arguments.out, arguments.config or beside, dtype=dtype)
    told = {"generation": reader.manifest.generation, "step": reader.manifest.step, "parameters": count}
    if arguments.json:
        print(json.dumps({**told, "out": str(arguments.out)}))
    else:
        print(f"{count:,} parameters of step {reader.manifest.step} in {arguments.out}")
    return 0


def take_in(arguments: argparse.Namespace) -> int:
    foreign = describe_foreign(arguments.source, trust_pickle=arguments.trust_pickle, ignored=arguments.ignore)
    step = arguments.step if arguments.step is not None else foreign.step
    if step is None:
        raise NotFoundError(f"{arguments.source} does not say which step is done. Type --step N (0 for none).")
    if scan(FileStorage(arguments.dir)):
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


def verify(storage: FileStorage, found: list[Generation], as_json: bool) -> int:
    """Check every committed generation found; with one named, that one."""
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


PROGRESS_BYTES = 16 * 1024 * 1024  # checked between one sign of progress and the next


def _verify_one(storage: FileStorage, generation: Generation) -> dict[str, Any]:
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


def _state(generation: Generation) -> str:
    if not generation.committed:
        return "not committed"
    if generation.damage:
        return "unreadable" if isinstance(generation.damage, UnreadableError) else "damaged"
    return "abandoned" if generation.abandoned else "committed"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")[:19] + "Z"


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


if __name__ == "__main__":
    sys.exit(main())
