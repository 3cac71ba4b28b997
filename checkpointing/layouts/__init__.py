"""From an engine's state to pieces: one file per kind of layout."""

from checkpointing.layouts.dtensor import pieces_of
from checkpointing.layouts.module import describe, materialize, param_groups, restore_param_groups

__all__ = ["describe", "materialize", "param_groups", "pieces_of", "restore_param_groups"]
