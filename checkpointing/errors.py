"""The errors of this library. Each says cause, consequence and what to do; callers tell them apart by type."""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of everything this library raises on purpose."""


class LayoutError(CheckpointError):
    """The pieces do not describe whole tensors: a hole, an overlap, two shapes or dtypes for one name."""


class ReplicaError(CheckpointError):
    """Ranks that should hold the same bytes hold different ones."""


class MismatchError(CheckpointError):
    """The checkpoint and the pieces disagree: a tensor missing, left over, or of another shape or dtype."""


class BaseNeededError(MismatchError):
    """A model is to be written whole, and the generation holds only what was trained of it."""


class ConfigNeededError(MismatchError):
    """A model is to be written for other programs, and how these name its tensors cannot be told."""


class DamagedError(CheckpointError):
    """Stored bytes are not what was written: a checksum, a size or a structure is wrong."""


class VersionError(CheckpointError):
    """The files are whole but of a format version this library does not read."""


class NotFoundError(CheckpointError):
    """There is no committed generation where one was asked for."""


class UnreadableError(CheckpointError, OSError):
    """Storage failed to read, again and again. What lies there may be sound: it is neither damaged nor absent."""


class PeerError(CheckpointError):
    """Another rank failed; the message carries its rank and its reason."""


class LostError(CheckpointError):
    """The other ranks cannot be reached, so that it is unknown how they went on."""


class LeaseHeldError(CheckpointError):
    """Another live process holds the directory; the message says who."""


def first_few(names: list[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`: enough to recognise the problem, short enough to read."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def reason_of(error: BaseException) -> str:
    """The reason in a library's error, in one line: as much of it as holds the reason, which may come after a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or type(error) is KeyError:  # which says a key and nothing more
        return repr(error)
    said = lines[0]
    for line in lines[1:]:
        if not said.endswith((":", ",", " or", " and")):
            break
        said += f" {line}"
    return said
