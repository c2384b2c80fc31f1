"""Proximal policy optimisation: sample, ask the reward, move the policy a little, again and again.

A step of the run is one batch of samples: drawn, scored, and trained on for `ppo_epochs` passes of
`minibatches` optimiser steps each. All of it takes the same packed batches and the same head as DPO;
the samples of a prompt share it.
"""

import torch

from prefopt.config import PPOConfig
from prefopt.errors import ConfigError
from prefopt.model.adapter import check_targets
from prefopt.model.load import load_reference
from prefopt.model.values import value_model
from prefopt.outcome import Sampler, finish
from prefopt.progress import say, warn
from prefopt.proximal import Proximal
from prefopt.rewards import Reward, open_reward
from prefopt.rollout import Rollout, first_samples
from prefopt.run import RunFolder
from prefopt.setup import (
    begin_health,
    begin_run,
    check_path,
    device_and_dtype,
    load,
    manifest,
    read_prompt_groups,
    split_rows,
)
from prefopt.train.budget import training_budget
from prefopt.train.loop import Objective, fit, total_steps

__all__ = ["train"]

_ADAM_EPS = 1e-5  # Huang et al. 2024 (arXiv 2403.17031): RLHF's reference code, and better for it than 1e-8
# Of the first ratios, which are 1: what rounding makes of single tokens.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def train(config: PPOConfig, resumed: RunFolder | None = None) -> RunFolder:
    """Read prompts, then sample, score and train until done; save the policy and report.

    Args:
        resumed: The run folder to go on with; `config` is then the one saved in it.
    """
    device, dtype = device_and_dtype(config.dtype)
    if resumed is None:
        RunFolder.refuse_taken(config.out)
    reward = open_reward(config.reward, device=device, dtype=dtype)
    loaded, renderer = load(config, dtype, device)
    check_targets(loaded.model, config.lora_targets)
    _check_value(config, reward)
    if reward.tokenizer_fingerprint not in (None, loaded.tokenizer_fingerprint):
        say("the reward model has a tokenizer of its own: it reads the samples as text")
    prompts = read_prompt_groups(config, loaded.model, renderer, new_tokens=config.max_new_tokens)
    rows = split_rows(config, prompts.groups, prompts.audit)
    reference = load_reference(config.reference, loaded, dtype, device) if config.reference else loaded
    samples = first_samples(loaded.model, rows.train, renderer, config)
    path = check_path(loaded.model, samples, device)
    reference_path = path if reference is loaded else check_path(reference.model, samples, device)
    steps = total_steps(config, len(rows.train), config.batch_prompts)
    value = value_model(config, loaded, path.path, steps)
    made_of = {**manifest(config, loaded), "reference": reference.fingerprint, "reward": _made_of(reward, resumed)}
    run = begin_run(config, "ppo", rows, made_of, resumed)

    if resumed is None:
        run.event("path", step=0, path=path.path, reason=path.reason, max_difference=path.max_difference)
    sampler = Sampler.over(config, renderer, rows.held_out or rows.train)
    before = sampler.complete(loaded.model)
    learner = Proximal(
        config, run, loaded, reference, path.path, reference_path.path, value, renderer, reward, prompts.contents, steps
    )
    health = begin_health(run, rows, None, resumed=resumed is not None)
    health.ratio_tolerance = _TOLERANCE[dtype]

    blank = Rollout.blank(rows.train, config, device)
    budget = training_budget(
        run,
        config.tokens_per_batch,
        learner.networks,
        lambda batch: learner.loss(batch, blank, learner.lesson(blank)),
        blank.groups,
        device,
    )
    steps = fit(
        run,
        config,
        Objective(
            label="ppo",
            unit="prompts",
            update=learner.update,
            evaluate=(lambda: learner.evaluate(rows.held_out, budget)) if rows.held_out else None,
            batch=config.batch_prompts,
            lr=config.lr,
            tokens_per_batch=budget,
            adam_eps=_ADAM_EPS,
            lr_factors={} if config.value_lr is None else {"value.": config.value_lr / config.lr},
            several=True,
            enough=learner.far,
            note=lambda metrics: f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.2f}",
            begin=lambda: learner.normalize(rows.train[: config.batch_prompts], budget),
            kept=learner.kept,
        ),
        learner.networks,
        rows.train,
        health,
        device,
    )
    finish(run, loaded, learner.policy, sampler, before, steps)
    return run


def _made_of(reward: Reward, resumed: RunFolder | None) -> str:
    """The reward's fingerprint in the manifest; a function may have been mended since the run stopped at it."""
    if resumed is None or not reward.code or resumed.manifest.get("reward") == reward.fingerprint:
        return reward.fingerprint
    warn(f"the file of {reward.name} has changed since the run started: from here on the new one is asked")
    resumed.event("reward", step=0, name=reward.name, fingerprint=reward.fingerprint)
    return str(resumed.manifest["reward"])


def _check_value(config: PPOConfig, reward: Reward) -> None:
    """That the reward is a model where the value model is to start as one."""
    if config.value_from == "reward" and reward.tokenizer_fingerprint is None:
        raise ConfigError(
            "The value model cannot start as the reward model.",
            where="value_from",
            got=f"reward {config.reward}",
            expected="a reward-model folder",
            todo="Use --value-from policy.",
        )
