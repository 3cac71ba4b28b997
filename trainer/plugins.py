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
from types import ModuleType

from hydra.core.config_store import ConfigStore

from checkpointing.errors import reason_of
from trainer.errors import Refused
from trainer.options.config import CHOICES

CONFIG_DIR = ("--config-dir", "-cd")  # Hydra's flag


def directories_in(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The flags among words that name a configuration directory, with the directory. `Refused` where there is none."""
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_DIR:
            directory = Path(value if equals else next(rest, "")).expanduser().resolve()
            if not directory.is_dir():
                raise Refused(f"{flag} {directory} is no directory. Give one that holds configurations.")
            yield flag, directory


def load(directory: Path) -> None:
    """Import the Python files beside the YAMLs of a directory's groups, and make their choices known."""
    for path in sorted(directory.glob("*/*.py")):
        if path.with_suffix(".yaml").is_file():
            module = _imported(path)
            if (schema := getattr(module, "OPTIONS", None)) is not None:
                add(path.parent.name, path.stem, schema, path)


def add(group: str, name: str, schema: type, where: Path) -> None:
    """Make a choice of a group known, to Hydra and to whoever reads a saved configuration."""
    known = CHOICES.get(group)
    if known is None:
        raise Refused(f"{where} is beside no group that has choices of its own ({', '.join(CHOICES)}). Move it there.")
    owner = next(iter(known.values())).__mro__[-2]
    if not (isinstance(schema, type) and is_dataclass(schema) and issubclass(schema, owner)):
        raise Refused(f"OPTIONS in {where} must be a dataclass below {owner.__module__}.{owner.__name__}.")
    known[name] = schema
    ConfigStore.instance().store(group=f"schema/{group}", name=name, node=schema)


def _imported(path: Path) -> ModuleType:
    """A file as a module, imported once. `Refused` where it fails."""
    name = f"evershard_plugins_{path.parent.name}_{path.stem}"
    there = sys.modules.get(name)
    if there is not None and there.__file__ == str(path):
        return there
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        del sys.modules[name]
        raise Refused(f"{path} cannot be imported: {reason_of(error)}. Mend it, or take it out.") from error
    return module
