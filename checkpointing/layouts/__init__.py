"""From an engine's state to pieces: one file per kind of layout."""

from checkpointing.layouts.dtensor import Held, pieces_of
from checkpointing.layouts.module import describe, materialize, param_groups, restore_param_groups

__all__ = ["Held", "describe", "materialize", "param_groups", "pieces_of", "restore_param_groups"]
