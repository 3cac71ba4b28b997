"""Options of the method: what of a model trains. A choice of the group is a class."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from trainer.errors import Refused
from trainer.options.field import option


@dataclass
class MethodOptions:
    """The method. Its options of the optimizer count where the optimizer's are not given."""

    made_by: ClassVar[str] = "trainer.methods.method:Method"  # MODULE:CLASS of the method itself

    lr: float = option("${model.lr}", low=0, free=True)
    weight_decay: float = option(0.1, low=0, free=True)

    def refuse(self) -> None:
        """Refuse combinations of a method's own options that mean nothing."""

    @property
    def trains_entries(self) -> bool:
        """Whether single entries of weights train, which no optimizer keeps in blocks."""
        return False

    @property
    def brings_optimizer(self) -> bool:
        """Whether the method has an optimizer of its own."""
        return False

    @property
    def reads_gradients(self) -> bool:
        """Whether gradients decide what trains, or something is added to them."""
        return False

    @property
    def grows_by_parts(self) -> bool:
        """Whether the gradient of a part of a micro-batch decides what trains."""
        return False


@dataclass
class Full(MethodOptions):
    """Train every parameter."""


@dataclass
class Lora(MethodOptions):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), by peft."""

    made_by: ClassVar[str] = "trainer.methods.lora:LoraMethod"

    r: int = option(8, low=1)
    alpha: float = option(8.0, low=0)
    dropout: float = option(0.0, low=0, high=1)
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # names of modules, such as [q_proj,v_proj]


@dataclass
class Selective(MethodOptions):
    """Train some parameters as they are, and freeze the rest (PERP: Zimmer et al. 2023, arXiv:2312.15230)."""

    made_by: ClassVar[str] = "trainer.methods.selective:SelectiveMethod"

    name: str = "selective"
    parameters: list[str] = field(default_factory=list)  # patterns found in the names of those that train


class Selector(Enum):
    random = "random"
    magnitude = "magnitude"  # the largest weights
    smallest = "smallest"  # the smallest weights
    low_rank = "low_rank"  # the largest of the weight's best approximation of rank `rank`
    gradient = "gradient"  # the largest gradients of the first global batch
    squared_gradient = "squared_gradient"  # the largest sums of squared gradients over its micro-batches
    delta = "delta"  # what a full phase changed most


class Granularity(Enum):
    element = "element"
    inputs = "inputs"  # whole columns of the weight: input channels, or the inputs that a head has
    outputs = "outputs"  # whole rows


class Allocator(Enum):
    uniform = "uniform"  # the same share of every weight
    whole = "whole"  # the best of all weights together
    rank = "rank"  # of every weight as much as a low-rank pair of rank `budget_rank` holds
    by_module = "by_module"  # `densities` by pattern
    threshold = "threshold"  # all below `threshold`


class Reselection(Enum):
    once = "once"
    renew = "renew"  # select anew; what is dropped keeps what it learned (LIFT)
    regrow = "regrow"  # drop the least changed, which go back, and grow others from nothing (SpIEL)
    narrow = "narrow"  # once, in the middle: go on with those that are still selected (SaRA)
    rewind = "rewind"  # train all first, select what changed most, rewind, and train that (LT-SFT)


class Growth(Enum):
    gradient = "gradient"  # by gradients accumulated over `window` steps on candidates (SpIEL-AG)
    sm3 = "sm3"  # by the product of SM3's row and column accumulators (SpIEL-MA)


@dataclass
class Sparse(MethodOptions):
    """Train some entries of the weights of linear layers: a selector, an allocator and a schedule of re-selections."""

    made_by: ClassVar[str] = "trainer.methods.sparse.method:SparseMethod"

    weight_decay: float = option(0.0, low=0, free=True)  # of the difference from the base
    name: str = "sparse"
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    selector: Selector = Selector.random
    granularity: Granularity = Granularity.element
    rank: int = option(32, low=1)  # of selector=low_rank
    allocator: Allocator = Allocator.uniform
    density: float = option(0.01, low=0, high=1)  # of allocator=uniform and allocator=whole
    budget_rank: float = option(8, low=0)  # of allocator=rank
    densities: list[str] = field(default_factory=list)  # pattern:density of allocator=by_module; the first counts
    threshold: float = option(2e-3, low=0)  # of allocator=threshold, on the absolute weight
    promote_rank: int = option(
        0, low=0
    )  # a weight with enough hits trains a low-rank pair of this rank instead; 0: none
    promote_alpha: float = option(8.0, low=1)  # enough hits are promote_rank (m + n) / promote_alpha
    schedule: Reselection = Reselection.once
    every: int = option(0, low=0)  # steps between re-selections; of `narrow` and `rewind` the step; 0: half the steps
    growth: Growth = Growth.gradient  # of schedule=regrow
    rate: float = option(0.2, low=0, high=1)  # share of the entries that `regrow` replaces at first; falls to zero
    window: int = option(5, low=1)  # steps that gradients of candidates are accumulated for
    nuclear: float = option(0.0, low=0)  # weight of the nuclear norm of one layer's difference a step (SaRA)
    l1: float = option(0.0, low=0)  # weight of the mean absolute difference from the base (LT-SFT)
    bf16_weights: bool = False  # keep frozen weights in bf16; what trains stays fp32

    @property
    def trains_entries(self) -> bool:
        return True

    @property
    def brings_optimizer(self) -> bool:
        return self.schedule not in (Reselection.once, Reselection.rewind)

    @property
    def reads_gradients(self) -> bool:
        early = self.selector in (Selector.gradient, Selector.squared_gradient)
        return bool(early or self.grows_by_parts or self.l1 or self.nuclear)

    @property
    def grows_by_parts(self) -> bool:
        return self.schedule is Reselection.regrow and self.growth is Growth.gradient

    def refuse(self) -> None:
        early = self.selector in (Selector.gradient, Selector.squared_gradient)
        if (self.selector is Selector.delta) != (self.schedule.name == "rewind"):
            raise Refused(
                f"method.selector={self.selector.name} with method.schedule={self.schedule.name}: the difference of a "
                "full phase is there after one. Type method.selector=delta method.schedule=rewind together."
            )
        if self.granularity is not Granularity.element and self.schedule.name != "once":
            raise Refused(
                f"method.granularity={self.granularity.name} with method.schedule={self.schedule.name}: whole channels "
                "are selected once. Type method.schedule=once, or method.granularity=element."
            )
        if self.allocator is Allocator.threshold and self.selector is not Selector.smallest:
            raise Refused(
                "method.allocator=threshold is of the smallest weights. Type method.selector=smallest with it."
            )
        if self.allocator is Allocator.threshold and self.granularity is not Granularity.element:
            raise Refused("method.allocator=threshold is of single weights. Type method.granularity=element with it.")
        if self.schedule.name == "narrow" and self.allocator is not Allocator.threshold:
            raise Refused("method.schedule=narrow goes on below a threshold. Type method.allocator=threshold with it.")
        if self.schedule.name in ("regrow", "renew") and early:
            raise Refused(
                f"method.selector={self.selector.name} is of the start. Type method.schedule=once, or method=spiel."
            )
        if self.schedule.name in ("regrow", "renew") and self.every == 0:
            raise Refused(f"method.schedule={self.schedule.name} needs method.every=STEPS.")
        if self.schedule.name == "regrow" and self.growth.name == "gradient" and self.every <= self.window:
            raise Refused(
                f"method.every={self.every} leaves no room for method.window={self.window} steps of accumulating "
                f"gradients. Type method.every={self.window + 1} or more."
            )
        if self.nuclear and self.granularity is not Granularity.element:
            raise Refused("method.nuclear is for single entries. Type method.nuclear=0, or method.granularity=element.")
        if self.bf16_weights and (
            self.allocator in (Allocator.whole, Allocator.threshold) or self.schedule is Reselection.rewind
        ):
            raise Refused(
                "method.bf16_weights=true is for methods that train a part of every targeted weight, and here some may "
                "stay as they are, or train whole. Type method.bf16_weights=false, or method.allocator=uniform."
            )
        if self.promote_rank and self.schedule.name != "once":
            raise Refused("method.promote_rank is for method.schedule=once. Type method.promote_rank=0.")
