"""Where text comes from: the standard library, text files, lines of records; each a training and a held-out set."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import xxhash

from trainer.data import cache, hub
from trainer.data.conversations import Conversations
from trainer.data.dataset import Dataset, Records, Windows
from trainer.data.files import files, read_text, records, refuse_records, unreadable
from trainer.data.mixture import Mixture, counts_of
from trainer.data.packing import Packed
from trainer.data.records import Fields, Record, RecordReader, append, conversational
from trainer.data.tokenizer import Tokenizer, Tokens
from trainer.errors import Refused
from trainer.options.data import Chat, Data, Hub, Jsonl, Mix, Stdlib, Text

STDLIB_HELD_OUT_BYTES = 256 * 1024
# Data tables, test suites and installed packages: not the kind of source text this corpus is for, and not the same
# on every machine.
STDLIB_LEFT_OUT = {
    "encodings",
    "pydoc_data",
    "idlelib",
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out dataset, and what to say about them in the plan."""

    train: Dataset
    held_out: Dataset
    name: str
    notes: list[str] = field(default_factory=list)
    endings: Set[str] = frozenset()  # tokens that end the turns of conversations


def load_corpus(config: Data, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    """Read and tokenize the configured data. `Refused` if it is missing, malformed or empty."""
    if isinstance(config, Stdlib):
        corpus = _stdlib(tokenizer, seq_len)
    elif isinstance(config, Text):
        corpus = _text(config, tokenizer, seq_len)
    elif isinstance(config, Jsonl):
        fields = Fields(config.text_field, config.prompt_field, config.completion_field, tokenizer, seq_len)
        corpus = _records(config, fields, seq_len)
    elif isinstance(config, Chat):
        corpus = _records(config, Conversations(config.template, tokenizer, seq_len), seq_len)
    elif isinstance(config, Hub):
        corpus = _hub(config, tokenizer, seq_len)
    else:
        assert isinstance(config, Mix)
        corpus = _mixed(config, tokenizer, seq_len)
    if len(corpus.train) == 0:
        if corpus.notes:
            why = "; ".join(corpus.notes)
            raise Refused(f"{corpus.name} holds nothing to train on: {why}. Mend the records, or raise train.seq_len.")
        raise Refused(
            f"{corpus.name} holds nothing to train on: it is empty, or all of it is held out. Give more data, or a "
            "smaller data.eval_fraction."
        )
    if config.pack:
        corpus = _packed(corpus, seq_len)
    if len(corpus.held_out) == 0:
        corpus.notes.append("nothing is held out, so there is no evaluation")
    return corpus


def load_sets(given: Sequence[str], data: Data, tokenizer: Tokenizer, seq_len: int) -> dict[str, Dataset]:
    """The datasets that `eval.sets` names, all of each. `Refused` for what is no NAME@KIND:PATH."""
    own: Any = {key: getattr(data, key) for key in ("template", "cache", "workers") if hasattr(data, key)}
    mix, sets = Mix(eval_fraction=0, **own), dict[str, Dataset]()
    for one in given:
        name, at, source = one.partition("@")
        if not at or not re.fullmatch(r"[\w.-]+", name) or name in sets:
            raise Refused(
                f"eval.sets: {one} is no NAME@KIND:PATH with a name of its own. Type one such as code@jsonl:code.jsonl."
            )
        try:
            sets[name] = load_corpus(_source(mix, source)[0], tokenizer, seq_len).train
        except Refused as error:
            raise Refused(f"eval.sets: {one} cannot be read. {error}") from None
    return sets


def _mixed(config: Mix, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    if not config.sources:
        raise Refused("data=mix has no sources. Type 'data.sources=[chat:talk.jsonl@3,text:books@1]'.")
    given = [_source(config, source) for source in config.sources]
    corpora = [load_corpus(one, tokenizer, seq_len) for one, _ in given]
    counts = counts_of([len(corpus.train) for corpus in corpora], [share for _, share in given])
    notes = []
    for corpus, count in zip(corpora, counts, strict=True):
        often = f"{count / len(corpus.train):.2f} times" if count != len(corpus.train) else "once"
        notes.append(f"{corpus.name}: {count / sum(counts):.1%} of the samples, each {often} an epoch")
        notes += [f"{corpus.name}: {note}" for note in corpus.notes]
    held_out = [corpus.held_out for corpus in corpora if len(corpus.held_out)]
    return Corpus(
        Mixture([corpus.train for corpus in corpora], counts),
        Mixture(held_out, [len(one) for one in held_out]),
        f"a mixture of {len(corpora)} sources",
        notes,
        frozenset().union(*(corpus.endings for corpus in corpora)),
    )


def _source(config: Mix, source: str) -> tuple[Data, float]:
    """`KIND:PATH@SHARE` as options of its own, and the share; `hf/SPLIT` is a kind as well."""
    kind, _, rest = source.partition(":")
    kind, _, split = kind.partition("/")
    path, at, share = rest.rpartition("@")
    try:
        path, weight = (path, float(share)) if at else (rest, 1.0)
    except ValueError:
        path, weight = rest, 1.0  # of a path with an @ in it
    own: Any = {"path": path, "eval_fraction": config.eval_fraction, "cache": config.cache, "workers": config.workers}
    makes: dict[str, Callable[[], Data]] = {
        "stdlib": Stdlib,
        "text": lambda: Text(path=path, eval_fraction=config.eval_fraction),
        "jsonl": lambda: Jsonl(**own),
        "chat": lambda: Chat(**own, template=config.template),
        "hf": lambda: Hub(**own, template=config.template, split=split or "train"),
    }
    if kind not in makes or (split and kind != "hf") or not (path or kind == "stdlib") or not 0 < weight < float("inf"):
        raise Refused(
            f"data.sources: {source} is no KIND:PATH@SHARE with a KIND of {', '.join(makes)} and a SHARE above 0. Type "
            "one such as chat:talk.jsonl@2."
        )
    return makes[kind](), weight


def _packed(corpus: Corpus, seq_len: int) -> Corpus:
    """Pack the rows to train on. Held-out rows stay as they are, and their loss comparable."""
    rows = Packed(corpus.train, seq_len)
    count = len(corpus.train)
    padded = corpus.train.num_tokens(np.arange(count)) / (count * seq_len)
    note = f"{count:,} samples in {len(rows):,} rows that are {rows.filled:.0%} full ({padded:.0%} with one in each)"
    return replace(corpus, train=rows, notes=[*corpus.notes, note])


def stdlib_files() -> dict[str, Path]:
    """The source files of the running Python's standard library, by their path in it."""
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if not STDLIB_LEFT_OUT & set(path.relative_to(root).parts)
    }


def _stdlib(tokenizer: Tokenizer, seq_len: int) -> Corpus:
    root, files = Path(sysconfig.get_path("stdlib")), stdlib_files()
    held_out = held_out_files({name: path.stat().st_size for name, path in files.items()})
    if len(held_out) == len(files):
        raise Refused(f"The standard library in {root} holds no source text. Choose data=text data.path=FILE.")
    train = _join(tokenizer, (_read_source(path) for name, path in files.items() if name not in held_out))
    test = _join(tokenizer, (_read_source(path) for name, path in files.items() if name in held_out))
    name = f"the standard library's source, {len(files) - len(held_out)} files and {len(held_out)} held out"
    return Corpus(Windows(train, seq_len), Windows(test, seq_len), name)


def held_out_files(sizes: dict[str, int]) -> set[str]:
    """Choose files of at least `STDLIB_HELD_OUT_BYTES` in all, by a hash of their relative path alone."""
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).digest()):
        if sum(sizes[n] for n in chosen) >= STDLIB_HELD_OUT_BYTES:
            break
        chosen.add(name)
    return chosen


