"""Text from a checkpoint reaches the terminal as text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, save
from checkpointing.__main__ import main
from checkpointing.printing import printable_output, shown
from tests.harness.processes import ROOT

EVIL = "a\x1b]0;owned\x07b\x9bc\u202ed\rline\x00"


def test_what_steers_a_terminal_is_spelled_out_and_the_rest_stays() -> None:
    assert shown(EVIL) == r"a\x1b]0;owned\x07b\x9bc\u202ed\rline\x00"
    plain = "größer als 10 µs → ok\n\tzwei 漢字 🙂\n"
    assert shown(plain) == plain


def test_it_holds_for_what_is_printed_in_the_context_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_output():
        print(EVIL)
        print(EVIL, file=sys.stderr)
    print("\x1b[1mours\x1b[0m")
    captured = capsys.readouterr()
    assert "\x1b]0" not in captured.out + captured.err and captured.err == shown(EVIL) + "\n"
    assert captured.out.endswith("\x1b[1mours\x1b[0m\n")


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "diff"])
def test_no_command_about_checkpoints_prints_an_escape(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = torch.ones(3)
    save(tmp_path, 1, [Piece("model/w", tensor, (0,), (3,))], {"note": EVIL, EVIL: 1}, run_id="r\x1b[2J")
    words = [command, str(tmp_path)] + ([str(tmp_path)] if command == "diff" else [])
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out and not set(captured.out + captured.err) & set("\x1b\x9b\x07\x00\u202e")
    if command != "diff":
        assert main([*words, "--json"]) == 0
        assert "\x1b" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([command])
    capsys.readouterr()
    assert main([command, *["/nowhere\x1b[2J"] * (len(words) - 1)]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.usefixtures("processes")
def test_closed_streams_are_opened_and_nothing_is_written_into_a_file_instead(tmp_path: Path) -> None:
    """A descriptor that is free is the next file's, and what is printed would land there."""
    script = """
import sys
from checkpointing.printing import open_closed_streams
open_closed_streams()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    print("printed", flush=True)
    sys.stderr.write("said")
    file.write("own")
"""
    for closed in (">&-", "2>&-", ">&- 2>&-", "<&-"):
        words = f"exec {sys.executable} -c '{script}' {tmp_path / 'file'} {closed}"
        done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "file").read_text() == "own"
