"""The bytes of tensors: row-major views, scalars as text, divisors, and which casts keep every value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from checkpointing.errors import DamagedError, LayoutError
from checkpointing.geometry import External

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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
    if divisor != 1:  # two temporaries of a wider dtype go with it
        limit = max(1, limit * tensor.element_size() // 16)
    yield from _rows(tensor, limit, divisor)


def _rows(tensor: torch.Tensor, limit: int, divisor: float) -> Iterator[memoryview]:
    if tensor.dim() == 0 or tensor.numel() == 0:
        yield tensor_bytes(multiplied(tensor, divisor))
        return
    if tensor.dim() > 1 and tensor.nbytes > limit * tensor.shape[0]:  # one row is too much
        for row in tensor.detach():
            yield from _rows(row, limit, divisor)
        return
    # Only whole leading rows are split off: the bytes of a row-major box are those of its rows, one after the other.
    for part in torch.split(tensor.detach(), max(1, limit * tensor.shape[0] // tensor.nbytes)):
        yield tensor_bytes(multiplied(part, divisor))


def multiplied(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor times a factor, in its own dtype. `LayoutError` where a value leaves the dtype's range."""
    if factor == 1:
        return tensor
    wide = tensor.detach().to(_wider(tensor.dtype)) * factor
    result = wide.to(tensor.dtype)
    if bool((wide.isfinite() & ~result.to(wide.dtype).isfinite()).any()):
        raise LayoutError(f"a value times its divisor {factor} is beyond the range of {tensor.dtype}")
    return result


def divided(tensor: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    """The tensor over a divisor, in `dtype`."""
    if divisor == 1:
        return tensor.to(dtype)
    return (tensor.to(_wider(tensor.dtype)) / divisor).to(dtype)


def _wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in so that the result is rounded once: torch casts float64 by way of float32."""
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


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


def can_cast(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast rounds at the most. From complex numbers to real ones, or to integers, it would do more."""
    if source == target:
        return True
    if source.is_floating_point:
        return target.is_floating_point or target.is_complex
    if source.is_complex or target == torch.bool:
        return False
    return target.is_floating_point or target.is_complex or keeps_values(source, target)


def external_of(name: str, tensor: torch.Tensor, source: str) -> External:
    """Declare a whole plain tensor external. Its row-major bytes are hashed, a bounded part at a time."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise LayoutError(f"{name}: the hash is that of a whole plain tensor, not of a {type(tensor).__name__}")
    hasher = hashlib.sha256()
    for part in row_bytes(tensor):
        hasher.update(part)
    return External(name, tensor.dtype, tuple(tensor.shape), source, hasher.hexdigest())
