"""One seed of an experiment: its start, pairs and reward model; one run of a method, trained and measured."""

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prefopt.config import PPOConfig
from prefopt.config.base import TrainConfig
from prefopt.config.frontier import Arm, FrontierConfig, MethodConfig, PairsConfig
from prefopt.errors import RunError
from prefopt.evaluate.best_of import best_of_points
from prefopt.evaluate.material import PromptFiles, all_pairs, as_json_lines, read_back
from prefopt.evaluate.points import Point, PointsFile, content_key
from prefopt.evaluate.policy import PolicyPoint, draw, measure, reward_of_samples
from prefopt.model.load import LoadedModel, load_model
from prefopt.model.policy import make_policy
from prefopt.progress import say
from prefopt.records import Content
from prefopt.resume import RECIPES, resume
from prefopt.rewards import Reward, open_reward
from prefopt.run import RunFolder, write_atomically
from prefopt.sampling.completions import Settings
from prefopt.sampling.local import LocalModel
from prefopt.setup import device_and_dtype, manifest
from prefopt.train.checkpoint import load_step

__all__ = ["Seed", "measure_arm", "measure_best_of", "measure_run", "measure_start", "prepare"]


@dataclass(frozen=True)
class Seed:
    """What all runs of a seed are made from, by name.

    Attributes:
        model: The start.
        pairs: Preference files; none where nothing is trained on pairs.
        learned: Reward-model run; "" where no method needs one.
    """

    number: int
    folder: Path
    model: str
    prompts: PromptFiles
    pairs: tuple[str, ...]
    learned: str


def prepare(config: FrontierConfig, number: int, prompts: PromptFiles) -> Seed:
    """Make the start, the pairs and the reward model of a seed, or find them made."""
    folder = config.out / f"seed-{number}"
    model = config.model
    if config.start is not None:
        model = str(_trained("sft", config.start_config(number, folder / "start")).path)
    seed = Seed(number, folder, model, prompts, (), "")
    if config.pairs is not None:
        seed = replace(seed, pairs=config.pairs.data or (str(_sampled_pairs(config, seed, config.pairs)),))
    if config.learns_reward:
        learning = config.reward_config(number, model=model, pairs=seed.pairs, out=folder / "reward-model")
        seed = replace(seed, learned=str(_trained("reward", learning).path))
    return seed


def _sampled_pairs(config: FrontierConfig, seed: Seed, asked: PairsConfig) -> Path:
    """All pairs of several samples of each training prompt; the file's name tells what it was made from."""
    assert asked.samples is not None
    bench = _Bench(config, seed)
    made_of = content_key(start=bench.start.fingerprint, truth=bench.reward.fingerprint, **asked.model_dump())
    path = seed.folder / f"pairs-{made_of[:8]}.jsonl"
    if not path.exists():
        prompts = read_back(seed.prompts.train)
        settings = Settings(asked.max_new_tokens, seed=2 * seed.number)
        drawn = draw(LocalModel.of(bench.start), prompts, asked.samples, settings, "samples for pairs")
        rewards = reward_of_samples(bench.reward, prompts, drawn)
        rows = all_pairs(prompts, drawn, rewards)
        possible = len(prompts) * math.comb(asked.samples, 2)
        say(f"pairs: {len(rows):,} of {possible:,}; the others are ties or twice the same text")
        write_atomically(path, as_json_lines(rows))
    return path


