"""The frozen base of a model, which checkpoints name by its hash and do not hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from checkpointing import External, Piece, external_of, parameter_names
from checkpointing.collective import Team
from trainer.choices import HuggingFace
from trainer.config import Config
from trainer.methods.sparse.layer import VALUES


def externals_of(model: nn.Module, config: Config, rank: int, size: int) -> list[External]:
    """Every parameter that the base has, of a model that is whole on all ranks; they share the hashing. Collective."""
    source = f"{config.model.path}" if isinstance(config.model, HuggingFace) else f"seed {config.train.seed}"
    base = {name: p for name, p in parameter_names(model).items() if not is_added(name)}
    first: dict[object, str] = {}
    own = {name: first.setdefault(id(p), name) for name, p in base.items()}  # a tied one is hashed once
    names = sorted(set(own.values()))
    hashed = Team().together(
        lambda: {name: external_of(name, base[name].detach(), source).sha256 for name in names[rank::size]}
    )
    digests = {name: digest for part in hashed for name, digest in part.items()}
    return [
        External(f"model/{name}", parameter.dtype, tuple(parameter.shape), source, digests[own[name]])
        for name, parameter in base.items()
    ]


def frozen_of(model: nn.Module, config: Config, rank: int, size: int) -> list[External]:
    """Those of them that do not train. Collective."""
    trains = {f"model/{name}" for name, p in parameter_names(model).items() if p.requires_grad}
    return [one for one in externals_of(model, config, rank, size) if one.name not in trains]


def with_external(pieces: Iterable[Piece], external: Sequence[External]) -> list[Piece | External]:
    """Externals in place of the pieces of the same names."""
    names = {one.name for one in external}
    return [*(piece for piece in pieces if piece.name not in names), *external]


def is_added(name: str) -> bool:
    """Whether a parameter of this name is a method's, and not the base's."""
    parts = name.split(".")
    return parts[-1] == VALUES or any(part.startswith("lora_") for part in parts)
