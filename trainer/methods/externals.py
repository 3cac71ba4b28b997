"""The frozen base of a model, which checkpoints name by its hash and do not hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from checkpointing import External, Piece, Team, external_of, parameter_names
from trainer.methods.method import Method
from trainer.options.model import HuggingFace


def externals_of(model: nn.Module, method: Method, rank: int, size: int) -> list[External]:
    """Hash the base's frozen parameters, of a model that is whole on all ranks; they share the work. Collective."""
    config = method.config
    source = f"{config.model.path}" if isinstance(config.model, HuggingFace) else f"seed {config.train.seed}"
    frozen = {n: p for n, p in parameter_names(model).items() if not (p.requires_grad or method.adds(n))}
    first: dict[object, str] = {}
    own = {name: first.setdefault(id(p), name) for name, p in frozen.items()}  # a tied one is hashed once
    names = sorted(set(own.values()))
    hashed = Team().together(
        lambda: {name: external_of(name, frozen[name].detach(), source).sha256 for name in names[rank::size]}
    )
    digests = {name: digest for part in hashed for name, digest in part.items()}
    return [
        External(f"model/{name}", parameter.dtype, tuple(parameter.shape), source, digests[own[name]])
        for name, parameter in frozen.items()
    ]


def with_external(pieces: Iterable[Piece], external: Sequence[External]) -> list[Piece | External]:
    """Externals in place of the pieces of the same names."""
    names = {one.name for one in external}
    return [*(piece for piece in pieces if piece.name not in names), *external]
