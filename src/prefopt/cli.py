"""Every command declared. What a command does lives elsewhere and is imported when it runs.

So `--help` is quick: nothing here imports torch, transformers, datasets or matplotlib.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import App
from cyclopts.help import DefaultFormatter, PanelSpec
from rich import box

from prefopt.config import (
    BestOfConfig,
    ChatConfig,
    CheckConfig,
    DPOConfig,
    FrontierCommand,
    FrontierConfig,
    MergeConfig,
    PPOConfig,
    QuickstartConfig,
    ResumeConfig,
    RewardConfig,
    ScoreConfig,
    SFTConfig,
)
from prefopt.failure import exit_code
from prefopt.flags import positional_label, with_flags_of

if TYPE_CHECKING:
    from prefopt.run import RunFolder

__all__ = ["main"]


def _version() -> str:
    from prefopt import __version__

    return __version__


app = App(
    name="prefopt",
    help="Align language models from preferences.",
    help_epilogue="Start with `prefopt quickstart`. `prefopt COMMAND --help` shows what a command takes, and examples.",
    help_format="plaintext",
    help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=box.MINIMAL, padding=(0, 0, 0, 0))),
    version=_version,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 130 interrupted.

    Args:
        arguments: Those of the process unless given.

    Raises:
        Exception: a bug, whose traceback is wanted; Python leaves with exit code 1.
        SystemExit: a command that chose its own exit code (130 and 143: interrupted and saved).
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: app(tokens), tokens, _COMMANDS)


_COMMANDS: dict[str, Callable[..., None]] = {}


def _command(
    kind: type[Any],
    examples: str,
    *,
    positional: str | None = None,
    file: bool = False,
    json: bool = True,
    under: App = app,
) -> Callable[[Callable[[Any, bool], None]], None]:
    """Declare `body(config, json)` as a command with the flags of `kind`.

    Args:
        under: The command it is a subcommand of.
    """

    def declare(body: Callable[[Any, bool], None]) -> None:
        name = body.__name__.replace("_", "-")
        full = name if under is app else f"{under.name[0]} {name}"
        run = with_flags_of(kind, name=full, positional=positional, file=file, json=json)(body)
        usage = ["Usage: prefopt", full]
        if positional is not None:
            several = "..." if positional == "data" else ""
            usage.append(positional_label(positional) + several)
        about = {"usage": " ".join([*usage, "[OPTIONS]"]), "help_epilogue": f"Examples:\n{examples}"}
        under.command(run, name=name, sort_key=len(_COMMANDS), **about)
        _COMMANDS[full] = run

    return declare


@_command(
    QuickstartConfig,
    "  prefopt quickstart\n  prefopt quickstart --out runs/first --seed 1",
)
def quickstart(config: QuickstartConfig, as_json: bool) -> None:
    """The whole story on a tiny model made on the spot: a few minutes on two cores, a report at the end."""
    from prefopt.quickstart.story import run_story

    report = run_story(config.out, config.seed)
    _result({"report": str(report)}, as_json)


@_command(
    CheckConfig,
    "  prefopt check pairs.jsonl\n"
    "  prefopt check pairs.jsonl --model models/base --max-length 512\n"
    "  prefopt check pairs.jsonl --against mt_bench.jsonl --write clean.jsonl --report found.html\n"
    "  prefopt check table.parquet --columns prompt=question chosen=best rejected=worst --json",
    positional="data",
)
def check(config: CheckConfig, as_json: bool) -> None:
    """The data doctor: which rows would be kept, mended or refused, and what is in them. Nothing is trained."""
    from prefopt.recipes.check import check

    if not check(config, as_json=as_json):
        sys.exit(2)


@_command(
    SFTConfig,
    "  prefopt sft --model models/base --data demonstrations.jsonl --out runs/sft\n"
    "  prefopt sft --model models/base --data pairs.jsonl --out runs/sft --lora-rank 16 --lr 1e-4\n"
    "  prefopt sft --config configs/sft.yaml --epochs 3",
    file=True,
)
def sft(config: SFTConfig, as_json: bool) -> None:
    """Supervised fine-tuning: imitate demonstrations, or the chosen completions of pairs."""
    from prefopt.recipes.sft import train

    _trained(train(config), as_json)


@_command(
    DPOConfig,
    "  prefopt dpo --model models/base --data pairs.jsonl --out runs/dpo --beta 0.1\n"
    "  prefopt dpo --model models/base --data pairs.jsonl --out runs/lora --beta 0.1 --lora-rank 16\n"
    "  prefopt dpo --config configs/dpo.yaml --seed 1",
    file=True,
)
def dpo(config: DPOConfig, as_json: bool) -> None:
    """Direct Preference Optimization: train a policy on pairs of completions, one preferred."""
    from prefopt.recipes.dpo import train

    _trained(train(config), as_json)


@_command(
    RewardConfig,
    "  prefopt reward --model runs/sft --data pairs.jsonl --out runs/reward\n"
    "  prefopt reward --model runs/sft --data rankings.jsonl --out runs/reward --normalize scale\n"
    "  prefopt reward --config configs/reward.yaml --seed 1",
    file=True,
)
def reward(config: RewardConfig, as_json: bool) -> None:
    """Train a reward model on pairs or rankings: a score for any completion, for `prefopt ppo` or Best-of-N."""
    from prefopt.recipes.reward import train

    _trained(train(config), as_json)


@_command(
    PPOConfig,
    "  prefopt ppo --model runs/sft --data prompts.jsonl --reward runs/reward --out runs/ppo\n"
    "  prefopt ppo --model runs/sft --data pairs.jsonl --reward rewards:score --target-kl 6 --out runs/ppo",
    file=True,
)
def ppo(config: PPOConfig, as_json: bool) -> None:
    """Proximal policy optimisation: sample, ask a reward, move the policy a little, again and again."""
    from prefopt.recipes.ppo import train

    _trained(train(config), as_json)


@_command(ResumeConfig, "  prefopt resume runs/dpo", positional="run")
def resume(config: ResumeConfig, as_json: bool) -> None:
    """Go on with an interrupted run as if nothing had happened."""
    from prefopt.resume import resume

    _trained(resume(config.run), as_json)


@_command(
    ScoreConfig,
    "  prefopt score --model runs/dpo --data pairs.jsonl --out scores.jsonl\n"
    "  prefopt score --model runs/dpo --reference models/base --data pairs.jsonl --out rewards.jsonl\n"
    "  prefopt score --reward-model runs/reward --data pairs.jsonl --out scores.jsonl",
    file=True,
)
def score(config: ScoreConfig, as_json: bool) -> None:
    """Log-probabilities, implicit rewards against a reference, or a reward model's scores, as JSON lines."""
    from prefopt.recipes.score import score

    rows = score(config)
    _result({"out": str(config.out), "rows": rows}, as_json)


