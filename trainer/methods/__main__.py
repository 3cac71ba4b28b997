"""`python -m trainer.methods COMMAND`: what fine-tuning changed, in and out of a model.

    stats A [B] [--json]       density and change of every layer of run A; with B the sparsity of the difference
    delta RUN FILE             the difference from the base, as a small file
    compose FILE FILE... OUT   the sum of several differences from one base
    merge RUN DIR              the fine-tuned model, as a Hugging Face directory with its tokenizer
    adapter RUN DIR            the adapter of a LoRA run, as peft loads it
    apply MODEL FILE DIR       a Hugging Face directory with a difference put into it
    revert MODEL FILE DIR      and taken out again, bit for bit

RUN, A and B are run directories, directories of generations, or one generation. What they were trained from is opened
where --base says; of a run that was trained in this place it need not be given. Exit status 2: refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from checkpointing import CheckpointError, copy_description, leads_out, parameter_names
from checkpointing.printing import printable_output
from checkpointing.small_files import read_text
from trainer.errors import Refused
from trainer.methods.changes import as_rows, changes, compare
from trainer.methods.deltas import DESCRIBED, LONGEST, Applied, Delta, as_any_new_file, compose, take_out
from trainer.methods.tuned_runs import Tuned
from trainer.models import load_tokenizer
from trainer.options.model import HuggingFace
from trainer.plugins import directory_of, load

# What a model speaks with, and nothing that says what it is, or that runs.
SPOKEN = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "tokenizer.model"),
    *("*.tiktoken", "chat_template*", "generation_config.json"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats")
    stats.add_argument("a", metavar="A")
    stats.add_argument("b", metavar="B", nargs="?")
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    for name, paths in (("delta", ("run", "file")), ("merge", ("run", "dir")), ("adapter", ("run", "dir"))):
        command = commands.add_parser(name)
        for path in paths:
            kind = str if path == "run" else Path  # which may be in a store
            command.add_argument(path, type=kind, metavar=path.upper())
        _add_base(command)
    _add_base(stats)
    for name in ("apply", "revert"):
        command = commands.add_parser(name)
        for path in ("model", "file", "dir"):
            command.add_argument(path, type=Path, metavar=path.upper())
    added = commands.add_parser("compose")
    added.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the last one is written")
    for command in commands.choices.values():
        help_ = "where methods and optimizers of your own are (repeatable)"
        command.add_argument("--config-dir", "-cd", action="append", default=[], metavar="DIR", help=help_)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()  # an error is one paragraph
    if not torch.cuda.is_available():  # which DeepSpeed, where peft looks for it, would say
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with printable_output():
        try:
            load([directory_of("--config-dir", value) for value in arguments.config_dir])
            return int(_COMMANDS[arguments.command](arguments) or 0)
        except (Refused, CheckpointError, OSError) as error:
            print(f"trainer.methods: {error}", file=sys.stderr)
            return 2


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, metavar="MODEL", help="the model that was fine-tuned")
    command.add_argument("--trust-remote-code", action="store_true", help="code that comes with it may run")


def _tuned(run: str, arguments: argparse.Namespace) -> Tuned:
    return Tuned.open(run, arguments.base, trust_code=arguments.trust_remote_code)


def _stats(arguments: argparse.Namespace) -> None:
    run = _tuned(arguments.a, arguments)
    if arguments.b is None:
        rows = as_rows(changes(run.delta()))
    else:
        rows = list(compare(run.weights(), dict(_tuned(arguments.b, arguments).weights())))
    if arguments.json:
        print(json.dumps({"layers": rows, "total": _total(rows)}))
        return
    if not rows:
        print("nothing has changed")
        return
    width = max(len(row["name"]) for row in rows)
    for row in [*rows, _total(rows)]:
        print(f"{row['name']:{width}}  {_line(row)}")


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numel = sum(row["numel"] for row in rows)
    total: dict[str, Any] = {"name": "all", "numel": numel}
    for key in ("selected", "equal", "close"):
        if rows and key in rows[0]:
            total[key] = sum(row[key] for row in rows)
    if "selected" in total:
        total["density"] = total["selected"] / numel
        total["changed"] = sum(row["changed"] * row["numel"] for row in rows) / numel
    total["largest"] = max((row["largest"] for row in rows), default=0.0)
    return total


def _line(row: dict[str, Any]) -> str:
    if "selected" in row:
        rms = f", rms {row['rms']:.2e}" if "rms" in row else ""
        return (
            f"{row['selected']:>12,} of {row['numel']:>14,} ({row['density']:.3%}), {row['changed']:.3%} changed, "
            f"at most {row['largest']:.2e}{rms}"
        )
    equal, close = (row[key] / max(row["numel"], 1) for key in ("equal", "close"))
    return f"{row['numel']:>14,}  {equal:8.3%} equal, {close:8.3%} within 1e-5, at most {row['largest']:.2e} apart"


def _delta(arguments: argparse.Namespace) -> None:
    run = _tuned(arguments.run, arguments)
    delta = run.delta()
    beside = _beside(run)
    for name in DESCRIBED:
        if beside is not None and (text := _text(beside / name)) is not None:
            delta.described[name] = text
            model = run.config.model
            here = Path(os.path.expanduser(model.path)) if isinstance(model, HuggingFace) else None
            delta.before[name] = _text(here / name) if here is not None and here.is_dir() else None
    delta.save(arguments.file)
    print(f"{delta.count:,} entries of {len(delta.shapes)} weights, {arguments.file.stat().st_size / 1e6:.1f} MB")


def _compose(arguments: argparse.Namespace) -> None:
    *given, out = arguments.files
    if len(given) < 2:
        raise Refused("compose takes at least two files and the one to write: compose A.safetensors B.safetensors OUT")
    total = compose([Delta.load(path) for path in given])
    total.save(out)
    print(f"{total.count:,} entries of {len(total.shapes)} weights")


def _merge(arguments: argparse.Namespace) -> None:
    run = _tuned(arguments.run, arguments)
    model: Any = run.merged()
    _write(model, arguments.dir)
    load_tokenizer(run.config.model).save(arguments.dir)
    _describe(run, arguments.dir)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.dir}")


def _adapter(arguments: argparse.Namespace) -> None:
    run = _tuned(arguments.run, arguments)
    model: Any = run.adapted()
    _write(model, arguments.dir)
    _describe(run, arguments.dir)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = model.peft_config["default"].base_model_name_or_path or "the model that this run began with"
    print(f"{count:,} parameters in {arguments.dir}, on {base}")


def _write(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        as_any_new_file(path)


def _describe(run: Tuned, directory: Path) -> None:
    """Have the tokenizer, the template and the tokens that end turns be those that were trained."""
    if (beside := _beside(run)) is not None:
        copy_description(beside, directory, only=SPOKEN)


def _text(path: Path) -> str | None:
    """A small file of a directory that somebody else may have made; None where it is none, or a link out of it."""
    with suppress(OSError, ValueError):
        if not leads_out(path) and len(text := read_text(path)) <= LONGEST:
            return text
    return None


def _beside(run: Tuned) -> Path | None:
    """Where a run has left what model it trains; None where it has not, or only its generations are known."""
    return None if run.run is None or not (run.run / "hf").is_dir() else run.run / "hf"


def _open(path: Path) -> nn.Module:
    if not (path / "config.json").is_file():
        raise Refused(f"{path} is no Hugging Face directory: it has no config.json. `merge` writes one.")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False)
    return model


def _apply(arguments: argparse.Namespace) -> None:
    model: Any = _open(arguments.model)
    Applied(model, delta := Delta.load(arguments.file))
    _write(model, arguments.dir)
    copy_description(arguments.model, arguments.dir, only=SPOKEN)
    for name, text in delta.described.items():
        (arguments.dir / name).write_text(text, encoding="utf-8")


def _revert(arguments: argparse.Namespace) -> None:
    model: Any = _open(arguments.model)
    delta, names = Delta.load(arguments.file), parameter_names(model)
    if delta.low_rank:
        raise Refused(
            f"{next(iter(delta.low_rank))} was changed by a low-rank pair, whose sum with the weight was rounded: the "
            "base is where it was, and does not come out of the merged model."
        )
    merged = {name: names[name].detach().view(-1)[entries.indices.long()] for name, entries in delta.entries.items()}
    take_out(names, delta)
    Applied(model, delta)  # which checks that the base is the delta's
    if wrong := [
        n for n, e in delta.entries.items() if not torch.equal(names[n].view(-1)[e.indices.long()], merged[n])
    ]:
        raise Refused(f"{wrong[0]} does not hold this delta. Give the model that `apply` or `merge` wrote with it.")
    take_out(names, delta)
    _write(model, arguments.dir)
    copy_description(arguments.model, arguments.dir, only=SPOKEN)
    for name, text in delta.before.items():
        if text is None:
            (arguments.dir / name).unlink(missing_ok=True)
        else:
            (arguments.dir / name).write_text(text, encoding="utf-8")


_COMMANDS: dict[str, Any] = {
    "stats": _stats,
    "delta": _delta,
    "compose": _compose,
    "merge": _merge,
    "adapter": _adapter,
    "apply": _apply,
    "revert": _revert,
}

if __name__ == "__main__":
    sys.exit(main())
