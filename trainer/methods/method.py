"""The contract of a fine-tuning method, and its defaults, which train every parameter. A method is one file.

A method knows no engine and an engine knows no method. `trainer.training.Training` holds one of each and calls them in
the order below; a method asks its `Host`, which is the engine, for where a rank stands and what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import Manifest, Piece, Slice, parameter_names
from trainer.errors import Refused
from trainer.methods.deltas import Delta, difference
from trainer.methods.selection.choosing import Ranks
from trainer.options.config import Config, method_name

# How much of each layer trains, by the layer's name: entries, columns, rows, or whatever else a method counts.
Sizes = Mapping[str, int]
# Runs this rank's micro-batches of one step forward and backward, changes nothing, and calls its argument after each.
Backwards = Callable[[Callable[[], None]], None]


class Host(Protocol):
    """The engine as a method sees it. Methods with `Collective.` are called on all ranks."""

    device: torch.device
    data_rank: int  # which share of the global batch this rank computes, of `data_size` shares
    data_size: int

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold parts or copies of the layers that this one holds; None for this rank alone."""

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group: the ranks of `layer_group` that compute the same samples. None without one."""

    @property
    def tensor_rank(self) -> int:
        """This rank's place in the tensor group."""

    def parameter_names(self) -> Collection[str]:
        """The logical names of the parameters of the layers that this rank computes."""

    def pieces(self) -> Sequence[Piece]:
        """Everything that the engine keeps of the model and the optimizer, as pieces."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Gather trained parameters that may be sharded over the data. Collective."""

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        """Invalidate gathered copies of these frozen parameters: their shards were changed in place."""

    def held_of(self, tensor: torch.Tensor) -> list[Slice]:
        """Which entries of which parameters a tensor of the optimizer's param groups holds."""

    def publish(self) -> None:
        """Rebuild what is derived from the pieces, after they were written."""


class Stored(Protocol):
    """A generation that a run has saved, as a method reads it without an engine."""

    @property
    def manifest(self) -> Manifest:
        """The generation's manifest."""

    @property
    def names(self) -> set[str]:
        """The names of all tensors in it, under every name of a tied one."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, whole."""

    def base(self) -> nn.Module:
        """Build the model as it was before fine-tuning. `Refused` where this machine has another of its name."""

    def attached(self) -> nn.Module:
        """Build the model with its method, and fill it from the generation."""

    def fill(self, model: nn.Module) -> None:
        """Load every tensor of a model that the generation holds."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a method takes beside parameters, gradients, moments and activations."""

    values: int = 0  # trained tensors that every tensor-parallel rank holds whole
    places: int = 0  # what is kept beside them for the whole run

    def beyond(self, step: int, kept: int, parameters: int) -> int:
        """Bytes that a selection takes beyond a step of `step` bytes, of which `kept` stay between steps."""
        return 0


@dataclass(frozen=True)
class Rebuild:
    """Train another model from here on, in an engine of its own.

    `settle` gets a fresh, whole model with the method attached, on every rank, and makes it the one to go on with. It
    is called before the engine goes where it `compares` with what that holds, and otherwise after, when there is more
    memory. `restore` is called when the new engine stands.
    """

    settle: Callable[[nn.Module], None]
    compares: bool = False
    restore: Callable[[], None] = lambda: None


