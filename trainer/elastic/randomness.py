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
    """Start torch's generators, of the CPU and of the GPU if one is in use, at the key of one purpose.

    What `torch.manual_seed` does, without its search for devices, which costs more than a micro-batch should.
    """
    key = derive(seed, *parts)
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(key)
