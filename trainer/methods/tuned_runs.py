"""Checkpoints of this trainer, read without an engine: the difference from the base, and the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from checkpointing import (
    CHECKPOINTS,
    DTYPES,
    CheckpointError,
    FileStorage,
    GenerationReader,
    Manifest,
    NotFoundError,
    Piece,
    describe,
    external_of,
    find,
    is_path,
    parameter_names,
    read_index,
    read_manifest,
)
from checkpointing.small_files import read_text
from trainer.errors import Refused
from trainer.identity import came_from, recorded
from trainer.methods import build, method_of
from trainer.methods.deltas import Delta
from trainer.models import build_model
from trainer.options.config import Config
from trainer.options.model import HuggingFace
from trainer.options.stored import from_json

RUN_CONFIG = "config.yaml"  # of a run, as resolved


def is_at_home(path: Path) -> bool:
    """Whether a run, its checkpoints or one of them are where that run was trained."""
    runs = [path, path.parent, path.parent.parent]
    return any(recorded(run) is not None and not came_from(run) for run in runs)


def checkpoints_of(path: Path) -> Path | str:
    """Where the generations of a path are: of a run that was trained here, where its configuration says."""
    if (path / RUN_CONFIG).is_file() and not (path / CHECKPOINTS).is_dir() and is_at_home(path):
        with suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            place = str(yaml.safe_load(read_text(path / RUN_CONFIG))["checkpoint"]["dir"])
            return place if not is_path(place) else Path(place)
    return path


@dataclass(frozen=True)
class Tuned:
    """One generation, opened."""

    reader: GenerationReader
    config: Config
    stranger: bool = False  # whether nobody but the checkpoint says where the base is
    run: Path | None = None  # the run's directory, as far as its place tells

    @staticmethod
    def open(given: Path | str, base: Path | None = None, *, trust_code: bool = False) -> Tuned:
        """A run directory or a directory or store of generations (the newest), or one generation. `Refused` otherwise.

        What a checkpoint says is a stranger's word, unless it lies in a run that was trained here: where the `base` is
        must be given then, and whether code beside it may run always (`trust_code`).
        """
        # A link, or `.`, has its own name only where it leads to.
        path = Path(given).expanduser().resolve() if is_path(given) else None
        shown = given if path is None else path
        checkpoints = given if path is None else checkpoints_of(path)
        try:
            place = find(checkpoints)
            generation = place.candidates[0] if place.named and place.candidates else place.newest
            if generation is None:
                raise NotFoundError("nothing there was committed")
            storage = place.storage
            manifest = read_manifest(storage, generation.name)
            state = read_index(storage, manifest, 0).objects.get("trainer")
        except NotFoundError as error:
            if path is not None and not is_path(checkpoints):
                raise Refused(
                    f"The checkpoints of {path} are at {checkpoints}: {error} Type --config-dir DIRECTORY with the one "
                    "that has the store."
                ) from None
            raise Refused(
                f"{shown} holds no committed generation. `python -m checkpointing ls {shown}` shows what is there."
            ) from None
        except CheckpointError as error:
            raise Refused(
                f"{shown} cannot be read: {error}. `python -m checkpointing verify {shown}` says more."
            ) from None
        if not isinstance(state, dict) or "config" not in state:
            raise Refused(
                f"{shown} was not written by this trainer. `python -m checkpointing inspect {shown}` shows it."
            )
        try:
            config = from_json(state["config"])
        except (ValueError, TypeError, KeyError, AttributeError, OmegaConfBaseException) as error:
            raise Refused(f"The configuration in {shown} cannot be read: {error}") from None
        at_home = path is not None and is_at_home(path)
        stranger = isinstance(config.model, HuggingFace) and base is None and not at_home
        if isinstance(config.model, HuggingFace):
            where = config.model.path if base is None else str(base)
            config = replace(config, model=replace(config.model, path=where, trust_remote_code=trust_code))
        run = path
        # Checkpoints may be a link, or elsewhere; or what was given is their own directory, or one of them.
        if path is None or not ((path / CHECKPOINTS).is_dir() or (path / RUN_CONFIG).is_file()):
            run = storage.root.parent if isinstance(storage, FileStorage) else None
        return Tuned(GenerationReader(storage, manifest), config, stranger, run)

    @property
    def manifest(self) -> Manifest:
        return self.reader.manifest

    def tensor(self, name: str) -> torch.Tensor:
        stored = self.manifest.stored_name(name)
        about = self.manifest.tensors[stored]
        found = torch.zeros(about.shape, dtype=DTYPES[about.dtype])
        self.reader.load([Piece(stored, found, (0,) * found.dim(), tuple(about.shape))])
        return found

    def base(self) -> nn.Module:
        """The model before it was fine-tuned. `Refused` where this machine has another of the same name."""
        self._check_word()
        config = self.config
        model = build_model(config.model, seq_len=config.train.seq_len, seed=config.train.seed)
        method_of(config).prepare_base(model)
        self._check_base(model)
        return model

    def _check_word(self) -> None:
        if self.stranger and isinstance(model := self.config.model, HuggingFace):
            raise Refused(
                f"This run was not trained in this place, so the model that it names, {model.path!r}, is not opened on "
                "its word. Type --base MODEL, with where you have that model."
            )

    def _check_base(self, model: nn.Module) -> None:
        for name, parameter in parameter_names(model).items():
            stored = self.manifest.external.get(f"model/{name}")
            if stored is not None and external_of(name, parameter.detach(), "").sha256 != stored.sha256:
                raise Refused(
                    f"{name} of the base is not what this run was trained from, which came from {stored.source}. Put "
                    "that model back where it was: what was trained means nothing on another."
                )

    @property
    def names(self) -> set[str]:
        return {*self.manifest.tensors, *self.manifest.aliases}

    def delta(self, base: nn.Module | None = None) -> Delta:
        """The difference from the base. `Refused` where the method has none."""
        return method_of(self.config).delta(self, base)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the fine-tuned model, by name."""
        for name, parameter in parameter_names(self.merged()).items():
            yield name, parameter.detach()

    def merged(self) -> nn.Module:
        """The fine-tuned model, with what was trained in its weights."""
        return method_of(self.config).merged(self)

    def adapted(self) -> nn.Module:
        """The base with its adapter beside it, as peft has them. `Refused` of a run that trained none."""
        return method_of(self.config).adapter(self)

    def attached(self) -> nn.Module:
        self._check_word()
        model = build(self.config, sizes=method_of(self.config).shapes(self.manifest))
        self._check_base(model)
        self.fill(model)
        return model

    def fill(self, model: nn.Module) -> None:
        stored = self.names
        self.reader.load(
            [p for p in describe(model) if p.name in stored and self.manifest.stored_name(p.name) == p.name]
        )
