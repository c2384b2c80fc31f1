"""Which token comes next: what is asked for, the noise of each sample, and the draw itself.

Every token takes one uniform number of its sample's own stream, turned into a token by the inverse
of the distribution function over the vocabulary. The stream depends on the seed, the prompt's
number and the sample's number alone, so that batches and their order cannot change a sample beyond
the rounding of its probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

__all__ = ["Request", "Sampled", "choose", "uniforms"]


@dataclass(frozen=True)
class Sampled:
    """One completion.

    Attributes:
        ids: Tokens without the prompt; the stop token included if it was reached.
        finished: A stop token was reached.
        logprobs: log p(token | prompt, earlier tokens) of the model itself, nats: neither tempered nor cut to
            a nucleus, so they are the terms of `sequence_logprob_sum` whatever the sampling settings.
    """

    prompt_index: int
    sample_index: int
    ids: Int32[np.ndarray, " tokens"]
    finished: bool
    logprobs: Float32[np.ndarray, " tokens"]


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        prompts: Ids of each prompt; none is empty.
        room: Longest completion of each prompt, tokens.
        samples: Completions of each prompt.
        batch_tokens: Bound of the tokens held in caches at once; one sample is always taken.
    """

    prompts: Sequence[Int32[np.ndarray, " _"]]
    room: tuple[int, ...]
    samples: int
    temperature: float
    top_p: float
    stop_ids: frozenset[int]
    seed: int
    batch_tokens: int


def uniforms(seed: int, prompt: int, sample: int, tokens: int) -> Float32[np.ndarray, " tokens"]:
    """The first `tokens` numbers in [0, 1) of one sample's stream."""
    return np.random.default_rng([seed, prompt, sample]).random(tokens, dtype=np.float32)


def choose(
    logits: Float[Tensor, "rows vocab"], noise: Float[Tensor, " rows"], temperature: float, top_p: float
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token for each row, and its log-probability under softmax(logits).

    Args:
        logits: float32.
        noise: A number in [0, 1) for each row; without meaning at temperature 0, which takes the likeliest token.
        top_p: Below 1, tokens come from the nucleus: the fewest likeliest tokens (after tempering, ties to the
            lower id) whose probabilities sum to at least `top_p`.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=1)
    else:
        probabilities = torch.softmax(logits / temperature, dim=1)
        if top_p < 1:
            probabilities = _nucleus(probabilities, top_p)
        reached = probabilities.cumsum(dim=1)
        # The first token beyond the threshold: it has a probability above zero.
        tokens = torch.searchsorted(reached, noise[:, None] * reached[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp_(max=logits.shape[1] - 1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)


def _nucleus(probabilities: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """`probabilities` with the tail at zero, in the order of the vocabulary, not normalised."""
    ordered, tokens = probabilities.sort(dim=1, descending=True, stable=True)
    ordered[ordered.cumsum(dim=1) - ordered >= top_p] = 0  # what stands before it is enough already
    return torch.zeros_like(probabilities).scatter_(1, tokens, ordered)
