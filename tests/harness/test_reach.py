"""What a change reaches: all that a process loads, and what is only named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import ROOT
from tests.harness.reach import PACKAGES, Graph, changed_since, place_in_history

FILES = {
    "trainer/__init__.py": "",
    "trainer/__main__.py": "from trainer.run import run",
    "trainer/run.py": "def run():\n    from checkpointing import save",
    "trainer/kinds/__init__.py": "import importlib\nfound = importlib.import_module('trainer.kinds.' + 'one')",
    "trainer/kinds/one.py": "",
    "checkpointing/__init__.py": "from checkpointing.save import save",
    "checkpointing/save.py": "save = 1",
    "checkpointing/unused.py": "",
    "launch/__init__.py": "",
    "launch/script.py": "WORDS = ['-m', 'trainer']",
    "launch/says.py": "'`python -m trainer`'\nGROUP = 'trainer'\nREMEDY = 'type `python -m trainer x`'",
    "conf/config.yaml": "",
    "docs/page.md": "",
    "docs/other.md": "",
    "pyproject.toml": "",
    "tests/conftest.py": "import tests.shared",
    "tests/shared.py": "",
    "tests/test_relative.py": "from . import shared",
    "tests/test_launch.py": "def test():\n    import launch.script",
    "tests/test_kinds.py": "from trainer import kinds",
    "tests/test_page.py": "PAGE = 'docs/page.md'",
    "tests/test_pages.py": "PAGES = '*.md'",
    "tests/test_conf.py": "NAME = 'conf'",
    "tests/test_script.py": "CODE = '''\nfrom checkpointing import save\n'''",
    "tests/test_says.py": "import launch.says",
    "tests/test_nothing.py": "",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one commit."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(directory: Path, *words: str) -> str:
    known = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *known, *words], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(directory: Path) -> str:
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "--allow-empty", "-m", "x")
    return git(directory, "rev-parse", "HEAD")


def reached(directory: Path, changed: str) -> set[str]:
    found = Graph(directory).reached_by([changed])
    return {Path(name).stem.removeprefix("test_") for name in found if "/test_" in name}


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_change_reaches_what_imports_starts_or_names_it(checkout: Path) -> None:
    every = {Path(name).stem.removeprefix("test_") for name in FILES if "/test_" in name}
    assert reached(checkout, "checkpointing/save.py") == {"launch", "script"}  # through a command that is started
    assert reached(checkout, "checkpointing/unused.py") == set()
    assert reached(checkout, "trainer/kinds/one.py") == {"kinds"}  # through a name that is put together
    assert reached(checkout, "docs/page.md") == {"page", "pages"} and reached(checkout, "docs/other.md") == {"pages"}
    assert reached(checkout, "conf/config.yaml") == {"conf"}
    assert reached(checkout, "tests/shared.py") == reached(checkout, "pyproject.toml") == every
    assert reached(checkout, "tests/test_page.py") == {"page"}


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_the_graph_of_this_checkout_tells_tests_apart() -> None:
    """What every test has is small, and a change reaches what could hear of it."""
    graph = Graph()
    assert all(name.startswith("tests/harness/") or "/" not in name[6:] for name in graph.closure("tests/conftest.py"))
    tests = {name for name in graph.files if "/test_" in name and name.endswith(".py")}
    scores = graph.reached_by(["trainer/methods/selection/scores.py"]) & tests
    assert "tests/trainer/methods/test_conformance.py" in scores and len(scores) < 0.75 * len(tests)
    assert not {"tests/checkpointing/test_geometry.py", "tests/checkpointing/test_saving.py"} & scores
    assert len(graph.reached_by(["docs/adopt.md"]) & tests) < 10
    assert "tests/checkpointing/test_geometry.py" in graph.reached_by(["checkpointing/geometry.py"])


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_name_of_a_lazy_package_reaches_its_own_module_alone(checkout: Path) -> None:
    (checkout / "checkpointing").mkdir(exist_ok=True)
    (checkout / "checkpointing" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from checkpointing.b import B\n"
        '_NAMES = {"a": "A other", "b": "B"}\n'
    )
    for name in ("a", "b"):
        (checkout / "checkpointing" / f"{name}.py").write_text("")
    for name, text in (("one", "from checkpointing import A"), ("all", "import checkpointing")):
        (checkout / "tests" / f"test_{name}.py").write_text(text)
    graph = Graph(checkout)
    assert {"checkpointing/a.py", "checkpointing/__init__.py"} <= graph.closure("tests/test_one.py")
    assert "checkpointing/b.py" not in graph.closure("tests/test_one.py")
    assert {"checkpointing/a.py", "checkpointing/b.py"} <= graph.closure("tests/test_all.py")


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_what_has_changed_is_in_commits_and_in_the_working_tree(checkout: Path) -> None:
    first, place = git(checkout, "rev-parse", "HEAD"), place_in_history(checkout)
    (checkout / "docs/page.md").write_text("changed")
    commit(checkout)
    (checkout / "conf/config.yaml").write_text("changed")
    (checkout / "trainer/new.py").write_text("")
    (checkout / "launch/script.py").unlink()
    gone = Graph(checkout, ["launch/script.py"]).reached_by(["launch/script.py"])
    assert "tests/test_launch.py" in gone and "tests/test_launch.py" not in Graph(checkout).reached_by(["launch/x.py"])
    assert changed_since(first, checkout) == ["conf/config.yaml", "docs/page.md", "launch/script.py", "trainer/new.py"]
    assert place_in_history(checkout) == place + 1
    with pytest.raises(ValueError, match="git diff fails here"):
        changed_since("nonsense", checkout)


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("module", ["trainer.run", "launch.slurm", "checkpointing.__main__", "tests.harness.engines"])
def test_nothing_is_loaded_that_the_graph_does_not_know(module: str) -> None:
    """The graph is made of the text; this is what Python itself has loaded, whichever way."""
    code = (
        "import importlib, json, sys; "
        f"importlib.import_module({module!r}); "
        f"print(json.dumps([m.__file__ for n, m in list(sys.modules.items()) if n.split('.')[0] in {PACKAGES!r} and "
        "getattr(m, '__file__', None)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    loaded = {str(Path(file).relative_to(ROOT)) for file in json.loads(done.stdout.splitlines()[-1])}
    graph = Graph()
    known = set().union(*map(graph.closure, graph.module(module)))
    assert len(loaded) > 10 and loaded - known == set()
