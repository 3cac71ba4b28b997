"""Models and tokenizers of Hugging Face from a directory, and what cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config

from tests.harness.models import VOCABULARY, save_tiny_model
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import Refused
from trainer.models import architecture, build_model, draws_randomness, leave_description, load_tokenizer
from trainer.options.model import HuggingFace, TinyLlama


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_model_is_loaded_with_fp32_masters(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path, kind, dtype)
    model = build_model(HuggingFace(path=str(tmp_path)), seq_len=32, seed=0)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for (name, a), (_, b) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float()), name
    assert model.training
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, VOCABULARY)
    shapes = build_model(HuggingFace(path=str(tmp_path)), seq_len=32, seed=0, device="meta")
    assert [n for n, _ in shapes.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    for what in (load_tokenizer, lambda c: build_model(c, seq_len=8, seed=0)):
        with pytest.raises(Refused, match=r"of model\.path=.*absent cannot be loaded"):
            what(HuggingFace(path=str(tmp_path / "absent")))
        with pytest.raises(Refused, match="cannot be loaded"):
            what(HuggingFace(path="no-such-organisation/no-such-model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refused, match="cannot be loaded"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0)


def test_a_directory_with_a_model_and_no_weights_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Refused, match="The model of"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0)


def test_sequences_longer_than_the_model_knows_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    with pytest.raises(Refused, match=r"Type train\.seq_len=64"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=65, seed=0)


def test_what_it_leaves_beside_the_weights_is_what_its_files_say(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    GenerationConfig(eos_token_id=[5, 256], do_sample=True, top_k=7).save_pretrained(tmp_path / "model")
    config = HuggingFace(path=str(tmp_path / "model"))
    model = build_model(config, seq_len=8, seed=0, device="meta")
    leave_description(config, model, load_tokenizer(config), "{{ messages }}", tmp_path / "hf")
    left = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert left.eos_token_id == [5, 256] and left.top_k == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == "{{ messages }}"
    assert AutoConfig.from_pretrained(tmp_path / "hf").hidden_size == 24
    tiny = TinyLlama()
    leave_description(tiny, build_model(tiny, seq_len=8, seed=0, device="meta"), ByteTokenizer(), None, tmp_path / "b")
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 0
    assert not (tmp_path / "b" / "chat_template.jinja").exists()


def test_randomness_is_seen(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    assert draws_randomness(build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0, device="meta"))
    assert not draws_randomness(build_model(TinyLlama(), seq_len=8, seed=0, device="meta"))
    assert draws_randomness(build_model(TinyLlama(dropout=0.1), seq_len=8, seed=0, device="meta"))


def test_files_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    """transformers would go on with random values, others on every rank."""
    save_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "down_proj" in name)
    save_file({n: t for n, t in weights.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=r"lack 1 of the model's tensors, .*down_proj"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0)
    save_file({**weights, "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0)


def test_damaged_weights_and_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(Refused, match=r"model\.safetensors is damaged or cut short"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0)
    weights.write_bytes(whole)
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"The model of .* cannot be loaded"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0, device="meta")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Refused, match="has no token that ends a text"):
        load_tokenizer(HuggingFace(path=str(tmp_path)))


def test_the_architecture_is_what_is_computed_and_not_where_it_lies(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (
        architecture(build_model(HuggingFace(path=str(tmp_path / d)), seq_len=8, seed=0, device="meta")) for d in "ab"
    )
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    third = architecture(build_model(HuggingFace(path=str(tmp_path / "b")), seq_len=8, seed=0))
    assert first == second != third


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        found.logits = 2 * found.logits
        return found
"""


