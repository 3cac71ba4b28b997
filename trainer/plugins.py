"""Methods, optimizers and other choices from outside of this package: a Python file beside its YAML.

In a directory that `--config-dir` names, `method/NAME.yaml` is a choice of the group method. Where it has options of
its own or is of a new kind, `method/NAME.py` lies beside it, and holds `OPTIONS`, a dataclass below the group's own. A
store is `checkpoint/NAME.py` with `STORE`, and a reducer `parallel/NAME.py` with `REDUCER`, each beside its YAML.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from checkpointing import LayoutError
from trainer.errors import Refused
from trainer.options.config import CHOICES
from trainer.options.parallel import REDUCERS

CONFIG_DIR = ("--config-dir", "-cd")  # Hydra's flag
CONF = Path(__file__).resolve().parents[1] / "conf"
BUILT_IN = {group: frozenset(known) for group, known in CHOICES.items()}
# What the Python file of a choice holds, by group: its options, or the class of a store or a reducer.
HOLDS = {**dict.fromkeys(CHOICES, "OPTIONS"), "checkpoint": "STORE", "parallel": "REDUCER"}


def directories_in(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The flags among words that name a configuration directory, with the directory. `Refused` where there is none."""
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_DIR:
            yield flag, directory_of(flag, value if equals else next(rest, ""))


def directory_of(flag: str, value: str) -> Path:
    """The configuration directory that a flag's value names. `Refused` where there is none."""
    directory = Path(value).expanduser().resolve()
    if not value or not directory.is_dir():
        named = f"{flag} {directory}" if value else f"{flag} without a value"
        raise Refused(f"{named} is no directory. Give one that holds configurations.")
    return directory


def load(directories: Sequence[Path]) -> None:
    """Import the Python files beside YAMLs in the groups of these directories, and make what they hold known.

    `Refused` for a file that is none, and for a name that the project or another directory has.
    """
    taken: dict[tuple[str, str], Path] = {}
    for directory in directories:
        for path in sorted(directory.glob("*/*.py")):
            group, name = path.parent.name, path.stem
            if group not in HOLDS or not path.with_suffix(".yaml").is_file():
                continue  # somebody's module, and none of ours
            other = taken.setdefault((group, name), path)
            if other is not path or name in BUILT_IN.get(group, ()) or (CONF / group / f"{name}.yaml").is_file():
                where = f"{other} is" if other is not path else "the project has"
                raise Refused(f"{path} cannot be {group}={name}: {where} that already. Rename the file and its YAML.")
            from checkpointing import module_of  # launchers go without numpy where nobody brings files

            try:
                module = module_of(path, f"evershard_{group}_{name}")
            except LayoutError as error:
                raise Refused(str(error)) from error
            if not hasattr(module, HOLDS[group]):
                raise Refused(f"{path} has no {HOLDS[group]} (docs/adding.md).")
            _take_in(group, name, module, path)


def _take_in(group: str, name: str, module: Any, path: Path) -> None:
    """Make known what a file holds."""
    if group == "checkpoint":
        from checkpointing import add_store

        try:
            add_store(name, module.STORE, path)
        except LayoutError as error:
            raise Refused(str(error)) from error
    elif group == "parallel":
        if not callable(module.REDUCER):
            raise Refused(f"REDUCER in {path} must be the class of a reducer (docs/adding.md).")
        REDUCERS[name] = f"{module.__name__}:REDUCER"
    else:
        add(group, name, module.OPTIONS, path)


def add(group: str, name: str, schema: type, where: Path) -> None:
    """Make a choice of a group known, to Hydra and to whoever reads a saved configuration."""
    known = CHOICES[group]
    owner = next(iter(known.values())).__mro__[-2]
    if not (isinstance(schema, type) and is_dataclass(schema) and issubclass(schema, owner)):
        raise Refused(f"OPTIONS in {where} must be a dataclass below {owner.__module__}.{owner.__name__}.")
    try:
        schema()
    except TypeError as error:
        raise Refused(f"OPTIONS in {where} must have a default for every option: {error}.") from None
    known[name] = schema
    ConfigStore.instance().store(group=f"schema/{group}", name=name, node=schema)
