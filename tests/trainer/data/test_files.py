"""Files are read as what they are, or refused with what they are and what to type."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.files import open_text, read_text, records
from trainer.errors import Refused

RECORDS = [{"text": f"line {n} é"} for n in range(3)]
LINES = "".join(json.dumps(one) + "\n" for one in RECORDS).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def read(path: Path) -> list[Any]:
    return [record for _, _, record in records(path, path.name)]


READ: dict[str, bytes] = {
    "lines": LINES,
    "lines of Windows after a mark": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\r\n",
    "an array": json.dumps(RECORDS).encode(),
    "an array over many lines": json.dumps(RECORDS, indent=2).encode(),
    "an array after a mark": b"\xef\xbb\xbf \t" + json.dumps(RECORDS).encode(),
    "an array after a blank line": b"\n \n" + json.dumps(RECORDS).encode(),
    "gzip": gzip.compress(LINES),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "an array in gzip": gzip.compress(json.dumps(RECORDS).encode()),
    "without a last line break": LINES.rstrip(),
}


@pytest.mark.parametrize("kind", READ)
def test_what_holds_records_is_read_whatever_it_is_called(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(READ[kind])
    assert read(path) == RECORDS


REFUSED: dict[str, tuple[bytes, str]] = {
    "a pointer of Git LFS": (LFS, "is a pointer of Git LFS .*git lfs pull"),
    "a pointer in gzip": (gzip.compress(LFS), "is a pointer of Git LFS"),
    "Parquet": (b"PAR1" + bytes(range(256)), "is a Parquet file. Type data=hf"),
    "Arrow": (b"ARROW1\0\0" + bytes(50), "is an Arrow file. Type data=hf"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "is packed by zstd. Type `zstd -d .*data.jsonl`"),
    "zip": (b"PK\x03\x04" + bytes(50), "is a zip archive"),
    "SQLite": (b"SQLite format 3\0", "is a database of SQLite"),
    "UTF-16": (LINES.decode().encode("utf-16"), "is UTF-16 text. Type `iconv"),
    "UTF-32": (LINES.decode().encode("utf-32"), "is UTF-32 text. Type `iconv"),
    "bytes": (b"\x93NUMPY\x01\0" + bytes(50), "holds bytes that are no text"),
    "a web page": (b"<!DOCTYPE html><html></html>", "is a web page or XML"),
    "gzip that is cut": (gzip.compress(LINES * 1000)[:-20], "packed, and cut short"),
    "gzip that is damaged": (
        gzip.compress(LINES)[:20] + b"xxxx" + gzip.compress(LINES)[24:],
        "packed, and cut short",
    ),
    "xz that is damaged": (lzma.compress(LINES)[:40] + bytes(30), "packed, and cut short"),
    "an array that is cut": (json.dumps(RECORDS, indent=2).encode()[:-4], r"is not JSON: .*line \d+, column"),
    "an array of texts": (b'["a", "b"]', "record 1 is a text, not an object"),
    "an array, and more": (b"[{}] {}", "is not JSON: Extra data"),
    "printed for reading": (json.dumps(RECORDS[0], indent=1).encode(), r"begins in line 1 goes over several .*jq -c"),
    "the second one is": (LINES + json.dumps(RECORDS[0], indent=1).encode(), r"begins in line \d+ goes over several"),
    "a field twice": (b'{"text": "a", "text": "b"}\n', "line 1 names 'text' twice"),
    "a field twice inside": (b'{"a": [{"digits": 1, "digits": 1}]}\n', "line 1 names 'digits' twice"),
    "a field twice in an array": (b'[{"text": "a", "text": "a"}]', "names 'text' twice"),
    "a line that is cut": (b'{"text": "a"\n{"text": "b"}\n', "line 1 is not JSON"),
    "an object that has no end": (b'{"text": "a",\n"b": {', "line 1 is not JSON"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_such_file_is_refused_with_what_it_is(kind: str, tmp_path: Path) -> None:
    data, message = REFUSED[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(Refused, match=message):
        read(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_text_is_unpacked_and_what_is_none_is_refused(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(pack("<html> is text here, é".encode()))
    assert read_text(path) == "<html> is text here, é"
    path.write_bytes(pack("\ufeffwith a mark".encode()))
    assert read_text(path) == "with a mark"
    path.write_bytes(pack(b"caf\xe9"))
    with pytest.raises(Refused, match="is not UTF-8: byte 3 is 0xe9"):
        read_text(path)
    path.write_bytes(pack(LFS))
    with pytest.raises(Refused, match="git lfs pull"):
        read_text(path)


def test_of_an_array_each_record_is_told_from_the_others_and_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RECORDS[0], RECORDS[1], RECORDS[0]]))
    found = list(records(path, "data.json"))
    assert [where for where, _, _ in found] == [f"data.json, record {n}" for n in (1, 2, 3)]
    assert found[0][1] == found[2][1] != found[1][1]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", *(data[:n] for data in READ.values() for n in (3, 12, 60))]),
    rest=st.binary(max_size=60),
)
def test_any_file_is_read_or_refused(tmp_path: Path, start: bytes, rest: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(start + rest)
    for act in (read, read_text, lambda one: open_text(one).close()):
        try:
            act(path)
        except Refused as error:
            assert str(path.name) in str(error)
