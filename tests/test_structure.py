"""What holds for the files themselves: every module has its namesake among the tests, and the documents list it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

# Modules without behaviour of their own, and where they are tested.
ELSEWHERE = {
    "checkpointing/errors.py": "names only",
    "trainer/errors.py": "names only",
    "trainer/__main__.py": "trainer/cli.py, in processes of its own",
}
MODULES = [
    path.relative_to(ROOT)
    for package in ("trainer", "checkpointing", "launch", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_namesake(module: Path) -> None:
    namesake = ROOT / "tests" / module.parent / f"test_{module.stem.strip('_')}.py"
    assert namesake.exists() != (module.as_posix() in ELSEWHERE), namesake


def test_the_architecture_page_names_every_module_of_the_first_level() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [m for m in MODULES if len(m.parts) == 2 and m.parts[0] != "benchmarks" and m.name not in page]
    # launch is one line there
    assert [m for m in missing if m.parts[0] != "launch" and m.name != "errors.py"] == []
