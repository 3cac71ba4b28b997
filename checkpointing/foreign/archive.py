"""Reading what torch.save wrote, and other pickles, without running any of it.

A pickle names functions and classes, and an ordinary reader imports and calls them. This one knows a handful, those
that say where a tensor's numbers lie, and takes its own in their place; for every other name it makes an inert object
that keeps what it was given and does nothing. The numbers are memory-mapped.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpointing.errors import DamagedError

PICKLE_BYTES = 64 * 1024 * 1024  # of a pickle: some hundred thousand tensors
SHARED = 4  # how many times a file's bytes may be in tensors: tied ones share theirs
LOCAL_HEADER = 30  # bytes of a file's header inside an archive, before its name; their lengths lie in the last four


class Inert:
    """Stands for an object whose class is not known here: what it was made from, and nothing else."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def append(self, _: Any) -> None:
        """Objects that are filled as lists are."""

    def extend(self, _: Any) -> None:
        """Objects that are filled as lists are."""

    def add(self, _: Any) -> None:
        """Objects that are filled as sets are."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Objects that are filled as dicts are."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A file in memory, copy-on-write, so that torch may have tensors of it. Nothing here writes."""

    path: Path
    data: mmap.mmap

    @staticmethod
    def of(path: Path) -> Mapped:
        """`DamagedError` for a file without a byte."""
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DamagedError(f"{path} is empty")
            return Mapped(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def read_archive(file: Mapped, offset: int = 0, length: int | None = None) -> Any:
    """Read an archive of torch.save's, or a part of a file. `DamagedError` where it is none, or is cut short."""
    path, mapped = file.path, file.data
    try:
        length = len(mapped) - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > len(mapped):
            raise DamagedError(f"{path} ends before byte {offset + length}")
        with zipfile.ZipFile(_Part(mapped, offset, length)) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            for name in ("byteorder", "data.pkl"):
                if name in entries and entries[name].compress_type != zipfile.ZIP_STORED:
                    raise DamagedError(f"{path} is compressed, which torch.save never does")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise DamagedError(f"{path} was written on a machine with another order of bytes")

            def storage(key: str) -> tuple[int, int]:
                entry = entries[f"data/{key}"]
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise DamagedError(f"{path} holds compressed tensors")
                start = offset + entry.header_offset + LOCAL_HEADER
                words = mapped[start - 4 : start]
                start += int.from_bytes(words[:2], "little") + int.from_bytes(words[2:], "little")
                return start, entry.file_size

            _check_pickle(path, entries["data.pkl"].file_size)
            return _Unpickler(io.BytesIO(archive.read(entries["data.pkl"])), mapped, storage).load()
    except DamagedError:
        raise
    except Exception as error:  # of bytes that anybody may have written
        raise DamagedError(
            f"{path} is not what torch.save writes, or is damaged ({type(error).__name__}: {error})"
        ) from error


def read_pickle(path: Path) -> Any:
    """A pickle without tensors. `DamagedError` where it is none, or is cut short."""
    try:
        _check_pickle(path, path.stat().st_size)
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except DamagedError:
        raise
    except OSError:
        raise
    except Exception as error:  # of bytes that anybody may have written
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _check_pickle(path: Path, nbytes: int) -> None:
    if nbytes > PICKLE_BYTES:
        raise DamagedError(f"{path} holds a pickle of {nbytes:,} bytes, and at most {PICKLE_BYTES:,} are read")


class _Unpickler(pickle._Unpickler):  # the one in Python: of the other, BUILD is fixed
    def __init__(
        self, file: io.BytesIO, mapped: mmap.mmap | None = None, storage: Callable[[str], tuple[int, int]] | None = None
    ) -> None:
        super().__init__(file)
        self.mapped, self.storage = mapped, storage
        self.room = SHARED * len(mapped) if mapped is not None else 0  # bytes of tensors that may still be made

    def find_class(self, module: str, name: str) -> Any:
        if (known := KNOWN.get((module, name))) is not None:
            return self._counted(known) if known in (_tensor, _typed) else known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return type(name, (Inert,), {"__module__": f"{Inert.__module__}.{module}"})

    def _counted(self, rebuild: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Tensors may share the file's bytes, as tied ones do; not so often that a small file becomes a large one."""

        def made(*arguments: Any) -> torch.Tensor:
            tensor = rebuild(*arguments)
            self.room -= tensor.nbytes
            if self.room < 0:
                raise pickle.UnpicklingError("tensors of more bytes than the file has, again and again")
            return tensor

        return made

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None or self.mapped is None or pid[0] != "storage":
            raise pickle.UnpicklingError("a pickle without tensors refers to one")
        _, kind, key, _, numel = pid
        dtype = kind if isinstance(kind, torch.dtype) else torch.uint8
        start, nbytes = self.storage(str(key))
        if numel * dtype.itemsize > nbytes:
            raise pickle.UnpicklingError(f"a tensor of {numel} elements in {nbytes} bytes")
        if not numel:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.mapped, dtype=dtype, count=numel, offset=start)

    stack: list[Any]

    def load_build(self) -> None:
        """The state of an object. Of what is not inert only attributes of a dict come up, and they are not needed: any
        other would change a function of this module, or have torch run what a tensor asks for."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Inert):
            made.__setstate__(state)
        elif not isinstance(made, OrderedDict):
            raise pickle.UnpicklingError(f"a {type(made).__name__} with a state of its own")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _tensor(storage: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> torch.Tensor:
    if not prod(size):
        return storage.new_empty(tuple(size))
    reach = 0  # the last element of the dimensions so far, by their strides
    for step, count in sorted(zip(stride, size, strict=True)):
        if count > 1 and step <= reach:
            raise pickle.UnpicklingError(f"a tensor of {prod(size)} elements that are the same ones again and again")
        reach += step * (count - 1)
    return storage.as_strided(tuple(size), tuple(stride), offset)  # torch checks that it lies in the storage


def _typed(storage: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *more: Any) -> torch.Tensor:
    """A tensor as newer releases write it, with a dtype of its own."""
    dtype = next((one for one in more if isinstance(one, torch.dtype)), storage.dtype)
    return _tensor(storage.view(dtype), offset, size, stride)


def _of_a_type(rebuild: Callable[..., Any], _: Any, arguments: Sequence[Any], *__: Any) -> Any:
    """A tensor with attributes of its own: `rebuild` is one of the functions here, or the class of an inert object."""
    return rebuild(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


# By the name in the pickle. Storages are told apart by what they hold.
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_a_type,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "BoolStorage"): torch.bool,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}


class _Part(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, mapped: mmap.mmap, offset: int, length: int) -> None:
        self.mapped, self.offset, self.length, self.position = mapped, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError(f"byte {base + offset} of a file")
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        size = left if size < 0 else min(size, left)
        start = self.offset + self.position
        self.position += size
        return self.mapped[start : start + size]
