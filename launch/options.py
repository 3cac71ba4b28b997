"""The flags of `python -m launch TARGET`: one for every option of the target, and the overrides that they stand for."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from checkpointing.errors import reason_of
from trainer.check import check
from trainer.compose import compose
from trainer.errors import Refused
from trainer.options.config import CHOICES, Config
from trainer.options.launch import Launch, is_secret
from trainer.plan import plan_batch, resolve_topology
from trainer.plugins import CONFIG_DIR

TARGETS = CHOICES["launch"]


@dataclass(frozen=True)
class Call:
    """One command line: where to start what."""

    target: str
    config: Config
    overrides: list[str]  # for the trainer
    flags: list[str] = field(default_factory=list)  # of the launch, as they were given
    dry_run: bool = False
    multirun: bool = False


def add_targets(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, schema in TARGETS.items():
        about = inspect.getdoc(schema) or ""
        parser = commands.add_parser(name, help=about.splitlines()[0], description=about)
        parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
        parser.add_argument("--multirun", action="store_true", help="a run for every point that the overrides span")
        told = _help(schema)
        for one in fields(schema):
            flag, default = f"--{one.name.replace('_', '-')}", one.default if one.default is not MISSING else []
            note = f"{told.get(one.name, '')} (default {default!r})".replace("%", "%%")
            action = "append" if isinstance(default, list) else "store"
            parser.add_argument(flag, dest=one.name, action=action, default=None, metavar="X", help=note)


def _help(schema: type) -> dict[str, str]:
    """The comments beside a dataclass's fields, its parents' as well."""
    told: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            if match := re.match(r"    (\w+): .*  # (.+)", line):
                told[match[1]] = match[2]
    return told


def read(target: str, flags: argparse.Namespace, overrides: Sequence[str]) -> Call:
    """Compose, and check what can be checked here. `Refused` if it does not compose."""
    words = composable(overrides)
    given = {one.name: value for one in fields(TARGETS[target]) if (value := getattr(flags, one.name)) is not None}
    fixed = [word for word in words if not (flags.multirun and is_override(word) and is_choice(word))]
    chosen = [] if any(word.startswith("launch=") for word in words) else [f"launch={target}"]
    wanted = [f"launch.{key}={quote(value)}" for key, value in given.items()]
    try:
        config = compose([*chosen, *fixed, *(wanted if chosen else [])])
    except Refused:
        if not any(word.startswith("experiment=") for word in words):
            raise
        config, chosen = compose(fixed), []  # an experiment with options of another launcher
    if type(config.launch) is not TARGETS[target] or not chosen:
        config = replace(config, launch=_of_another(config, target, given))
        check(config)
    passed = list(overrides) if target == "local" else [*chosen, *overrides]
    passed = [word for word in passed if not is_secret(word)]  # of use to the job's script alone, which has it
    return Call(target, config, passed, list(_as_flags(given)), flags.dry_run, flags.multirun)


def _of_another(config: Config, target: str, given: Mapping[str, str | list[str]]) -> Launch:
    """The target's own options, where the overrides chose another's: as many processes, and what the flags say."""
    same = type(config.launch) is TARGETS[target]
    structured = OmegaConf.structured(config.launch if same else TARGETS[target](nproc=config.launch.nproc))
    try:
        tree = OmegaConf.create({"run": vars(config.run), "launch": OmegaConf.merge(structured, dict(given))})
        found = OmegaConf.to_object(tree)["launch"]  # type: ignore[call-overload,index]
    except OmegaConfBaseException as error:
        raise Refused(f"A flag of {target} does not fit: {reason_of(error)}. Type another value.") from None
    assert isinstance(found, Launch)
    return found


def _as_flags(given: Mapping[str, str | list[str]]) -> Iterator[str]:
    for key, values in given.items():
        for value in values if isinstance(values, list) else [values]:
            yield f"--{key.replace('_', '-')}={value}"


def is_override(word: str) -> bool:
    """Whether a word is an override and not one of Hydra's flags or a flag's value, as in `--cfg job`."""
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def composable(words: Sequence[str]) -> list[str]:
    """The words of the trainer's that `compose` takes: overrides, and where else configurations lie."""
    rest, found = iter(words), list[str]()
    for word in rest:
        if word in CONFIG_DIR:
            found += [word, *islice(rest, 1)]
        elif is_override(word) or word.partition("=")[0] in CONFIG_DIR:
            found.append(word)
    return found


def is_choice(word: str) -> bool:
    """Whether Hydra would make several runs of it: `a=1,2`, `a=range(3)`, `a=choice(x,y)`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(word).is_sweep_override())
    except HydraException as error:
        raise Refused(f"{word} cannot be read: {reason_of(error)}. Quote it, or mend it.") from None


def quote(value: str | list[str]) -> str:
    """Quote a value so that Hydra reads it back, whatever is in it."""
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def bounds(nodes: str, option: str) -> tuple[int, int]:
    """`2` and `1:4` or `1-4`. `Refused` otherwise."""
    match = re.fullmatch(r"(\d+)(?:[:-](\d+))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise Refused(f"{option}={nodes} is no number of machines. Type {option}=2, or as many as MIN:MAX.")
    return least, most


def check_file(call: Call, flag: str, path: str, remedy: str, *, instead_of: Sequence[str]) -> None:
    """`Refused` where a launcher's own file is not there, or a flag is given that it takes the place of."""
    if not Path(path).is_file():
        raise Refused(f"{flag} {path} is not there. {remedy}")
    for other in instead_of:
        if any(given.partition("=")[0] == other for given in call.flags):
            raise Refused(f"{other} does not count beside {flag}, whose file says it. Leave one of them out.")


def check_sizes(config: Config, sizes: Sequence[int]) -> None:
    """Refuse, once and early, what the trainer would refuse about any number of processes that it may have."""
    for num_processes in sizes:
        plan_batch(config, resolve_topology(config.parallel, num_processes).data_size)
