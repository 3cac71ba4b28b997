"""Several samples in a row: what they compute is what they compute alone, in every family and every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tests.harness.engines import feed_for, training_here
from tests.harness.worlds import SharedWorld
from trainer.compose import compose
from trainer.data.dataset import IGNORE, Records, collate, predicted
from trainer.data.packing import Packed, first_fit
from trainer.errors import Refused
from trainer.loop import optimize
from trainer.models import PACKS, check_packing
from trainer.parallel.computing import logits_of

SEQ_LEN = 24


def records(count: int = 60) -> Records:
    """Of 2 to 13 tokens, with prompts."""
    drawn = np.random.default_rng(5)
    lengths = drawn.integers(2, 14, count)
    return Records([predicted(drawn.integers(1, 97, n).astype(np.uint8), 1 + n // 3) for n in lengths], SEQ_LEN)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], room: int) -> None:
    rows = first_fit(np.array(lengths, dtype=np.int64), room)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= room for row in rows)
    # No two rows could be one.
    least = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(least) < 2 or least[0] + least[1] > room


def test_a_packed_dataset_counts_what_its_samples_hold() -> None:
    samples = records()
    packed = Packed(samples, SEQ_LEN)
    every, rows = np.arange(len(samples)), np.arange(len(packed))
    assert packed.num_tokens(rows) == samples.num_tokens(every) and packed.num_targets(rows) == samples.num_targets(
        every
    )
    assert packed.filled > 0.9 and len(packed) < len(samples) / 2
    batch = collate(packed, rows, pad=0)
    assert int((batch.labels != IGNORE).sum()) == samples.num_targets(every)
    assert batch.positions is not None and batch.positions.shape == batch.inputs.shape
    starts = (batch.positions == 0).sum(1) - torch.tensor([(row == 0).any() for row in batch.inputs]).long()
    assert starts.tolist() == [len(packed.members(int(row))) for row in rows]
    assert Packed(records(), SEQ_LEN).fingerprint == packed.fingerprint != Packed(records(), SEQ_LEN + 1).fingerprint


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 2,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 4,
}


def model_of(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(family)
    for name, value in SIZES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def difference(model: torch.nn.Module, *, restart: bool = True) -> float:
    """The largest between the logits of packed rows and those of their samples one by one."""
    packed = Packed(records(9), SEQ_LEN)
    rows = collate(packed, np.arange(len(packed)), pad=0)
    furthest = 0.0
    with torch.no_grad():
        together = logits_of(model, rows.inputs, rows.positions if restart else None, low=None)
        for row in range(len(packed)):
            start = 0
            for member in packed.members(row):
                alone = logits_of(model, collate(packed.dataset, np.array([member]), pad=0).inputs, low=None)[0]
                found = together[row, start : start + len(alone)]
                start += len(alone)
                furthest = max(furthest, float((found - alone).abs().max()))
    return furthest


@pytest.mark.parametrize("family", sorted(PACKS))
def test_samples_in_a_row_do_not_see_each_other(family: str) -> None:
    model = model_of(family)
    check_packing(model)
    assert difference(model) < 1e-6
    assert difference(model, restart=False) > 1e-3  # the control: one after the other as one text


def test_a_family_whose_samples_would_see_each_other_is_refused() -> None:
    model = model_of("bloom")
    assert difference(model) > 1e-3
    with pytest.raises(Refused, match=r"A bloom model is not known to keep samples in one row apart.*data\.pack=false"):
        check_packing(model)


def losses(overrides: list[str], packed: bool) -> list[float]:
    """Of steps on all samples at once, so that rows and samples make the same batches."""
    sizes = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2", f"train.seq_len={SEQ_LEN}"]
    dataset = Packed(records(), SEQ_LEN) if packed else records()
    config = compose([*sizes, f"train.global_batch={len(dataset)}", "train.micro_batch=3", *overrides])
    engine = training_here(config)
    feed = feed_for(engine, config, dataset)
    return [optimize(engine, feed.step(step), 1e-2, key=step)[0] for step in range(1, 5)]


LAYOUTS = [["parallel=ddp"], ["parallel=fsdp"], ["parallel.tp=2"], ["parallel.pp=2"], ["parallel=zero2"]]


def test_a_packed_batch_trains_as_its_samples_under_every_layout(world: SharedWorld) -> None:
    expected = world.run(losses, 1, [], False)[0]
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(world.run(losses, 1, [], True)[0], expected, rtol=2e-6)
    for layout in LAYOUTS:
        for found in world.run(losses, 2, layout, True):
            np.testing.assert_allclose(found, expected, rtol=2e-6, err_msg=str(layout))
