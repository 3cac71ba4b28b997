"""A real fine-tune by every method at equal trainable counts: what it gains on a task, and what it forgets of another.

    python -m benchmarks.tuning [--long] [--json] [--base-steps N] [--steps N] [--rates N] [--methods NAME ...]

The tiny Llama learns the source of the standard library, as the README's main job does, and is then fine-tuned to write
the first line of a function's docstring from its source; both are made of this Python's own library, and modules are
held out whole. Every method has the same number of learning rates, the best of which is chosen on a validation part;
the table tells the loss on a test part that nothing was chosen by, and on held-out source. Without --long a few steps
at one rate show that every method learns, and nothing is judged.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.report import Row, finish, options_of
from tests.harness.engines import training_here
from trainer.compose import compose
from trainer.data.feed import Feed
from trainer.data.sources import Corpus, load_corpus, stdlib_files
from trainer.data.tokenizer import ByteTokenizer
from trainer.evaluation import evaluate
from trainer.loop import optimize
from trainer.methods import build
from trainer.models import load_tokenizer
from trainer.options.config import Config, method_name
from trainer.options.method import Reselection, Sparse
from trainer.schedule import learning_rate

SEQ_LEN, BATCH = 192, 8
RANK = 2  # of LoRA; the others train as many elements as it does
DEVICE = torch.device("cpu")

# What makes each method train about as many elements as LoRA of this rank, on this model; `{density}` is their share.
METHODS: dict[str, list[str]] = {
    "full": [],
    "lora": [f"method.r={RANK}", f"method.alpha={RANK}"],
    "random_sparse": [f"method.budget_rank={RANK}"],
    "lift": [f"method.budget_rank={RANK}", "method.every={quarter}"],
    "spiel": ["method.density={density}", "method.every={twelfth}"],
    "spiel_ma": ["method.density={density}", "method.every={twelfth}"],
    "sara": ["method.threshold={threshold}", "method.every={half}"],
    "lt_sft": ["method.density={density}"],
    "spt": ["method.density={density}", "method.promote_rank=2"],
    "s2ft": ['method.densities=["o_proj:0.125","down_proj:0.0058"]'],  # a head of eight and four channels of 688
    "perp_selective": [],
}
RATES = {"full": [3e-4, 1e-3, 3e-3], "spiel_ma": [3e-4, 1e-3, 3e-3]}
SPARSE_RATES = [1e-3, 3e-3, 1e-2]


@dataclass(frozen=True)
class Tuned:
    """What one method came to."""

    method: str
    rate: float
    trains: int
    validation: float  # nats a byte
    test: float
    base_task: float


def examples() -> Iterator[tuple[str, dict[str, str]]]:
    """Functions of the standard library with their docstring's first line, each with the module it is of."""
    for name, path in stdlib_files().items():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)) or not node.body[1:]:
                continue
            first = text.strip().splitlines()[0]
            head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
            prompt = f"{head}\n{body}\n# "
            if len((prompt + first).encode()) < SEQ_LEN and len(first) >= 8:
                yield name, {"prompt": prompt, "completion": first + "\n"}


