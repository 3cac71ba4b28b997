"""What a practitioner does every day: packed training on conversations, starting, and taking the model out.

    python -m benchmarks.daily [--json] [--records N] [--rounds N] [--megabytes N]

Training is one epoch of the same conversations (functions of Python's standard library, and what their documentation
says of them) through the same model, chat template, AdamW and threads, against TRL's SFTTrainer, packed, and padded to
the full length as axolotl pads. The learning rate is zero, which leaves the work as it is, and the mean loss over all
that is learned is asserted equal: both have seen the same tokens, under the same masks. Every side runs in a process
of its own, in turn, with its data tokenized before; the first steps are left out. Starting is from the end of the
imports to the end of the first step. The export is of one model, saved by four ranks with FSDP2, against torch's own
converter of its distributed checkpoints; both files hold the same tensors, asserted.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Row, absolute, compared, cores, finish, options_of
from tests.harness.worlds import on_ranks

SEQ_LEN, ROWS = 512, 1  # of a batch; with one, every epoch ends with a batch
WARM_UP = 2  # steps
TOLERANCE = 1e-4  # of the mean loss
RANKS = 4
PARTS = ("training", "export")
BARS = {"training": 1.0, "export": 0.5, "start": 1.0}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
SIDES = {"ours": "", "trl": "TRL, packed", "padded": "TRL, padded to the full length"}


def conversations(count: int) -> list[dict[str, Any]]:
    """Functions with a docstring, short enough that no side cuts one."""
    from trainer.data.sources import stdlib_files

    found = []
    for path in stdlib_files().values():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                body = (ast.get_source_segment(source, node) or "")[:900]
                turns = [{"role": "user", "content": body}, {"role": "assistant", "content": text[:300]}]
                found.append({"messages": turns})
        if len(found) >= 2 * count:
            break
    return found[:: max(1, len(found) // count)][:count]


def prepare(directory: Path, count: int) -> None:
    """A model with random weights and a tokenizer trained on the conversations, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    records = conversations(count)
    texts = [turn["content"] for record in records for turn in record["messages"]]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=specials, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=SEQ_LEN,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    fits = [r for r in records if len(tokenizer.apply_chat_template(r["messages"])["input_ids"]) <= SEQ_LEN]
    (directory / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in fits), encoding="utf-8")


# ---- one side of training, in a process of its own ----


class Watch:
    """When steps ended, how many tokens without padding they had, in how many places, and their losses added up."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.places: list[int] = []
        self.loss, self.targets = 0.0, 0

    def report(self) -> dict[str, Any]:
        seconds = self.ends[-1] - self.ends[WARM_UP - 1]
        share = sum(self.tokens[WARM_UP:]) / sum(self.tokens)  # of the epoch
        return {
            "start": self.ends[0] - self.began,
            "seconds": seconds / share,  # of the whole epoch, which has the same samples on every side
            "waste": 1 - sum(self.tokens) / sum(self.places),
            "loss": self.loss / self.targets,
            "targets": self.targets,
            "tokens": sum(self.tokens),
        }


def ours(directory: Path) -> dict[str, Any]:
    import trainer.loop as loop
    from trainer.compose import compose
    from trainer.run import run

    watch = Watch()
    plain = loop.train_step

    def watched(config: Any, training: Any, feed: Any, step: int, *rest: Any) -> dict[str, Any]:
        dealt: list[Any] = []

        def deal(number: int) -> Any:
            dealt.append(type(feed).step(feed, number))
            return dealt[0]

        feed.step = deal
        row = plain(config, training, feed, step, *rest)
        del feed.step
        (share,) = dealt
        watch.loss += row["loss"] * share.num_targets
        watch.targets += share.num_targets
        watch.tokens.append(row["tokens"])
        watch.places.append(sum(batch.inputs.numel() for _, batch in share.micro_batches))
        watch.ends.append(time.perf_counter())
        return row

    loop.train_step = watched  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        config = compose(
            [
                *(
                    "model=hf",
                    f"model.path={directory / 'model'}",
                    "data=chat",
                    f"data.path={directory / 'chats.jsonl'}",
                ),
                *(f"data.cache={directory / 'tokens'}", "data.pack=true", "data.eval_fraction=0", "train.epochs=1"),
                *(f"train.seq_len={SEQ_LEN - 1}", f"train.global_batch={ROWS}", f"train.micro_batch={ROWS}"),
                *("optimizer.lr=0", "schedule=constant", "schedule.warmup_steps=0", "checkpoint.every=0"),
                *("eval.every=0", "eval.generate_tokens=0", "tracking=none", "tracking.print_every=1000"),
                *(f"run.dir={scratch}/run",),
            ]
        )
        with open(os.devnull, "w") as nowhere:
            sys.stdout, shown = nowhere, sys.stdout
            try:
                assert run(config) == 0
            finally:
                sys.stdout = shown
    return watch.report()


def trl(directory: Path, *, packed: bool) -> dict[str, Any]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    watch = Watch()

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.ends.append(time.perf_counter())

    class Watched(SFTTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            given, labels = inputs["input_ids"], inputs["labels"]
            watch.tokens.append(int((given != self.processing_class.pad_token_id).sum()))
            watch.places.append(given.numel())
            targets = int((labels[..., 1:] != -100).sum())
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = found[0] if return_outputs else found
            watch.loss += float(loss.detach()) * targets
            watch.targets += targets
            return found

    options = SFTConfig(
        str(directory / "trl"),
        max_length=SEQ_LEN,
        packing=packed,
        pad_to_multiple_of=None if packed else SEQ_LEN,
        assistant_only_loss=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(directory / "model", dtype="float32"),
        args=options,
        train_dataset=datasets.load_dataset("json", data_files=str(directory / "chats.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
        callbacks=[Ends()],
    )
    trainer.train()
    return watch.report()


def side(name: str, directory: Path) -> None:
    """Train one side in this process: imports first, then the clock."""
    import torch

    torch.set_num_threads(cores())
    if name == "ours":
        import trainer.run  # noqa: F401
    else:
        from trl import SFTTrainer as _trainer  # noqa: F401
    found = ours(directory) if name == "ours" else trl(directory, packed=name == "trl")
    print(json.dumps(found), flush=True)


def asked(*arguments: object) -> dict[str, Any]:
    """What a process of its own measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.daily", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def training(count: int, rounds: int, full: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        os.environ["HF_HOME"] = str(directory / "hf")
        prepare(directory, count)
        for name in SIDES:  # into the caches
            asked("--side", name, "--directory", directory)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for _ in range(rounds):
            for name, runs in found.items():
                runs.append(asked("--side", name, "--directory", directory))
    first = found["ours"][0]
    for name, runs in found.items():
        for run in runs:
            assert run["targets"] == first["targets"], (name, run, first)
            assert abs(run["loss"] - first["loss"]) <= TOLERANCE, (name, run, first)
    rows = []
    for name in ("trl", "padded"):
        own, peer = ([run["seconds"] for run in found[one]] for one in ("ours", name))
        rows.append(compared("an epoch of training", "s", own, peer, SIDES[name], bar=BARS["training"], full=full))
    own, peer = ([run["start"] for run in found[one]] for one in ("ours", "trl"))
    rows.append(compared("start, tokenized before", "s", own, peer, SIDES["trl"], bar=BARS["start"], full=full))
    for name, runs in found.items():
        what = SIDES[name] or "ours"
        waste = statistics.median(run["waste"] for run in runs)
        rows.append(
            Row(f"places of a batch that are padding, {what}", "", waste, None, None, None, "lower", None, None)
        )
    return rows


