"""The generations in a directory: which exist, which is newest, and reading what describes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from checkpointing.codec import decode_index, decode_manifest
from checkpointing.errors import CheckpointError, DamagedError, UnreadableError
from checkpointing.format import ABANDONED, COMMIT, MANIFEST, METADATA_BYTES, Index, Manifest, digest, index_name
from checkpointing.storage import FileStorage, Storage

_NAME = re.compile(r"step-(\d{8,19})-[0-9a-f]{8}")


def is_generation(name: str) -> bool:
    """Whether a name is one that generations have."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Generation:
    """One directory of a generation as found: committed or not, sound or with what is wrong, abandoned or not.

    `damage` is an `UnreadableError` where the storage failed: whether it is sound is not known then, and neither is
    where it stands in the order.
    """

    name: str
    step: int
    files: dict[str, int]  # size in bytes by name, without the directory
    manifest: Manifest | None = None
    damage: CheckpointError | None = None

    @property
    def committed(self) -> bool:
        return COMMIT in self.files

    @property
    def abandoned(self) -> bool:
        """Whether it lies on a branch that the run turned away from; never chosen automatically."""
        return ABANDONED in self.files

    @property
    def stored_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def sound(self) -> bool:
        """Committed, with every file there in its size. What lies in the files is checked when it is read."""
        return self.manifest is not None and self.damage is None

    @property
    def order(self) -> tuple[int, int, int]:
        """Newer is greater: the incarnation decides before the step, because a resumed run overtakes its past."""
        return (self.manifest.incarnation, self.step, self.manifest.serial) if self.manifest else (-1, self.step, 0)


def scan(storage: Storage, *, remembered: bool = False) -> list[Generation]:
    """Every generation of a directory, newest first; unreadable ones last, with their damage.

    With `remembered` one that this process found sound, and to which no file came and from which none went, is not
    looked at again: a run that keeps thousands saves as fast as one that keeps two. Whether its files still have their
    sizes is not known then, and its manifest has its head alone, without tensors and writers.
    """
    if not isinstance(storage, FileStorage):
        names = {path.partition("/")[0] for path in storage.list()}
        found = [look(storage, name) for name in names if _NAME.fullmatch(name)]
    else:
        place = str(storage.root.absolute())
        known = _known.get(place, {}) if remembered else {}
        stamps = {name: stamp for name, stamp in storage.directories().items() if _NAME.fullmatch(name)}
        seen = {name: _remembered(storage, name, stamp, known) for name, stamp in stamps.items()}
        _known[place] = {
            name: known[name] if name in known and generation is known[name][1] else (stamps[name], _head(generation))
            for name, generation in seen.items()
        }
        found = [generation for generation in seen.values() if generation.files]
    return sorted(found, key=lambda g: (*g.order, g.name), reverse=True)


# What was found last, by storage and name, with the stamp of its directory.
_known: dict[str, dict[str, tuple[int, Generation]]] = {}


def _head(generation: Generation) -> Generation:
    """A generation with as much as choosing and ordering need: whole manifests of thousands would fill the memory."""
    if generation.manifest is None:
        return generation
    return replace(generation, manifest=replace(generation.manifest, writers=[], tensors={}, aliases={}, external={}))


def _remembered(storage: FileStorage, name: str, stamp: int, known: dict[str, tuple[int, Generation]]) -> Generation:
    last, generation = known.get(name, (0, None))
    if generation is None or not stamp or stamp != last or not generation.sound:
        return look(storage, name)
    return generation


def look(storage: Storage, name: str) -> Generation:
    """The generation of this name, as it is now."""
    step = int(_NAME.fullmatch(name)[1])  # type: ignore[index]  # whoever calls this has matched it
    content = _content(storage, name)
    manifest, damage = None, None
    if COMMIT in content:
        try:
            manifest = read_manifest(storage, name, content)
            check_files(manifest, content)
        except CheckpointError as error:
            damage = error
    return Generation(name, step, content, manifest, damage)


