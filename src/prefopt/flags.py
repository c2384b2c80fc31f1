"""Command-line flags from configuration models: one declaration for flags, YAML keys and help."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefopt.errors import ConfigError
from prefopt.failure import disk_full, interrupted
from prefopt.parse import flag_of, parse_config

__all__ = ["with_flags_of"]

C = TypeVar("C", bound=BaseModel)

_FIRST = ("model", "data", "out", "beta", "loss")  # what most people give stands first in the help
# Fields that are given as NAME=VALUE: how help shows it, and what is expected.
_MAPPINGS = {
    "columns": (
        "OURS=THEIRS...",
        "our name, =, the name in the data, such as prompt=question chosen=best rejected=worst",
    ),
    "loss_options": ("NAME=VALUE...", "a parameter, =, its value, such as gamma=0.5"),
}


def with_flags_of(
    kind: type[C], *, name: str = "", positional: str | None = None, file: bool = False, json: bool = True
) -> Callable[[Callable[[C, bool], None]], Callable[..., None]]:
    """Turn `command(config, json)` into a command with a flag for every field of `kind`.

    Values are handed to the model as they were typed, so that a flag and a YAML key are judged by
    the same bounds in the same words.

    Args:
        name: What the command is called, for messages; default: the function's name.
        positional: The field that is given without a flag.
        file: Whether `--config FILE.yaml` is taken, too.
        json: Whether `--json` is taken.
    """

    def decorate(command: Callable[[C, bool], None]) -> Callable[..., None]:
        def run(*positionals: str, **flags: Any) -> None:
            as_json = bool(flags.pop("json", False))
            path = flags.pop("config", None)
            if positional is not None:
                flags[positional] = _positional(kind, positional, name or command.__name__, positionals)
            for mapping, (_, example) in _MAPPINGS.items():
                if flags.get(mapping) is not None:
                    flags[mapping] = _pairs(mapping, flags[mapping], example)
            config = parse_config(kind, None if path is None else Path(path), flags)
            made = getattr(config, "out", None) or getattr(config, "run", None)
            try:
                command(config, as_json)
            except KeyboardInterrupt as error:
                raise interrupted(made) from error
            except Exception as error:  # a full disk has as many names as there are libraries that write
                full = disk_full(error, made)
                if full is None:
                    raise
                raise full from error

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__annotations__ = {}
        run.__signature__ = _signature(kind, positional, file, json)  # type: ignore[attr-defined]
        return run

    return decorate


def positional_label(name: str) -> str:
    """What help calls a field that is given without a flag."""
    return "FILE" if name == "data" else name.upper()


def _positional(kind: type[BaseModel], name: str, command: str, values: tuple[str, ...]) -> tuple[str, ...] | str:
    several = get_origin(kind.model_fields[name].annotation) is tuple
    if not values:
        raise ConfigError(
            f"{positional_label(name)} is missing.",
            where=f"prefopt {command}",
            expected=kind.model_fields[name].description,
            todo=f"`prefopt {command} --help` shows examples.",
        )
    return values if several else values[0]


def _signature(kind: type[BaseModel], positional: str | None, file: bool, json: bool) -> inspect.Signature:
    names = [n for n in _FIRST if n in kind.model_fields] + [n for n in kind.model_fields if n not in _FIRST]
    parameters = [_extra(name, None, _flag(kind, name)) for name in names if name != positional]
    if positional is not None:
        field = kind.model_fields[positional]
        several = get_origin(field.annotation) is tuple
        described = Parameter(name=positional_label(positional), help=field.description, show_default=False)
        parameters.insert(
            0,
            inspect.Parameter(
                positional,
                inspect.Parameter.VAR_POSITIONAL if several else inspect.Parameter.POSITIONAL_ONLY,
                annotation=Annotated[str, described],
            ),
        )
    if file:
        about = "YAML file with any of these settings (underscores in their names); flags win."
        parameters.append(_extra("config", None, Annotated[str | None, Parameter(help=about, metavar="FILE")]))
    if json:
        about = "Print one JSON object on stdout."
        parameters.append(
            _extra("json", False, Annotated[bool, Parameter(help=about, negative=(), show_default=False)])
        )
    return inspect.Signature(parameters)


def _extra(name: str, default: object, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(kind: type[BaseModel], name: str) -> object:
    """The annotation cyclopts reads: text, except for switches and lists."""
    field = kind.model_fields[name]
    plain = _without_none(field.annotation)
    shown: dict[str, Any] = {"name": flag_of(name), "help": _help(field, plain), "show_default": False}
    if plain is bool:
        return Annotated[bool | None, Parameter(**shown)]
    metavar = _MAPPINGS[name][0] if name in _MAPPINGS else _metavar(plain)
    shown |= {"metavar": metavar, "negative": (), "allow_leading_hyphen": plain in (int, float)}
    if get_origin(plain) in (tuple, dict):
        return Annotated[tuple[str, ...] | None, Parameter(**shown, consume_multiple=(1, None))]
    return Annotated[str | None, Parameter(**shown)]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = [a for a in get_args(annotation) if a is not NoneType]
    return annotation


def _help(field: FieldInfo, plain: Any) -> str:
    text = str(field.description)
    if field.is_required():
        return f"{text} [required]"
    if get_origin(plain) is Literal and len(get_args(plain)) > 1:
        text += f" [{', '.join(get_args(plain))}]"
    if field.default is None:
        return text
    default = f"{field.default:g}".replace("e-0", "e-") if plain is float else str(field.default)
    return f"{text} [default: {default.lower() if plain is bool else default}]"


def _metavar(plain: Any) -> str:
    names = {int: "N", float: "X", Path: "PATH", str: "NAME"}
    if get_origin(plain) is tuple:
        element = get_args(plain)[0]
        bare = get_args(element)[0] if get_origin(element) is Annotated else element
        return names.get(bare, "NAME") + "..."
    if get_origin(plain) is Literal:
        return "WORD"
    return names[plain]


def _pairs(flag: str, texts: tuple[str, ...], example: str) -> dict[str, str]:
    """`prompt=question` -> {"prompt": "question"}."""
    found: dict[str, str] = {}
    for text in texts:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs) or ours in found:
            raise ConfigError(
                f"{flag_of(flag)} cannot be read." if ours not in found else f"{flag_of(flag)} names {ours} twice.",
                where=f"flag {flag_of(flag)}",
                got=text,
                expected=example,
            )
        found[ours] = theirs
    return found
