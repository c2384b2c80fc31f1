"""Completions from a local model: ids in, ids out.

Models that plug in an attention are decoded by `engine`; the others by transformers' `generate`.
Both draw with `choose`, so that they give the same samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Int32
from transformers import PreTrainedModel

from prefopt.errors import ConfigError, ModelError, NonFiniteError
from prefopt.model.attention import UnsharableError, cannot_share
from prefopt.model.choose import Request, Sampled
from prefopt.model.decode import DECODE
from prefopt.model.engine import Engine
from prefopt.model.generate import attention, generate
from prefopt.model.load import max_positions
from prefopt.model.logprobs import plain_attention, plain_model
from prefopt.progress import say

__all__ = ["Sampled", "sample"]

# Mean difference of a token's log-probability to transformers' own (nats); see `model.logprobs`.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_CHECK_PROMPT, _CHECK_TOKENS = 32, 4

# Why a model is left to transformers, or None; found out when it is first sampled from.
_left_to_transformers: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


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
    batch_tokens: int = 32768,
    on_prompt: Callable[[int, list[Sampled]], None] = lambda *_: None,
) -> list[Sampled]:
    """`completions` samples of each prompt, in prompt order.

    They come from the model's own distribution: top_k, penalties and other defaults of the model's
    generation configuration are not applied. A sample depends on the seed, the prompt and its number, and
    its own number; not on the other prompts or `batch_tokens`, beyond the rounding of probabilities.
    Where the model's positions end first, a completion ends there, unfinished.

    Args:
        temperature: 0 decodes greedily; every completion of a prompt is then the same.
        top_p: Below 1, only tokens of the nucleus are drawn (see `model.choose`).
        batch_tokens: Bound of the tokens held in caches at once, a prompt's once for all its samples.
        on_prompt: Is given each prompt's number and samples when the last of them has ended.

    Raises:
        ConfigError: a prompt is empty or leaves no room for a completion.
        NonFiniteError: the model's probabilities are NaN.
    """
    if not prompts:
        return []
    plain = plain_model(model)
    # Greedily all samples of a prompt are the same one.
    draws = completions if temperature > 0 else 1
    room = _room(prompts, max_new_tokens, max_positions(plain.config))
    request = Request(prompts, room, draws, temperature, top_p, stop_ids, seed, batch_tokens)
    drawn: list[list[Sampled]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for one in _run(plain, request):
                if not np.isfinite(one.logprobs).all():
                    raise NonFiniteError(
                        "The model's probabilities are not finite, so nothing can be drawn from it.",
                        where=f"prompt {one.prompt_index + 1}, token {int(np.isfinite(one.logprobs).argmin()) + 1}",
                        todo="Its weights are damaged, or training has diverged.",
                    )
                mine = drawn[one.prompt_index]
                mine.append(one)
                if len(mine) == draws:
                    repeats = range(completions // draws)
                    ordered = sorted(mine, key=lambda s: s.sample_index)
                    drawn[one.prompt_index] = [
                        replace(s, sample_index=s.sample_index + n) for n in repeats for s in ordered
                    ]
                    on_prompt(one.prompt_index, drawn[one.prompt_index])
    finally:
        model.train(was_training)
    return [one for mine in drawn for one in mine]


def _room(prompts: Sequence[Int32[np.ndarray, " _"]], wanted: int, limit: int | None) -> tuple[int, ...]:
    """Longest completion of each prompt within the model's positions."""
    lengths = [len(p) for p in prompts]
    if limit is not None and max(lengths) >= limit:
        raise ConfigError(
            "A prompt leaves no room for a completion.",
            where="prompt",
            got=f"{max(lengths)} tokens",
            expected=f"fewer than the model's {limit} positions",
            todo="Shorten the prompt.",
        )
    if not min(lengths):
        raise ConfigError("A prompt is empty.", where=f"prompt {lengths.index(0) + 1}", expected="at least one token")
    return tuple(wanted if limit is None else min(wanted, limit - length) for length in lengths)


def _run(model: PreTrainedModel, request: Request) -> Iterator[Sampled]:
    if model not in _left_to_transformers:
        reason = _left_to_transformers[model] = _why_not(model, request)
        if reason is not None:
            say(f"sampling by transformers' generate - {reason}")
    if _left_to_transformers[model] is None:
        with attention(model, DECODE):
            yield from Engine(model, request).run()
    else:
        yield from generate(model, request)


def _why_not(model: PreTrainedModel, request: Request) -> str | None:
    """Why `model` cannot be decoded by `engine`: by inspection, then by decoding a little and comparing."""
    reason = cannot_share(model)
    if reason is not None:
        return reason
    prompt = request.prompts[0][:_CHECK_PROMPT]
    room = min(_CHECK_TOKENS, request.room[0])
    check = replace(
        request, prompts=[prompt], room=(room,), samples=2, temperature=1.0, top_p=1.0, stop_ids=frozenset()
    )
    try:
        with attention(model, DECODE):
            drawn = list(Engine(model, check).run())
    except UnsharableError as error:
        return f"its layers need {error}"
    except ModelError as error:
        return error.what
    differences = []
    with attention(model, plain_attention(model)):
        for one in drawn:
            ids = torch.from_numpy(np.concatenate([prompt, one.ids]).astype(np.int64))[None].to(model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            truth = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy()
            differences.append(np.abs(one.logprobs - truth).mean())
    difference = float(np.mean(differences))
    if difference <= _TOLERANCE[model.dtype]:  # a NaN is not
        return None
    return f"our own decoding differs from transformers by {difference:.1e} nats a token"
