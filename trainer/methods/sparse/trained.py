"""The sparse layers that this rank computes: their values in the weights, and all that is known of them beside that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from checkpointing import Piece
from trainer.methods.entries import Entries, index_dtype
from trainer.methods.method import Host
from trainer.methods.selection.choosing import Ranks
from trainer.methods.sparse.attach import targets_of
from trainer.methods.sparse.entry_optimizers import EntryAdamW, accumulators
from trainer.methods.sparse.layer import VALUES, SparseLayer, sparse_layers
from trainer.methods.sparse.places import EntryPlace, assemble, by_name, put_back
from trainer.methods.sparse.reselection import Candidates, Moments
from trainer.options.method import Granularity, Growth, Reselection, Sparse

Gathered = dict[str, tuple[Entries, dict[str, torch.Tensor]]]  # by layer; moments by the optimizer's name for them


@dataclass
class State:
    """State of one weight beside what trains of it."""

    settled: Entries  # changed, and trained no more
    candidates: Candidates


@dataclass(frozen=True)
class Known:
    """All layers of a model, before an engine takes its part of them."""

    layers: Mapping[str, SparseLayer]
    shapes: Mapping[str, tuple[int, int]]  # of every targeted weight, sparse or not
    num_values: int

    @staticmethod
    def of(model: nn.Module, method: Sparse) -> Known:
        targets = targets_of(model, method)
        layers = sparse_layers(model)
        num_values = sum(layer.sparse_values.numel() for layer in layers.values())
        return Known(layers, {name: (t.rows, t.columns) for name, (_, t) in targets.items()}, num_values)

    @property
    def sizes(self) -> dict[str, int]:
        """The entries, columns or rows that train of each."""
        return {name: layer.sparse_indices.numel() for name, layer in self.layers.items()}


class Trained:
    """Every method is collective over the ranks that hold the same layers."""

    def __init__(self, host: Host, known: Known, method: Sparse) -> None:
        self.host, self.method, self.sizes = host, method, known.sizes
        here = host.parameter_names()  # of a pipeline's stage those of its layers
        self.layers = {name: layer for name, layer in known.layers.items() if f"{name}.weight" in here}
        self.ranks = Ranks.of(host.layer_group, host.device)
        self.first = host.data_rank == 0  # whether this rank computes the first of a step's micro-batches
        self.speaks = self.first and host.tensor_rank == 0
        self.states = {n: self._no_state(shape) for n, shape in known.shapes.items() if f"{n}.weight" in here}
        for layer in self.layers.values():
            layer.first_here = self.first
        self.locate()

    def _no_state(self, shape: tuple[int, int]) -> State:
        dtype = torch.bfloat16 if self.method.bf16_weights else torch.float32
        none = Entries.none(index_dtype(shape), dtype, self.host.device)
        return State(none, Candidates.of(none.indices))

    def shards(self) -> list[Piece]:
        """The engine's pieces here. Not collective."""
        return list(self.host.pieces())

    def weights(self) -> dict[str, list[Piece]]:
        """The pieces of every layer's weight on this rank, none where it has none."""
        held = by_name(self.shards(), lambda name: name.endswith(".weight"))
        return {name: list(held.get(f"model/{name}.weight", ())) for name in self.states}

    def locate(self) -> None:
        """Find where the entries lie in this rank's shards, after they have changed."""
        for layer in self.layers.values():
            layer.forget()
        weights = self.weights()
        self._places = {
            n: EntryPlace(weights[n], one.sparse_indices, one.granularity) for n, one in self.layers.items()
        }
        self._settled = {
            name: EntryPlace(weights[name], state.settled.indices, Granularity.element)
            for name, state in self.states.items()
            if state.settled.indices.numel()
        }

    def write(self) -> None:
        """Values into the weights."""
        layers = list(self.layers.items())
        values = self.host.whole([layer.sparse_values for _, layer in layers])
        for (name, layer), value in zip(layers, values, strict=True):
            self._places[name].write(layer.sparse_originals, value)
        self.host.written([layer.weight for _, layer in layers])

    def publish(self) -> None:
        """Bring the weights up to date after entries, values or what is settled were replaced."""
        self.locate()
        for name, place in self._settled.items():
            place.write(self.states[name].settled.originals, self.states[name].settled.values)
        self.write()

    def revert(self) -> None:
        """The base, bit for bit, in every weight. Not collective."""
        for name, layer in self.layers.items():
            self._places[name].revert(layer.sparse_originals)
        for name, place in self._settled.items():
            place.revert(self.states[name].settled.originals)

    def values(self) -> Values:
        return Values(self, by_name(self.shards(), lambda name: f".{VALUES}" in name))

    @property
    def moments(self) -> tuple[str, ...]:
        return () if self._has_accumulators else EntryAdamW.MOMENTS

    def replaced(self) -> None:
        """Bring engine and weights up to date after values and moments of other entries were put back."""
        self.host.publish()
        self.publish()

    @property
    def _has_accumulators(self) -> bool:
        return self.method.schedule is Reselection.regrow and self.method.growth is Growth.sm3

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint beside the engine's, the same on all ranks that hold a layer."""
        found: dict[str, torch.Tensor] = {}
        for name, state in self.states.items():
            if self.method.schedule in (Reselection.renew, Reselection.narrow):
                found |= {f"method/{name}/settled_{key}": tensor for key, tensor in vars(state.settled).items()}
            if self.method.schedule is Reselection.regrow and self.method.growth is Growth.gradient:
                found |= {f"method/{name}/candidate_{key}": tensor for key, tensor in vars(state.candidates).items()}
            if self._has_accumulators and name in self.layers:
                rows, columns = accumulators(self.layers[name])
                found |= {f"method/{name}/sm3_rows": rows, f"method/{name}/sm3_columns": columns}
        return found

    def make_room(self, name: str, length: int) -> None:
        """Make room for the tensor that a checkpoint holds under a name of `tensors`."""
        _, layer, key = name.split("/")
        kind, _, part = key.partition("_")
        owner = self.states[layer].settled if kind == "settled" else self.states[layer].candidates
        setattr(owner, part, getattr(owner, part).new_zeros(length))


@dataclass(frozen=True)
class Values:
    """Each layer's values and moments on the ranks, gathered and replaced a layer at a time."""

    _trained: Trained
    _held: Mapping[str, list[Piece]]

    def gathered(self, name: str) -> tuple[Entries, dict[str, torch.Tensor]]:
        """The whole entries and moments of a layer, on all ranks. Collective."""
        layer, moments = self._trained.layers[name], {}
        values = self._whole(f"model/{name}.{VALUES}", layer)
        for key in self._trained.moments:
            moments[key] = self._whole(f"optim/{name}.{VALUES}/{key}", layer)
        return Entries(layer.sparse_indices.clone(), values, layer.sparse_originals.clone()), moments

    def put_back(self, name: str, entries: Entries, moments: Moments) -> None:
        """`Trained.replaced` is to follow, after the last layer."""
        put_back(self._held.get(f"model/{name}.{VALUES}", []), entries.values)
        for key, whole in moments.items():
            put_back(self._held.get(f"optim/{name}.{VALUES}/{key}", []), whole)

    def _whole(self, name: str, layer: SparseLayer) -> torch.Tensor:
        shape, ranks = tuple(layer.sparse_originals.shape), self._trained.ranks
        return assemble(self._held.get(name, []), ranks.group, self._trained.host.device, shape=shape)
