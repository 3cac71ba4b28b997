"""Layouts: how an engine's state becomes pieces. One file a kind."""

from checkpointing.layouts.dtensor import Held, pieces_of
from checkpointing.layouts.module import describe, materialize, param_groups, parameter_names, restore_param_groups
from checkpointing.layouts.zero import describe_zero, publish_zero

__all__ = [
    "Held",
    "describe",
    "describe_zero",
    "materialize",
    "param_groups",
    "parameter_names",
    "pieces_of",
    "publish_zero",
    "restore_param_groups",
]
