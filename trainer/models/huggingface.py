"""Causal language models and tokenizers of Hugging Face, from a local directory or the hub."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from checkpointing.errors import first_few, reason_of
from trainer.data.files import LFS
from trainer.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from trainer.errors import Refused
from trainer.options.model import HuggingFace

logger = logging.getLogger(__name__)
SAFETENSORS = "model.safetensors"


def load_tokenizer(config: HuggingFace) -> Tokenizer:
    _check_files(config)
    _check_tokenizer(Path(os.path.expanduser(config.path)))
    tokenizer = _load(AutoTokenizer, config, "tokenizer")
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise Refused(
            f"The tokenizer of model.path={config.path} has no token that ends a text. "
            "Name one as eos_token in its tokenizer_config.json."
        )
    return HuggingFaceTokenizer(tokenizer)


def generation(config: HuggingFace) -> Any:
    """How the model generates, such as the tokens that end an answer; None where its files do not say."""
    local = Path(os.path.expanduser(config.path))
    try:
        return GenerationConfig.from_pretrained(str(local) if local.exists() else config.path, revision=config.revision)
    except OSError:
        return None


def build(config: HuggingFace, seq_len: int) -> nn.Module:
    """The model with its weights as fp32, on the current default device; on `meta` its shapes only."""
    _check_files(config)
    settings = _load(AutoConfig, config, "configuration")
    _check_not_quantised(config, settings)
    _mend_padding(settings)
    longest = getattr(settings, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise Refused(
            f"train.seq_len={seq_len} is more than the {longest} positions of {config.path}. "
            f"Type train.seq_len={longest}."
        )
    if torch.get_default_device().type == "meta":
        with _refused_if_it_fails(config, "model"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    else:
        model, found = _load(
            AutoModelForCausalLM, config, "model", config=settings, dtype=torch.float32, output_loading_info=True
        )
        _check_complete(config, found)
    assert isinstance(model, nn.Module)
    return model.train()  # from_pretrained leaves it in evaluation mode, without dropout


def _check_files(config: HuggingFace) -> None:
    """`Refused` where what lies in a local directory is not the model that its user means."""
    local = Path(os.path.expanduser(config.path))
    if not local.is_dir():
        return
    try:
        names = {path.name for path in local.iterdir()}
    except OSError as error:
        raise Refused(f"model.path={config.path} cannot be read: {error.strerror}. Make it readable.") from None
    if odd := sorted(name for name in names if _is_no_file(local / name)):
        raise Refused(
            f"model.path={config.path} holds what is neither a file nor a directory, such as a pipe: {first_few(odd)}. "
            "Take it away, or get the model anew."
        )
    if pointers := sorted(name for name in names if _is_pointer(local / name)):
        raise Refused(
            f"model.path={config.path} holds pointers of Git LFS in place of files: {first_few(pointers)}. Type "
            f"`git -C {config.path} lfs pull`, which gets them."
        )
    if "adapter_config.json" in names:
        where = "an adapter beside a model" if "config.json" in names else "an adapter and no model"
        raise Refused(
            f"model.path={config.path} holds {where} (adapter_config.json), and would be trained without it. Merge it "
            "first, with merge_and_unload of peft, and give what that saves, or move the adapter away to train the "
            "model alone."
        )

    _check_weights(config.path, local, names)


def _is_no_file(path: Path) -> bool:
    """Whether something lies there, also behind a link, that reading might never come to an end of."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return False  # whoever reads it says why it cannot be


