"""Text that the trained model writes, for a person to see what it learned."""

from __future__ import annotations

import torch

from trainer.data.dataset import Dataset
from trainer.data.tokenizer import Tokenizer, Tokens
from trainer.elastic.randomness import reseed
from trainer.training import Training

PROMPT_TOKENS = 48
TEMPERATURE = 0.7


def sample_text(
    training: Training, tokenizer: Tokenizer, dataset: Dataset, num_tokens: int, seed: int, room: int
) -> tuple[str, str]:
    """A prompt from a dataset's first sample, and how the model goes on within `room` positions.

    Collective: all ranks draw the same tokens.
    """
    start = choose_prompt(dataset, tokenizer.eos, min(PROMPT_TOKENS, max(1, room - num_tokens)))
    prompt = torch.as_tensor(start.astype("int64"), device=training.device)[None]
    reseed(seed, "sample")
    written = prompt
    for _ in range(max(1, min(num_tokens, room - len(start)))):
        chances = torch.softmax(training.next_logits(written).float() / TEMPERATURE, dim=-1)
        chosen = torch.multinomial(chances.cpu(), 1).to(training.device)
        written = torch.cat([written, chosen], dim=1)
        if chosen.item() == tokenizer.eos:
            break
    return tokenizer.decode(prompt[0].tolist()), tokenizer.decode(written[0, prompt.shape[1] :].tolist())


def choose_prompt(dataset: Dataset, eos: int, longest: int) -> Tokens:
    """The end of a record's prompt, which the completion should follow; of running text the beginning."""
    tokens, targets = dataset.sample(0)
    if (first := int(targets.argmax())) > 1:
        return tokens[:first][-longest:]
    start = tokens[:longest]
    return start[:-1] if len(start) > 1 and start[-1] == eos else start  # nothing follows the end
