"""What is read from a checkpoint without an engine: of every method, from every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, parameter_names, save
from tests.harness.engines import LAYOUTS, start
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import Trained, base_model, overrides, save_to
from trainer.compose import compose
from trainer.errors import Refused
from trainer.identity import identify
from trainer.methods.deltas import Applied
from trainer.methods.tuned_runs import Tuned
from trainer.options.stored import as_json


def train_under(layout: str, directory: Path) -> None:
    started = start([*overrides("lift"), *LAYOUTS[layout][1]])
    started.train(1, 6)
    save_to(directory, started, 6)


@pytest.mark.parametrize("layout", ["fsdp x tp", "zero 3"])
def test_the_difference_does_not_tell_who_wrote_it(layout: str, tmp_path: Path, world: SharedWorld) -> None:
    world.run(train_under, LAYOUTS[layout][0], layout, tmp_path / "many")
    train_under("single", tmp_path / "one")
    many, one = (Tuned.open(tmp_path / name).delta() for name in ("many", "one"))
    assert many.shapes == one.shapes and many.count == one.count > 0
    for name, entries in one.entries.items():
        assert torch.equal(entries.indices, many.entries[name].indices)
        assert torch.equal(entries.originals, many.entries[name].originals)
        torch.testing.assert_close(entries.values, many.entries[name].values, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", ["lift", "s2ft", "sara", "full", "perp_selective"])
def test_base_plus_difference_is_the_merged_model(method: str, tmp_path: Path) -> None:
    trained = Trained.by(method, tmp_path)
    run = Tuned.open(tmp_path)
    model = base_model(run.config)
    Applied(model, run.delta())
    merged, weights = dict(run.weights()), trained.weights
    for name, parameter in parameter_names(model).items():
        assert torch.equal(parameter, merged[name]) or method in ("full", "perp_selective"), name
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-6, atol=1e-7)


def test_a_full_phase_has_a_difference_too(tmp_path: Path) -> None:
    started = start(overrides("lt_sft"))
    started.train(1, 3)
    save_to(tmp_path, started, 3)
    delta = Tuned.open(tmp_path).delta()
    assert delta.count > 10_000 and all(name.endswith("proj.weight") for name in delta.entries)


@pytest.mark.parametrize("method", ["random_sparse", "lora", "perp_selective"])
def test_another_base_under_the_same_name_is_refused(method: str, tmp_path: Path) -> None:
    Trained.by(method, tmp_path, steps=1)
    run = Tuned.open(tmp_path)
    run.merged()
    run.config.train.seed = 1
    with pytest.raises(Refused, match=r"of the base is not what this run was trained from, which came from seed 0"):
        run.merged()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no committed generation"):
        Tuned.open(tmp_path / "nowhere")
    save(tmp_path, 1, start([]).training.pieces())
    with pytest.raises(Refused, match="was not written by this trainer"):
        Tuned.open(tmp_path)
    Trained.by("lora", tmp_path / "lora", steps=1)
    with pytest.raises(Refused, match="The difference of a LoRA is its adapter"):
        Tuned.open(tmp_path / "lora").delta()


EVIL = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel

Path(MARKER).touch()

class EvilConfig(PretrainedConfig):
    model_type = "evil"

class Evil(PreTrainedModel):
    config_class = EvilConfig
"""


@pytest.fixture
def gift(tmp_path: Path) -> Path:
    """A run with code beside it, which its checkpoint says may run."""
    code = tmp_path / "gift" / "code"
    code.mkdir(parents=True)
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (code / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    (code / "evil.py").write_text(EVIL.replace("MARKER", repr(str(tmp_path / "ran"))))
    config = as_json(compose(["model=hf", f"model.path={code}", "model.trust_remote_code=true"]))
    state = {"config": config, "fingerprint": "", "architecture": "", "step": 1}
    save(tmp_path / "gift" / "checkpoints", 1, [Piece("model/w", torch.zeros(4), (0,), (4,))], {"trainer": state})
    return tmp_path / "gift"


def test_code_beside_a_checkpoint_does_not_run_on_its_word(
    gift: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = Tuned.open(gift)
    with pytest.raises(Refused, match=r"was not trained in this place.*code'.*--base MODEL"):
        run.merged()
    identify(gift, "r1")  # also in a run that was trained here
    for opened in (Tuned.open(gift), Tuned.open(tmp_path / "gift" / "checkpoints", gift / "code")):
        with pytest.raises(Refused, match="cannot be loaded"):
            opened.merged()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Refused):
        Tuned.open(gift, trust_code=True).merged()  # the control: whoever says so gets it run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["gift", "gift/checkpoints", "generation"])
def test_a_run_that_was_trained_here_says_where_its_base_is(path: str, gift: Path, tmp_path: Path) -> None:
    (generation,) = (gift / "checkpoints").glob("step-*")
    opened = generation if path == "generation" else tmp_path / path
    assert Tuned.open(opened).stranger
    identify(gift, "r1")
    assert not Tuned.open(opened).stranger
    gift.rename(tmp_path / "moved")
    assert Tuned.open(tmp_path / "moved").stranger and not Tuned.open(tmp_path / "moved", tmp_path).stranger


@pytest.mark.parametrize("config", [None, [], {}, {"choices": {"model": "no"}}, {"choices": {}, "run": {"name": {}}}])
def test_a_configuration_that_is_none_is_refused(config: object, tmp_path: Path) -> None:
    state = {"config": config, "fingerprint": "", "architecture": "", "step": 1}
    save(tmp_path, 1, [Piece("model/w", torch.zeros(4), (0,), (4,))], {"trainer": state})
    with pytest.raises(Refused, match="cannot be read"):
        Tuned.open(tmp_path)


def test_the_runs_own_description_is_found_where_its_checkpoints_are_a_link(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    Trained.by("full", elsewhere, steps=1)
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    assert Tuned.open(run).run == run
    assert Tuned.open(elsewhere).run == tmp_path
