"""Where a policy stands: reward and KL along its own samples, against plain code."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.errors import ConfigError
from prefopt.evaluate import policy as module
from prefopt.evaluate.points import standard_error
from prefopt.evaluate.policy import draw, measure, sequence_kl
from prefopt.model.load import LoadedModel, load_model
from prefopt.model.logprobs import plain_attention, set_attention
from prefopt.records import Content, Message
from prefopt.rewards import Reward, open_reward
from prefopt.sampling.completions import Settings
from prefopt.sampling.local import LocalModel
from tiny import save_tiny_model

CPU = torch.device("cpu")
PROMPTS: list[Content] = ["How is x?", (Message("user", "Who?"),), "A", "And then she said to"]
LETTERS = Reward("letters", "0", lambda prompts, completions: [len(c) for c in completions])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """Policy and reference, which differ."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(folder)
    policy, reference = (load_model(str(folder), dtype=torch.float32, device=CPU) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for model in (policy.model, reference.model):
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return policy, reference


def plain_logprobs(loaded: LoadedModel, prompt: np.ndarray, ids: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """[tokens, vocab] of one completion by transformers itself."""
    whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
    set_attention(loaded.model, plain_attention(loaded.model))
    with torch.no_grad():
        logits = loaded.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


@pytest.mark.parametrize(("temperature", "budget"), [(1.0, 4096), (0.6, 4096), (1.0, 40)])
def test_kl_is_the_plain_sum_along_each_sample(
    models: tuple[LoadedModel, LoadedModel], temperature: float, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS", budget)
    policy, reference = models
    local = LocalModel.of(policy)
    drawn = draw(local, PROMPTS, 3, Settings(7, temperature=temperature, seed=2), "samples")
    found = sequence_kl(policy.model, reference.model, local.renderer, PROMPTS, drawn, temperature=temperature)
    wanted = np.zeros((len(PROMPTS), 3))
    for i, (prompt, group) in enumerate(zip(PROMPTS, drawn, strict=True)):
        for k, s in enumerate(group):
            p, q = (plain_logprobs(m, local.renderer.prompt_ids(prompt), s.ids, temperature) for m in models)
            wanted[i, k] = float((p.exp() * (p - q)).sum())
    assert wanted.min() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_point_is_the_means_over_each_prompts_samples(models: tuple[LoadedModel, LoadedModel]) -> None:
    policy, reference = models
    local = LocalModel.of(policy)
    point = measure(
        policy.model, reference.model, local.renderer, PROMPTS, LETTERS, completions=3, max_new_tokens=7, seed=2
    )
    drawn = draw(local, PROMPTS, 3, Settings(7, seed=2), "samples")
    kl = sequence_kl(policy.model, reference.model, local.renderer, PROMPTS, drawn)
    assert point.reward.tolist() == [pytest.approx(sum(len(s.text) for s in group) / 3) for group in drawn]
    assert point.tokens.tolist() == [pytest.approx(sum(len(s.ids) for s in group) / 3) for group in drawn]
    assert point.finished.tolist() == [pytest.approx(sum(s.finish == "stop" for s in group) / 3) for group in drawn]
    np.testing.assert_allclose(point.kl, kl.mean(axis=1), rtol=1e-6)


def test_the_mean_log_ratio_estimates_the_same_with_more_noise(models: tuple[LoadedModel, LoadedModel]) -> None:
    policy, reference = models
    local = LocalModel.of(policy)
    prompt, samples = "How is x?", 600
    (group,) = draw(local, [prompt], samples, Settings(3, seed=0), "samples")
    exact = sequence_kl(policy.model, reference.model, local.renderer, [prompt], [group])[0]
    # The reference's log-probability of the same samples: k1 = log p - log q.
    start = local.renderer.prompt_ids(prompt)
    ratios = []
    for s in group:
        at = torch.from_numpy(s.ids.astype(np.int64))[:, None]
        logprobs = plain_logprobs(reference, start, s.ids).gather(1, at)
        ratios.append(float(s.logprobs.sum()) - float(logprobs.sum()))
    spread = float(np.std(ratios) / math.sqrt(samples))
    assert abs(np.mean(ratios) - exact.mean()) < 4 * spread
    assert 2 * exact.std() < np.std(ratios)


def test_one_token_has_the_same_kl_whatever_is_drawn(models: tuple[LoadedModel, LoadedModel]) -> None:
    policy, reference = models
    local = LocalModel.of(policy)
    drawn = draw(local, PROMPTS[:1], 8, Settings(1, seed=0), "samples")
    assert len({int(s.ids[0]) for s in drawn[0]}) > 1
    found = sequence_kl(policy.model, reference.model, local.renderer, PROMPTS[:1], drawn)[0]
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


def test_a_policy_in_training_goes_on_training(models: tuple[LoadedModel, LoadedModel]) -> None:
    policy, reference = models
    policy.model.train()
    try:
        renderer = LocalModel.of(policy).renderer
        measure(policy.model, reference.model, renderer, ["A"], LETTERS, completions=2, max_new_tokens=2, seed=0)
        assert policy.model.training and not reference.model.training
    finally:
        policy.model.eval()


def test_rewards_are_asked_for_a_bounded_number_at_once(
    models: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCORED", 7)
    calls: list[list[Content]] = []

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[int]:
        calls.append(list(prompts))
        return [len(c) for c in completions]

    drawn = draw(LocalModel.of(models[0]), PROMPTS, 3, Settings(7, seed=2), "samples")
    found = module.reward_of_samples(Reward("r", "0", score), PROMPTS, drawn)
    assert calls == [[PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, [PROMPTS[2]] * 3 + [PROMPTS[3]] * 3]
    assert found.tolist() == [[len(s.text) for s in group] for group in drawn]


def test_the_standard_error_is_over_prompts() -> None:
    kl = np.array([1.0, 2.0, 3.0, 6.0])
    # Mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14/3, standard error sqrt(14/3/4) = 1.0801.
    assert standard_error(kl) == pytest.approx(1.0801, abs=1e-4)


def test_what_cannot_be_measured_is_refused(models: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    policy, reference = models
    renderer, reward = LocalModel.of(policy).renderer, open_reward("length:5", device=CPU)
    for prompts, temperature, what in (
        (PROMPTS, 0.0, "A policy without randomness has no KL to speak of."),
        ([], 1.0, "There is no prompt to measure a policy on."),
    ):
        with pytest.raises(ConfigError) as caught:
            measure(
                policy.model, reference.model, renderer, prompts, reward,
                completions=2, max_new_tokens=2, temperature=temperature, seed=0,
            )  # fmt: skip
        assert caught.value.what == what
