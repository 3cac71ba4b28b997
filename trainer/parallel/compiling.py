"""`parallel.compile`: layers compiled by torch.compile, one by one, so that what wraps and hooks them stays outside.

Alike layers share their graphs. Where torch would go on uncompiled without a word, this says so, or stops.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn

from trainer.errors import Refused, TrainingFailed
from trainer.options.config import Config
from trainer.options.optimizer import Implementation


def check_compiling(config: Config, device: torch.device) -> None:
    """`Refused` where layers cannot be compiled. Not collective."""
    parallel = config.parallel
    if config.optimizer.implementation is Implementation.torchao_8bit:
        _check_compiler("optimizer=adamw_8bit", "optimizer.implementation=fused", device)
    if not parallel.compile:
        return
    if parallel.uses_deepspeed:
        raise Refused(
            "parallel.compile=true does not go with DeepSpeed, whose hooks are inside of layers. Type "
            "parallel.compile=false, or parallel=fsdp."
        )
    known = torch.compiler.list_backends(exclude_tags=())
    if parallel.compile_backend not in known:
        raise Refused(
            f"parallel.compile_backend={parallel.compile_backend} is not one of this torch's: {', '.join(known)}. "
            "Type parallel.compile_backend=inductor."
        )
    if parallel.compile_backend == "inductor":
        _check_compiler("parallel.compile=true", "parallel.compile=false", device)


def _check_compiler(option: str, without: str, device: torch.device) -> None:
    compilers = ("g++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")  # the latter for triton
    if not any(map(_found, compilers)):
        raise Refused(
            f"{option} needs a compiler to make code for the {'CPU' if device.type == 'cpu' else 'GPU'}, and there is "
            f"none of {', '.join(compilers)} here. Install one, or type {without}."
        )


def _found(program: str) -> bool:
    return shutil.which(program) is not None


# Training, evaluation, and the shapes and kinds of masks that each may see; torch's own limit is 8.
RECOMPILE_LIMIT = 64


class Compiled:
    """Compiled layers. Their random draws are those of layers that are not compiled."""

    def __init__(self, layers: Iterable[nn.Module], backend: str) -> None:
        from torch._inductor import config as inductor

        torch.compiler.reset()  # graphs of an earlier engine count against the limit
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        inductor.fallback_random = True
        for layer in layers:
            layer.forward = _compiled(layer.forward, backend)
        self._before = _seen()

    def news(self) -> str | None:
        """Tell in one line what was compiled since the last call, and where graphs broke; None if nothing was."""
        now = _seen()
        new, self._before = now - self._before, now
        graphs = new.pop("", 0)
        if not graphs and not new:
            return None
        breaks = "; ".join(f"{count} x {reason}" for reason, count in new.items())
        return f"{graphs} graphs, {sum(new.values())} graph breaks{f': {breaks}' if breaks else ''}"


def _seen() -> Counter[str]:
    """How many graphs were made (under the empty name), and how often one broke for each reason."""
    from torch._dynamo.utils import counters

    breaks = {str(reason).strip().splitlines()[0]: count for reason, count in counters["graph_break"].items()}
    return Counter({"": counters["stats"]["unique_graphs"], **breaks})


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    made = torch.compile(forward, backend=backend)

    @wraps(forward)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return made(*arguments, **options)
        except FailOnRecompileLimitHit as error:
            raise TrainingFailed(
                "A layer had to be compiled more often than torch allows, for inputs of too many kinds, and would have "
                "gone on uncompiled. The same command with parallel.compile=false goes on from the last checkpoint; "
                "TORCH_LOGS=recompiles shows why."
            ) from error

    return run
