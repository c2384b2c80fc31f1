"""Every command, declared; the work is done in the rooms they call. `--help` loads no torch."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from cyclopts import App, CycloptsError, Parameter
from pydantic import BaseModel, Field, create_model

from prefopt import __version__
from prefopt.config import DPOConfig, ScoreConfig, SFTConfig, parse_config
from prefopt.errors import ConfigError, PrefoptError

if TYPE_CHECKING:
    from prefopt.run import RunFolder

__all__ = ["app", "main"]

app = App(
    name="prefopt",
    version=__version__,
    help="Align language models from preferences.\n\nStart with `prefopt quickstart`, or with your own file: "
    "`prefopt check pairs.jsonl`, then `prefopt dpo --model M --data pairs.jsonl --out RUN --beta 0.1`.",
    help_format="markdown",
    default_parameter=Parameter(negative_iterable=()),
)

Columns = Annotated[
    dict[str, str] | None,
    Parameter(help="Columns of an unknown layout: --columns.prompt question --columns.chosen best."),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object for machines.")]


def _flags(config: type[BaseModel]) -> Any:
    """The configuration's fields as flags: all optional, so that given can be told from not given."""
    fields: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else f"default: {_shown(field.default)}"
        note = "" if "default:" in (field.description or "") else f" [{default}]"
        fields[name] = (Optional[field.annotation], Field(default=None, description=f"{field.description}{note}"))  # noqa: UP045
    return create_model(config.__name__.replace("Config", "Flags"), **fields)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


SFTFlags, DPOFlags, ScoreFlags = _flags(SFTConfig), _flags(DPOConfig), _flags(ScoreConfig)
Config = Annotated[Path | None, Parameter(name="--config", help="YAML file with the same names; flags win over it.")]


@app.command
def sft(*, config: Config = None, json: Json = False, flags: Annotated[SFTFlags, Parameter(name="*")] = None) -> None:
    """Supervised fine-tuning on demonstrations, or on the chosen completions of pairs.

    Examples:

        prefopt sft --model ./base --data chats.jsonl --out runs/sft

        prefopt sft --config configs/sft.yaml --lr 1e-5
    """
    parsed = parse_config(SFTConfig, config, _given(flags))
    from prefopt.recipes.sft import train

    _report_run(train(parsed), json)


@app.command
def dpo(*, config: Config = None, json: Json = False, flags: Annotated[DPOFlags, Parameter(name="*")] = None) -> None:
    """Direct Preference Optimization on pairs of a chosen and a rejected completion.

    Examples:

        prefopt dpo --model runs/sft --data pairs.jsonl --out runs/dpo --beta 0.1

        prefopt dpo --config configs/dpo-lora.yaml --beta 0.05 --out runs/beta-0.05
    """
    parsed = parse_config(DPOConfig, config, _given(flags))
    from prefopt.recipes.dpo import train

    _report_run(train(parsed), json)


@app.command
def resume(run: Path, /, *, json: Json = False) -> None:
    """Go on with an interrupted run, from its last whole checkpoint, to the same numbers.

    Examples:

        prefopt resume runs/dpo
    """
    from prefopt.resume import resume as go_on

    _report_run(go_on(run), json)


@app.command
def check(
    files: Annotated[list[str], Parameter(help="Data files, dataset folders or hub names.")],
    /,
    *,
    model: Annotated[str | None, Parameter(help="Also count what this model's tokenizer and length do.")] = None,
    template: Literal["auto", "chat", "plain"] = "auto",
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    columns: Columns = None,
    split: str | None = None,
    json: Json = False,
) -> None:
    """The data doctor: what each row was read as, and which rows are kept, mended or refused.

    Examples:

        prefopt check pairs.jsonl

        prefopt check pairs.parquet --model ./base --max-length 512 --json
    """
    from prefopt.recipes.check import check as look

    usable = look(
        files,
        model=model,
        template=template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        columns=columns,
        split=split,
        as_json=json,
    )
    if not usable:
        raise SystemExit(2)


