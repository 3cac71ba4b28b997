"""An engine that trains sparse values: what happens between steps, on top of any other engine.

The engine inside computes with weights that are frozen to it, and steps the values like any parameter. Here values go
into the weights after each step, entries are selected anew when that is due, and the base stays out of checkpoints.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import External, Piece
from checkpointing.format import Manifest
from trainer.choices import Reselection, Sparse
from trainer.config import Config
from trainer.data.dataset import Batch
from trainer.elastic.randomness import derive
from trainer.errors import TrainingFailed
from trainer.methods.externals import externals_of, with_external
from trainer.methods.sparse.attach import Sizes, select, settle, sizes_in, train_whole
from trainer.methods.sparse.calibration import EARLY, Subjects, by_change, by_gradient
from trainer.methods.sparse.choosing import Ranks
from trainer.methods.sparse.growing import look, watch
from trainer.methods.sparse.layer import INDICES, ORIGINALS
from trainer.methods.sparse.reselecting import is_due, narrow, reselect, say_near
from trainer.methods.sparse.trained import Known, Trained
from trainer.methods.sparse.watching import Penalty
from trainer.parallel.engine import TrainingEngine

POSITION = "method/position"


class Phase(Enum):
    """What trains: nothing until gradients are known, whole weights until what changed is known, or sparse values."""

    calibrating = "calibrating"
    full = "full"
    sparse = "sparse"


@dataclass(frozen=True)
class Makes:
    """How to make an engine of a model, and the model with its method again, sparse of these sizes."""

    engine: Callable[[nn.Module], TrainingEngine]
    model: Callable[[Sizes | None], nn.Module]


class TunedEngine:
    """As the engine inside, with sparse values."""

    def __init__(
        self, config: Config, model: nn.Module, makes: Makes, device: torch.device, sizes: Sizes | None = None
    ) -> None:
        """`sizes` are those of a checkpoint that will be loaded; without them the first selection is made."""
        assert isinstance(config.method, Sparse)
        self._config, self._method, self._makes = config, config.method, makes
        grouped = dist.is_initialized() and dist.get_world_size() > 1
        self._world = Ranks.of(dist.group.WORLD if grouped else None, device)
        self._external = externals_of(model, config, self._world.rank, self._world.size)
        self._position = torch.zeros((), dtype=torch.int64)
        self._filling = False  # from `pieces_for` to `publish`: what is in memory is of no use to anything
        self._phase = self._first_phase(sizes)
        if sizes is None and self._phase is Phase.sparse:
            self._choose(model)
        self._start(model, self._phase)

    def _first_phase(self, sizes: Sizes | None) -> Phase:
        if sizes is not None:
            return Phase.sparse if sizes else Phase.full
        if self._method.selector in EARLY:
            return Phase.calibrating
        return Phase.full if self._method.schedule is Reselection.rewind else Phase.sparse

    def _start(self, model: nn.Module, phase: Phase) -> None:
        """Make the engine of a model, and know where its entries lie."""
        self._phase = phase
        if phase is Phase.full:
            train_whole(model, self._method)
        known = Known.of(model, self._method)
        self._names = list(known.shapes)
        self._num_values = sum(layer.sparse_values.numel() for layer in known.layers.values())
        self._trained = Trained(self._makes.engine(model), known, self._method)
        inner = self.inner
        self.device, self.world_size = inner.device, inner.world_size
        self.data_rank, self.data_size = inner.data_rank, inner.data_size

    def _remake(self, make: Callable[[], nn.Module], phase: Phase) -> None:
        """Train another model from here on, made when this one is gone; what is known beside it stays."""
        fence, states = self.inner.fence, self._trained.states
        self.close()
        del self._trained
        gc.collect()
        self._start(make(), phase)
        self.inner.fence = fence
        self._trained.states.update(states)

    @property
    def inner(self) -> TrainingEngine:
        return self._trained.inner

    @property
    def fence(self) -> Callable[[], None]:
        return self.inner.fence

    @fence.setter
    def fence(self, fence: Callable[[], None]) -> None:
        self.inner.fence = fence

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        return self.inner.layer_group

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        return self.inner.tensor_group

    @property
    def tensor_rank(self) -> int:
        return self.inner.tensor_rank

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        if self._phase is Phase.calibrating:
            self._calibrate(micro_batches, weight)
        step = int(self._position) + 1
        for layer in self._trained.layers.values():
            layer.calls = 0
        watch(self._trained, self._config, step)
        self._penalize(step)
        return self.inner.accumulate(micro_batches, weight)

    def step(self, lr: float, loss_scale: float | None = None) -> torch.Tensor:
        norm = self.inner.step(lr, loss_scale)
        self.fence()  # also of a step that was left out
        self._position += 1
        if self._phase is Phase.sparse:
            self._trained.write()
            look(self._trained, self._config, norm, loss_scale)
        if is_due(self._config, self._method, int(self._position)):
            self._select_anew()
        return norm

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        return self.inner.loss(batches)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner.reduce(values)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner.next_logits(tokens)

    def pieces(self) -> list[Piece | External]:
        """The base is external: its hash is all that a checkpoint holds of it."""
        own = (INDICES, ORIGINALS)
        found = [
            replace(piece, volatile=False) if piece.name.endswith(own) else piece for piece in self._trained.shards()
        ]
        for name, tensor in {POSITION: self._position, **self._tensors()}.items():
            found.append(Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)))
        return with_external(found, self._external_now())

    def pieces_for(self, manifest: Manifest) -> list[Piece | External]:
        sizes = sizes_in(manifest)
        trains = {name: size for name, size in sizes.items() if size > 0}
        other = trains != self._trained.sizes or bool(sizes) != (self._phase is Phase.sparse)
        # A load that gave up half-way has filled originals, from which the base cannot be told any more.
        if other or self._filling:
            model = self._makes.model(sizes or None)  # before anything is given up: it may be refused
            self._remake(lambda: model, Phase.sparse if sizes else Phase.full)
        else:
            self._trained.revert()
        for name, tensor in self._tensors().items():
            if (stored := manifest.tensors.get(name)) is not None and stored.shape != tuple(tensor.shape):
                self._trained.make_room(name, stored.shape[0])
        self._filling = True
        return self.pieces()

    def publish(self) -> None:
        self._filling = False
        self.inner.publish()
        if self._phase is Phase.sparse:
            self._trained.publish()

    def parameter_names(self) -> Collection[str]:
        return self.inner.parameter_names()

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        return self.inner.whole(parameters)

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        self.inner.written(parameters)

    def close(self) -> None:
        self.inner.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._trained.tensors() if self._phase is Phase.sparse else {}

    def _external_now(self) -> list[External]:
        """Not what trains as it is, in a full phase."""
        whole = {f"model/{name}.weight" for name in self._names} if self._phase is Phase.full else set()
        return [one for one in self._external if one.name not in whole]

    def _say(self, text: str) -> None:
        print(f"  {'selected':10} step {int(self._position)}: {text}", flush=True)

    def _choose(self, model: nn.Module, subjects: Subjects | None = None) -> None:
        """The first selection, of a whole model whose weights are the base."""
        seed = self._config.train.seed
        chosen, near = select(model, self._method, seed, self._world, subjects)
        settle(model, self._method, seed, {name: indices.cpu() for name, indices in chosen.items()})
        total = sum(indices.numel() for indices in chosen.values())
        if self._world.rank == 0:
            kind = "entries" if self._method.granularity.name == "element" else "columns or rows"
            self._say(f"{total:,} {kind} of {len(chosen)} weights; {say_near(near)}")

    def _calibrate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> None:
        """Select by the gradients of these micro-batches, on all ranks, and train what was selected."""
        model = self._makes.model(None)
        self._choose(model, by_gradient(self._trained, model, self._world, micro_batches, weight))
        self._remake(lambda: model, Phase.sparse)

    def _select_anew(self) -> None:
        schedule, said = self._method.schedule, ""
        if schedule is Reselection.rewind:
            if self._phase is Phase.full:
                self._rewind()
        elif schedule is Reselection.narrow:
            said = self._narrow()
        else:
            said = reselect(self._trained, self._config, int(self._position))
        if said and self._trained.speaks:
            self._say(said)

    def _rewind(self) -> None:
        """The end of a full phase: select what it changed most, and train that from the base.

        After Ansell et al. 2022 (LT-SFT, arXiv:2110.07560).
        """
        model = self._makes.model(None)
        self._choose(model, by_change(self._trained, model, self._world))
        self._remake(lambda: model, Phase.sparse)

    def _narrow(self) -> str:
        kept, said = narrow(self._trained)
        if not self._world.sum(sum(entries.indices.numel() for entries, _ in kept.values())):
            raise TrainingFailed(
                f"No entry is below method.threshold={self._method.threshold:g} any more, so nothing is left to train. "
                "What was saved before stays as it is. Lower optimizer.lr, or raise method.threshold."
            )
        left = self._world.union({name: entries.indices for name, (entries, _) in kept.items()}, self._names)

        def model() -> nn.Module:
            made = self._makes.model(None)
            settle(made, self._method, self._config.train.seed, left)
            return made

        self._remake(model, Phase.sparse)
        values = self._trained.values()
        for name in self._trained.layers:
            values.put_back(name, *kept[name])
        self._trained.replaced()
        return said

    def _penalize(self, step: int) -> None:
        """Penalties count once a step: in the first micro-batch, on one of the ranks that compute it."""
        method = self._method
        if self._phase is not Phase.sparse or not self._trained.speaks or not (method.l1 or method.nuclear):
            return
        turn = self._names[derive(self._config.train.seed, "nuclear", step) % len(self._names)]
        for name, layer in self._trained.layers.items():
            layer.penalty = Penalty(layer, method.l1 / self._num_values, method.nuclear if name == turn else 0.0)
