"""Train some parameters as they are, such as biases and norms, and freeze the rest (Zimmer et al. 2023, PERP,
arXiv:2312.15230)."""

from __future__ import annotations

import re

from torch import nn

from checkpointing import parameter_names
from trainer.errors import Refused
from trainer.methods.method import Method, Sizes
from trainer.options.method import Selective


class SelectiveMethod(Method):
    """Train the parameters whose names match a pattern."""

    def attach(self, model: nn.Module, sizes: Sizes | None = None) -> nn.Module:
        """`Refused` where a pattern is none, or all of them together are found in no name."""
        assert isinstance(self.config.method, Selective)
        given = self.config.method.parameters
        try:
            patterns = [re.compile(pattern) for pattern in given]
        except re.error as error:
            raise Refused(f"method.parameters={given}: {error}. Type patterns such as [norm,bias].") from None
        names = parameter_names(model)
        chosen = {p for name, p in names.items() if any(pattern.search(name) for pattern in patterns)}
        if not chosen:
            raise Refused(
                f"method.parameters={given} is found in no name of a parameter, such as "
                f"{', '.join(list(names)[:3])}. Type other patterns."
            )
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in chosen)
        return model