def _trained(recipe: str, config: TrainConfig, reward: str | None = None) -> RunFolder:
    """The finished run of a configuration: found, resumed or made.

    Args:
        reward: Fingerprint of what it is trained on now, of ppo.

    Raises:
        RunError: another run stands in its folder, or its model or data have changed; what differs is named.
    """
    kind, train = RECIPES[recipe]
    out = config.out
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        train(config)
        return RunFolder.open(out)
    run = RunFolder.open(out)
    there, wanted = (c.model_dump(mode="json") for c in (kind.model_validate(run.config_dict), config))
    differing = [f"{name}: {there[name]}, not {wanted[name]}" for name in wanted if there[name] != wanted[name]]
    if run.recipe != recipe or differing:
        raise RunError(
            "Another run stands in this run's folder.",
            where=str(out),
            got=f"recipe {run.recipe}" if run.recipe != recipe else "; ".join(differing),
            expected="the run that the experiment's file asks for",
            todo="Put the file back as it was, move that run away to train anew, or choose another out.",
        )
    now: dict[str, Any] = {} if reward is None else {"reward": reward}
    if run.finished:
        now |= manifest(config, load_model(config.model, dtype=torch.float32, device=torch.device("cpu")))
    parts = ("model", "tokenizer", "template", "data", "reward")
    changed = [name for name in parts if name in now and now[name] != run.manifest[name]]
    if changed:
        raise RunError(
            "A run was trained on something else than what is there now.",
            where=str(out),
            got=f"another {', another '.join(changed)} than in its manifest.json",
            expected=f"{config.model}, {', '.join(config.data)} and the reward as they were",
            todo="Put them back, move that run away to train anew, or choose another out.",
        )
    if run.finished:
        return run
    del run
    resume(out)
    return RunFolder.open(out)


class _Bench:
    """The start, the truth and the test prompts of a seed, loaded; and how a policy is measured with them."""

    def __init__(self, config: FrontierConfig, seed: Seed) -> None:
        self.config, self.seed = config, seed
        self.device = device_and_dtype("float32")[0]
        self.points = PointsFile(config.out / "points.jsonl")

    @cached_property
    def start(self) -> LoadedModel:
        return load_model(self.seed.model, dtype=torch.float32, device=self.device)

    @cached_property
    def reward(self) -> Reward:
        return self.opened(self.config.reward)

    @cached_property
    def prompts(self) -> list[Content]:
        return read_back(self.seed.prompts.test)

    @cached_property
    def known(self) -> dict[str, Point]:
        return self.points.read()

    def opened(self, reward: str) -> Reward:
        return open_reward(reward, device=self.device, dtype=torch.float32)

    def key(self, **what: Any) -> str:
        """Of a point: what is measured, and everything that it is measured with."""
        asked = self.config.evaluate
        return content_key(
            **what,
            start=self.start.fingerprint,
            truth=self.reward.fingerprint,
            prompts=self.seed.prompts.test_hash,
            samples=asked.samples,
            max_new_tokens=asked.max_new_tokens,
            seed=self.seed.number,
        )

    @property
    def sampling_seed(self) -> int:
        """Of fresh samples: pairs take the even numbers."""
        return 2 * self.seed.number + 1

    def measure(self, policy: torch.nn.Module, label: str) -> PolicyPoint:
        asked = self.config.evaluate
        return measure(
            policy,
            self.start.model,
            LocalModel.of(self.start).renderer,
            self.prompts,
            self.reward,
            completions=asked.samples,
            max_new_tokens=asked.max_new_tokens,
            seed=self.sampling_seed,
            label=label,
        )

    def keep(self, found: PolicyPoint, key: str, method: str, setting: str, step: int, run: str) -> Point:
        tokens = float(found.tokens.mean())
        point = Point(key, method, setting, self.seed.number, step, run, found.reward, found.kl, tokens)
        self.points.append(point)
        return point


def measure_start(config: FrontierConfig, seed: Seed) -> list[Point]:
    """The start itself, at KL 0."""
    bench = _Bench(config, seed)
    key = bench.key(what="start")
    return [bench.known.get(key) or bench.keep(bench.measure(bench.start.model, "start"), key, "start", "", 0, "")]


def measure_arm(config: FrontierConfig, seed: Seed, arm: Arm) -> list[Point]:
    """Train a setting of a method, or find it trained, and measure its checkpoints."""
    assert arm.method.recipe is not None
    training = arm.training_config(
        config,
        seed.number,
        model=seed.model,
        pairs=seed.pairs,
        prompts=str(seed.prompts.train),
        learned=seed.learned,
        out=seed.folder / arm.folder,
    )
    bench = _Bench(config, seed)
    reward = bench.opened(str(training.reward)).fingerprint if isinstance(training, PPOConfig) else None
    run = _trained(arm.method.recipe, training, reward)
    last, every = _last_step(run), training.save_every or 1
    saved = {event["step"] for event in run.events() if event["event"] == "saved"}
    # An interruption saves too, and is no reason for another point.
    steps = sorted(step for step in saved if step % every == 0 or step == last)
    points = _measure_steps(bench, arm.method.name, arm.label, run, steps)
    if not config.evaluate.keep_checkpoints:
        for path in run.checkpoints.glob("step-*"):
            if path.name != f"step-{last:06d}":
                shutil.rmtree(path)
    return points


