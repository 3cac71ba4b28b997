"""Progress: aligned lines where nobody watches, one live line on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from trainer.track.console import Console

ROW = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 12345.6, "step_s": 0.5}


def test_one_aligned_line_every_n_steps(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(total_steps=120, print_every=50)
    for step in range(1, 121):
        row = {**ROW, "step": step, "loss": 1000.0 / step}
        console.step({**row, "eval_loss": 2.25} if step == 70 else row)
    console.close(0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["50/120", "70/120", "100/120", "120/120"]
    assert len({line.index("loss") for line in lines}) == len({line.index("tok/s") for line in lines}) == 1
    assert "12,346 tok/s" in lines[0] and "eval loss 2.2500" in lines[1] and "00:00 left" in lines[-1]


def test_where_snapshots_stand(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(total_steps=3, print_every=1)
    console.step({**ROW, "step": 1})
    snapshots = {"snapshot_age_s": 1.26, "snapshot_bytes": 2.5e9, "snapshot_backlog": 0}
    console.step({**ROW, "step": 2, **snapshots})
    console.step({**ROW, "step": 3, **snapshots, "snapshot_backlog": 2})
    first, second, third = capsys.readouterr().out.splitlines()
    assert "snapshot" not in first
    assert second.endswith("left  snapshot 1.3 s old, 2.50 GB") and third.endswith("2.50 GB, 2 to flush")


@pytest.mark.usefixtures("processes")
def test_a_live_line_on_a_terminal() -> None:
    code = (
        "from trainer.track.console import Console\n"
        f"row = {ROW!r}\n"
        "console = Console(3, 1)\n"
        "for step in (1, 2, 3): console.step({**row, 'step': step, **({'eval_loss': 2.25} if step == 2 else {})})\n"
        "console.close(0)"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other side has closed
            break
        if not part:
            break
        output += part
    assert process.wait(60) == 0
    text = output.decode()
    # Evaluated steps stay as lines, and the last one; the others pass through the live line, erased at the end.
    assert text.count("eval loss 2.2500") >= 1 and "step 2/3" in text
    assert "\x1b[2K" in text and "step 3/3" in text.rpartition("\x1b[2K")[2]