class Method:
    """Full fine-tuning, and what every other method does unless it says otherwise.

    An instance is made wherever one is needed, and models are attached by another one than trains: nothing is kept on
    `self` before `begin`. Training calls `begin` and `placed`, then for every step `before` and `after`, with
    `calibrate` before the first where `calibrates`. Where another model is to train it calls `left`, and `begin` (of a
    load) or the rebuild's `settle`, and `placed`. A load calls `shapes`, `fits`, `fill`, `pieces` and `publish`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    # The model.

    def attach(self, model: nn.Module, sizes: Sizes | None = None) -> nn.Module:
        """Freeze parameters or add some, as a function of the seed alone: `sizes` as a checkpoint has them, or the
        method's own. The output stays what it was, bit for bit."""
        return model

    @property
    def freezes(self) -> bool:
        """Whether frozen parameters are the base's, which checkpoints name by their hash."""
        return type(self).attach is not Method.attach

    def adds(self, name: str) -> bool:
        """Whether a parameter of this name is the method's, and not the base's."""
        return False

    def expected(self, model: nn.Module) -> Sizes | None:
        """The sizes that a plan counts with, of a model on the device meta."""
        return None

    def largest(self, model: nn.Module) -> None:
        """Bring an attached model on the device meta into the phase that needs most memory."""

    def needs(self, model: nn.Module) -> Needs:
        """The memory of an attached model on the device meta."""
        return Needs()

    # Training.

    @property
    def calibrates(self) -> bool:
        """Whether gradients are wanted before the next step."""
        return False

    def begin(self, model: nn.Module, sizes: Sizes | None, everyone: Ranks) -> None:
        """Choose what trains of a whole attached model, or take what a checkpoint of these `sizes` trains. Collective.

        The last look at the whole model: after this an engine takes its part of it.
        """

    def placed(self, host: Host) -> None:
        """Hold on to the engine that was made of the model. Collective."""

    def left(self) -> None:
        """Let go of the engine, which ends."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether optimizer.weight_decay applies: to matrices, and not to norms and biases."""
        return parameter.dim() >= 2

    def optimizer(
        self, groups: list[dict[str, Any]], default: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimizer of param groups: the method's own, one around the default, or the default."""
        return default()

    def calibrate(self, backwards: Backwards) -> Rebuild | None:
        """Look at gradients of the first step's micro-batches, in as many passes as it takes. Collective."""
        return None

    def before(self) -> None:
        """Prepare a step's forward and backward: watches and penalties. Collective."""

    def after(self, norm: torch.Tensor, loss_scale: float | None) -> Rebuild | None:
        """Act on a step that was taken, or was left out because it overflowed `loss_scale`. Collective.

        `norm` is the gradient's before clipping. Pieces may be written from here on.
        """
        return None

    # Checkpoints.

    def pieces(self, held: Sequence[Piece]) -> list[Piece]:
        """The engine's pieces, and the method's own beside them."""
        return list(held)

    def shapes(self, manifest: Manifest) -> Sizes | None:
        """The sizes that a generation was trained with; None where there is nothing to tell."""
        return None

    def fits(self, sizes: Sizes | None, *, half_loaded: bool) -> bool:
        """Whether a generation of these sizes can be loaded into the model that trains now.

        `half_loaded` where a load has filled some pieces and gave up.
        """
        return True

    def fill(self, manifest: Manifest) -> None:
        """Make room for a generation that is about to be loaded into the pieces."""

    def publish(self) -> None:
        """Rebuild what is derived from the pieces, after they were loaded."""

    # What leaves a checkpoint.

    def prepare_base(self, model: nn.Module) -> None:
        """Bring a base that was read anew into the form in which the run had it."""

    def delta(self, run: Stored, base: nn.Module | None) -> Delta:
        """The difference from the base, which is read unless it is given, entry by entry."""
        base = run.base() if base is None else base
        if self._added(run):
            return difference(parameter_names(base), parameter_names(self.merged(run)), method_name(self.config))
        names = {name: p for name, p in parameter_names(base).items() if f"model/{name}" in run.names}
        tuned = {name: run.tensor(f"model/{name}") for name in names}
        return difference(names, tuned, method_name(self.config))

    def merged(self, run: Stored) -> nn.Module:
        """The fine-tuned model, as a model of the base's architecture."""
        if added := self._added(run):
            raise Refused(
                f"method={method_name(self.config)} trains parameters that the base has not, such as {added[0]}, and "
                f"does not say how they are merged. Give {type(self).__name__} a method `merged`."
            )
        model = run.base()
        run.fill(model)
        return model

    def adapter(self, run: Stored) -> nn.Module:
        """The base with an adapter of peft's beside it."""
        raise Refused(
            f"A run of method={method_name(self.config)} has no adapter. `merge` writes the fine-tuned model, and "
            "`delta` the difference."
        )

    def _added(self, run: Stored) -> list[str]:
        """The names of the parameters in a generation that the base has not."""
        names = (name.removeprefix("model/") for name in run.names if name.startswith("model/"))
        return sorted(name for name in names if self.adds(name))


def lasting(piece: Piece) -> Piece:
    """A piece that is written between steps under the fence, though it is a buffer."""
    return replace(piece, volatile=False)
