"""The training loop: checkpoint, evaluate, step, log - until done or interrupted.

What is recorded under step k was measured with the weights after k updates, so step 0 is before
any update. A checkpoint at step k comes before anything else at k: a resumed run repeats k whole.
"""

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from prefopt.config import TrainConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.order import rows_of_step, steps_per_epoch
from prefopt.errors import MemoryFullError, NonFiniteError, RewardError
from prefopt.progress import progress, say, warn
from prefopt.run import RunFolder
from prefopt.train.checkpoint import (
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from prefopt.train.health import Health
from prefopt.train.optimizer import Masters, learning_rate, make_optimizer
from prefopt.train.step import StepResult, Update

__all__ = ["Objective", "fit"]


@dataclass(frozen=True)
class Objective:
    """What a recipe hands to the loop.

    Attributes:
        label: Name on the progress bar.
        unit: What a group is called in rates: "pairs" or "rows".
        update: Computes and makes an optimiser step on the rows it is given.
        evaluate: Metrics on held-out rows; None where nothing is held out.
        batch: Groups in an optimiser step.
        lr: Peak learning rate.
        tokens_per_batch: Budget of a micro-batch.
        adam_eps: Of AdamW.
        lr_factors: Beginning of a parameter's name to what its learning rate is multiplied by.
        several: Whether an update makes several optimiser steps: one that breaks off among them has moved some
            weights, so the state is not saved then, and a resumption goes on from the last checkpoint. A reward
            is asked before the first of them.
        enough: Why the run ends with the step whose metrics these are; None: it goes on.
        begin: Is called once, before the first step of a run that no checkpoint goes on with.
        prepare: Is given the rows of a training step before it is computed.
        learn: Is given the metrics of every training step, those before a resumption first.
        note: What the progress bar says of a step's metrics.
        kept: Tensors besides the weights that change; a checkpoint holds them, a resumption puts them back.
    """

    label: str
    unit: str
    update: Update
    evaluate: Callable[[], dict[str, float]] | None
    batch: int
    lr: float
    tokens_per_batch: int
    adam_eps: float = 1e-8
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    several: bool = False
    enough: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    begin: Callable[[], None] = lambda: None
    prepare: Callable[[Sequence[CompletionGroup]], None] = lambda _: None
    learn: Callable[[Mapping[str, Any]], None] = lambda _: None
    note: Callable[[Mapping[str, Any]], str] = lambda metrics: f"loss {metrics['loss']:.4f}"
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class _Interruption:
    """Turns the first SIGINT or SIGTERM into a flag; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "_Interruption":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        say(f"{self.signal.name}: finishing this step, then saving; press Ctrl-C again to leave at once")


def total_steps(config: TrainConfig, rows: int, batch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.epochs * steps_per_epoch(rows, batch)
    return min(steps, config.max_steps) if config.max_steps else steps


def fit(
    run: RunFolder,
    config: TrainConfig,
    objective: Objective,
    policy: torch.nn.Module,
    groups: Sequence[CompletionGroup],
    health: Health,
    device: torch.device,
) -> int:
    """Train `policy` in place on `groups`, from the run's last whole checkpoint if it has one.

    Returns:
        How many steps the run has.

    Raises:
        NonFiniteError, MemoryFullError, RewardError: with the last good state in a checkpoint.
        SystemExit: 130 or 143 after SIGINT or SIGTERM, the state saved.
    """
    steps = planned = total_steps(config, len(groups), objective.batch)
    torch.manual_seed(config.seed)
    # Only a LoRA adapter's dropout asks for training mode; the model's own is off.
    training_mode = bool(config.lora_dropout)
    masters = Masters(policy.parameters())
    optimizer = make_optimizer(
        config.optimizer,
        _groups(policy, masters, objective.lr_factors),
        lr=objective.lr,
        weight_decay=config.weight_decay,
        eps=objective.adam_eps,
    )
    state = _State(run, config, policy, masters, optimizer, objective.kept)
    start = state.restore()
    if not start:
        objective.begin()
    budget = state.tokens_per_batch = min(objective.tokens_per_batch, state.tokens_per_batch)
    if start or run.metrics():
        run.rewind(start)
        health.recall(run.metrics())
        run.event("resumed", step=start)
        say(f"resumed at step {start} of {steps}")
    for line in run.metrics():
        if line["split"] == "train":
            objective.learn(line)
            if objective.enough(line):
                steps = line["step"] + 1
    evaluations = _marks(planned, config.eval_every) | {0}
    saves = _marks(planned, config.save_every)
    with _Interruption() as interruption, progress(objective.label, total=steps, unit="steps") as bar:
        bar.advance(start)
        for step in range(start, planned + 1):
            if step > start and (step in saves or step == steps or interruption.signal):
                state.save(step)
            if interruption.signal:
                _leave(run, step, steps, interruption.signal)
            if objective.evaluate and (step in evaluations or step == steps):
                policy.eval()
                with state.saved_on(step, RewardError):
                    _log(run, health, step, "eval", objective.evaluate())
            if step == steps:
                break
            order = rows_of_step(step, rows=len(groups), batch=objective.batch, seed=config.seed)
            rows = [groups[i] for i in order]
            run.event("rows", step=step, rows=[str(g.source) for g in rows])
            lr = learning_rate(step, total=planned, peak=objective.lr, warmup=config.warmup, schedule=config.schedule)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr * parameters.get("factor", 1.0)
            policy.train(training_mode)
            began = time.perf_counter()
            objective.prepare(rows)
            with state.saved_on(step, RewardError, *(() if objective.several else (NonFiniteError, MemoryFullError))):
                result = objective.update(rows, optimizer, masters, budget)
            seconds = time.perf_counter() - began
            if result.tokens_per_batch < budget:
                budget = state.tokens_per_batch = result.tokens_per_batch
                warn(f"memory ran out at step {step}: micro-batches of {budget:,} tokens from here on, the same steps")
                run.event("memory_ran_out", step=step, tokens=budget)
            metrics = _train_metrics(result, lr, seconds, len(rows), objective.unit)
            _log(run, health, step, "train", metrics)
            objective.learn(metrics)
            bar.advance(1, note=objective.note(metrics))
            if why := objective.enough(metrics):
                steps = step + 1
                warn(why)
                run.event("warned", step=step, kind="ended_early", sentence=why)
    return steps


def _groups(policy: torch.nn.Module, masters: Masters, factors: Mapping[str, float]) -> list[Any]:
    """What the optimiser is given: all parameters alike, or a group for each factor of the learning rate."""
    if not factors:
        return masters.parameters
    found: dict[float, list[torch.nn.Parameter]] = {}
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    for name, parameter in zip(names, masters.parameters, strict=True):
        factor = next((f for start, f in factors.items() if name.startswith(start)), 1.0)
        found.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in found.items()]


def _marks(steps: int, every: int | None) -> set[int]:
    every = every or max(1, math.ceil(steps / 5))
    return set(range(every, steps, every)) | {steps}


def _log(run: RunFolder, health: Health, step: int, split: str, metrics: dict[str, float]) -> None:
    run.log_metrics(step, split, metrics)
    for warning in health.observe(step, split, metrics):
        warn(warning.sentence)
        run.event("warned", step=step, kind=warning.kind, sentence=warning.sentence)


def _leave(run: RunFolder, step: int, steps: int, received: signal.Signals) -> None:
    run.event("interrupted", step=step, signal=received.name)
    say(f"saved at step {step} of {steps}; go on with: prefopt resume {run.path}")
    raise SystemExit(128 + received)


def _train_metrics(result: StepResult, lr: float, seconds: float, groups: int, unit: str) -> dict[str, float]:
    return {
        "loss": result.loss,
        **result.metrics,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_second": result.tokens / seconds,
        f"{unit}_per_second": groups / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Most memory the process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


class _State:
    """Everything a resumed run needs: master weights, optimiser, random generators."""

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        policy: torch.nn.Module,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        kept: Mapping[str, Tensor],
    ) -> None:
        self.run = run
        self.kept = kept
        self.keep = config.keep_checkpoints
        self.masters = masters
        self.optimizer = optimizer
        self.tokens_per_batch = sys.maxsize  # smaller once memory has run out
        self.names = [name for name, p in policy.named_parameters() if p.requires_grad]

    def save(self, step: int) -> None:
        tensors, scalars = optimizer_tensors(self.optimizer)
        save_checkpoint(
            self.run.checkpoints,
            step=step,
            tensors={
                "weights": dict(zip(self.names, self.masters.parameters, strict=True)),
                "optimizer": tensors,
                "rng": rng_tensors(),
                **({"kept": self.kept} if self.kept else {}),
            },
            state={"optimizer": scalars, "tokens_per_batch": self.tokens_per_batch},
            keep=self.keep,
        )
        self.run.event("saved", step=step)

    @contextmanager
    def saved_on(self, step: int, *errors: type[Exception]) -> Iterator[None]:
        """Save before one of `errors` ends the run."""
        try:
            yield
        except errors:
            self.save(step)
            raise

    @torch.no_grad()
    def restore(self) -> int:
        checkpoint = load_latest(self.run.checkpoints, on_damage=warn)
        if checkpoint is None:
            return 0
        weights: dict[str, Any] = checkpoint.tensors("weights")
        for name, master in zip(self.names, self.masters.parameters, strict=True):
            master.copy_(weights[name])
        self.masters.refresh()
        load_optimizer_tensors(self.optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])
        restore_rng(checkpoint.tensors("rng"))
        if self.kept:
            saved = checkpoint.tensors("kept")
            for name, tensor in self.kept.items():
                tensor.copy_(saved[name])
        self.tokens_per_batch = checkpoint.state.get("tokens_per_batch", sys.maxsize)
        return checkpoint.step
