"""Which linear layers method.target_modules names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.errors import Refused

ALL = "all-linear"  # peft's name for every linear layer but the output


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Every name must be there: peft leaves one out without a word where another one matches."""
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if target != ALL and not any(_matches(name, target) for name in modules):
            layers = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise Refused(
                f"method.target_modules={list(targets)}: the model has no module called {target!r}. "
                f"Its linear layers are called {', '.join(layers)}; type method.target_modules=[{ALL}] for all of them."
            )


def check_untied(model: nn.Module, targets: Sequence[str]) -> None:
    """`Refused` for a layer that shares its weight: merged into it, an adapter would change the other layer too."""
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            sharing.setdefault(id(weight), []).append(name)
    for names in sharing.values():
        if len(names) > 1 and (tied := [name for name in names if any(_matches(name, one) for one in targets)]):
            others = " and ".join(name for name in names if name != tied[0])
            raise Refused(
                f"method.target_modules={list(targets)}: {tied[0]} shares its weight with {others}, so that an adapter "
                "beside it could not be merged. Leave it out, or give a model that is not tied "
                "(tie_word_embeddings=false, with the weight in its files twice)."
            )


def targeted(model: Any, targets: Sequence[str], key: str) -> dict[str, nn.Module]:
    """The linear layers that are named, in the model's order."""
    check_targets(model, targets)
    output = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not name.rpartition(".")[2].startswith("lora_")
    }
    found = {n: m for n, m in linear.items() if any(t == ALL or _matches(n, t) for t in targets)}
    if not found:
        raise Refused(
            f"{key}.target_modules={list(targets)} names no linear layer. Type {key}.target_modules=[{ALL}] for all of "
            "them but the output."
        )
    return found


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
