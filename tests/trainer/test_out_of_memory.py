"""Running out of memory says what to type, and only that does."""

from __future__ import annotations

import pytest
import torch

from trainer.compose import compose
from trainer.errors import TrainingFailed
from trainer.out_of_memory import explained, remedies

CPU = torch.device("cpu")


def test_an_allocation_that_fails_says_what_to_type() -> None:
    config = compose([])
    with (
        pytest.raises(TrainingFailed, match=r"does not fit into memory: .* Type, in this order") as failed,
        explained(config, CPU),
    ):
        torch.empty(1 << 50)
    told = str(failed.value)
    places = [
        told.index(word)
        for word in (
            "local_batch=1 ",
            "activation_checkpointing",
            "parallel=fsdp",
            "precision=bf16",
            "adamw_8bit",
            "method=lora",
        )
    ]
    assert places == sorted(places) and "\n" not in told
    with (
        pytest.raises(TrainingFailed, match="a GPU's memory: CUDA out of memory"),
        explained(config, torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a shape"), explained(compose([]), CPU):
        raise RuntimeError("a shape does not fit")


@pytest.mark.usefixtures("long")
def test_what_is_done_already_is_not_told_again() -> None:
    done = ["parallel=zero3", "parallel.offload=true", "parallel.activation_checkpointing=true", "precision=bf16"]
    left = remedies(compose([*done, "train.micro_batch=1", "method=lora"]))
    assert [one.removeprefix("in a new run ").partition(" ")[0] for one in left] == ["train.seq_len=64"]
    less = remedies(compose(["parallel=zero2"]))
    assert any(one.startswith("parallel.zero_stage=3") for one in less) and any("offload" in one for one in less)
    for remedy in [*less, *remedies(compose([])), *remedies(compose(["parallel=fsdp"]))]:
        word = remedy.removeprefix("in a new run ").partition(" (")[0]
        if "more processes" not in word:
            compose([word] if "zero_stage" not in word and "offload" not in word else ["parallel=zero2", word])
