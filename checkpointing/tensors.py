"""The bytes of tensors: row-major views, scalars as text, divisors, and which casts keep every value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from checkpointing.errors import DamagedError
from checkpointing.geometry import External

CHUNK_BYTES = 32 * 1024 * 1024  # what is copied at a time from a tensor that is not contiguous host memory


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor, on the CPU; a copy only where the tensor is elsewhere or not contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # one element, whose stride means nothing, except to what follows
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided((flat.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers


def tensor_over(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A one-dimensional tensor over bytes, without a copy."""
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


def scalar_hex(tensor: torch.Tensor) -> str:
    return tensor_bytes(tensor.reshape(1)).hex()


def scalar_from_hex(text: str, dtype: torch.dtype, source: str) -> torch.Tensor:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != dtype.itemsize:
        raise DamagedError(f"{source} is not a scalar of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype)[0]


def row_bytes(tensor: torch.Tensor, limit: int | None = None, divisor: float = 1) -> Iterator[memoryview]:
    """The row-major bytes of a tensor times `divisor`, at most `limit` bytes at a time.

    Contiguous host memory is given as it is, without a copy.
    """
    limit = CHUNK_BYTES if limit is None else limit
    if tensor.dim() == 0 or tensor.numel() == 0:
        yield tensor_bytes(multiplied(tensor, divisor))
        return
    if tensor.dim() > 1 and tensor.nbytes > limit * tensor.shape[0]:  # one row is too much
        for row in tensor.detach():
            yield from row_bytes(row, limit, divisor)
        return
    # Only whole leading rows are split off: the bytes of a row-major box are those of its rows, one after the other.
    for part in torch.split(tensor.detach(), max(1, limit * tensor.shape[0] // tensor.nbytes)):
        yield tensor_bytes(multiplied(part, divisor))


def multiplied(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor times a factor, rounded once to its own dtype."""
    if factor == 1:
        return tensor
    return (tensor.detach().to(torch.float64) * factor).to(tensor.dtype)


def divided(tensor: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over a divisor, rounded once to `dtype`."""
    if divisor == 1:
        return tensor.to(dtype)
    return (tensor.to(torch.float64) / divisor).to(dtype)


def keeps_values(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of one dtype is one of the other, so that a cast loses nothing."""
    if source == target:
        return True
    if source.is_complex or target.is_complex or torch.bool in (source, target):
        return False
    if source.is_floating_point and target.is_floating_point:
        a, b = torch.finfo(source), torch.finfo(target)
        if target.itemsize == 1:
            return False  # each of them lacks something that another has: infinities, negative zero, a sign
        # The ends of the ranges, and the steps between numbers, normal and subnormal.
        return b.eps <= a.eps and b.max >= a.max and b.tiny * b.eps <= a.tiny * a.eps
    if source.is_floating_point or target.is_floating_point:
        return False
    c, d = torch.iinfo(source), torch.iinfo(target)
    return d.min <= c.min and d.max >= c.max


def external_of(name: str, tensor: torch.Tensor, source: str) -> External:
    """Declare a whole plain tensor external. Its row-major bytes are hashed, a bounded part at a time."""
    hasher = hashlib.sha256()
    for part in row_bytes(tensor):
        hasher.update(part)
    return External(name, tensor.dtype, tuple(tensor.shape), source, hasher.hexdigest())
