"""From an engine's state to pieces: one file per kind of layout."""

from checkpointing.layouts.dtensor import pieces_of
from checkpointing.layouts.module import describe, materialize

__all__ = ["describe", "materialize", "pieces_of"]
