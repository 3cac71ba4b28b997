"""Constant work: the global batch is always the same logical micro-batches, dealt to however many ranks there are."""

from __future__ import annotations


def deal(num_micro_batches: int, num_ranks: int, rank: int) -> list[int | None]:
    """The logical micro-batches of one rank, one a round; None where it has nothing to do.

    Every rank gets the same number of rounds, because they compute together (FSDP gathers parameters in each). In a
    round without work a rank takes part with a micro-batch that has no targets and so adds exactly zero.
    """
    num_rounds = -(-num_micro_batches // num_ranks)
    mine = [round_ * num_ranks + rank for round_ in range(num_rounds)]
    return [index if index < num_micro_batches else None for index in mine]