def test_code_that_comes_with_a_model_goes_on_with_it(tmp_path: Path) -> None:
    """From its directory to that of a run, from which transformers builds it."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(CODE)
    file = tmp_path / "model" / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": own}))
    config = HuggingFace(path=str(tmp_path / "model"), trust_remote_code=True)
    model = build_model(config, seq_len=8, seed=0).eval()
    leave_description(config, model, load_tokenizer(config), None, tmp_path / "hf")
    assert (tmp_path / "hf" / "own.py").read_text() == CODE
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "hf" / "model.safetensors")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    tokens = torch.arange(8)[None]
    assert type(again).__name__ == "OwnModel" and torch.equal(model(tokens).logits, again(tokens).logits)
    with pytest.raises(Refused, match=r"custom code.*type model\.trust_remote_code=true"):
        build_model(HuggingFace(path=str(tmp_path / "model")), seq_len=8, seed=0)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_in_a_models_directory_is_not_waited_for(tmp_path: Path, name: str, linked: bool) -> None:
    save_tiny_model(tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink(missing_ok=True)
    pipe = tmp_path / "pipe" if linked else path
    os.mkfifo(pipe)
    if linked:
        path.symlink_to(pipe)
    for load in (load_tokenizer, lambda c: build_model(c, seq_len=8, seed=0)):
        with pytest.raises(Refused, match=f"neither a file nor a directory, such as a pipe: {name}"):
            load(HuggingFace(path=str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_are_told_from_files(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / name).write_text(LFS)
    for what in (load_tokenizer, lambda c: build_model(c, seq_len=8, seed=0, device="meta")):
        with pytest.raises(Refused, match=f"holds pointers of Git LFS in place of files: {name}.*lfs pull"):
            what(HuggingFace(path=str(tmp_path)))


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_not_passed_over(tmp_path: Path, alone: bool) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    if alone:
        (tmp_path / "config.json").unlink()
    what = "an adapter and no model" if alone else "an adapter beside a model"
    for act in (load_tokenizer, lambda c: build_model(c, seq_len=8, seed=0)):
        with pytest.raises(Refused, match=f"holds {what}.*merge_and_unload"):
            act(HuggingFace(path=str(tmp_path)))


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "something_new"])
def test_a_quantised_model_is_refused_by_its_name(tmp_path: Path, method: str) -> None:
    save_tiny_model(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(Refused, match=rf"are quantised \(quant_method={method}\).*Give the model that they were made"):
        build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0, device="meta")


@pytest.mark.parametrize("known", [None, 3, [3, 5]])
def test_what_ends_a_turn_ends_what_the_exported_model_generates(tmp_path: Path, known: Any) -> None:
    save_tiny_model(tmp_path / "m")
    GenerationConfig(eos_token_id=known).save_pretrained(tmp_path / "m")
    config = HuggingFace(path=str(tmp_path / "m"))
    tokenizer = load_tokenizer(config)
    ending = tokenizer.specials[0]
    model = build_model(config, seq_len=8, seed=0, device="meta")
    for endings, more in (({ending}, [tokenizer.id_of(ending)]), (set(), [])):
        leave_description(config, model, tokenizer, None, tmp_path / "hf", endings)
        found = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
        before = [] if known is None else [known] if isinstance(known, int) else known
        assert ([found] if isinstance(found, int) else found or []) == [*before, *more]


def test_a_download_that_is_not_whole_is_refused_by_its_files(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        for what in (load_tokenizer, lambda c: build_model(c, seq_len=8, seed=0, device="meta")):
            with pytest.raises(Refused, match=match):
                what(HuggingFace(path=str(tmp_path)))

    save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused(r"model.safetensors is damaged or cut short.*Get it anew")
    weights.unlink()
    weights.symlink_to("gone")
    refused("is not whole: model.safetensors cannot be found, or leads nowhere")
    weights.unlink()
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):  # of another download
        (tmp_path / name).write_text(json.dumps(index))
    (tmp_path / "pytorch_model.bin").symlink_to("gone")
    load_tokenizer(HuggingFace(path=str(tmp_path)))  # the control
    assert build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0) is not None
    weights.rename(tmp_path / "model-00001-of-00002.safetensors")
    refused("is not whole: model-00002-of-00002.safetensors")


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    inside = tmp_path / "tokenizer"
    inside.mkdir()
    for path in tmp_path.glob("*token*.json"):
        path.rename(inside / path.name)
    with pytest.raises(Refused, match=r"holds no tokenizer .*Copy the files of .*/tokenizer beside config.json"):
        load_tokenizer(HuggingFace(path=str(tmp_path)))


@pytest.mark.parametrize("pad", [-1, 9999])
def test_padding_outside_of_the_vocabulary_is_none(tmp_path: Path, pad: int) -> None:
    save_tiny_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pad_token_id": pad}))
    for device in ("cpu", "meta"):
        model: Any = build_model(HuggingFace(path=str(tmp_path)), seq_len=8, seed=0, device=device)
        assert model.config.pad_token_id is None


def test_generation_that_transformers_would_not_write_is_left_with_all_the_rest(tmp_path: Path) -> None:
    base, left = tmp_path / "base", tmp_path / "left"
    save_tiny_model(base)
    flags = {"temperature": 0.0, "do_sample": False, "top_p": 0.5, "max_length": -1, "eos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(flags))
    config = HuggingFace(path=str(base))
    model = build_model(config, seq_len=8, seed=0, device="meta")
    leave_description(config, model, load_tokenizer(config), None, left, {"<end>"})
    told = json.loads((left / "generation_config.json").read_text())
    assert told["eos_token_id"] == [1, VOCABULARY - 1] and (left / "tokenizer.json").is_file()