def _content(storage: Storage, name: str) -> dict[str, int]:
    """The files right in a generation's directory, with their sizes."""
    files = {path.partition("/")[2]: size for path, size in storage.list(f"{name}/").items()}
    return {file: size for file, size in files.items() if "/" not in file}


def candidates(storage: Storage) -> list[Generation]:
    """The committed generations that may be loaded without being named, best first; damaged ones included."""
    return [g for g in scan(storage) if g.committed and not g.abandoned]


def newest(storage: Storage) -> Generation | None:
    """The newest sound generation."""
    found = candidates(storage)
    check_readable(found)
    return next((g for g in found if g.sound), None)


def check_readable(generations: Iterable[Generation]) -> None:
    """Raise `UnreadableError` where the storage fails: any of these may be the newest, and sound."""
    for generation in generations:
        if isinstance(generation.damage, UnreadableError):
            raise generation.damage


def check_files(manifest: Manifest, files: dict[str, int]) -> None:
    """Raise `DamagedError` unless every file that the manifest counts on is there, in the size it was written."""
    for writer in manifest.writers:
        for file, nbytes in writer.files.items():
            if files.get(file) != nbytes:
                found = f"has {files[file]} bytes" if file in files else "is missing"
                raise DamagedError(f"{manifest.generation}/{file} {found}; {nbytes} bytes were committed")


def check_writers(manifest: Manifest) -> None:
    """Raise `DamagedError` unless a manifest names all that wrote, and not only those of one node.

    To be called before a generation is committed where others count on it: memory of a node holds its own part.
    """
    ranks = {writer.rank for writer in manifest.writers}
    named = {rank for tensor in manifest.tensors.values() for rank in tensor.writers or ()}
    if missing := sorted(({0} | named) - ranks):
        raise DamagedError(f"{manifest.generation}: rank {missing[0]} wrote to it, and is not among its writers")


def read_manifest(storage: Storage, name: str, files: dict[str, int] | None = None) -> Manifest:
    """The manifest of a committed generation, checked against COMMIT and against the directory's name.

    `files` is what lies in it, with sizes, where that was looked up already.
    """
    files = _content(storage, name) if files is None else files
    commit = _read(storage, f"{name}/{COMMIT}", files.get(COMMIT))
    data = _read(storage, f"{name}/{MANIFEST}", files.get(MANIFEST))
    if commit.decode("ascii", "replace").strip() != digest(data):
        raise DamagedError(f"{name}/{MANIFEST} is not the manifest that was committed")
    manifest = decode_manifest(data, f"{name}/{MANIFEST}")
    if manifest.generation != name:
        raise DamagedError(f"{name}/{MANIFEST} belongs to {manifest.generation}")
    return manifest


def read_index(storage: Storage, manifest: Manifest, position: int) -> Index:
    """The index of the manifest's writer at `position`, checked against its digest."""
    writer = manifest.writers[position]
    name = f"{manifest.generation}/{index_name(writer.rank)}"
    data = read(storage, name)
    if digest(data) != writer.index:
        raise DamagedError(f"{name} is not the index that was committed")
    return decode_index(data, manifest, name)


def read(storage: Storage, name: str) -> bytes:
    """A whole small object. `DamagedError` if it is missing, or is none of ours by its size."""
    return _read(storage, name, storage.list(name).get(name))


def _read(storage: Storage, name: str, size: int | None) -> bytes:
    if size is None:
        raise DamagedError(f"{name} is missing")
    if size > METADATA_BYTES:
        raise DamagedError(f"{name} has {size:,} bytes, and none of its kind is written with over {METADATA_BYTES:,}")
    return bytes(storage.read_ranges(name, [(0, size)])[0])


def abandon(storage: Storage, generations: list[Generation]) -> None:
    """Mark generations as lying on a branch that the run turned away from.

    The oldest first: cut short, the newest is still the one that is chosen, and nothing has changed yet.
    """
    for generation in sorted(generations, key=lambda g: g.order):
        storage.create_if_absent(f"{generation.name}/{ABANDONED}", b"")
