"""Text that the trained model writes, for a person to see what it learned."""

from __future__ import annotations

import torch

from trainer.data.dataset import Dataset
from trainer.data.tokenizer import Tokenizer
from trainer.elastic.randomness import reseed
from trainer.parallel.engine import TrainingEngine

PROMPT_TOKENS = 48


def sample_text(
    engine: TrainingEngine, tokenizer: Tokenizer, dataset: Dataset, num_tokens: int, seed: int
) -> tuple[str, str]:
    """The start of a dataset's first sample, and how the model goes on. Collective: all ranks draw the same tokens."""
    tokens, _ = dataset.sample(0)
    prompt = torch.as_tensor(tokens[:PROMPT_TOKENS].astype("int64"), device=engine.device)[None]
    reseed(seed, "sample")
    model = engine.module().eval()
    with torch.no_grad():
        written = model.generate(  # type: ignore[operator]  # every causal language model of transformers has it
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.eos,
        )
    model.train()
    return tokenizer.decode(prompt[0].tolist()), tokenizer.decode(written[0, prompt.shape[1] :].tolist())
