"""AdamW with moments of 8 bits, after Dettmers et al. 2022 (arXiv:2110.02861); torchao's kernels do the arithmetic.

Every 256 neighbours in a row share a scale. Such blocks never reach from one row into the next, and what they are is
decided by a parameter's whole shape: however its rows are shared out, codes and scales are those of the whole, and a
checkpoint of them goes on under any layout without being quantised again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from checkpointing import materialize, parameter_names
from trainer.errors import Refused
from trainer.options.config import Config
from trainer.options.optimizer import Implementation
from trainer.parallel.tensor import is_splittable, shares_of
from trainer.plan import Topology

BLOCK = 256  # values that share a scale
LEAST = 4096  # parameters with fewer values keep fp32 moments, as in bitsandbytes and torchao
BYTES = 2 * (1 + 4 / BLOCK)  # of both moments of one value


def is_in_blocks(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether the moments of a parameter of this whole shape are kept in 8 bits."""
    return len(shape) >= 2 and shape[-1] % BLOCK == 0 and prod(shape) >= LEAST


class EightBitKind:
    """AdamW with moments of 8 bits, of matrices whose rows are multiples of `BLOCK`."""

    def __init__(self, config: Config) -> None:
        self._options = config.optimizer

    def refuse(self, model: nn.Module, topology: Topology) -> None:
        """`Refused` where tensor-parallel ranks would hold a part of a block."""
        if topology.tp > 1:
            check_blocks(model, topology.tp)

    def bytes_of(self, shape: torch.Size) -> float:
        return shape.numel() * (BYTES if is_in_blocks(shape) else 8)

    def make(self, groups: list[dict[str, Any]], shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> Optimizer:
        options = self._options
        blocked = {parameter for parameter, shape in shapes.items() if is_in_blocks(shape)}
        betas = (options.betas[0], options.betas[1])
        return EightBitAdamW(groups, blocked, lr=options.lr, betas=betas, eps=options.eps)

    def goes_on_from(self, other: str) -> bool:
        """Codes and scales are of no use to another one."""
        return other == Implementation.torchao_8bit.value

    def about(self, model: nn.Module) -> str:
        trained = [p for p in model.parameters() if p.requires_grad]
        low, total = sum(p.numel() for p in trained if is_in_blocks(p.shape)), sum(p.numel() for p in trained)
        return f"AdamW ({self._options.implementation.value}: {low / max(1, total):.0%} of the moments)"


class EightBitAdamW(Optimizer):
    """AdamW that keeps the moments of `blocked` as codes of 8 bits (uint8, in the parameter's shape) and scales (fp32,
    one for `BLOCK` codes of a row), and those of other parameters in fp32.

    Parameters may be DTensors that are sharded by rows. Two optimizers of the libraries work on the local tensors; the
    state of all is this one's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], blocked: set[nn.Parameter], *, lr: float, betas: Any, eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._blocked = blocked
        self._plain = AdamW(self._groups_of(lambda p: None if p in blocked else p), lr=lr, fused=True)
        self._plain.state = self.state
        self._local: dict[nn.Parameter, nn.Parameter] = {}  # what this rank holds of the blocked ones, if anything
        self._low: Optimizer | None = None

    def prepare(self) -> None:
        """Create the state that is not there yet: moments of zero."""
        materialize(self._plain)
        if self._low is not None:
            return
        low, state_of = _library()
        for parameter in self._in_order():
            held = self.state[parameter]
            held["step"] = torch.zeros(())
            for moment in MOMENTS:
                held[f"{moment}_codes"] = _zeros(parameter, torch.uint8)
                held[f"{moment}_scales"] = _zeros(parameter, torch.float32, per=BLOCK)
            if (local := _local(parameter)).numel():
                self._local[parameter] = nn.Parameter(local)
        self._low = low(self._groups_of(self._local.get), lr=0.0, block_size=BLOCK)
        for parameter, here in self._local.items():
            held = self.state[parameter]
            self._low.state[here] = {
                "step": held["step"],
                **{
                    moment: state_of(_local(held[f"{moment}_codes"]), _local(held[f"{moment}_scales"]), signed)
                    for moment, signed in MOMENTS.items()
                },
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step as `torch.optim.AdamW` does, without a closure."""
        assert closure is None, "a closure is not called"
        self.prepare()
        assert self._low is not None
        for parameter, here in self._local.items():
            here.data = _local(parameter)
            here.grad = None if parameter.grad is None else _local(parameter.grad)
        for group, plain, low in zip(self.param_groups, self._plain.param_groups, self._low.param_groups, strict=True):
            for key in ("lr", "betas", "eps", "weight_decay"):
                plain[key] = group[key]
                if key != "lr":
                    low[key] = group[key]
            low["lr"].fill_(group["lr"])  # its compiled step holds on to the tensor
        self._plain.step()
        self._low.step()
        for here in self._local.values():
            here.grad = None
        for parameter in self._blocked - self._local.keys():
            if parameter.grad is not None:  # of which other ranks hold the rows
                self.state[parameter]["step"] += 1

    def load_state_dict(self, state_dict: Any) -> None:
        """Not this way: load into the tensors that `describe` gives, which other optimizers work on as well."""
        raise NotImplementedError("load into the pieces that describe() gives")

    def _in_order(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"] if p in self._blocked)

    def _groups_of(self, chosen: Callable[[nn.Parameter], nn.Parameter | None]) -> list[dict[str, Any]]:
        return [
            {**group, "params": [found for p in group["params"] if (found := chosen(p)) is not None]}
            for group in self.param_groups
        ]


MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _zeros(parameter: torch.Tensor, dtype: torch.dtype, per: int = 1) -> torch.Tensor:
    """Zeros, one for every `per` values of a parameter's row, sharded as the parameter is."""

    def shape(whole: torch.Size) -> torch.Size:
        return torch.Size((*whole[:-1], whole[-1] // per))

    local = _local(parameter)
    zeros = torch.zeros(shape(local.shape), dtype=dtype, device=local.device)
    if not isinstance(parameter, DTensor):
        return zeros
    whole = shape(parameter.shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole, stride=stride
    )


def _library() -> tuple[Callable[..., Optimizer], Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]]:
    """torchao's optimizer, and its view of codes and scales that are kept elsewhere."""
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    def state_of(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
        qmap = OptimState8bit.zeros((BLOCK,), signed, BLOCK, codes.device).qmap
        state: torch.Tensor = OptimState8bit(codes, scales.view(-1), qmap, signed, dtype=torch.float32)
        return state

    return AdamW8bit, state_of


def check_blocks(model: nn.Module, size: int) -> None:
    """`Refused` if one of so many tensor-parallel ranks would hold a part of a block. Of a model on meta."""
    if (cut := cut_within(model, size)) is None:
        return
    name, at = cut
    smaller = [other for other in range(size - 1, 0, -1) if size % other == 0]  # which fit the same processes
    fits = next(other for other in smaller if other == 1 or _fits(model, other))
    raise Refused(
        f"8-bit moments have a scale for every {BLOCK} values of a row, and parallel.tp={size} cuts the rows of {name} "
        f"at {at}, within such a block. Type parallel.tp={fits}, or optimizer.implementation=fused."
    )


def _fits(model: nn.Module, size: int) -> bool:
    return is_splittable(model, size) and cut_within(model, size) is None


def cut_within(model: nn.Module, size: int) -> tuple[str, int] | None:
    """A parameter whose rows are cut within a block, and where."""
    trained = {name for name, parameter in parameter_names(model).items() if parameter.requires_grad}
    for cuts in shares_of(model, size) if size > 1 else ():
        for name, part in cuts.held.items():
            if name in trained and is_in_blocks(part.shape):
                for at in (n for start, length in part.ranges[-1] for n in (start, start + length)):
                    if at % BLOCK:
                        return name, at
    return None
