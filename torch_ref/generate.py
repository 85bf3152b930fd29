"""Decoding again, in PyTorch: greedy, with and without a cache, and the distribution behind sampling.

The random draw itself has no twin: the two libraries' generators give different numbers. What is drawn from,
and every decision before it, can be compared. The fields of `mlx_impl.generate.Sampling` are plain arguments.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_ref.model import ContinualLLM


def penalized(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits (V,) with those of tokens already there made less likely (Keskar et al. 2019, section 4.1)."""
    there = torch.zeros(logits.shape, dtype=torch.bool)
    there[[token for token in seen if token < len(logits)]] = True
    weaker = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(there, weaker, logits)


def filtered(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Log-probabilities (V,) at the temperature; what top-k, top-p and min-p exclude is -inf.

    Temperature, then top-k, then top-p over what is left, then min-p. The likeliest token always passes.
    top-p keeps the smallest set of at least that mass (Holtzman et al. 2020), min-p what has at least that
    share of the likeliest one's probability.
    """
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    if 0 < top_k < len(logp):
        least = torch.topk(logp, top_k).values[-1]
        logp = torch.log_softmax(logp.masked_fill(logp < least, -math.inf), dim=-1)
    if top_p < 1:
        ordered, order = torch.sort(logp.exp(), descending=True, stable=True)
        likelier = ordered.cumsum(0) - ordered  # mass of the tokens before
        logp = logp.masked_fill(
            torch.zeros_like(logp, dtype=torch.bool).scatter(0, order, likelier >= top_p), -math.inf
        )
    if min_p > 0:
        logp = logp.masked_fill(logp < logp.max() + math.log(min_p), -math.inf)
    return logp


@torch.no_grad()
def naive(
    model: ContinualLLM,
    prompt: Sequence[int],
    max_tokens: int,
    penalty: float = 1.0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The slow, obvious greedy decoder: the whole text again for each token. `vocab_size` bounds the ids."""
    seen = list(prompt)
    for _ in range(max_tokens):
        logits = model(torch.tensor([seen]))[0, -1, :vocab_size]  # (V,)
        seen.append(int(penalized(logits, seen, penalty).argmax()))
        yield seen[-1]


@torch.no_grad()
def decode(
    model: ContinualLLM,
    prompt: Sequence[int],
    max_tokens: int,
    penalty: float = 1.0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The greedy decoder with a cache: the prompt at once, then a token a step. Same tokens as `naive`."""
    cache = model.make_cache()
    seen = list(prompt)
    new = seen
    for _ in range(max_tokens):
        logits = model(torch.tensor([new]), cache)[0, -1, :vocab_size]  # (V,)
        new = [int(penalized(logits, seen, penalty).argmax())]
        seen = seen + new
        yield new[0]
