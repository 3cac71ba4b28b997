"""From an engine's state to pieces: one file per kind of layout."""

from checkpointing.layouts.dtensor import Held, pieces_of
from checkpointing.layouts.module import describe, materialize, param_groups, parameter_names, restore_param_groups

__all__ = [
    "Held",
    "describe",
    "materialize",
    "param_groups",
    "parameter_names",
    "pieces_of",
    "restore_param_groups",
]
