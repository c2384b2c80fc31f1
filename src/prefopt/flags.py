"""Command-line flags from configuration models, and the parser's complaints in our own form."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cyclopts import Parameter
from cyclopts.exceptions import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefopt.config import flag_of, parse_config
from prefopt.errors import ConfigError

__all__ = ["explain", "with_flags_of"]

C = TypeVar("C", bound=BaseModel)

_FIRST = ("model", "data", "out", "beta")  # what everybody has to give stands first in the help


def with_flags_of(
    kind: type[C], *, positional: str | None = None, file: bool = False
) -> Callable[..., Callable[..., None]]:
    """Turn `command(config, json)` into a command with a flag for every field of `kind`.

    Values are handed to the model as they were typed, so that a flag and a YAML key are judged by
    the same bounds in the same words.

    Args:
        positional: The field that is given without a flag.
        file: Whether `--config FILE.yaml` is taken, too.
    """

    def decorate(command: Callable[[C, bool], None]) -> Callable[..., None]:
        def run(*positionals: str, **flags: Any) -> None:
            as_json = bool(flags.pop("json", False))
            path = flags.pop("config", None)
            if positional is not None:
                flags[positional] = positionals
            if flags.get("columns") is not None:
                flags["columns"] = _pairs(flags["columns"])
            command(parse_config(kind, None if path is None else Path(path), flags), as_json)

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__annotations__ = {}
        run.__signature__ = _signature(kind, positional, file)  # type: ignore[attr-defined]
        return run

    return decorate


def _signature(kind: type[BaseModel], positional: str | None, file: bool) -> inspect.Signature:
    names = [n for n in _FIRST if n in kind.model_fields] + [n for n in kind.model_fields if n not in _FIRST]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(kind, name))
        for name in names
        if name != positional
    ]
    if positional is not None:
        described = Parameter(name="FILE", help=kind.model_fields[positional].description, show_default=False)
        parameters.insert(
            0,
            inspect.Parameter("file", inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, described]),
        )
    if file:
        about = "YAML file with any of these settings (underscores in their names); flags win."
        parameters.append(_extra("config", None, Annotated[str | None, Parameter(help=about, metavar="FILE")]))
    about = "Print one JSON object on stdout."
    parameters.append(_extra("json", False, Annotated[bool, Parameter(help=about, negative=(), show_default=False)]))
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
    shown |= {"metavar": _metavar(plain), "negative": (), "allow_leading_hyphen": plain in (int, float)}
    if get_origin(plain) in (tuple, dict):
        return Annotated[tuple[str, ...] | None, Parameter(**shown, consume_multiple=True)]
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
    return f"{text} [default: {str(field.default).lower() if plain is bool else field.default}]"


def _metavar(plain: Any) -> str:
    if get_origin(plain) is dict:
        return "OURS=THEIRS..."
    if get_origin(plain) is tuple:
        return "NAME..."
    if get_origin(plain) is Literal:
        return "WORD"
    return {int: "N", float: "X", Path: "PATH", str: "NAME"}[plain]


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """`prompt=question` -> {"prompt": "question"}."""
    found: dict[str, str] = {}
    for text in texts:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs) or ours in found:
            raise ConfigError(
                "The column mapping cannot be read." if ours not in found else f"Column {ours} is mapped twice.",
                where="flag --columns",
                got=text,
                expected="our name, =, the name in the data, such as prompt=question chosen=best rejected=worst",
            )
        found[ours] = theirs
    return found


def explain(error: CycloptsError, commands: Mapping[str, object]) -> ConfigError:
    """A complaint of the command-line parser as one of ours.

    Args:
        commands: Names of all commands.
    """
    chain = " ".join(("prefopt", *(error.command_chain or ())))
    todo = f"`{chain} --help` lists what it takes."
    if isinstance(error, UnknownCommandError):
        given = (error.unused_tokens or [""])[0]
        near = difflib.get_close_matches(given, list(commands), n=1)
        return ConfigError(
            f"There is no command {given!r}.",
            where="command line",
            got=given,
            expected="one of " + ", ".join(commands),
            todo=f"Did you mean `prefopt {near[0]}`?" if near else "`prefopt --help` says what each does.",
        )
    if isinstance(error, UnknownOptionError):
        given = (error.token.keyword or error.token.value).partition("=")[0]
        known = [n for a in error.argument_collection for n in a.names if a.parse and n.startswith("--")]
        near = difflib.get_close_matches(given, known, n=1)
        return ConfigError(
            f"{chain} has no flag {given}.",
            where="command line",
            got=given,
            expected=f"{near[0]}?" if near else None,
            todo=todo,
        )
    if isinstance(error, UnusedCliTokensError):
        left = " ".join(error.unused_tokens or [])
        return ConfigError(
            f"{chain} does not know what to do with {left!r}.",
            where="command line",
            got=left,
            expected="a flag before every value; a value with blanks or a leading - in quotes, as --flag='value'",
            todo=todo,
        )
    name = _name(error)
    if isinstance(error, MissingArgumentError):
        what = f"{name} needs a value." if name.startswith("-") and error.keyword else f"{name} is missing."
        help = error.argument.parameter.help if error.argument else None
        return ConfigError(what, where=chain, expected=help, todo=todo)
    if isinstance(error, RepeatArgumentError):
        return ConfigError(f"{name} is given twice.", where=chain, expected="every flag once", todo=todo)
    if isinstance(error, CoercionError):
        expected = {int: "a whole number", float: "a number", bool: "no value: it is a switch"}
        return ConfigError(
            f"{name} is not right.",
            where=f"flag {name}",
            got=error.token.value if error.token else None,
            expected=expected.get(_without_none(error.target_type)),
            todo=todo,
        )
    error.verbose = False
    return ConfigError(str(error), where=chain, todo=todo)


def _name(error: CycloptsError) -> str:
    token = getattr(error, "token", None)
    keyword = getattr(error, "keyword", None) or (token.keyword if token else None)
    if keyword:
        return str(keyword)
    return error.argument.name if error.argument else "An argument"
