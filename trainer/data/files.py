"""Files of records and of text, opened as what they are: by their first bytes, whatever they are called."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.records import Record, conversational, kind_of
from trainer.errors import Refused

LFS = b"version https://git-lfs.github.com/spec/"
# What begins with these bytes is read through the module of the standard library.
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
_NOT_READ = {
    LFS: "a pointer of Git LFS and not the file itself. Type `git lfs pull` where it was cloned",
    b"PAR1": "a Parquet file. Type data=hf data.path=DIRECTORY with the directory that it lies in",
    b"ARROW1": "an Arrow file. Type data=hf data.path=DIRECTORY with the directory that it lies in",
    b"\xff\xff\xff\xff": "an Arrow file. Type data=hf data.path=DIRECTORY with the directory that it lies in",
    b"\x28\xb5\x2f\xfd": "packed by zstd. Type `zstd -d FILE`, and give what that writes",
    b"PK\x03\x04": "a zip archive. Type `unzip FILE`, and give what that writes",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive. Type `7z x FILE`, and give what that writes",
    b"SQLite format 3": "a database of SQLite. Write its rows as JSON, one a line",
    b"%PDF": "a PDF. Give its text",
    b"\xff\xfe\0\0": "UTF-32 text. Type `iconv -f utf-32 -t utf-8 FILE`, and give what that writes",
    b"\xff\xfe": "UTF-16 text. Type `iconv -f utf-16 -t utf-8 FILE`, and give what that writes",
    b"\xfe\xff": "UTF-16 text. Type `iconv -f utf-16 -t utf-8 FILE`, and give what that writes",
}
_MARK = b"\xef\xbb\xbf"  # that some programs write before UTF-8
_LOOK = 512  # bytes
_SPREAD = 1 << 20  # bytes that are looked at for the end of an object that does not end in its line


def open_text(path: Path) -> BinaryIO:
    """Open a file of text, through what it is packed with. `Refused`, with what it is, for what is none."""
    try:
        with open(path, "rb") as file:
            first = file.read(_LOOK)
        for start, module in _PACKED.items():
            if first.startswith(start):
                opened: BinaryIO = module.open(path)
                first = opened.read(_LOOK)
                opened.seek(0)
                _check(path, first)
                return opened
        _check(path, first)
        return open(path, "rb")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from None


def _check(path: Path, first: bytes) -> None:
    for start, what in _NOT_READ.items():
        if first.startswith(start):
            raise Refused(f"{path} is {what.replace('FILE', str(path))}.")
    if b"\0" in first:
        raise Refused(f"{path} holds bytes that are no text. Give a file of text, or of JSON objects, one a line.")


def unreadable(path: Path, error: Exception) -> Refused:
    if isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile):
        return Refused(f"{path} is packed, and cut short or damaged ({error}). Get it anew.")
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Refused(f"{path} cannot be read: {why}. Give another file, or the right to read it.")


def read_text(path: Path) -> str:
    try:
        with open_text(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise Refused(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. "
            "Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from None


def refuse_records(path: Path, text: str) -> None:
    """`Refused` for a file of records where text is read: its braces and names would be learned."""
    start = text.lstrip()
    if start[:1] not in ("{", "["):
        return
    try:
        found, _ = json.JSONDecoder().raw_decode(start.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    pair = {"prompt", "completion"} <= found.keys()
    if conversational(found) or pair or (set(found) == {"text"} and isinstance(found["text"], str)):
        kind = "chat" if conversational(found) else "jsonl"
        raise Refused(
            f"{path} holds records of {', '.join(sorted(found))} and not text. Type data={kind} data.path={path}, or "
            "leave it out with data.pattern."
        )


def records(path: Path, name: str) -> Iterator[tuple[str, bytes, Record]]:
    """Where each record stands, what tells it from others, and the record: of lines of JSON, or of one array of them.

    `name` is what the file is called in what is said of it. `Refused` names a line that is malformed.
    """
    try:
        with open_text(path) as file:
            first = True
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(_MARK) if number == 1 else line
                if first and line.strip():
                    first = False
                    if line.lstrip().startswith(b"["):
                        yield from _array(name, line + file.read())
                        return
                    if line.lstrip().startswith(b"<"):
                        raise Refused(f"{name} is a web page or XML, as where a download needs a login. Get it anew.")
                if line := line.strip():
                    where = f"{name}, line {number}"
                    try:
                        found = parse(where, line)
                    except Refused:
                        _refuse_spread(name, number, line + b"\n" + file.read(_SPREAD))
                        raise
                    yield where, line, _object(where, found)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from None


def _array(name: str, data: bytes) -> Iterator[tuple[str, bytes, Record]]:
    found = parse(name, data)
    if not isinstance(found, list):
        raise Refused(f"{name} begins with [ and is no array of records. Give JSON objects, one a line.")
    for number, one in enumerate(found, start=1):
        where = f"{name}, record {number}"
        yield where, json.dumps(one).encode(), _object(where, one)


def _refuse_spread(name: str, number: int, rest: bytes) -> None:
    """`Refused` for an object that does not end in its line, as of a file that was printed for reading."""
    if not rest.startswith(b"{"):
        return
    try:
        _, end = json.JSONDecoder().raw_decode(text := rest.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return
    if "\n" in text[:end]:
        raise Refused(
            f"{name}: the JSON object that begins in line {number} goes over several lines, and a record is one line. "
            "Type `jq -c . FILE > LINES`, and give what that writes."
        )


class _Twice(ValueError):
    """An object names one field twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def parse(where: str, text: bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise Refused(
            f"{where} names {str(error)!r} twice, and which of the two counts JSON does not say. Mend or remove the "
            "line; nothing was started."
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            # Of a line the column alone: its own "line 1" is not the file's.
            place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
            why = f"{error.msg} ({place})"
        elif isinstance(error, RecursionError):
            why = "it is nested too deeply"
        else:
            why = "it holds a number of too many digits" if "digits" in str(error) else str(error)
        raise Refused(f"{where} is not JSON: {why}. Mend or remove the line; nothing was started.") from None


def _object(where: str, found: Any) -> Record:
    if not isinstance(found, dict):
        raise Refused(f'{where} is {kind_of(found)}, not an object such as {{"text": ...}}.')
    return found


def files(path: str, pattern: str, key: str) -> Sequence[Path]:
    """The file that an option named `key` gives, or those of a directory that match a pattern."""
    top = Path(os.path.expanduser(path))
    if top.is_file():
        return [top]
    if not top.exists():
        raise Refused(f"{key}={path} does not exist (looked in {Path.cwd()}). Type {key}=FILE.")
    if not pattern:
        raise Refused(f"{key}={path} is not a file. Type {key}=FILE.")
    try:
        found = sorted(p for p in top.glob(pattern) if p.is_file())
    except (ValueError, NotImplementedError) as error:
        raise Refused(
            f"data.pattern={pattern} is no pattern of files below {key}: {error}. Type data.pattern='**/*.txt'."
        ) from None
    except OSError as error:
        raise unreadable(top, error) from None
    if not found:
        raise Refused(
            f"No file in {key}={path} matches data.pattern={pattern}. Type data.pattern='**/*' for all files."
        )
    return found
