"""Fine-tuning methods: what of a model trains, and what is added to it. One file a mechanism."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from checkpointing.collective import Team
from trainer.choices import Lora, Method, Reselection, Selective, Sparse
from trainer.config import Config
from trainer.models import build_model


def build(
    config: Config, device: str = "cpu", sizes: Mapping[str, int] | None = None, team: Team | None = None
) -> nn.Module:
    """The model with its method, its values a function of the seed; on `meta` its shapes, as far as known.

    `sizes` are what a sparse method trains of each layer, where a checkpoint tells. With a team, all of whose ranks
    call this, one process of each machine reads the model.
    """
    model = build_model(config.model, seq_len=config.train.seq_len, seed=config.train.seed, device=device, team=team)
    if device == "meta" and sizes is None and isinstance(config.method, Sparse):
        from trainer.methods.sparse.expected import expected_sizes

        sizes = expected_sizes(model, config.method)
    return apply_method(model, config.method, seed=config.train.seed, sizes=sizes)


def build_largest(config: Config) -> nn.Module:
    """On `meta`, as in the phase of the method that needs most memory."""
    model = build(config, "meta")
    if isinstance(config.method, Sparse) and config.method.schedule is Reselection.rewind:
        from trainer.methods.sparse.attach import train_whole

        train_whole(model, config.method)
    return model


def apply_method(model: nn.Module, config: Method, *, seed: int, sizes: Mapping[str, int] | None = None) -> nn.Module:
    """The model as it will train: parameters frozen or added. What is added follows from the seed alone."""
    if isinstance(config, Lora):
        from trainer.methods import lora  # peft takes a second to import, and the other methods do without it

        return lora.apply(model, config, seed)
    if isinstance(config, Selective):
        from trainer.methods import selective

        return selective.apply(model, config)
    if isinstance(config, Sparse):
        from trainer.methods.sparse.attach import attach

        return attach(model, config, seed, sizes)
    return model
