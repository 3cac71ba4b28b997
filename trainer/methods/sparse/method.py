"""Sparse fine-tuning as a method: what trains at first, what happens between steps, and what a checkpoint holds of it.

An engine computes with weights that are frozen to it, and steps the values like any parameter. Between steps values go
into the weights, and entries are selected anew when that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checkpointing import Manifest, Piece
from trainer.elastic.randomness import derive
from trainer.errors import TrainingFailed
from trainer.methods.deltas import Applied, Delta, LowRank
from trainer.methods.entries import Entries
from trainer.methods.method import Backwards, Host, Method, Needs, Rebuild, Sizes, Stored, lasting
from trainer.methods.selection.choosing import Ranks
from trainer.methods.sparse.attach import attach, select, settle, sizes_in, targets_of, train_whole
from trainer.methods.sparse.calibration import EARLY, Subjects, by_change, by_gradient
from trainer.methods.sparse.entry_optimizers import EntryAdamW, EntrySM3
from trainer.methods.sparse.expected import expected_sizes, needs_of
from trainer.methods.sparse.growing import look, watch
from trainer.methods.sparse.layer import INDICES, ORIGINALS, VALUES, flat_entries
from trainer.methods.sparse.reselecting_layers import is_due, narrow, reselect, say_near
from trainer.methods.sparse.trained import Gathered, Known, State, Trained
from trainer.methods.sparse.watching import Penalty
from trainer.options.config import Config
from trainer.options.method import Growth, Reselection, Sparse

POSITION = "method/position"


class Phase(Enum):
    """Nothing trains until gradients are known, whole weights until their change is, or sparse values do."""

    calibrating = "calibrating"
    full = "full"
    sparse = "sparse"


class SparseMethod(Method):
    """A selector, an allocator and a schedule of re-selections (docs/methods.md has each one's paper)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Sparse)
        self._options, self._seed = config.method, config.train.seed
        self._position = torch.zeros((), dtype=torch.int64)  # steps done
        self._phase = Phase.sparse
        self._known: Known | None = None  # of the whole model, until an engine takes its part of it
        self._trained: Trained  # what this rank has of it
        self._names: list[str] = []  # of all layers that are targeted
        self._states: dict[str, State] = {}
        self._everyone: Ranks
        self._sm3: EntrySM3 | None = None

    def attach(self, model: nn.Module, sizes: Sizes | None = None) -> nn.Module:
        return attach(model, self._options, self._seed, sizes)

    def adds(self, name: str) -> bool:
        parts = name.split(".")
        return parts[-1] == VALUES or any(part.startswith("lora_") for part in parts)

    def expected(self, model: nn.Module) -> Sizes | None:
        return expected_sizes(model, self._options)

    def largest(self, model: nn.Module) -> None:
        if self._options.schedule is Reselection.rewind:
            train_whole(model, self._options)

    def needs(self, model: nn.Module) -> Needs:
        return needs_of(model, self._options)

    @property
    def calibrates(self) -> bool:
        return self._phase is Phase.calibrating

    def begin(self, model: nn.Module, sizes: Sizes | None, everyone: Ranks) -> None:
        self._everyone = everyone
        if sizes is not None:
            self._phase = Phase.sparse if sizes else Phase.full
        elif self._options.selector in EARLY:
            self._phase = Phase.calibrating
        elif self._options.schedule is Reselection.rewind:
            self._phase = Phase.full
        else:
            self._phase = Phase.sparse
            self._choose(model)
        if self._phase is Phase.full:
            train_whole(model, self._options)
        self._known = Known.of(model, self._options)

    def placed(self, host: Host) -> None:
        known, self._known = self._known, None  # it holds layers that other ranks compute
        assert known is not None
        self._names, self._num_values = list(known.shapes), known.num_values
        self._trained = Trained(host, known, self._options)
        self._trained.states.update(self._states)
        self._states = self._trained.states
        if self._sm3 is not None:
            self._sm3.place(host, self._trained.layers.values())

    def left(self) -> None:
        del self._trained
        self._sm3 = None

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 or name.endswith(VALUES)

    def optimizer(
        self, groups: list[dict[str, Any]], default: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """Entries that are selected anew have an age of their own; SM3 where the method grows by its accumulators."""
        method, options = self._options, self.config.optimizer
        if method.schedule is Reselection.regrow and method.growth is Growth.sm3:
            self._sm3 = EntrySM3(groups, lr=options.lr, eps=options.eps)
            return self._sm3
        if method.schedule not in (Reselection.once, Reselection.rewind):
            betas = (options.betas[0], options.betas[1])
            return EntryAdamW(groups, lr=options.lr, betas=betas, eps=options.eps)
        return default()

    def calibrate(self, backwards: Backwards) -> Rebuild | None:

        def settle_by_gradient(model: nn.Module) -> None:
            self._choose(model, by_gradient(self._trained, model, self._everyone, backwards))
            self._becomes_sparse(model)

        return Rebuild(settle_by_gradient, compares=True)

    def before(self) -> None:
        step = int(self._position) + 1
        for layer in self._trained.layers.values():
            layer.calls = 0
        watch(self._trained, self.config, step)
        self._penalize(step)

    def after(self, norm: torch.Tensor, loss_scale: float | None) -> Rebuild | None:
        self._position += 1
        if self._phase is Phase.sparse:
            self._trained.write()
            look(self._trained, self.config, norm, loss_scale)
        if not is_due(self.config, self._options, int(self._position)):
            return None
        if self._options.schedule is Reselection.rewind:
            return self._rewind() if self._phase is Phase.full else None
        if self._options.schedule is Reselection.narrow:
            return self._narrow()
        self._say_for_layers(reselect(self._trained, self.config, int(self._position)))
        return None

    def pieces(self, held: Sequence[Piece]) -> list[Piece]:
        own = (INDICES, ORIGINALS)
        found = [lasting(piece) if piece.name.endswith(own) else piece for piece in held]
        for name, tensor in {POSITION: self._position, **self._tensors()}.items():
            found.append(Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)))
        return found

    def shapes(self, manifest: Manifest) -> Sizes | None:
        return sizes_in(manifest)

    def fits(self, sizes: Sizes | None, *, half_loaded: bool) -> bool:
        """Half-loaded originals are replaced, and the base cannot be told from them any more."""
        trains = {name: size for name, size in (sizes or {}).items() if size > 0}
        return not half_loaded and trains == self._trained.sizes and bool(sizes) == (self._phase is Phase.sparse)

    def fill(self, manifest: Manifest) -> None:
        self._trained.revert()
        for name, tensor in self._tensors().items():
            if (stored := manifest.tensors.get(name)) is not None and stored.shape != tuple(tensor.shape):
                self._trained.make_room(name, stored.shape[0])

    def publish(self) -> None:
        if self._phase is Phase.sparse:
            self._trained.publish()

    def prepare_base(self, model: nn.Module) -> None:
        if self._options.bf16_weights:
            for layer, _ in targets_of(model, self._options).values():
                weight: Any = layer.weight
                weight.data = weight.data.to(torch.bfloat16)

    def delta(self, run: Stored, base: nn.Module | None) -> Delta:
        """The difference as the generation has it; of a full phase where weights differ."""
        if not sizes_in(run.manifest):
            return super().delta(run, base)
        return self._stored(run, run.base() if base is None else base)

    def merged(self, run: Stored) -> nn.Module:
        if not sizes_in(run.manifest):
            return super().merged(run)
        model = run.base()
        Applied(model, self._stored(run, model))
        return model

    def _stored(self, run: Stored, base: nn.Module) -> Delta:
        found = Delta(method=self._options.name)
        for layer, (module, target) in targets_of(base, self._options).items():
            name, shape = f"{layer}.weight", (target.rows, target.columns)
            entries: Entries | None = None
            if f"model/{layer}.{VALUES}" in run.names:
                indices, originals = (run.tensor(f"buffer/{layer}.{part}") for part in (INDICES, ORIGINALS))
                values = run.tensor(f"model/{layer}.{VALUES}")
                entries = flat_entries(indices, values, originals, target.granularity, shape)
            if f"method/{layer}/settled_indices" in run.names:
                parts = ("indices", "values", "originals")
                settled = Entries(*(run.tensor(f"method/{layer}/settled_{part}") for part in parts))
                entries = settled if entries is None else entries.joined(settled)
            if f"model/{layer}.lora_A.weight" in run.names:
                a, b = (run.tensor(f"model/{layer}.lora_{part}.weight") for part in "AB")
                found.low_rank[name] = LowRank(a, b, isinstance(module, Conv1D))
            elif entries is not None and entries.indices.numel():
                found.entries[name] = entries
            else:
                continue
            found.shapes[name] = shape
        return found

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._trained.tensors() if self._phase is Phase.sparse else {}

    def _say(self, text: str) -> None:
        print(f"  {'selected':10} step {int(self._position)}: {text}", flush=True)

    def _say_for_layers(self, text: str) -> None:
        """Print what became of a rank's layers, once for all ranks that hold them."""
        if self._trained.speaks:
            self._say(text)

    def _choose(self, model: nn.Module, subjects: Subjects | None = None) -> None:
        """Make the first selection, of a whole model whose weights are the base."""
        chosen, near = select(model, self._options, self._seed, self._everyone, subjects)
        settle(model, self._options, self._seed, {name: indices.cpu() for name, indices in chosen.items()})
        total = sum(indices.numel() for indices in chosen.values())
        if self._everyone.rank == 0:
            kind = "entries" if self._options.granularity.name == "element" else "columns or rows"
            self._say(f"{total:,} {kind} of {len(chosen)} weights; {say_near(near)}")

    def _becomes_sparse(self, model: nn.Module) -> None:
        self._phase = Phase.sparse
        self._known = Known.of(model, self._options)

    def _rewind(self) -> Rebuild:
        """End a full phase: select what it changed most, and train that from the base.

        After Ansell et al. 2022 (LT-SFT, arXiv:2110.07560).
        """

        def settle_by_change(model: nn.Module) -> None:
            self._choose(model, by_change(self._trained, model, self._everyone))
            self._becomes_sparse(model)

        return Rebuild(settle_by_change, compares=True)

    def _narrow(self) -> Rebuild:
        kept, said = narrow(self._trained)
        if not self._everyone.sum(sum(entries.indices.numel() for entries, _ in kept.values())):
            raise TrainingFailed(
                f"No entry is below method.threshold={self._options.threshold:g} any more, so nothing is left to "
                "train. What was saved before stays as it is. Lower optimizer.lr, or raise method.threshold."
            )
        left = self._everyone.union({name: e.indices for name, (e, _) in kept.items()}, self._names)

        def settle_what_is_left(model: nn.Module) -> None:
            settle(model, self._options, self._seed, left)
            self._becomes_sparse(model)

        def put_back() -> None:
            self._put_back(kept)
            self._say_for_layers(said)

        return Rebuild(settle_what_is_left, restore=put_back)

    def _put_back(self, kept: Gathered) -> None:
        values = self._trained.values()
        for name in self._trained.layers:
            values.put_back(name, *kept[name])
        self._trained.replaced()

    def _penalize(self, step: int) -> None:
        """Add penalties once a step: in the first micro-batch, on one of the ranks that compute it."""
        method = self._options
        if self._phase is not Phase.sparse or not self._trained.speaks or not (method.l1 or method.nuclear):
            return
        turn = self._names[derive(self._seed, "nuclear", step) % len(self._names)]
        for name, layer in self._trained.layers.items():
            nuclear = method.nuclear if name == turn else 0.0
            layer.penalty = Penalty(layer, method.l1 / self._num_values, nuclear)
