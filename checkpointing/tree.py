"""Draw logical tensors as a tree of modules, alike siblings folded together. Text only; no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from checkpointing.format import LogicalTensor
from checkpointing.geometry import Box, intersect


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    tensor: LogicalTensor | None = None
    writers: Sequence[int] = ()

    @property
    def nbytes(self) -> int:
        own = self.tensor.nbytes if self.tensor else 0
        return own + sum(child.nbytes for child in self.children.values())

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for subtrees of the same shapes, names and dtypes, whoever wrote them."""
        return (self.tensor, tuple((name, child.signature) for name, child in self.children.items()))

    @property
    def shape_signature(self) -> tuple[object, ...]:
        """Equal for subtrees of the same shapes and names, whatever their dtypes."""
        shape = self.tensor.shape if self.tensor else None
        return (shape, tuple((name, child.shape_signature) for name, child in self.children.items()))

    def leaves(self) -> Iterator[LogicalTensor]:
        if self.tensor:
            yield self.tensor
        for child in self.children.values():
            yield from child.leaves()

    @property
    def all_writers(self) -> set[int]:
        return set(self.writers).union(*(child.all_writers for child in self.children.values()))


def render_tree(tensors: Mapping[str, LogicalTensor], writers: Mapping[str, Sequence[int]]) -> list[str]:
    """One line a module or tensor: name, dtype and shape, size, and the ranks that wrote it.

    A branch with the same tensors as one shown before, as an optimizer's moments mirror the model, is one line.
    """
    root = _Node()
    for name, tensor in tensors.items():
        node = root
        for part in _parts(name):
            node = node.children.setdefault(part, _Node())
        node.tensor, node.writers = tensor, writers[name]
    lines: list[str] = []
    shown: dict[tuple[object, ...], str] = {}
    for label, child in root.children.items():
        leaves = list(child.leaves())
        dtypes = ", ".join(sorted({t.dtype for t in leaves}))
        if (twin := shown.setdefault(child.shape_signature, label)) != label:
            lines.append(_line(f"  {label}", f"{dtypes}, tensors as in {twin}  {human_bytes(child.nbytes):>9}", child))
        elif all(t.shape == () for t in leaves):
            lines.append(_line(f"  {label}", f"{dtypes}, {len(leaves)} scalars  {human_bytes(child.nbytes):>9}", child))
        else:
            lines += _lines({label: child}, "  ")
    return lines


def human_bytes(count: float) -> str:
    """A size in units of 1000, as disks are sold: `29.6 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _parts(name: str) -> list[str]:
    """`optim/layers.0.weight/exp_avg` is shown by its last part first: what belongs to one key stays together."""
    kind, _, rest = name.partition("/")
    fqn, _, key = rest.rpartition("/") if kind == "optim" else ("", "", "")
    return [f"{kind}/{key}", *fqn.split(".")] if fqn else [kind, *rest.split(".")]


def _lines(children: Mapping[str, _Node], indent: str) -> list[str]:
    lines = []
    for label, child in _folded(children):
        while child.tensor is None and len(child.children) == 1:  # a module with one thing in it shares its line
            ((name, child),) = child.children.items()
            label = f"{label}.{name}"
        facts = human_bytes(child.nbytes)
        if child.tensor:
            shape = "x".join(map(str, child.tensor.shape)) or "scalar"
            facts = f"{child.tensor.dtype:4} {shape:>14}  {facts:>9}"
        lines.append(_line(indent + label, facts, child))
        lines += _lines(child.children, indent + "  ")
    return lines


def _line(label: str, facts: str, node: _Node) -> str:
    return f"{label:46} {facts:>37}  rank {','.join(map(str, sorted(node.all_writers)))}"


def _folded(children: Mapping[str, _Node]) -> list[tuple[str, _Node]]:
    """Runs of numbered siblings with the same content become one, such as `0-3 (4 alike)`."""
    found: list[tuple[str, _Node]] = []
    numbered = sorted((name for name in children if name.isdigit()), key=int)
    for name in [n for n in children if not n.isdigit()]:
        found.append((name, children[name]))
    while numbered:
        first = numbered.pop(0)
        alike = [first]
        while numbered and children[numbered[0]].signature == children[first].signature:
            alike.append(numbered.pop(0))
        label = first if len(alike) == 1 else f"{first}-{alike[-1]} ({len(alike)} alike)"
        found.append((label, _merged([children[name] for name in alike])))
    return found


def _merged(alike: Sequence[_Node]) -> _Node:
    """One node for several of the same content, written by all that wrote any of them."""
    children = {name: _merged([node.children[name] for node in alike]) for name in alike[0].children}
    return _Node(children, alike[0].tensor, sorted({rank for node in alike for rank in node.writers}))


PICTURE = (16, 32)  # rows and columns at most


def render_boxes(tensor: LogicalTensor, boxes: Sequence[tuple[Box, int]]) -> list[str]:
    """A small picture of who wrote which part: rows are the first dimension, columns the last, one letter a rank.

    Of the dimensions between, the first element is shown. A dot is a part that no rank wrote.
    """
    shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    if 0 in shape or not tensor.shape:
        return []
    ranks = sorted({rank for _, rank in boxes})
    shown = ranks if ranks[-1:] <= [len(_LETTERS) - 1] else range(len(ranks))  # its own digit where there are enough
    letters = {rank: _LETTERS[n] if n < len(_LETTERS) else "#" for n, rank in zip(shown, ranks, strict=True)}
    rows, columns = min(PICTURE[0], shape[0]), min(PICTURE[1], shape[-1])
    lines = []
    for row in range(rows):
        line = ""
        for column in range(columns):
            at = (row * shape[0] // rows, *(0 for _ in shape[1:-1]), column * shape[-1] // columns)
            point = Box(at[-len(tensor.shape) :], (1,) * len(tensor.shape))
            line += next((letters[rank] for box, rank in boxes if intersect(box, point)), ".")
        lines.append(line)
    legend = ", ".join(f"{letters[rank]} rank {rank}" for rank in ranks)
    scale = f"one letter is {shape[0] / rows:g} x {shape[-1] / columns:g} elements"
    return [*lines, f"{legend}; {scale}"]


_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
