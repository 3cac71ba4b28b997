"""What methods add to a model, told by name."""

from __future__ import annotations


def is_added(name: str) -> bool:
    """Whether a parameter of this name is a method's, and not the base's."""
    parts = name.split(".")
    return parts[-1] == "sparse_values" or any(part.startswith("lora_") for part in parts)
