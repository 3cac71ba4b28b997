"""Which library wrote a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpointing.errors import CheckpointError, DamagedError, LayoutError, NotFoundError
from checkpointing.foreign.dcp import METADATA, describe_dcp
from checkpointing.foreign.deepspeed import describe_deepspeed, newest_tag
from checkpointing.foreign.huggingface import describe_hugging_face, weight_files
from checkpointing.foreign.state import Foreign


def describe_foreign(directory: Path, *, trust_pickle: bool = False, ignored: Sequence[str] = ()) -> Foreign:
    """The pieces of a checkpoint that another library wrote, memory-mapped.

    DeepSpeed (ZeRO stages 1 to 3), torch.distributed.checkpoint, also as accelerate lays out a model and its optimizer,
    and Hugging Face directories. `LayoutError` where its description is a pickle and `trust_pickle` was not given:
    pickles are read by a reader that runs none of what they name, and a person still says that they come from somebody
    they trust. `NotFoundError` for a directory of none of these.
    """
    try:
        return _described(directory, trust_pickle, ignored)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # of what anybody may have written
        raise DamagedError(
            f"{directory} is damaged, or of a form that is not known here ({type(error).__name__}: {error})"
        ) from error


def who_wrote(directory: Path) -> str | None:
    """The library that wrote the checkpoints of a directory, by its files' names; None for none that is known here."""
    if newest_tag(directory) is not None:
        return "DeepSpeed"
    if (directory / METADATA).is_file() or any(directory.glob(f"*_[0-9]/{METADATA}")):
        return "torch.distributed.checkpoint"
    return None


def _described(directory: Path, trust_pickle: bool, ignored: Sequence[str]) -> Foreign:
    if not directory.is_dir():
        raise NotFoundError(f"{directory} is not a directory")
    if (tag := newest_tag(directory)) is not None:
        _check_trust(tag, "DeepSpeed", trust_pickle)
        return describe_deepspeed(tag)
    chunks = [
        path.parent for path in (directory / METADATA, *sorted(directory.glob(f"*_[0-9]/{METADATA}"))) if path.is_file()
    ]
    if chunks:
        _check_trust(directory, "torch.distributed.checkpoint", trust_pickle)
        return describe_dcp(chunks, ignored)
    if files := weight_files(directory):
        if any(file.suffix != ".safetensors" for file in files):
            _check_trust(directory, "torch.save", trust_pickle)
        return describe_hugging_face(directory)
    raise NotFoundError(
        f"{directory} holds no checkpoint that is known here: neither DeepSpeed's (latest, or "
        "mp_rank_00_model_states.pt), nor torch.distributed.checkpoint's (.metadata), nor Hugging Face's "
        "(model.safetensors, pytorch_model.bin)."
    )


def _check_trust(directory: Path, who: str, trusted: bool) -> None:
    if not trusted:
        raise LayoutError(
            f"{directory} was written by {who}, which describes tensors by pickles. They are read here by a reader "
            "that runs nothing of what they name. If you know where this directory comes from, type --trust-pickle."
        )