@app.command
def score(
    *, config: Config = None, json: Json = False, flags: Annotated[ScoreFlags, Parameter(name="*")] = None
) -> None:
    """Log-probabilities, and with --reference implicit rewards, per completion, as JSON lines.

    Examples:

        prefopt score --model runs/dpo --reference ./base --data pairs.jsonl --out scores.jsonl
    """
    parsed = parse_config(ScoreConfig, config, _given(flags))
    from prefopt.recipes.score import score as write

    rows = write(parsed)
    _print({"out": str(parsed.out), "rows": rows} if json else f"scored {rows:,} rows into {parsed.out}")


@app.command
def chat(
    model: Annotated[str, Parameter(help="Model folder, run folder or hub name.")],
    /,
    *,
    system: Annotated[str | None, Parameter(help="System message.")] = None,
    temperature: Annotated[float, Parameter(help="0 decodes greedily.")] = 0.7,
    max_new_tokens: Annotated[int, Parameter(help="Length limit of an answer.")] = 512,
    seed: Annotated[int | None, Parameter(help="Makes the answers repeatable.")] = None,
    template: Literal["auto", "chat", "plain"] = "auto",
) -> None:
    """Talk to a model in the terminal, or pipe prompts in, one a line.

    Examples:

        prefopt chat runs/dpo

        echo "Once upon a time" | prefopt chat runs/dpo --temperature 0
    """
    from prefopt.serve.chat import chat as talk

    talk(model, system=system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, template=template)


@app.command
def merge(adapter: Path, /, *, out: Annotated[Path, Parameter(help="Folder to make.")], json: Json = False) -> None:
    """Write a LoRA adapter, or the run that trained it, into plain weights.

    Examples:

        prefopt merge runs/dpo-lora --out models/aligned
    """
    from prefopt.model.load import merge as write

    write(adapter, out)
    _print({"model": str(out)} if json else f"merged into {out}")


@app.command
def quickstart(*, out: Path = Path("runs/quickstart"), seed: int = 0, json: Json = False) -> None:
    """The whole story on a tiny model made on the spot: a few minutes on two cores, no network.

    Examples:

        prefopt quickstart
    """
    from prefopt.quickstart.story import run_story

    report = run_story(out, seed)
    _print({"report": str(report)} if json else f"open {report}")


def _given(flags: BaseModel | None) -> dict[str, Any]:
    """Only what was said on the command line."""
    return {} if flags is None else {name: getattr(flags, name) for name in flags.model_fields_set}


def _report_run(run: "RunFolder", as_json: bool) -> None:
    evaluations = [m for m in run.metrics() if m["split"] == "eval"]
    report = run.path / "report.html"
    if as_json:
        steps = max(e["step"] for e in run.events())
        final = evaluations[-1] if evaluations else None
        _print({"run": str(run.path), "model": str(run.model), "report": str(report), "steps": steps, "final": final})
    else:
        _print(f"model:  {run.model}\nreport: {report}")


def _print(result: dict[str, Any] | str) -> None:
    print(result if isinstance(result, str) else json.dumps(result))


def main() -> None:
    """Run a command; exit 0 done, 2 the user's mistake, 1 a bug, 130 or 143 interrupted."""
    arguments = sys.argv[1:]
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(ConfigError(str(error).strip(), where="command line", todo=_help_hint(arguments)), arguments)
    except PrefoptError as error:
        _fail(error, arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        _fail(PrefoptError(f"{error.strerror}.", where=str(error.filename or "disk")), arguments)


def _fail(error: PrefoptError, arguments: list[str]) -> None:
    print(f"error: {error.message()}", file=sys.stderr)
    if "--json" in arguments:
        fields = {name: getattr(error, name) for name in ("what", "where", "got", "expected", "todo")}
        print(json.dumps({"error": {k: v for k, v in fields.items() if v}}))
    raise SystemExit(2) from None


def _help_hint(arguments: list[str]) -> str:
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    return f"See `prefopt {command + ' ' if command else ''}--help`."
