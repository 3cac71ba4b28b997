"""Methods, optimizers and other choices from outside of this package: a Python file beside its YAML.

In a directory that `--config-dir` names, `method/NAME.yaml` is a choice of the group method. Where it has options of
its own or is of a new kind, `method/NAME.py` lies beside it, and holds `OPTIONS`, a dataclass below the group's own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore

from checkpointing.errors import reason_of
from trainer.errors import Refused
from trainer.options.config import CHOICES

CONFIG_DIR = ("--config-dir", "-cd")  # Hydra's flag
CONF = Path(__file__).resolve().parents[1] / "conf"
BUILT_IN = {group: frozenset(known) for group, known in CHOICES.items()}


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
    """Import the Python files beside YAMLs in the groups of these directories, and make their choices known.

    `Refused` for a file that is none, and for a name that the project or another directory has.
    """
    taken: dict[tuple[str, str], Path] = {}
    for directory in directories:
        for path in sorted(directory.glob("*/*.py")):
            group, name = path.parent.name, path.stem
            if group not in CHOICES or not path.with_suffix(".yaml").is_file():
                continue  # somebody's module, and none of ours
            other = taken.setdefault((group, name), path)
            if other is not path or name in BUILT_IN[group] or (CONF / group / f"{name}.yaml").is_file():
                where = f"{other} is" if other is not path else "the project has"
                raise Refused(f"{path} cannot be {group}={name}: {where} that already. Rename the file and its YAML.")
            add(group, name, _options_in(path), path)


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


def _options_in(path: Path) -> type:
    """The OPTIONS of a file, which is imported once. `Refused` where that fails, or it has none."""
    name = f"evershard_plugins_{path.parent.name}_{path.stem}"
    module = sys.modules.get(name)
    if module is None or module.__file__ != str(path):
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            specification.loader.exec_module(module)
        except Exception as error:  # whatever somebody's file does
            del sys.modules[name]
            raise Refused(f"{path} cannot be imported: {reason_of(error)}. Mend it, or take it out.") from error
    if not hasattr(module, "OPTIONS"):
        raise Refused(f"{path} has no OPTIONS, the dataclass of its options (docs/adding.md).")
    found: type = module.OPTIONS
    return found
