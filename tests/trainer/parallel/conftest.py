"""What several tests of layouts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.zoo import MODELS, save_model


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every model of the zoo lies, under its name."""
    top = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_model(top / name, name)
    return top
