"""docs/checkpointing.md: its code runs as written, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpointing.generations import scan
from checkpointing.storage import FileStorage
from tests.harness.processes import ROOT, wait_for

pytestmark = pytest.mark.usefixtures("processes")


def test_the_code_on_the_page_runs(in_tmp: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpointing.md").read_text(), re.DOTALL)
    assert len(blocks) == 11
    memory = in_tmp / "memory"
    scope: dict[str, object] = {"memory": memory}
    for block in blocks:
        exec(block, scope)  # the page's own lines
    assert [g.step for g in scan(FileStorage(in_tmp / "checkpoints"))] == [40, 30]
    wait_for(lambda: not memory.exists())
    # Its assertions can fail.
    with pytest.raises(AssertionError):
        exec(blocks[4].replace("start=30", "start=29"), scope)
