"""Which tests a change can reach: through the imports of Python files, and what they name of other files.

The graph is made of the text alone. A file reaches what it imports, anywhere in it; the modules that it names in a
string, as in `["-m", "launch"]`; and the files that it names, as in `ROOT / "docs" / "layouts.md"`. It may hold more
than runs ever load, and never less: `tests/harness/test_reach.py` compares it with what processes have loaded.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath

from tests.harness.processes import ROOT

PACKAGES = ("trainer", "checkpointing", "launch", "benchmarks", "tests")
# Their modules import whatever an option names (its `made_by`): all that lies below.
MAKERS = {"trainer/methods/__init__.py": "trainer.methods.", "trainer/optimizers/__init__.py": "trainer.optimizers."}
EVERYTHING = ("pyproject.toml",)  # what is installed, and how tests run
# They name what processes have imported beforehand, and what is to be found here: no test needs any of it.
NAMES_ONLY = ("tests/harness/forks.py", "tests/harness/reach.py", "tests/harness/tiers.py")
DOTTED = rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*"
NAMED = re.compile(rf"(?:^|-m\s+|from\s+|import\s+)({DOTTED})(?=\s|$)", re.MULTILINE)
SAID = re.compile(r"`[^`]*(?:`|$)")  # what a message tells somebody to type, and nothing starts
BELOW = re.compile(rf"^{DOTTED}\.$")  # the start of a name that is put together: all below it


class Graph:
    """Files of a checkout by their paths in it, and which reach which."""

    def __init__(self, root: Path = ROOT, gone: Iterable[str] = ()) -> None:
        """`gone` are files that are no longer there, and may be reached all the same."""
        self.root = root
        self.files = sorted({*_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"), *gone})
        self._python = {name for name in self.files if name.endswith(".py") and name.split("/")[0] in PACKAGES}
        self._others = [name for name in self.files if name not in self._python]
        self._lazily: dict[str, dict[str, str]] = {}

    @cached_property
    def reaches(self) -> dict[str, set[str]]:
        return {name: set(self._from(name)) - {name} for name in self._python}

    def reached_by(self, changed: Iterable[str]) -> set[str]:
        """The files that reach one of these, those included; all where what is installed has changed."""
        changed = set(changed)
        if changed & set(EVERYTHING):
            return set(self.files)
        reached_from: dict[str, set[str]] = {}
        for name, targets in self.reaches.items():
            for target in targets:
                reached_from.setdefault(target, set()).add(name)
        found, todo = set(changed), list(changed)
        while todo:
            new = reached_from.get(todo.pop(), set()) - found
            found |= new
            todo += new
        return found

    def closure(self, name: str) -> set[str]:
        """Everything that a file reaches."""
        found, todo = {name}, [name]
        while todo:
            new = self.reaches.get(todo.pop(), set()) - found
            found |= new
            todo += new
        return found

    def module(self, dotted: str) -> Iterator[str]:
        """The files that importing a module runs."""
        parts = dotted.split(".")
        for length in range(1, len(parts) + 1):
            path = "/".join(parts[:length])
            yield from {f"{path}.py", f"{path}/__init__.py"} & self._python

    def _from(self, name: str) -> Iterator[str]:
        path = PurePosixPath(name)
        yield from self.module(".".join(path.parent.parts))
        if path.parts[0] == "tests":
            yield from {str(parent / "conftest.py") for parent in path.parents} & self._python
        if not (self.root / name).is_file():
            return
        if name in MAKERS:
            yield from self._named(MAKERS[name])
        tree = ast.parse((self.root / name).read_text(), name)
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings start nothing
        starts = any(isinstance(node, ast.Constant) and node.value == "-m" for node in ast.walk(tree))
        for node in _that_runs(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self.module(alias.name)
                    for module in self._lazily_of(alias.name).values():
                        yield from self.module(module)
            elif isinstance(node, ast.ImportFrom):
                package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
                base = ".".join([*package, *([node.module] if node.module else [])])
                yield from self.module(base)
                lazily = self._lazily_of(base)
                for alias in node.names:
                    yield from self.module(lazily.get(alias.name, f"{base}.{alias.name}"))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                only_said = name in NAMES_ONLY or id(node) in texts or (node.value in PACKAGES and not starts)
                yield from () if only_said else self._named(node.value)

    def _lazily_of(self, package: str) -> dict[str, str]:
        """The module of each name that a package imports when it is asked for, by its `_NAMES`."""
        path = self.root / package.replace(".", "/") / "__init__.py"
        if package not in self._lazily:
            self._lazily[package] = {}
            for node in ast.parse(path.read_text()).body if path.is_file() else ():
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_NAMES":
                    for module, names in ast.literal_eval(node.value).items():
                        self._lazily[package] |= dict.fromkeys(names.split(), f"{package}.{module}")
        return self._lazily[package]

    def _named(self, text: str) -> Iterator[str]:
        text = SAID.sub("", text)
        for dotted in NAMED.findall(text):
            yield from self.module(dotted)
            yield from {f"{dotted.replace('.', '/')}/__main__.py"} & self._python
        if BELOW.match(text):
            below = text.replace(".", "/")
            yield from (name for name in self._python if name.startswith(below))
        if len(text) < 200 and "\n" not in text:
            last = text.rpartition("/")[2]
            if last.endswith(".py"):
                yield from (name for name in self._python if name.endswith(text))
            elif "." in last:  # a name, a pattern, or the end of a name that is put together
                pattern = f"*{last}" if last.startswith(".") else last
                yield from (name for name in self._others if fnmatch(PurePosixPath(name).name, pattern))
            elif text == "conf":
                yield from (name for name in self._others if name.startswith("conf/"))
            elif text:
                yield from {name for name in (f".ci/{text}",) if name in self._others}


def _that_runs(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module without imports that are there for a type checker alone."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def changed_since(revision: str, root: Path = ROOT) -> list[str]:
    """The files that differ from a revision, in commits or in the working tree; `ValueError` where it is not there."""
    changed = _git(root, "diff", "-z", "--name-only", "--no-renames", revision, "--")
    return sorted(changed | _git(root, "ls-files", "-z", "--others", "--exclude-standard"))


def place_in_history(root: Path = ROOT) -> int:
    """How many commits led to the head: of any number of heads in a row, each has the next place."""
    (count,) = _git(root, "rev-list", "--count", "HEAD")
    return int(count)


def _git(root: Path, *words: str) -> set[str]:
    """What git lists; `ValueError` with its words where it does not."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"git cannot be run: {error}") from None
    if done.returncode:
        raise ValueError(f"git {words[0]} fails here: {done.stderr.strip()}")
    return {name for name in done.stdout.replace("\n", "\0").split("\0") if name}
