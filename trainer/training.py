"""Training: one engine and one method, and the model between them, which a method may have built anew."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import External, Manifest, Piece, parameter_names
from trainer.data.dataset import Batch
from trainer.methods import build, method_of
from trainer.methods.externals import externals_of, with_external
from trainer.methods.method import Method, Rebuild, Sizes
from trainer.methods.selection.choosing import Ranks
from trainer.optimizers import make_optimizer
from trainer.optimizers.groups import lr_scales
from trainer.options.config import Config
from trainer.parallel.computing import MakeOptimizer
from trainer.parallel.engine import TrainingEngine, make_engine
from trainer.parallel.world import World
from trainer.plan import Topology


@dataclass(frozen=True)
class Makes:
    """How to make an engine of a whole model, and that model with its method again, of these sizes."""

    engine: Callable[[nn.Module, MakeOptimizer], TrainingEngine]
    model: Callable[[Sizes | None], nn.Module]


class Training:
    """Every method is collective: all ranks call it, in the same order."""

    def __init__(
        self, method: Method, model: nn.Module, makes: Makes, device: torch.device, sizes: Sizes | None
    ) -> None:
        """`model` is whole on every rank, with the method attached. `sizes` are those of a generation that is to be
        loaded; without them the method chooses what trains."""
        self.method, self.device, self._makes = method, device, makes
        grouped = dist.is_initialized() and dist.get_world_size() > 1
        self._everyone = Ranks.of(dist.group.WORLD if grouped else None, device)
        self._filling = False  # from `pieces_for` to `publish`
        # Before an engine takes its part of the model: hashes are of what is whole.
        self._external = externals_of(model, method, self._everyone.rank, self._everyone.size) if method.freezes else []
        method.begin(model, sizes, self._everyone)
        self._start(model)

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        """Add a step's gradients as the engine's `accumulate` says; before the first a method may calibrate."""
        if self.method.calibrates:

            def backwards(after_each: Callable[[], None]) -> None:
                for one in micro_batches:
                    self.engine.accumulate([one], weight)
                    after_each()
                    self.engine.step(0.0)  # clears gradients; at a rate of zero nothing moves

            self._follow(self.method.calibrate(backwards))
        self.method.before()
        return self.engine.accumulate(micro_batches, weight)

    def step(
        self, lr: float, loss_scale: float | None = None, before_update: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Step as `TrainingEngine.step` says, then let the method act."""
        norm = self.engine.step(lr, loss_scale, before_update)
        before_update()  # a method may write after a step that was left out, too
        self._follow(self.method.after(norm, loss_scale))
        return norm

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The engine's `loss`."""
        return self.engine.loss(batches)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The engine's `reduce`."""
        return self.engine.reduce(values)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The engine's `next_logits`."""
        return self.engine.next_logits(tokens)

    def pieces(self) -> list[Piece | External]:
        """Everything that training changes or depends on, for the checkpoint. What is frozen is there by its hash."""
        return self._pieces(self._frozen)

    def pieces_for(self, manifest: Manifest) -> list[Piece | External]:
        """The pieces to load a generation into, with room for what that one holds. `publish` follows the load."""
        sizes = self.method.shapes(manifest)
        if not self.method.fits(sizes, half_loaded=self._filling):
            model = self._makes.model(sizes or None)  # before anything is given up: it may be refused
            self._end()
            self.method.begin(model, sizes, self._everyone)
            self._start(model)
        self.method.fill(manifest)
        self._filling = True
        # With the bytes of what is frozen where the generation holds them.
        return self._pieces(self._frozen if manifest.external else [])

    def publish(self) -> None:
        """Rebuild what is derived from the pieces, after they were loaded."""
        self._filling = False
        self.engine.publish()
        self.method.publish()

    def close(self) -> None:
        """Let go of the model, so that its memory is free when this object is. Nothing else is called after it."""
        self.engine.close()

    @property
    def world_size(self) -> int:
        """The processes of the run."""
        return self.engine.world_size

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank computes, of `data_size` shares."""
        return self.engine.data_rank

    @property
    def data_size(self) -> int:
        return self.engine.data_size

    def _start(self, model: nn.Module) -> None:
        """Make the engine of a model whose method has begun."""
        trains = {f"model/{name}" for name, p in parameter_names(model).items() if p.requires_grad}
        self._frozen = [one for one in self._external if one.name not in trains]
        config = self.method.config
        scales = lr_scales(model, config.optimizer)  # of the whole model, where tied tensors have all of their names
        self.engine = self._makes.engine(
            model, lambda mine, held: make_optimizer(mine, config, self.method, scales, held)
        )
        self.method.placed(self.engine)

    def _end(self) -> None:
        self.method.left()
        self.engine.close()
        del self.engine
        gc.collect()

    def _follow(self, rebuild: Rebuild | None) -> None:
        """Go on with another model where the method says so."""
        if rebuild is None:
            return
        if rebuild.compares:
            model = self._makes.model(None)
            rebuild.settle(model)
            self._end()
        else:
            self._end()
            model = self._makes.model(None)
            rebuild.settle(model)
        self._start(model)
        del model  # the engine has its part of it
        rebuild.restore()

    def _pieces(self, external: Sequence[External]) -> list[Piece | External]:
        return with_external(self.method.pieces(self.engine.pieces()), external)


def make_training(
    config: Config,
    model: nn.Module,
    topology: Topology,
    world: World,
    device: torch.device,
    sizes: Sizes | None = None,
) -> Training:
    """Training of a model that `trainer.methods.build` made, of these sizes, whole on every rank. Collective."""
    makes = Makes(
        engine=lambda model, make: make_engine(config, model, topology, world, device, make),
        model=lambda sizes: build(config, sizes=sizes),
    )
    return Training(method_of(config), model, makes, device, sizes)
