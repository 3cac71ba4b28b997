"""Options of the data; a choice of the group is a class."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from trainer.errors import Refused
from trainer.options.field import free, option

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


class Order(Enum):
    shuffled = "shuffled"  # every epoch in an order of its own
    rs2 = "rs2"  # short epochs, each the next part of one order, until all was seen (RS2)


@dataclass
class Data:
    order: Order = Order.shuffled
    ratio: float = option(1.0, low=1e-9, high=1)  # of the data, that an epoch of order=rs2 has
    log_ids: bool = free(False)  # write the ids of the samples that each step consumed into metrics.jsonl
    pack: bool = False  # several samples in one row of train.seq_len, none of which sees another

    def refuse(self) -> None:
        """Refuse a share of the data in an order that has all of it."""
        if self.ratio != 1 and self.order is not Order.rs2:
            raise Refused(f"data.ratio={self.ratio} is an option of data.order=rs2. Type both, or leave it out.")


@dataclass
class RecordData(Data):
    """Records, which can be tokenized once and kept."""

    cache: Optional[str] = free(None)  # a directory for tokenized records, which are mapped from there; null: in memory
    workers: int = option(0, low=0, free=True)  # processes that tokenize into it; 0: one for each core


@dataclass
class Stdlib(Data):
    """The source of the running Python's standard library."""


@dataclass
class Text(Data):
    path: str = free(MISSING)  # a UTF-8 file, or a directory whose files match `pattern`
    pattern: str = "**/*.txt"
    eval_path: Optional[str] = free(None)  # held-out text, like `path`; without it the tail of `path` is held out
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how much of the tail


@dataclass
class Jsonl(RecordData):
    path: str = free(MISSING)  # one JSON object a line: a text, or a prompt and its completion
    eval_path: Optional[str] = free(None)  # held-out records; without it records are held out by a hash of their line
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    text_field: str = "text"
    prompt_field: str = "prompt"  # conditions the completion; no loss on it
    completion_field: str = "completion"


@dataclass
class Chat(RecordData):
    """Conversations, through the model's chat template; what the assistant says is learned."""

    path: str = free(MISSING)  # one JSON object a line: messages, conversations, or instruction, input and output
    eval_path: Optional[str] = free(None)  # held-out conversations; without it held out by a hash of their line
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    template: str = ""  # a file with a Jinja template, or chatml; empty: the tokenizer's own


@dataclass
class Hub(RecordData):
    """A dataset of the Hugging Face hub, or a directory of its library: texts, pairs or conversations."""

    path: str = free(MISSING)  # a hub id or a directory
    name: Optional[str] = None  # of a dataset that has several
    revision: Optional[str] = None  # a branch, tag or commit
    split: str = "train"
    eval_split: Optional[str] = None  # held-out rows; without it they are held out by a hash of the row
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    template: str = ""  # as of data=chat
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"


@dataclass
class Mix(RecordData):
    """Several sources at once, each with its share of the samples."""

    sources: list[str] = field(default_factory=list)  # KIND:PATH@SHARE, such as chat:talk.jsonl@2; shares add up to all
    eval_fraction: float = option(0.02, low=0, high=0.9)  # of each
    template: str = ""  # as of data=chat
