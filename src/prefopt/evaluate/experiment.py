"""`prefopt evaluate frontier`: train what is missing, measure every checkpoint, say which method is above which."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefopt.config.frontier import FrontierConfig
from prefopt.evaluate.material import make_prompts
from prefopt.evaluate.points import Point
from prefopt.evaluate.runs import Seed, measure_arm, measure_best_of, measure_run, measure_start, prepare
from prefopt.progress import progress, warn

__all__ = ["run_experiment"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Task:
    """A call that a process of its own may make; what it says goes to a file of that name then."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_experiment(config: FrontierConfig, jobs: int = 1) -> list[Point]:
    """Every point of an experiment; those found in points.jsonl are not measured again.

    Runs stand in OUT/seed-0/dpo-beta-0.1 and so on. A kill loses no more than the present step of a run and the
    present point: called again, the rest is done.

    Args:
        jobs: Processes, each with one thread, that take whole runs; 1: all is done in this one.

    Raises:
        RunError, ConfigError, DataError, RewardError: see `evaluate.runs` and `evaluate.material`.
        SystemExit: 130 or 143 after SIGINT or SIGTERM, a run in training saved.
    """
    prompts = make_prompts(config.prompts, config.model, config.out, room=config.evaluate.max_new_tokens)
    first = [_Task(f"seed-{number}", prepare, (config, number, prompts)) for number in config.seeds]
    seeds: list[Seed] = _all_done(first, jobs, config.out, "start, pairs, reward model", "seeds")
    tasks = [task for seed in seeds for task in _tasks_of(config, seed)]
    for method in config.methods:
        tasks += [_Task(path.name, measure_run, (config, seeds, method, path)) for path in method.runs or ()]
    found: list[list[Point]] = _all_done(tasks, jobs, config.out, "methods", "runs")
    return [point for points in found for point in points]


def _tasks_of(config: FrontierConfig, seed: Seed) -> list[_Task]:
    name = f"seed-{seed.number}"
    tasks = [_Task(f"{name}-start", measure_start, (config, seed))]
    for method in config.methods:
        if method.recipe == "best_of_n":
            tasks.append(_Task(f"{name}-{method.name}", measure_best_of, (config, seed, method)))
        elif method.runs is None:
            tasks += [_Task(f"{name}-{arm.folder}", measure_arm, (config, seed, arm)) for arm in method.arms]
    return tasks


def _all_done(tasks: Sequence[_Task], jobs: int, out: Path, label: str, unit: str) -> list[Any]:
    """The tasks' results in their order."""
    results: dict[int, Any] = {}
    with progress(label, total=len(tasks), unit=unit) as bar:
        if jobs == 1:
            for number, task in enumerate(tasks):
                results[number] = task.function(*task.arguments)
                bar.advance(note=task.name)
            return list(results.values())
        logs = out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # torch and its threads do not survive a fork
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_begin_worker)
        try:
            numbers = {pool.submit(_in_worker, task, logs): number for number, task in enumerate(tasks)}
            for future in as_completed(numbers):
                number = numbers[future]
                if (error := future.exception()) is not None:
                    warn(f"{tasks[number].name}: {error}; what is under way is finished first")
                results[number] = future.result()
                bar.advance(note=tasks[number].name)
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[number] for number in range(len(tasks))]


def _in_worker(task: _Task, logs: Path) -> Any:
    name = task.name.replace("/", "-")
    with (logs / f"{name}.log").open("a", buffering=1) as log, contextlib.redirect_stderr(log):
        return task.function(*task.arguments)


def _begin_worker() -> None:
    """One thread, and an end as soon as the process that gives the work is gone."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        while True:  # a run in training saves at the first signal; the worker that then waits for work goes at the next
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
