"""Models and their tokenizers: the built-in tiny Llama, and anything of Hugging Face."""

from __future__ import annotations

import json
import stat
from collections.abc import Set
from pathlib import Path

import torch
import xxhash
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import is_flash_attn_2_available

from checkpointing import Team
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused
from trainer.models import huggingface, tiny_llama
from trainer.models.shared_weights import read_once
from trainer.options.model import Attention, HuggingFace, Model, TinyLlama


def load_tokenizer(config: Model) -> Tokenizer:
    if isinstance(config, HuggingFace):
        return huggingface.load_tokenizer(config)
    assert isinstance(config, TinyLlama)
    return tiny_llama.load_tokenizer(config)


def build_model(config: Model, *, seq_len: int, seed: int, device: str = "cpu", team: Team | None = None) -> nn.Module:
    """A causal language model with fp32 parameters: `model(input_ids=...)` returns an object with `.logits`.

    On the device `meta` it has shapes and no values, which is enough to plan. With a team, all of whose ranks call
    this, files are read by one process of each machine.
    """
    if team is not None and isinstance(config, HuggingFace):
        return read_once(
            lambda: build_model(config, seq_len=seq_len, seed=seed),
            lambda: build_model(config, seq_len=seq_len, seed=seed, device="meta"),
            team,
        )
    with torch.device(device):
        if isinstance(config, HuggingFace):
            model = huggingface.build(config, seq_len)
        else:
            assert isinstance(config, TinyLlama)
            model = tiny_llama.build(config, seq_len, seed)
    if config.attention is not Attention.auto:
        use_attention(model, config.attention)
    return model


def use_attention(model: nn.Module, attention: Attention) -> None:
    """Have a model compute attention with another kernel. `Refused` where it, or this machine, has none of the kind."""
    name = attention.value
    if attention is Attention.flash_attention_2 and not is_flash_attn_2_available():
        why = "it needs the package flash-attn, and a GPU"
    elif attention is Attention.flex_attention and not torch.cuda.is_available():
        why = "torch computes its gradients on a GPU only"
    else:
        try:
            model.set_attn_implementation(name)  # type: ignore[operator]  # every transformers model has it
        except (ImportError, ValueError) as error:
            why = str(error).strip().partition(". ")[0]
        else:
            if getattr(model.config, "_attn_implementation", name) == name:
                return
            why = f"a {type(model).__name__} does not compute it"
    raise Refused(f"model.attention={name} cannot be used here: {why}. Type model.attention=auto, or leave it out.")


def leave_description(
    config: Model,
    model: nn.Module,
    tokenizer: Tokenizer,
    template: str | None,
    directory: Path,
    endings: Set[str] = frozenset(),
) -> None:
    """All that a Hugging Face directory holds beside the weights: what model it is, how it generates, its tokenizer.

    `template` is the chat template that it is trained on, where that is not the tokenizer's own, and `endings` are the
    tokens that it is trained to end its turns with: they end what it generates, too.
    """
    inside = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if not stat.S_ISREG(path.lstat().st_mode) and not path.is_dir():
            path.unlink()  # a pipe would never end
    inside.config.save_pretrained(directory)
    if inside._auto_class is not None:  # of code that came with the model, which goes on with it
        custom_object_save(inside, str(directory), config=inside.config)
        inside.config.save_pretrained(directory)  # once more, for it names that code now
    generation = huggingface.generation(config) if isinstance(config, HuggingFace) else None
    if generation is None and inside.can_generate():
        generation = inside.generation_config
    if generation is not None:
        known = generation.eos_token_id
        ends = [] if known is None else list(known) if isinstance(known, list) else [known]
        if more := sorted({tokenizer.id_of(ending) for ending in endings} - {*ends}):
            generation.eos_token_id = [*ends, *more]
        # Unchecked: many models come with flags that transformers reads and would not write.
        generation.to_json_file(directory / "generation_config.json")
    tokenizer.save(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def architecture(model: nn.Module) -> str:
    """A digest of what a model computes beside its parameters: its configuration, not where it came from."""
    settings: dict[str, object] = getattr(getattr(model, "config", None), "to_dict", dict)()
    # Which dtype the files had and which kernels run do not matter: masters are fp32, and kernels may change.
    told = {k: v for k, v in settings.items() if k.strip("_") not in _NOT_THE_MODEL}
    return xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())


_NOT_THE_MODEL = {"name_or_path", "transformers_version", "dtype", "torch_dtype", "attn_implementation", "commit_hash"}


# Models that look at nothing before a sample's start where positions begin again; tests compare each.
PACKS = {
    *("cohere", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama"),
    *("mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}


def check_packing(model: nn.Module) -> None:
    """`Refused` where samples in one row would see each other."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in PACKS:
        raise Refused(
            f"A {kind} model is not known to keep samples in one row apart (those that are: "
            f"{', '.join(sorted(PACKS))}). Type data.pack=false."
        )


def draws_randomness(model: nn.Module) -> bool:
    """Whether a training forward draws random numbers, as far as modules and the model's configuration tell."""
    settings: dict[str, object] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or any(
        isinstance(value, float) and value > 0 for key, value in settings.items() if "drop" in key or "jitter" in key
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, by the class names that transformers lists as indivisible, as wrapped."""
    names = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    wrapped = {m._checkpoint_wrapped_module for m in model.modules() if isinstance(m, CheckpointWrapper)}
    return [
        m
        for m in model.modules()
        if isinstance(m, CheckpointWrapper) or (type(m).__name__.removeprefix("FSDP") in names and m not in wrapped)
    ]
