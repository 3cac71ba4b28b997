"""Datasets of the Hugging Face library, from this disk; without a network a hub id is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from trainer.data.sources import Corpus, load_corpus, load_sets
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import Refused
from trainer.options.data import Chat, Hub, Jsonl, Mix

TALK = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(n)}]} for n in range(30)]
TEXT = [{"text": f"text {n}"} for n in range(30)]


def load(path: Path, **options: object) -> Corpus:
    config = Hub(path=str(path), template="chatml", **{"eval_fraction": 0.0, **options})  # type: ignore[arg-type]
    return load_corpus(config, ByteTokenizer(), 100)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(TALK), "test": Dataset.from_list(TALK[:4])}).save_to_disk(tmp_path / "a")
    corpus = load(tmp_path / "a", eval_split="test")
    assert (len(corpus.train), len(corpus.held_out)) == (30, 4)
    assert corpus.notes[0] == "34 records of messages, loss on the assistant's turns"
    with pytest.raises(Refused, match=r"has no split other, only train, test\. Type data\.split=SPLIT"):
        load(tmp_path / "a", split="other")
    Dataset.from_list(TEXT).save_to_disk(tmp_path / "b")
    corpus = load(tmp_path / "b", eval_fraction=0.3)
    assert len(corpus.train) + len(corpus.held_out) == 30 and len(corpus.held_out) > 1


@pytest.mark.parametrize("records", [TALK, TEXT], ids=["conversations", "texts"])
def test_a_directory_of_files_is_what_the_file_is_elsewhere(records: list[dict[str, object]], tmp_path: Path) -> None:
    Dataset.from_list(records).to_json(tmp_path / "train.jsonl")
    ours = load(tmp_path)
    path, kind = str(tmp_path / "train.jsonl"), Chat if records is TALK else Jsonl
    more = {"template": "chatml"} if kind is Chat else {}
    theirs = load_corpus(kind(path=path, eval_fraction=0.0, **more), ByteTokenizer(), 100)  # type: ignore[arg-type]
    assert ours.train.fingerprint == theirs.train.fingerprint
    assert ours.train.num_targets(np.arange(30)) > 30


def test_a_split_as_a_source_and_as_a_set_to_evaluate(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(TEXT), "test": Dataset.from_list(TEXT[:4])}).save_to_disk(tmp_path)
    sets = load_sets([f"own@hf/test:{tmp_path}", f"all@hf:{tmp_path}"], Mix(), ByteTokenizer(), 100)
    assert {name: len(held) for name, held in sets.items()} == {"own": 4, "all": 30}
    mixed = load_corpus(Mix(sources=[f"hf/test:{tmp_path}@2"], eval_fraction=0), ByteTokenizer(), 100)
    assert len(mixed.train) == 4
    with pytest.raises(Refused, match="has no split other"):
        load_sets([f"own@hf/other:{tmp_path}"], Mix(), ByteTokenizer(), 100)
    with pytest.raises(Refused, match=r"is no KIND:PATH@SHARE"):
        load_sets([f"own@chat/test:{tmp_path}"], Mix(), ByteTokenizer(), 100)


def test_fields_that_are_named_count_more_than_what_a_row_looks_like(tmp_path: Path) -> None:
    Dataset.from_list([{"instruction": "2+2", "output": "4", "body": "x"}] * 3).save_to_disk(tmp_path)
    assert load(tmp_path).notes[0].startswith("3 records of instruction, input and output")
    tokens, targets = load(tmp_path, prompt_field="instruction", completion_field="output").train.sample(0)
    assert bytes(tokens.tolist()) == b"2+24\0" and targets.tolist() == [False] * 3 + [True] * 2
    assert bytes(load(tmp_path, text_field="body").train.sample(0).tokens.tolist()) == b"x\0"


def test_what_cannot_be_read_is_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in (tmp_path / "empty", Path("nobody/no-such-dataset")):
        with pytest.raises(Refused, match=f"The split train of data.path={path} cannot be read") as refused:
            load(path)
        assert "\n" not in str(refused.value)
    Dataset.from_list([{"text": "a"}, {"text": None}]).save_to_disk(tmp_path / "odd")
    with pytest.raises(Refused, match=r"odd, row 1: the field text is null"):
        load(tmp_path / "odd")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Refused, match=r"is not installed\. Type `pip install datasets`"):
        load(tmp_path)