def measure_run(config: FrontierConfig, seeds: Sequence[Seed], method: MethodConfig, path: Path) -> list[Point]:
    """Measure the checkpoints of a run that was made elsewhere, at the seed whose start it began at.

    Raises:
        RunError: it is not finished, or began at none of the starts.
    """
    run = RunFolder.open(path)
    benches = [_Bench(config, seed) for seed in seeds]
    mine = [bench for bench in benches if bench.start.fingerprint == run.manifest["model"]]
    own = [bench for bench in mine if bench.seed.number == run.config_dict.get("seed")]
    bench = next(iter(own or mine), None)
    steps = sorted(int(p.name.removeprefix("step-")) for p in run.checkpoints.glob("step-*"))
    wrong = {
        "a reward model": run.recipe == "reward",
        "a run that began at another model": bench is None,
        "a run that is not finished": not run.finished,
        "a run without checkpoints": not steps,
    }
    if bench is None or any(wrong.values()):
        raise RunError(
            "This run cannot be measured here.",
            where=f"{path}, of method {method.name}",
            got=next(what for what, holds in wrong.items() if holds),
            expected="a finished run that began at " + " or ".join(dict.fromkeys(seed.model for seed in seeds)),
        )
    return _measure_steps(bench, method.name, path.name, run, steps)


def _last_step(run: RunFolder) -> int:
    return max(int(event["step"]) for event in run.events() if event["event"] == "finished")


def _measure_steps(bench: _Bench, method: str, setting: str, run: RunFolder, steps: Sequence[int]) -> list[Point]:
    """Put the weights of every checkpoint into the start, in turn, and measure those that are not yet."""
    kind, _ = RECIPES[run.recipe]
    config = kind.model_validate(run.config_dict)
    made_of = {k: v for k, v in run.manifest.items() if k in ("model", "reference", "reward", "data")}
    trained = {"config": config.model_dump(mode="json", exclude={"out"}), "made_of": made_of, "recipe": run.recipe}
    points, policy = [], None
    for step in steps:
        key = bench.key(**trained, step=step)
        if key in bench.known:
            points.append(bench.known[key])
            continue
        if policy is None:
            policy = make_policy(copy.deepcopy(bench.start.model), config)
        _put(policy, load_step(run.checkpoints, step).tensors("weights"))
        found = bench.measure(policy, f"{method} {setting} step {step}")
        points.append(bench.keep(found, key, method, setting, step, str(run.path)))
    return points


@torch.no_grad()
def _put(policy: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's weights into the policy; PPO keeps those of its value model beside them."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(weights[name] if name in weights else weights[f"policy.{name}"])


def measure_best_of(config: FrontierConfig, seed: Seed, method: MethodConfig) -> list[Point]:
    """Every N of Best-of-N from one set of samples of the start; the KL is a bound."""
    assert method.n is not None
    bench = _Bench(config, seed)
    samples = method.samples or max(method.n)
    chooser = bench.opened(seed.learned) if method.reward == "learned" else bench.reward
    keys = {n: bench.key(what="best of", n=n, of=samples, by=chooser.fingerprint) for n in sorted(set(method.n))}
    if all(key in bench.known for key in keys.values()):
        return [bench.known[key] for key in keys.values()]
    settings = Settings(config.evaluate.max_new_tokens, seed=bench.sampling_seed)
    drawn = draw(LocalModel.of(bench.start), bench.prompts, samples, settings, method.name)
    valued = reward_of_samples(bench.reward, bench.prompts, drawn)
    chosen_by = reward_of_samples(chooser, bench.prompts, drawn) if chooser is not bench.reward else valued
    points = []
    tokens = sum(len(one.ids) for group in drawn for one in group) / valued.size
    for one in best_of_points(chosen_by, valued, list(keys)):
        kl = 0 * one.true_reward + one.kl_bound
        setting = f"n {one.n}"
        point = Point(keys[one.n], method.name, setting, seed.number, 0, "", one.true_reward, kl, tokens, bound=True)
        bench.points.append(point)
        points.append(point)
    return points
