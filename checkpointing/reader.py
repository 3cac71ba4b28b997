"""Read planned parts of stored boxes, verify the checksums of every block touched, and copy them into place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from checkpointing.errors import CheckpointError, DamagedError
from checkpointing.format import DTYPES, Index, Manifest, StoredBox, block_size, checksums, digest, shard_name
from checkpointing.generations import read_index
from checkpointing.geometry import Box
from checkpointing.plan import Read, Stored, stored_by_name
from checkpointing.storage import Storage


class GenerationReader:
    """One committed generation, opened: its manifest and every index, verified; shard files are read on demand."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.indexes: list[Index] = [read_index(storage, manifest, i) for i in range(len(manifest.writers))]
        self.stored: Stored = stored_by_name(self.indexes)
        self._sizes = storage.list(f"{manifest.generation}/")
        self._data_starts: dict[int, int] = {}

    @property
    def objects(self) -> dict[str, object]:
        return self.indexes[0].objects

    @property
    def scalars(self) -> dict[str, str]:
        return {name: value for index in self.indexes for name, value in index.scalars.items()}

    def fill(self, reads: Iterable[Read]) -> None:
        """Copy every planned part into its piece, in place."""
        for read in reads:
            source = self._read_part(read.writer, read.stored, read.part)
            with torch.no_grad():
                target = read.piece.tensor.detach()[read.part.slices(read.piece.offset)]
                target.copy_(source)

    def verify(self) -> Iterator[tuple[str, int, CheckpointError | None]]:
        """Check every stored box: its shard file, its bytes, and what is wrong with it, if anything."""
        for position, index in enumerate(self.indexes):
            name = shard_name(self.manifest.writers[position].rank)
            for stored in index.boxes:
                nbytes = stored.box.numel * self.manifest.tensors[stored.name].itemsize
                try:
                    self._read_blocks(position, stored, 0, nbytes)
                except CheckpointError as error:
                    yield name, nbytes, error
                else:
                    yield name, nbytes, None
            try:
                self._data_start(position)  # also of a shard without boxes
            except CheckpointError as error:
                yield name, 0, error

    def _read_part(self, position: int, stored: StoredBox, part: Box) -> torch.Tensor:
        """The elements of `part`, read with the whole leading rows around them."""
        tensor = self.manifest.tensors[stored.name]
        row_bytes = stored.box.numel // stored.box.size[0] * tensor.itemsize
        first = part.offset[0] - stored.box.offset[0]
        data = self._read_blocks(position, stored, first * row_bytes, (first + part.size[0]) * row_bytes)
        rows = torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(part.size[0], *stored.box.size[1:])
        return rows[Box(part.offset, part.size).slices((part.offset[0], *stored.box.offset[1:]))]

    def _read_blocks(self, position: int, stored: StoredBox, start: int, stop: int) -> bytearray:
        """Bytes start to stop of a stored box, after every block they touch has passed its checksum."""
        writer = self.manifest.writers[position]
        nbytes = stored.box.numel * self.manifest.tensors[stored.name].itemsize
        block = block_size(nbytes)
        first = start // block * block
        last = min(-(-stop // block) * block, nbytes)
        base = self._data_start(position) + stored.start
        name = f"{self.manifest.generation}/{shard_name(writer.rank)}"
        (raw,) = self.storage.read_ranges(name, [(base + first, base + last)])
        data = memoryview(raw)
        found = checksums(data, block)
        expected = stored.checksums[16 * (first // block) :][: len(found)]
        if found != expected:
            bad = next(i for i in range(0, len(found), 16) if found[i : i + 16] != expected[i : i + 16]) // 16
            at = first + bad * block
            raise DamagedError(
                f"{name}: the checksum of bytes {base + at} to {base + min(at + block, nbytes)} does not match; "
                f"they belong to {stored.name}"
            )
        return bytearray(data[start - first : stop - first])

    def _data_start(self, position: int) -> int:
        """Where a shard's data starts, after its size and its header have been checked."""
        if position not in self._data_starts:
            writer = self.manifest.writers[position]
            name = f"{self.manifest.generation}/{shard_name(writer.rank)}"
            if (size := self._sizes.get(name)) != writer.shard_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DamagedError(f"{name} {found}; {writer.shard_bytes} bytes were committed")
            itemsize = {stored_name: t.itemsize for stored_name, t in self.manifest.tensors.items()}
            data = sum(b.box.numel * itemsize[b.name] for b in self.indexes[position].boxes)
            (header,) = self.storage.read_ranges(name, [(0, writer.shard_bytes - data)])
            if digest(header) != writer.header:
                raise DamagedError(f"{name}: the header is not the one that was committed")
            self._data_starts[position] = writer.shard_bytes - data
        return self._data_starts[position]
