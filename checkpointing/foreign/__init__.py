"""Checkpoints of other libraries as they lie on disk, described as pieces: one file per kind.

Their tensors are memory-mapped, so that describing a checkpoint reads next to nothing, and saving it as a generation
reads each byte once.
"""

from checkpointing.foreign.recognise import describe_foreign
from checkpointing.foreign.state import IMPORTED, Foreign

__all__ = ["IMPORTED", "Foreign", "describe_foreign"]
