"""A whole PPO update against one written from the papers' equations: no packing, no vectors, no head of ours.

One sequence at a time through transformers' own logits, Python loops over tokens, torch's own AdamW.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from prefopt.config import PPOConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import pack
from prefopt.data.tokenize import Renderer
from prefopt.model.load import LoadedModel
from prefopt.model.logprobs import Path as Way
from prefopt.model.logprobs import plain_attention, plain_model
from prefopt.model.sample import Sampled, sample
from prefopt.model.values import value_model
from prefopt.proximal import Proximal
from prefopt.records import Content
from prefopt.rewards import Reward
from prefopt.run import RunFolder
from prefopt.train.optimizer import Masters, make_optimizer
from prefopt.train.step import StepResult
from tiny import completion, group, letters_tokenizer, model_of

TOKENIZER = letters_tokenizer()
PROMPTS = [[5, 9, 30], [40, 8], [12, 13, 14, 15, 16], [7], [22, 3, 50, 33]]
LR, EPS = 1e-3, 1e-5


def settings(folder: Path, **changes: Any) -> PPOConfig:
    given: dict[str, Any] = {
        **{"model": "m", "data": ("d",), "out": folder / "run", "reward": "vowels", "seed": 3},
        **{"completions": 3, "max_new_tokens": 12, "temperature": 0.7, "kl_coef": 0.1, "missing_eos_reward": -1.0},
        **{"whiten_rewards": True},
        **{"gamma": 0.98, "lam": 0.9, "ppo_epochs": 2, "minibatches": 2, "clip": 0.05, "value_clip": 0.02},
        **{"value_coef": 0.3, "lr": LR, "max_grad_norm": 0.5, **changes},
    }
    return PPOConfig(**given)


def vowels(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
    return [sum(c in "aeiouAEIOU" for c in text) - 0.1 * len(text) for text in completions]


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, TOKENIZER, "weights", "tokenizer", "template", "m")


def learner(config: PPOConfig, architecture: str, path: Way) -> Proximal:
    """Policy, value model and reference all different, or a log-ratio or a value of nothing would hide a mistake."""
    mine = loaded(model_of(architecture, vocab_size=len(TOKENIZER)))
    theirs = loaded(model_of(architecture, seed=1, vocab_size=len(TOKENIZER))) if config.lora_rank is None else mine
    run = RunFolder.create(config.out, recipe="ppo", config=config, manifest={})
    renderer, reward = Renderer(TOKENIZER, eos_ids=frozenset({1})), Reward("vowels", "", vowels)
    contents: dict[Any, Content] = {one.source: str(one.source) for one in groups()}
    value = value_model(config, mine, path, 1)
    made = Proximal(config, run, mine, theirs, path, path, value, renderer, reward, contents, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.value.head.weight.copy_(0.1 * torch.randn(made.value.head.weight.shape, generator=generator))
        for name, parameter in made.networks.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def groups() -> list[CompletionGroup]:
    return [group(prompt, row=row) for row, prompt in enumerate(PROMPTS, start=1)]


def update(made: Proximal, tokens_per_batch: int) -> StepResult:
    masters = Masters(made.networks.parameters())
    optimizer = make_optimizer("adamw", masters.parameters, lr=LR, weight_decay=0.0, eps=EPS)
    return made.update(groups(), optimizer, masters, tokens_per_batch)


# --- the plain twin ----------------------------------------------------------------------------


@dataclass
class Episode:
    """One sample and what the models said of it when it was drawn, a number a token."""

    prompt: list[int]
    ids: list[int]
    reward: float
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


class Plain:
    """PPO of copies of the networks."""

    def __init__(self, made: Proximal, config: PPOConfig) -> None:
        self.config = config
        self.policy, self.backbone = copy.deepcopy(made.policy), copy.deepcopy(made.value.backbone)
        self.head = copy.deepcopy(made.value.head)
        self.frozen = made.frozen
        for model in (self.policy, self.backbone, *([self.frozen] if self.frozen else [])):
            plain_model(model).set_attn_implementation(plain_attention(plain_model(model)))
        # Of the networks as `made` has them: name -> this twin's parameter.
        self.parameters = {
            **{f"policy.{name}": p for name, p in self.policy.named_parameters()},
            **{f"value.backbone.{name}": p for name, p in self.backbone.named_parameters()},
            **{f"value.head.{name}": p for name, p in self.head.named_parameters()},
        }

    def logprobs(self, model: torch.nn.Module, one: Episode) -> Tensor:
        """log softmax(logits / temperature) of every token of the vocabulary before each sampled one."""
        logits = model(input_ids=torch.tensor([one.prompt + one.ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits[len(one.prompt) - 1 : -1] / self.config.temperature, dim=-1)

    def value(self, one: Episode) -> Tensor:
        ids = torch.tensor([one.prompt + one.ids])
        hidden = self.backbone(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        return torch.stack([self.head(hidden[len(one.prompt) - 1 + t])[0] for t in range(len(one.ids))])

    def samples(self) -> list[Episode]:
        """Those that the update draws, and their rewards."""
        seed = int(np.random.SeedSequence([self.config.seed, 1, 0]).generate_state(1)[0])
        drawn: list[Sampled] = sample(
            self.policy,
            [np.array(prompt, dtype=np.int32) for prompt in PROMPTS],
            completions=self.config.completions,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_ids=frozenset({1}),
            seed=seed,
        )
        found = []
        for one in drawn:
            (score,) = vowels([], [spoken(one.ids.tolist())])
            penalty = self.config.missing_eos_reward
            reward = score if one.finished or penalty is None else penalty
            found.append(Episode(PROMPTS[one.prompt_index], one.ids.tolist(), reward))
        finished = [one.ids[-1] == 1 for one in found]
        assert any(finished) and not all(finished), "both kinds of samples are wanted"
        return found

    @torch.no_grad()
    def score(self, one: Episode) -> None:
        own = self.logprobs(self.policy, one)
        if self.frozen is not None:
            reference = self.logprobs(self.frozen, one)
        else:
            with self.policy.disable_adapter():  # type: ignore[operator]
                reference = self.logprobs(self.policy, one)
        one.old = [float(own[t, i]) for t, i in enumerate(one.ids)]
        one.reference = [float(reference[t, i]) for t, i in enumerate(one.ids)]
        one.entropy = [-sum(math.exp(x) * x for x in row) for row in own.tolist()]
        one.values = self.value(one).tolist()

    def teach(self, samples: list[Episode]) -> None:
        """Ziegler et al. 2019: rewards of tokens; Schulman et al. 2016: advantages from the last token back."""
        config = self.config
        for one in samples:
            one.rewards = [-config.kl_coef * (a - b) for a, b in zip(one.old, one.reference, strict=True)]
            one.rewards[-1] += one.reward
        if config.whiten_rewards:
            mean, deviation = spread([r for one in samples for r in one.rewards])
            for one in samples:
                one.rewards = [(r - mean) / deviation + mean for r in one.rewards]
        for one in samples:
            one.advantages = [0.0] * len(one.ids)
            behind = 0.0
            for t in reversed(range(len(one.ids))):
                following = one.values[t + 1] if t + 1 < len(one.ids) else 0.0
                delta = one.rewards[t] + config.gamma * following - one.values[t]
                one.advantages[t] = behind = delta + config.gamma * config.lam * behind
            one.returns = [a + v for a, v in zip(one.advantages, one.values, strict=True)]
        mean, deviation = spread([a for one in samples for a in one.advantages])
        for one in samples:
            one.advantages = [(a - mean) / deviation for a in one.advantages]

    def losses(self, one: Episode) -> tuple[list[Tensor], list[Tensor]]:
        """Of policy and value model, a number a token (Schulman et al. 2017, equation 7)."""
        config, logprobs, values = self.config, self.logprobs(self.policy, one), self.value(one)
        policy, value = [], []
        for t, token in enumerate(one.ids):
            ratio, advantage = (logprobs[t, token] - one.old[t]).exp(), one.advantages[t]
            # min(rho A, clip(rho) A): the clipped one, a constant, is the lower one beyond the bound A pulls to.
            beyond = ratio.item() > 1 + config.clip if advantage > 0 else ratio.item() < 1 - config.clip
            bound = 1 + config.clip if advantage > 0 else 1 - config.clip
            policy.append(torch.tensor(-bound * advantage) if beyond else -ratio * advantage)
            # max((V - R)^2, (clip(V) - R)^2): likewise where the value has left its range towards the return.
            error, step = values[t] - one.returns[t], values[t].item() - one.values[t]
            near = one.values[t] + math.copysign(config.value_clip, step) - one.returns[t]
            beyond = abs(step) > config.value_clip and abs(near) > abs(error.item())
            value.append(torch.tensor(0.5 * near**2) if beyond else 0.5 * error**2)
        return policy, value

    def update(self) -> dict[str, float]:
        config, k = self.config, self.config.completions
        samples = self.samples()
        for one in samples:
            self.score(one)
        self.teach(samples)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, eps=EPS)
        made: list[tuple[float, float]] = []
        for epoch in range(config.ppo_epochs):
            order = np.random.default_rng([config.seed, 2, 0, epoch]).permutation(len(PROMPTS))
            for part in np.array_split(order, config.minibatches):
                both = [self.losses(samples[int(p) * k + s]) for p in part for s in range(k)]
                policy = [x for one, _ in both for x in one]
                value = [x for _, one in both for x in one]
                loss = torch.stack(policy).mean() + config.value_coef * torch.stack(value).mean()
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
                optimizer.step()
                made.append((loss.item(), norm.item()))
        scores = vowels([], [spoken(one.ids) for one in samples])
        returns, values = ([x for one in samples for x in getattr(one, name)] for name in ("returns", "values"))
        left = [r - v for r, v in zip(returns, values, strict=True)]
        return {
            "loss": sum(loss for loss, _ in made) / len(made),
            "grad_norm": sum(norm for _, norm in made) / len(made),
            "reward": sum(scores) / len(scores),
            "kl": sum(sum(one.old) - sum(one.reference) for one in samples) / len(samples),
            "entropy": sum(sum(one.entropy) for one in samples) / len(returns),
            "lengths/sampled": len(returns) / len(samples),
            "explained_variance": 1 - (spread(left)[1] / spread(returns)[1]) ** 2,
            "updates": float(len(made)),
        }


def spoken(ids: list[int]) -> str:
    """A letter a token; 0 is padding, 1 ends a text."""
    return "".join(TOKENIZER.convert_ids_to_tokens([i for i in ids if i > 1]))


def spread(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


# --- the two side by side ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "path", "changes"),
    [
        ("Llama", "shared", {}),
        ("Llama", "shared", {"whiten_rewards": False, "missing_eos_reward": None, "minibatches": 3}),
        ("Llama", "shared", {"lora_rank": 4}),
        ("GPT-2", "shared", {"temperature": 1.3}),  # a head that is the embedding
        ("BLOOM", "padded", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "as it is",
)
def test_an_update_is_the_papers(architecture: str, path: Way, changes: dict[str, Any], tmp_path: Path) -> None:
    config = settings(tmp_path, **changes)
    made = learner(config, architecture, path)
    before = {name: p.detach().clone() for name, p in made.networks.named_parameters()}
    plain = Plain(made, config)
    wanted = plain.update()
    result = update(made, 100_000)

    found = {"loss": result.loss, "grad_norm": result.grad_norm, **result.metrics}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    assert found["ratio/first"] == pytest.approx(1.0, abs=1e-5)
    assert found["ratio/sampled"] == pytest.approx(1.0, abs=1e-5)
    assert min(found["clip_fraction"], found["value_clip_fraction"], found["update_kl"]) > 0, "a part was not tried"
    assert abs(found["kl"]) > 1, "the reference must be another model"
    moved = set()
    for name, parameter in made.networks.named_parameters():
        torch.testing.assert_close(parameter, plain.parameters[name], atol=1e-5, rtol=1e-5)
        if not torch.equal(parameter, before[name]):
            moved.add(name.split(".")[0])
    assert moved == {"policy", "value"}


@pytest.mark.parametrize("tokens_per_batch", [1, 64])
def test_micro_batches_of_any_budget_are_the_same(tokens_per_batch: int, tmp_path: Path) -> None:
    results = []
    for name, budget in (("whole", 100_000), ("parts", tokens_per_batch)):
        made = learner(settings(tmp_path / name), "Llama", "shared")
        result = update(made, budget)
        results.append(({**result.metrics, "loss": result.loss}, dict(made.networks.named_parameters())))
    (whole, weights), (parts, others) = results
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    for name, parameter in weights.items():
        torch.testing.assert_close(others[name], parameter, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "path"), [("Llama", "shared"), ("BLOOM", "padded")])
def test_samples_follow_the_probabilities_that_train(architecture: str, path: Way, tmp_path: Path) -> None:
    """First tokens of many samples against softmax(logits / 0.7) as `score` has it; at 1 they do not fit."""
    made, draws = learner(settings(tmp_path, max_new_tokens=1), architecture, path), 6000
    every = group(PROMPTS[0], *(completion(token) for token in range(len(TOKENIZER))))
    expected = made.score(pack([every])).logprobs.double().exp()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-6)
    drawn = sample(
        made.policy,
        [every.prompt_ids],
        completions=draws,
        max_new_tokens=1,
        temperature=0.7,
        stop_ids=frozenset(),
        seed=0,
    )
    seen = np.bincount([int(one.ids[0]) for one in drawn], minlength=len(TOKENIZER))
    plain = expected**0.7 / (expected**0.7).sum()  # the model's own distribution
    assert fit(seen, expected.numpy()) > 0.01
    assert fit(seen, plain.numpy()) < 1e-9


def fit(seen: np.ndarray, probabilities: np.ndarray) -> float:
    """P value of Pearson's test; tokens expected fewer than five times count together."""
    expected = seen.sum() * probabilities / probabilities.sum()
    slot = np.where(expected < 5, 0, np.arange(1, len(expected) + 1))
    parts = [np.bincount(slot, weights=counts) for counts in (seen, expected)]
    there = parts[1] > 0
    return float(chisquare(parts[0][there], parts[1][there]).pvalue)
