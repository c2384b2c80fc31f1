"""Completion groups cut to length: the prompt's front first, then the completions' ends."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int32

from prefopt.data.audit import Audit, Refusal
from prefopt.data.group import Completion, CompletionGroup

__all__ = ["fit"]


def fit(
    group: CompletionGroup, max_length: int, max_prompt_length: int, start_id: int | None, audit: Audit
) -> CompletionGroup:
    """The group within `max_length` tokens; what is cut is told to `audit`.

    Args:
        start_id: The start-of-text token, which a prompt keeps at its front.

    Raises:
        Refusal: the completions are, or become, the same; or nothing is left to train on.
    """
    if _same(group.completions):
        raise Refusal("identical_tokens", "the completions differ as texts and are the same tokens")
    prompt, completions = group.prompt_ids, group.completions
    longest = max(len(c.ids) for c in completions)
    if len(prompt) + longest > max_length:
        prompt = _last(prompt, max_prompt_length, start_id)
        room = max_length - len(prompt)
        completions = tuple(Completion(c.ids[:room], c.trainable[:room]) for c in completions)
        if _same(completions):
            raise Refusal("identical_after_cut", f"the completions differ only behind token {room}, where they are cut")
    if not all(c.scored_tokens for c in completions):
        raise Refusal("nothing_to_train", "a completion has no token to train on")
    if len(prompt) < len(group.prompt_ids):
        audit.mend(group.source, "prompt_cut", f"{len(group.prompt_ids)} tokens, the last {len(prompt)} kept")
    if (kept := max(len(c.ids) for c in completions)) < longest:
        audit.mend(group.source, "completion_cut", f"{longest} tokens, the first {kept} kept; its end is not trained")
    return replace(group, prompt_ids=prompt, completions=completions, truncated=group.truncated or kept < longest)


def _last(ids: Int32[np.ndarray, " tokens"], count: int, start_id: int | None) -> Int32[np.ndarray, " kept"]:
    if len(ids) <= count:
        return ids
    if count > 1 and ids[0] == start_id:
        return np.concatenate([ids[:1], ids[len(ids) - count + 1 :]])
    return ids[len(ids) - count :]


def _same(completions: Sequence[Completion]) -> bool:
    return len({(c.ids.tobytes(), c.trainable.tobytes()) for c in completions}) < len(completions)