def _check_weights(path: str, local: Path, names: set[str]) -> None:
    """`Refused` where a download is not whole: files that are not there, or are cut short."""
    weights = _weights(local, names)
    described = [name for name in names if name.endswith(".json")]
    lost = sorted(name for name in (*weights, *described) if not (local / name).exists())
    if lost:
        raise Refused(
            f"model.path={path} is not whole: {first_few(lost)} cannot be found, or leads nowhere. Get them anew, for "
            "example with `hf download`."
        )
    for name in weights:
        try:
            with suppress(OSError), safe_open(local / name, framework="pt"):  # whoever reads all of it says so
                pass
        except SafetensorError as error:
            raise Refused(
                f"{local / name} is damaged or cut short, as by a download that ended early: {reason_of(error)}. Get "
                "it anew, for example with `hf download`."
            ) from None


def _weights(local: Path, names: set[str]) -> list[str]:
    """The safetensors that transformers reads of a directory; what else lies there may be of another download."""
    if SAFETENSORS in names:
        return [SAFETENSORS]
    try:
        shards = json.loads((local / f"{SAFETENSORS}.index.json").read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(shard) for shard in shards.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # none, or an index that the loader will say is none


def _check_tokenizer(local: Path) -> None:
    """`Refused` for a directory without any, which libraries say less clearly."""
    if not local.is_dir():
        return
    if any(path.match(pattern) for path in local.iterdir() if path.is_file() for pattern in _TOKENIZERS):
        return
    inside = sorted(p.parent for p in local.glob("*/tokenizer*.json"))
    remedy = f"Copy the files of {inside[0]} beside config.json" if inside else "Save one there (save_pretrained)"
    raise Refused(f"model.path={local} holds no tokenizer (tokenizer.json, or files of another kind). {remedy}.")


_TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "merges*", "*.model", "*.tiktoken", "*.py")


def _mend_padding(settings: Any) -> None:
    """Nothing here learns or reads padding, and an embedding refuses one that it has no row for."""
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not 0 <= pad < size:
        text.pad_token_id = None


def _is_pointer(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > 1024:
            return False
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False  # whoever reads it says so


def _check_not_quantised(config: HuggingFace, settings: Any) -> None:
    if (quantised := getattr(settings, "quantization_config", None)) is not None:
        told = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise Refused(
            f"The weights of model.path={config.path} are quantised (quant_method={told.get('quant_method')}), and "
            "whole ones are what is trained here. Give the model that they were made of, or write them out whole first "
            "(dequantize() and save_pretrained() of transformers)."
        )


def _check_complete(config: HuggingFace, found: dict[str, Any]) -> None:
    """Refuse files that lack tensors: those would get random values, others on every rank and in every run."""
    lacking = sorted(map(str, found["missing_keys"])) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if lacking:
        raise Refused(
            f"The files in model.path={config.path} lack {len(lacking)} of the model's tensors, or hold them in "
            f"another shape: {first_few(lacking)}. Give the model that its config.json describes, with all its weights."
        )
    if unused := sorted(map(str, found["unexpected_keys"])):
        logger.warning("%s holds tensors that the model has no place for: %s", config.path, first_few(unused))


def _load(loader: Any, given: HuggingFace, what: str, **options: Any) -> Any:
    local = Path(os.path.expanduser(given.path))
    path = str(local) if local.exists() else given.path
    with _refused_if_it_fails(given, what):
        return loader.from_pretrained(
            path, revision=given.revision, trust_remote_code=given.trust_remote_code, **options
        )


@contextmanager
def _refused_if_it_fails(config: HuggingFace, what: str) -> Iterator[None]:
    """Whatever goes wrong inside transformers as one paragraph. Which errors it raises is not documented."""
    try:
        yield
    except Exception as error:
        logger.debug("loading the %s failed", what, exc_info=True)
        reason = reason_of(error)
        remedy = (
            "Give a directory that save_pretrained wrote, tokenizer included, or a hub id that this machine can reach."
        )
        if "custom code" in reason and not config.trust_remote_code:
            remedy = "Read that code, and type model.trust_remote_code=true if it may run here."
        reason = reason if reason.endswith((".", "!", "?")) else f"{reason}."
        raise Refused(f"The {what} of model.path={config.path} cannot be loaded: {reason} {remedy}") from error
