"""What holds for the files themselves: every module has its namesake among the tests, and the documents list it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.processes import ROOT

# Modules without behaviour of their own, and where they are tested.
ELSEWHERE = {
    "trainer/errors.py": "names only",
    "trainer/optimizers/optimizer.py": "a contract only, which every kind is tested for",
    "trainer/__main__.py": "trainer/cli.py, in processes of its own",
}
# Fields with their bounds, help and refusals: those of all groups together are tried in trainer/test_check.py.
ELSEWHERE |= {
    f"trainer/options/{group}.py": "trainer/check.py"
    for group in (
        *("checkpoint", "data", "elastic", "evaluation", "launch", "model", "optimizer", "parallel", "precision"),
        *("run", "schedule", "tracking", "train"),
    )
}
# Of what tests share, these are used by all of them, or are tested through another.
SHARED = ("cluster", "engines", "models", "rank", "runs", "threads")
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


def test_what_tests_share_is_tested_and_is_not_of_the_benchmarks() -> None:
    harness = ROOT / "tests" / "harness"
    modules = {path.stem for path in harness.glob("*.py") if not path.stem.startswith(("test_", "__"))}
    assert {name for name in modules if not (harness / f"test_{name}.py").exists()} == set(SHARED)
    users = [path for path in (ROOT / "tests").rglob("*.py") if "benchmarks" not in path.parts]
    importing = [path.name for path in users if re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.M)]
    assert importing == []


def test_the_architecture_page_names_every_module_of_the_first_level() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [m for m in MODULES if len(m.parts) == 2 and m.parts[0] != "benchmarks" and m.name not in page]
    # launch is one line there
    assert [m for m in missing if m.parts[0] != "launch" and m.name != "errors.py"] == []


def imports_of(package: str) -> dict[str, set[str]]:
    """By module below a package: the modules of ours that it names in an import, wherever in the file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text()
        names = re.findall(r"^\s*from ([\w.]+) import|^\s*import ([\w.]+)", text, re.M)
        found[path.relative_to(ROOT).as_posix()] = {one or other for one, other in names}
    return found


@pytest.mark.parametrize(
    ("package", "other"), [("trainer/methods", "trainer.parallel"), ("trainer/parallel", "trainer.methods")]
)
def test_methods_know_no_engine_and_engines_know_no_method(package: str, other: str) -> None:
    wrong = {name: found for name, names in imports_of(package).items() if (found := {n for n in names if other in n})}
    assert wrong == {}


# A first line that begins with one of these leans on what is above it, or names nothing.
LEANING = {
    *("After", "At", "Before", "Between", "By", "For", "From", "In", "Into", "It", "Of", "On", "That"),
    *("Those", "To", "Under", "What", "With", "Without"),
}


def first_lines(package: str) -> Iterator[str]:
    """The first line of every docstring below a package, after its file's name."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.name}: {text.splitlines()[0]}"


@pytest.mark.parametrize("package", ["trainer", "checkpointing", "launch"])
def test_docstrings_begin_with_a_verb_or_a_noun(package: str) -> None:
    assert [line for line in first_lines(package) if line.split()[1].strip(",:") in LEANING] == []


PUBLIC = ("trainer", "checkpointing", "launch")


def top_level(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of a package by its dotted name, parsed."""
    for path in sorted((ROOT / package).rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield dotted.removesuffix(".__init__"), ast.parse(path.read_text())


def imported_at_start(module: ast.Module, known: set[str]) -> set[str]:
    """The modules of ours that importing a module imports."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{one.name}" for one in node.names}
            names |= (full & known) or {node.module}
        elif isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
    return names & known


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules in a circle of imports, or above one."""
    left = {name: set(targets) - {name} for name, targets in graph.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return set(left)


def test_imports_go_one_way_and_no_module_needs_too_many() -> None:
    modules = dict(entry for package in PUBLIC for entry in top_level(package))
    graph = {name: imported_at_start(module, set(modules)) for name, module in modules.items()}
    assert circles(graph) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}  # the control
    upwards = {"checkpointing": ("trainer", "launch"), "trainer": ("launch",), "launch": ()}
    wrong = [(n, m) for n in graph for m in graph[n] if m.split(".")[0] in upwards[n.split(".")[0]]]
    assert wrong == []
    assert max(len(targets) for targets in graph.values()) <= 30


def test_no_two_public_classes_have_one_name() -> None:
    classes = [
        node.name
        for package in PUBLIC
        for _, module in top_level(package)
        for node in module.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name in set(classes) if classes.count(name) > 1] == []


# Words and small files, which all packages share; everything else of the library has its place in its public face.
SHARED_MODULES = {"checkpointing.errors", "checkpointing.printing", "checkpointing.small_files"}
STARTS = {"launch/console.py", "launch/keeper.py"}  # commands of the library, under other names


@pytest.mark.parametrize("package", ["trainer", "launch"])
def test_the_librarys_public_face_suffices(package: str) -> None:
    past = set()
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            past |= {(name, m) for m in modules if m.startswith("checkpointing.") and m not in SHARED_MODULES}
    assert {one for one in past if one[0] not in STARTS} == set()


def test_the_library_words_no_command_of_the_trainers() -> None:
    """It is used by other loops, whose users know none of them."""
    words = re.compile(r"python -m (trainer|launch)|(?<![\w.])(train|parallel|method|optimizer|run|resume)(\.\w+)?=\w")
    found = {}
    paths = set((ROOT / "checkpointing").rglob("*.py")) - {ROOT / "checkpointing" / "commands.py"}  # the command's own
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and words.search(node.value):
                found[f"{path.name}:{node.lineno}"] = node.value.strip()[:100]
    assert found == {}