# ---- the export ----


def save_both(directory: Path, megabytes: int) -> None:
    """Save the same sharded model by both, on one of four ranks."""
    import torch
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_by_dcp
    from torch.distributed.fsdp import fully_shard

    from checkpointing import describe, save

    torch.manual_seed(0)
    count = max(1, round(megabytes * 1e6 / (4 * 2048 * 2048)))
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(count)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    save(directory / "ours", 1, describe(model))
    save_by_dcp({"model": get_model_state_dict(model)}, checkpoint_id=directory / "dcp")


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


def export_one(how: str, directory: Path) -> None:
    """Export by one side in this process: how long it takes until the file is on the disk, and how much memory."""
    import transformers.core_model_loading
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoConfig, AutoModelForCausalLM

    from checkpointing import find
    from checkpointing.commands import open_newest
    from checkpointing.export import export_hugging_face

    assert transformers.core_model_loading and AutoConfig and AutoModelForCausalLM  # imported, as far as they are lazy
    target = directory / f"{how}.out"
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: that of the imports is no part of it
    began = time.perf_counter()
    if how == "ours":
        reader = open_newest(find(directory / "ours"))
        export_hugging_face(reader, target, directory / "config")
    else:
        dcp_to_torch_save(directory / "dcp", target)
        with open(target, "rb") as written:
            os.fsync(written.fileno())
    seconds = time.perf_counter() - began
    memory = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


def export(megabytes: int, rounds: int, full: bool) -> list[Row]:
    import shutil

    import torch
    from safetensors.torch import load_file

    found: dict[str, list[dict[str, Any]]] = {"ours": [], "dcp": []}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "config").mkdir()
        (directory / "config" / "config.json").write_text("{}")
        on_ranks(save_both, RANKS, directory, megabytes)
        for _ in range(rounds + 1):
            for how, runs in found.items():
                target = directory / f"{how}.out"
                shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
                runs.append(asked("--export", how, "--directory", directory))
        stored = torch.load(directory / "dcp.out", weights_only=True, mmap=True)["model"]
        ours: dict[str, Any] = {}
        for file in (directory / "ours.out").glob("*.safetensors"):
            ours |= load_file(file)
        assert ours.keys() == stored.keys() and all(torch.equal(ours[name], stored[name]) for name in ours)
        size = sum(tensor.nbytes for tensor in ours.values())
    own, theirs = ([run["seconds"] for run in found[how][1:]] for how in ("ours", "dcp"))  # after a warm-up
    memory = statistics.median(run["memory"] for run in found["ours"][1:])
    peer = statistics.median(run["memory"] for run in found["dcp"][1:])
    return [
        compared("export from 4 ranks", "s", own, theirs, "torch's converter", bar=BARS["export"], full=full),
        absolute("memory of the export, in shards", "", memory / (size / RANKS), better="lower", bar=1.0, full=full),
        Row("memory of torch's converter, in shards", "", peer / (size / RANKS), None, None, None, "lower", None, None),
    ]


QUICK = {"rounds": 2, "megabytes": 40, "parts": ["export"]}  # TRL takes minutes to start so often


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=650)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (default both)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--export", choices=("ours", "dcp"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = options_of(parser, QUICK)
    if options.side:
        side(options.side, options.directory)
        return 0
    if options.export:
        export_one(options.export, options.directory)
        return 0
    full = options.records >= 120 and options.megabytes >= 650 and options.rounds >= 2
    rows = training(options.records, options.rounds, full) if "training" in options.parts else []
    rows += export(options.megabytes, options.rounds, full) if "export" in options.parts else []
    return finish("daily", rows, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