evaluate = App(
    name="evaluate", help="What alignment bought and what it cost, on fresh samples.", sort_key=len(_COMMANDS)
)
app.command(evaluate)


@_command(
    BestOfConfig,
    "  prefopt evaluate best-of --model runs/sft --prompts prompts.jsonl --n 1 4 16 64 --out best.json\\\n"
    "      --reward sentiment:vader_lexicon.txt\n"
    "  prefopt evaluate best-of --model runs/sft --prompts prompts.jsonl --n 4 16 64 --out best.json\\\n"
    "      --reward runs/reward --true-reward judges.mine:score",
    file=True,
    under=evaluate,
)
def best_of(config: BestOfConfig, as_json: bool) -> None:
    """Best-of-N sampling: the reward of the best of N samples of each prompt, and a bound on the KL it costs."""
    from prefopt.evaluate.best_of import evaluate_best_of

    result = evaluate_best_of(config)
    print(json.dumps(result.as_json(), ensure_ascii=False) if as_json else result.table())


@_command(
    FrontierCommand,
    "  prefopt evaluate frontier configs/sentiment/grammar.yaml\n"
    "  prefopt evaluate frontier configs/sentiment/stories.yaml --jobs 2",
    positional="experiment",
    under=evaluate,
)
def frontier(config: FrontierCommand, as_json: bool) -> None:
    """Reward against KL of several methods: trains what is missing, measures every checkpoint, compares."""
    from prefopt.evaluate.experiment import run_experiment
    from prefopt.parse import parse_config
    from prefopt.report.frontier import FrontierReport

    experiment = parse_config(FrontierConfig, config.experiment, {})
    report = FrontierReport(experiment, run_experiment(experiment, config.jobs))
    report.write()
    print(json.dumps(report.as_json(), ensure_ascii=False) if as_json else report.markdown())


@_command(
    ChatConfig,
    '  prefopt chat runs/dpo\n  prefopt chat models/base --system "Answer in one sentence." --temperature 0',
    positional="model",
    json=False,
)
def chat(config: ChatConfig, as_json: bool) -> None:
    """Talk to a model."""
    from prefopt.serve.chat import chat

    chat(
        config.model,
        system=config.system,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        template=config.template,
    )


@_command(MergeConfig, "  prefopt merge runs/dpo-lora --out models/merged", positional="adapter")
def merge(config: MergeConfig, as_json: bool) -> None:
    """Write a LoRA adapter into the plain weights of its base model."""
    from prefopt.model.load import merge

    merge(config.adapter, config.out)
    _result({"model": str(config.out)}, as_json)


def _trained(run: "RunFolder", as_json: bool) -> None:
    evaluations = [line for line in run.metrics() if line["split"] == "eval"]
    final = {k: v for k, v in evaluations[-1].items() if k not in ("step", "split")} if evaluations else {}
    steps = max((event["step"] for event in run.events() if event["event"] == "finished"), default=0)
    paths = {"run": str(run.path), "model": str(run.model), "report": str(run.path / "report.html")}
    _result({**paths, "steps": steps, "final": final}, as_json, shown=("model", "report"))


def _result(result: dict[str, Any], as_json: bool, shown: Sequence[str] | None = None) -> None:
    """What a command made: one JSON object, or a line for each thing a person wants to know."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for name in shown or result:
        print(f"{name + ':':<8}{result[name]}")
