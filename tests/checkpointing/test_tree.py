"""The picture of what a checkpoint holds."""

from __future__ import annotations

from checkpointing.format import LogicalTensor
from checkpointing.tree import human_bytes, render_tree


def test_alike_layers_fold_and_moments_mirror_the_model() -> None:
    shapes = {"embed.weight": (256, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "layers.10.w": (8, 9)}
    tensors = {f"model/{n}": LogicalTensor("BF16", s) for n, s in shapes.items()}
    tensors |= {f"optim/{n}/exp_avg": LogicalTensor("F32", s) for n, s in shapes.items()}
    tensors |= {f"optim/{n}/step": LogicalTensor("F32", ()) for n in shapes}
    writers = {name: [number % 2] for number, name in enumerate(tensors)}
    text = "\n".join(" ".join(line.split()) for line in render_tree(tensors, writers))
    assert text.splitlines() == [
        "model 4.5 kB rank 0,1",
        "embed.weight BF16 256x8 4.1 kB rank 0",
        "layers 400 B rank 0,1",
        "0-1 (2 alike).w BF16 8x8 128 B rank 0,1",
        "10.w BF16 8x9 144 B rank 1",
        "optim/exp_avg F32, tensors as in model 9.0 kB rank 0,1",
        "optim/step F32, 4 scalars 16 B rank 0,1",
    ]


def test_sizes_read_well() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_500_000, 2e12, 5e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 TB",
        "5000.0 TB",
    ]
