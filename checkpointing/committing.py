"""Committing a generation: its manifest, then COMMIT, which vouches for it. No other module writes either of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from checkpointing.codec import decode_manifest, encode_manifest
from checkpointing.errors import CheckpointError, DamagedError, LayoutError
from checkpointing.format import COMMIT, MANIFEST, METADATA_BYTES, Manifest, digest
from checkpointing.generations import check_files, check_writers
from checkpointing.storage import Storage

_WITHDRAWN = ".commit"  # COMMIT under this name vouches for nothing


def commit(storage: Storage, manifest: Manifest, guard: Callable[[], None] | None = None) -> None:
    """Commit what all writers of a manifest have written, durably. One that is committed already stays as it is.

    COMMIT vouches only for what is there: every rank's files are durable by now, but a rank may have another directory
    mounted under the same name. `guard` stops the commit by raising; it is called when only COMMIT is missing.
    `LayoutError` for a manifest that could not be read again, `DamagedError` for files that are not there.
    """
    prefix = f"{manifest.generation}/"
    if f"{prefix}{COMMIT}" in storage.list(prefix):
        return  # by a process that died right after it
    data = encode_manifest(manifest)
    try:
        decode_manifest(data, MANIFEST)
    except CheckpointError as error:
        raise LayoutError(f"what was saved could not be read again: {error}") from error
    if len(data) > METADATA_BYTES:
        raise LayoutError(f"the manifest would have {len(data):,} bytes, and at most {METADATA_BYTES:,} are read again")
    check_writers(manifest)
    storage.put(f"{prefix}{MANIFEST}", [data])
    if guard is not None:
        guard()
    check_files(manifest, {name.removeprefix(prefix): size for name, size in storage.list(prefix).items()})
    storage.create_if_absent(f"{prefix}{COMMIT}", digest(data).encode())


def commit_in_memory(arena: Path, generation: Path, manifest: bytes, files: Mapping[str, int]) -> None:
    """Make a filled arena on a tmpfs the generation of this name. Whatever fails, it is an arena again.

    `files` are the sizes in bytes of what this node's ranks wrote; those of other nodes lie in the memory there.
    Nothing is synced: memory outlives processes, and no machine.
    """
    for file, nbytes in files.items():
        if (size := (arena / file).stat().st_size) != nbytes:
            raise DamagedError(f"{file} has {size} bytes, and {nbytes} were written")
    (arena / MANIFEST).write_bytes(manifest)
    directory = arena.rename(generation)
    try:
        (directory / _WITHDRAWN).write_text(digest(manifest))
        reinstate(directory)
    except OSError:
        directory.rename(arena)
        raise


def withdraw(generation: Path) -> None:
    """Take COMMIT from a generation in memory, if it has one, before its bytes are written over."""
    with suppress(FileNotFoundError):
        (generation / COMMIT).rename(generation / _WITHDRAWN)


def reinstate(generation: Path) -> None:
    """Give a generation in memory its COMMIT back. `OSError` where it was never withdrawn."""
    (generation / _WITHDRAWN).rename(generation / COMMIT)
