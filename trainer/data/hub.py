"""Datasets of the Hugging Face hub, and of its library's directories on this disk, row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpointing.errors import reason_of
from trainer.data.records import Record
from trainer.errors import Refused
from trainer.options.data import Hub


def rows(config: Hub, split: str) -> Iterator[tuple[str, bytes, Record]]:
    """Where each row stands, what tells it from others, and the row. `Refused` where the split cannot be read."""
    for number, row in enumerate(_open(config, split)):
        yield f"{config.path}, row {number}", json.dumps(row, sort_keys=True, default=str).encode(), row


def _open(config: Hub, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise Refused(
            "data=hf reads with the library datasets, which is not installed. Type `pip install datasets`, or give a "
            "file: data=chat or data=jsonl."
        ) from None
    local = Path(os.path.expanduser(config.path))
    datasets.disable_progress_bars()  # each rank would draw one
    try:
        # What save_to_disk wrote says so; anything else is read as the hub's repositories are.
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(str(local))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise Refused(
                        f"data.path={config.path} has no split {split}, only {', '.join(found)}. Type data.split=SPLIT."
                    )
                return found[split]
            return found
        path = str(local) if local.exists() else config.path
        return datasets.load_dataset(path, config.name, split=split, revision=config.revision)
    except Refused:
        raise
    except Exception as error:  # which it raises is not documented
        reason = reason_of(error)
        raise Refused(
            f"The split {split} of data.path={config.path} cannot be read: {reason} Give a directory that the library "
            "datasets reads, or a hub id that this machine can reach."
        ) from error
