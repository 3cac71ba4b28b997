"""`python -m trainer.data preview [-n N] [overrides]`: samples as training sees them, what is not learned dimmed.

Where the output is no terminal, what is learned stands between ⟦ and ⟧. Exit status 2: refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from checkpointing.printing import shown, spell_out
from trainer.compose import compose
from trainer.data.dataset import Dataset, Sample
from trainer.data.order import samples_of_step
from trainer.data.sources import load_corpus
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused
from trainer.models import load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preview = parser.add_subparsers(dest="command", required=True).add_parser("preview")
    preview.add_argument("-n", type=int, default=3, metavar="N", help="how many of the first that are trained on")
    preview.add_argument("overrides", nargs="*", help="such as data=chat data.path=FILE")
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    try:
        show(arguments.n, arguments.overrides)
    except Refused as error:
        print(f"trainer.data: {error}", file=sys.stderr)
        return 2
    return 0


def show(count: int, overrides: Sequence[str]) -> None:
    config = compose(list(overrides))
    tokenizer = load_tokenizer(config.model)
    corpus = load_corpus(config.data, tokenizer, config.train.seq_len)
    console = Console(highlight=False)
    console.print(f"{corpus.name}: {len(corpus.train):,} samples, {len(corpus.held_out):,} held out")
    for line in [*corpus.notes, lengths(corpus.train)]:
        console.print(f"  {line}", markup=False)
    ids = samples_of_step(1, seed=config.train.seed, dataset_size=len(corpus.train), global_batch=max(count, 1))
    for index in ids[:count]:
        sample = corpus.train.sample(int(index))
        console.rule(f"sample {index}: {len(sample.tokens)} tokens, {int(sample.targets.sum())} learned")
        console.print(written(sample, tokenizer, marks=not console.is_terminal), soft_wrap=True)


def lengths(dataset: Dataset) -> str:
    """How long samples are, and how much of them is learned."""
    ids = np.arange(len(dataset))
    # of at most some thousands, spread evenly
    looked_at = ids[:: max(1, len(ids) // 5000)]
    inputs = np.array([dataset.num_tokens(ids[i : i + 1]) for i in looked_at])
    learned = dataset.num_targets(ids) / max(1, dataset.num_tokens(ids))
    middle, high = np.percentile(inputs, [50, 95])
    how_long = f"half have at most {middle:.0f} tokens, 95% at most {high:.0f}, the longest {inputs.max()}"
    return f"{how_long}; {learned:.0%} of them are learned"


def written(sample: Sample, tokenizer: Tokenizer, *, marks: bool) -> Text:
    text = Text()
    for learned, part in _runs(sample):
        words = shown(tokenizer.decode(part, specials=True))
        if marks:
            text.append(f"⟦{words}⟧" if learned else words)
        else:
            text.append(words, style="" if learned else "dim")
    return text


def _runs(sample: Sample) -> Iterator[tuple[bool, list[int]]]:
    pairs = zip(sample.targets.tolist(), sample.tokens.tolist(), strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[0]):
        yield learned, [token for _, token in run]


if __name__ == "__main__":
    sys.exit(main())