def split(directory: Path) -> dict[str, int]:
    """Write the training, validation and test parts, of different modules; how many examples each has."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for module, example in examples():
        turn = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 10
        parts["validation" if turn == 0 else "test" if turn in (1, 2) else "train"].append(example)
    for name, found in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in found))
    return {name: len(found) for name, found in parts.items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny Llama's tokenizer for transformers: a token's number is its byte, and NUL ends a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in printable)}
    made = Tokenizer(models.BPE({letters[b]: b for b in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0], clean_up_tokenization_spaces=False)


def train(config: Config, corpus: Corpus) -> tuple[Any, int]:
    """An engine after all steps, in this process, and how many elements it trained.

    At the end: a calibration and a full phase are over then. Of a method that narrows, before it did.
    """
    engine = training_here(config, device=DEVICE)
    feed, trains = feed_of(config, corpus), num_trained(engine)
    for step in range(1, config.train.steps + 1):
        lr = learning_rate(step, config.train.steps, config.optimizer.lr, config.schedule)
        optimize(engine, feed.step(step), lr, step)
    narrows = isinstance(config.method, Sparse) and config.method.schedule is Reselection.narrow
    return engine, trains if narrows else num_trained(engine)


def num_trained(engine: Any) -> int:
    return sum(p.numel() for p in engine.engine._bare.parameters() if p.requires_grad)


def feed_of(config: Config, corpus: Corpus) -> Feed:
    train = config.train
    return Feed(
        corpus.train,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        seed=train.seed,
        pad=0,
        num_ranks=1,
        rank=0,
    )


def held_out_loss(engine: Any, config: Config, corpus: Corpus, samples: int = 0) -> float:
    return evaluate(engine, feed_of(config, corpus).evenly(corpus.held_out, samples))


def make_base(directory: Path, steps: int) -> None:
    config = compose(["train.micro_batch=8", f"train.steps={steps}"])
    engine, _ = train(config, load_corpus(config.data, load_tokenizer(config.model), config.train.seq_len))
    engine.engine._bare.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


class Study:
    """The base, the task and the corpora, read once."""

    def __init__(self, base: Path, task: Path, steps: int, samples: int) -> None:
        self.steps, self.samples, self.base, self.task = steps, samples, base, task
        shared = self.shared("train")
        self.tokenizer = load_tokenizer(compose(shared).model)
        self.validation, self.test = (
            load_corpus(compose(self.shared(part)).data, self.tokenizer, SEQ_LEN) for part in ("validation", "test")
        )
        self.source = load_corpus(compose([]).data, ByteTokenizer(), 128)  # the same numbers, and fast
        plain = build(compose(shared))
        linear = [m.weight for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        self.count = sum(RANK * sum(weight.shape) for weight in linear)
        flat = torch.cat([weight.detach().abs().reshape(-1) for weight in linear])
        self.words = {
            "density": self.count / flat.numel(),
            "threshold": float(flat.kthvalue(self.count).values),
            "half": max(1, steps // 2),
            "quarter": max(1, steps // 4),
            "twelfth": max(6, steps // 12),
        }

    def shared(self, held_out: str) -> list[str]:
        return [
            "model=hf",
            f"model.path={self.base}",
            "data=jsonl",
            f"data.path={self.task / 'train.jsonl'}",
            f"data.eval_path={self.task / f'{held_out}.jsonl'}",
            f"train.seq_len={SEQ_LEN}",
            f"train.global_batch={BATCH}",
            f"train.micro_batch={BATCH}",
            f"train.steps={self.steps}",
            f"schedule.warmup_steps={self.steps // 10}",
        ]

    def losses(self, engine: Any, config: Config) -> tuple[float, float, float]:
        return (
            held_out_loss(engine, config, self.validation, self.samples),
            held_out_loss(engine, config, self.test, self.samples),
            held_out_loss(engine, config, self.source, self.samples or 128),
        )

    def untouched(self) -> Tuned:
        config = compose([*self.shared("validation"), "method=full"])
        engine = training_here(config, device=DEVICE)
        return Tuned("untouched", 0.0, 0, *self.losses(engine, config))

    def tune(self, method: str, rate: float) -> Tuned:
        overrides = [one.format(**self.words) if "densities" not in one else one for one in METHODS[method]]
        config = compose([*self.shared("validation"), f"method={method}", *overrides, f"optimizer.lr={rate}"])
        engine, trains = train(config, self.validation)
        return Tuned(method_name(config), rate, trains, *self.losses(engine, config))


LONG = {"base_steps": 800, "steps": 150, "rates": 3, "samples": 0}
QUICK = {"base_steps": 20, "steps": 5, "samples": 16, "rates": 1, "methods": ["lift"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=100, help="held-out samples of each part; 0: all")
    parser.add_argument("--rates", type=int, default=1, help="learning rates tried, of three")
    parser.add_argument("--long", action="store_true", help=f"judged, in some hours: {LONG}")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=[*METHODS], metavar="NAME")
    arguments = options_of(parser, QUICK, argv)
    if arguments.long:
        vars(arguments).update(LONG)
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        base, task = Path(directory, "base"), Path(directory)
        counts = split(task)
        make_base(base, arguments.base_steps)
        study = Study(base, task, arguments.steps, arguments.samples)
        best = [study.untouched()]
        print(f"{counts}; {study.count:,} elements train; {best[0]}", file=sys.stderr, flush=True)
        for method in dict.fromkeys(["lora", *arguments.methods]):
            tried = []
            for rate in RATES.get(method, SPARSE_RATES)[: arguments.rates]:
                tried.append(study.tune(method, rate))
                print(tried[-1], file=sys.stderr, flush=True)
            best.append(min(tried, key=lambda one: one.validation))
    if not arguments.json:
        print(table(best))
    return finish("tuning", rows_of(best, arguments.long), as_json=arguments.json)


def rows_of(best: Sequence[Tuned], full: bool) -> list[Row]:
    """Every method's gain on the test part, and the loss it added on held-out source, over LoRA's."""
    untouched, lora = best[0], best[1]
    gain = untouched.test - lora.test
    rows = []
    for one in best[1:]:
        mine, forgot = untouched.test - one.test, one.base_task - untouched.base_task
        ratio = mine / gain if gain else None
        judged = ratio is not None and ratio >= 0.5 if full else None
        rows.append(Row(f"gain, {one.method}", "nats", mine, gain, "LoRA", ratio, "higher", 0.5, judged))
        rows.append(Row(f"forgot, {one.method}", "nats", forgot, None, None, None, "lower", None, None))
    return rows


def table(best: Sequence[Tuned]) -> str:
    lines = [
        "| method | trains | rate | held-out loss | gain | of LoRA's | base task, forgotten |",
        "| --- |" + " --- |" * 6,
    ]
    untouched, gain = best[0], best[0].test - best[1].test
    for one in best:
        mine, forgot = untouched.test - one.test, one.base_task - untouched.base_task
        lines.append(
            f"| {one.method} | {one.trains:,} | {one.rate:g} | {one.test:.4f} | {mine:.4f} | {mine / gain:.2f} | "
            f"{one.base_task:.4f}, {forgot:+.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
