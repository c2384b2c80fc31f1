"""Completions from a local model, through transformers' own generation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32
from transformers import GenerationConfig, PreTrainedModel

from prefopt.errors import ConfigError
from prefopt.model.load import max_positions
from prefopt.model.logprobs import plain_attention, plain_model

__all__ = ["Sampled", "own_distribution", "sample"]


@dataclass(frozen=True)
class Sampled:
    """One completion: its ids without the prompt, the stop token included if it was reached."""

    prompt_index: int
    ids: Int32[np.ndarray, " tokens"]
    finished: bool


def sample(
    model: torch.nn.Module,
    prompts: Sequence[Int32[np.ndarray, " _"]],
    *,
    completions: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stop_ids: frozenset[int],
    seed: int,
    batch_tokens: int = 16384,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Sampled]:
    """`completions` samples of each prompt, in prompt order.

    They come from the model's own distribution: top_k, penalties and other defaults of the model's
    generation configuration are not applied. Prompts of similar length share a batch; the seed
    reproduces the samples for the same prompts and `batch_tokens`, not across batch sizes. Where the
    model's positions end first, a completion ends there, unfinished.

    Args:
        temperature: 0 decodes greedily; every completion of a prompt is then the same.
        on_progress: Is told how many prompts have just been completed.
    """
    plain = plain_model(model)
    if not prompts:
        return []
    limit = max_positions(plain.config)
    longest = max(len(p) for p in prompts)
    if limit is not None and longest >= limit:
        raise ConfigError(
            "A prompt leaves no room for a completion.",
            where="prompt",
            got=f"{longest} tokens",
            expected=f"fewer than the model's {limit} positions",
            todo="Shorten the prompt.",
        )
    room = {i: min(max_new_tokens, (limit or max_new_tokens + len(p)) - len(p)) for i, p in enumerate(prompts)}
    draws = completions if temperature > 0 else 1
    device = next(plain.parameters()).device
    was_training = model.training
    model.eval()
    drawn: dict[int, list[Sampled]] = {}
    try:
        with own_distribution(plain), _own_seed(seed, device), torch.no_grad():
            for batch in _batches(prompts, room, draws, batch_tokens):
                config = _generation(temperature, top_p, room[batch[0]], stop_ids, draws)
                for one in _generate(plain, prompts, batch, config, stop_ids):
                    drawn.setdefault(one.prompt_index, []).append(one)
                on_progress(len(batch))
    finally:
        model.train(was_training)
    return [one for number in range(len(prompts)) for one in drawn[number] * (completions // draws)]


@contextmanager
def own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """`generate` follows the configuration it is given and nothing else, with transformers' own attention.

    It fills what that configuration leaves open from the model's: penalties, beams, banned tokens.
    """
    attention, defaults = model.config._attn_implementation, model.generation_config
    try:
        model.generation_config = GenerationConfig()
        model.set_attn_implementation(plain_attention(model))
        yield
    finally:
        model.generation_config = defaults
        if attention is not None:
            model.set_attn_implementation(attention)


@contextmanager
def _own_seed(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _batches(
    prompts: Sequence[Int32[np.ndarray, " _"]], room: dict[int, int], draws: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Prompt numbers in batches of similar length and the same room for new tokens."""
    batch: list[int] = []
    for number in sorted(room, key=lambda i: len(prompts[i])):
        tokens = (len(batch) + 1) * draws * (len(prompts[number]) + room[number])
        if batch and (tokens > batch_tokens or room[number] != room[batch[0]]):
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _generation(temperature: float, top_p: float, room: int, stop_ids: frozenset[int], draws: int) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=room,
        num_return_sequences=draws,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=0,  # masked on the left, cut off on the right: its value is never seen
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Int32[np.ndarray, " _"]],
    batch: list[int],
    config: GenerationConfig,
    stop_ids: frozenset[int],
) -> Iterator[Sampled]:
    longest = max(len(prompts[i]) for i in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, number in enumerate(batch):
        ids[row, longest - len(prompts[number]) :] = torch.from_numpy(prompts[number].astype(np.int64))
        mask[row, longest - len(prompts[number]) :] = 1
    device = next(model.parameters()).device
    out = model.generate(  # type: ignore[operator]
        ids.to(device), attention_mask=mask.to(device), generation_config=config
    )
    repeats = len(out) // len(batch)
    for row, full in enumerate(out.cpu().numpy().astype(np.int32)):
        new = full[longest:]
        stops = np.flatnonzero(np.isin(new, sorted(stop_ids)))
        finished = len(stops) > 0
        yield Sampled(batch[row // repeats], new[: stops[0] + 1] if finished else new, finished)
