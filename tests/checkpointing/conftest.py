"""What the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpointing.saved_run import save_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return save_run(tmp_path)
