"""Random draws keyed by what they are for, never by a rank or by what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit key for one purpose, such as `derive(seed, "dropout", step, micro_batch)`.

    The same on every machine and in every release: it only hashes its arguments.
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def reseed(seed: int, *parts: int | str) -> None:
    """Start torch's generators, of the CPU and of every accelerator, at the key of one purpose."""
    torch.manual_seed(derive(seed, *parts))