def _text(config: Text, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    tokens = _join(tokenizer, map(_read_text, files(config.path, config.pattern, "data.path")))
    if config.eval_path is not None:
        test = _join(tokenizer, map(_read_text, files(config.eval_path, config.pattern, "data.eval_path")))
    else:
        cut = len(tokens) - int(len(tokens) * config.eval_fraction)
        tokens, test = tokens[:cut], tokens[cut:]
    return Corpus(Windows(tokens, seq_len), Windows(test, seq_len), config.path)


def _read_text(path: Path) -> str:
    refuse_records(path, text := read_text(path))
    return text


def _records(config: Jsonl | Chat, reader: RecordReader, seq_len: int) -> Corpus:
    """Lines of JSON, each a record."""
    apart = None if config.eval_path is None else partial(_parsed, config.eval_path, "data.eval_path")
    return _corpus(config, partial(_parsed, config.path, "data.path"), apart, reader, seq_len)


def _hub(config: Hub, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    """Rows, each a record, of the kind that the first one is."""
    first = next(hub.rows(config, config.split), None)
    named = (config.text_field, config.prompt_field, config.completion_field)
    chosen = set(named) - {"text", "prompt", "completion"}  # by name, which says what is meant
    if first is not None and conversational(first[2]) and not chosen & set(first[2]):
        reader: RecordReader = Conversations(config.template, tokenizer, seq_len)
    else:
        reader = Fields(config.text_field, config.prompt_field, config.completion_field, tokenizer, seq_len)
    apart = None if config.eval_split is None else partial(hub.rows, config, config.eval_split)
    return _corpus(config, partial(hub.rows, config, config.split), apart, reader, seq_len)


Stand = Iterator[tuple[str, bytes, Record]]  # where a record stands, what tells it from others, and the record


def _corpus(
    config: Jsonl | Chat | Hub,
    found: Callable[[], Stand],
    apart: Callable[[], Stand] | None,
    reader: RecordReader,
    seq_len: int,
) -> Corpus:
    """A corpus of records that are read as often as it takes. Those `apart` are held out, or a part of the others."""

    def rows() -> Iterator[cache.Row]:
        for where, content, record in found():
            # By content, so that a record that is there twice does not land on both sides.
            held_out = apart is None and xxhash.xxh3_64_intdigest(content) / 2**64 < config.eval_fraction
            yield where, record, held_out
        for where, _, record in apart() if apart is not None else ():
            yield where, record, True

    if config.cache is None:
        train, test = (Records(side, seq_len) for side in cache.tokenize(reader, rows()))
    else:
        fraction = config.eval_fraction if apart is None else None
        told, count = xxhash.xxh3_128(f"{reader.key} {fraction} {transformers.__version__} {cache.PART}".encode()), 0
        for source in (found, apart):
            told.update(b"|")
            for _, content, _ in source() if source is not None else ():
                told.update(len(content).to_bytes(8, "little") + content)
                count += 1
        place = Path(os.path.expanduser(config.cache))
        made = cache.tokenized(place, told.hexdigest(), rows, count, reader, config.workers)
        train, test, reader.tally = Records(made.train, seq_len), Records(made.held_out, seq_len), made.tally
    return Corpus(train, test, config.path, reader.notes(), reader.endings)


def _parsed(path: str, key: str) -> Stand:
    (file,) = files(path, "", key)
    yield from records(file, path)


def _read_source(path: Path) -> str:
    """A module of the standard library; a few are in another encoding, which does not matter here."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise unreadable(path, error) from None


def _join(tokenizer: Tokenizer, documents: Iterable[str]) -> Tokens:
    """Documents one after the other, each with its end."""
    parts = [append(tokenizer.encode(text), tokenizer.eos) for text in documents if text]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)
