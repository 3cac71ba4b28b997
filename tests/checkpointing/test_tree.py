"""The picture of what a checkpoint holds."""

from __future__ import annotations

from checkpointing.format import LogicalTensor
from checkpointing.geometry import Box
from checkpointing.tree import human_bytes, render_boxes, render_tree


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


def test_a_picture_of_who_wrote_what() -> None:
    quarters = [(Box((r, c), (2, 4)), 2 * (r // 2) + c // 4) for r in (0, 2) for c in (0, 4)]
    assert render_boxes(LogicalTensor("F32", (4, 8)), quarters) == [
        "00001111",
        "00001111",
        "22223333",
        "22223333",
        "0 rank 0, 1 rank 1, 2 rank 2, 3 rank 3; one letter is 1 x 1 elements",
    ]
    assert render_boxes(LogicalTensor("F32", (64,)), [(Box((32,), (32,)), 9)])[0] == "." * 16 + "9" * 16
    assert render_boxes(LogicalTensor("F32", ()), []) == render_boxes(LogicalTensor("F32", (0, 3)), []) == []
    far = render_boxes(LogicalTensor("F32", (2,)), [(Box((n,), (1,)), 1000 + n) for n in range(2)])
    assert far == ["01", "0 rank 1000, 1 rank 1001; one letter is 1 x 1 elements"]
    deep = render_boxes(LogicalTensor("F32", (100, 3, 100)), [(Box((0, 0, 0), (100, 3, 100)), 5)])
    assert deep[:-1] == ["5" * 32] * 16 and deep[-1].endswith("one letter is 6.25 x 3.125 elements")


def test_models_of_several_names_are_trees_of_their_own() -> None:
    tensors = {
        f"model/{name}/layers.{n}.weight": LogicalTensor("F32", (2, 2)) for name in ("actor", "ema") for n in range(2)
    }
    text = "\n".join(render_tree(tensors, {name: [0] for name in tensors}))
    assert "actor/layers" in text and "ema/layers" in text and "0-1 (2 alike)" in text
