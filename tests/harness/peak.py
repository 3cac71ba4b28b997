"""The most memory that tensors have at a time, looked at after every operation: what no allocator's noise touches."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def parts_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that a sparse one is made of; itself where it is dense."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


class Peak(TorchDispatchMode):
    """`most` is in bytes: of the tensors held at the start, and of every operation's outputs while they live.

    Sizes are asked for each time: FSDP2 gives memory back by shrinking a storage to nothing.
    """

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        for tensor in held:
            self._add(tensor)
        self.most = self.now

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def _add(self, tensor: torch.Tensor) -> None:
        for part in parts_of(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
            storage = part.untyped_storage()
            if storage.device.type == "meta":  # a size that nothing lies behind, also of a fake tensor
                continue
            self._storages[storage._cdata] = storage

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):  # it has no memory: what it does with its local part has
            return NotImplemented
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.most = max(self.most, self.now)
        return outputs
