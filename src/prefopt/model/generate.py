"""transformers' own generation, for models that `engine` cannot run; it draws the very same tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from prefopt.model.choose import Request, Sampled, choose, uniforms
from prefopt.model.logprobs import plain_attention
from prefopt.model.tiles import tile_rows

__all__ = ["attention", "generate", "own_distribution"]


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """`model` with the attention implementation `name`, and then with the one it had."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        if before is not None:
            model.set_attn_implementation(before)


@contextmanager
def own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """`generate` follows the configuration it is given and nothing else, with transformers' own attention.

    It fills what that configuration leaves open from the model's: penalties, beams, banned tokens.
    """
    defaults = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        with attention(model, plain_attention(model)):
            yield
    finally:
        model.generation_config = defaults


def generate(model: PreTrainedModel, request: Request) -> Iterator[Sampled]:
    """Every sample of `request`, by batches of prompts of similar length, each until its longest sample ends."""
    with own_distribution(model):
        for batch in _batches(request):
            yield from _generate(model, request, batch)


def _batches(request: Request) -> Iterator[list[int]]:
    """Prompt numbers in batches of similar length and the same room for new tokens."""
    batch: list[int] = []
    room = request.room
    for number in sorted(range(len(room)), key=lambda i: len(request.prompts[i])):
        tokens = (len(batch) + 1) * request.samples * (len(request.prompts[number]) + room[number])
        if batch and (tokens > request.batch_tokens or room[number] != room[batch[0]]):
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _generate(model: PreTrainedModel, request: Request, batch: list[int]) -> Iterator[Sampled]:
    rows = [(number, k) for number in batch for k in range(request.samples)]
    longest, room = max(len(request.prompts[i]) for i in batch), request.room[batch[0]]
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (number, _) in enumerate(rows):
        prompt = request.prompts[number]
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=room,
        eos_token_id=sorted(request.stop_ids) or None,
        pad_token_id=0,  # masked on the left, cut off on the right: its value is never seen
        do_sample=False,
    )
    device = next(model.parameters()).device
    noise = np.stack([uniforms(request.seed, number, k, room) for number, k in rows])
    draw = _Draw(torch.from_numpy(noise).to(device), request.temperature, request.top_p)
    out = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([draw]),
    )
    logprobs = torch.stack(draw.logprobs, dim=1).cpu().numpy()
    for row, full in enumerate(out.cpu().numpy().astype(np.int32)):
        new = full[longest:]
        stops = np.flatnonzero(np.isin(new, sorted(request.stop_ids)))
        tokens = int(stops[0]) + 1 if len(stops) else len(new)
        number, k = rows[row]
        yield Sampled(number, k, new[:tokens], len(stops) > 0, logprobs[row, :tokens].copy())


class _Draw(LogitsProcessor):
    """Leaves transformers' greedy search only the token that `choose` takes, and keeps its log-probability."""

    def __init__(self, noise: Float[Tensor, "rows tokens"], temperature: float, top_p: float) -> None:
        self.noise, self.temperature, self.top_p = noise, temperature, top_p
        self.logprobs: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        size = tile_rows(scores.shape[1], scores.device)
        noise = self.noise[:, len(self.logprobs)]
        drawn = [
            choose(part, u, self.temperature, self.top_p)
            for part, u in zip(scores.split(size), noise.split(size), strict=True)
        ]
        self.logprobs.append(torch.cat([logprobs for _, logprobs in drawn]))
        tokens = torch.cat([tokens for tokens, _ in drawn])
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)
