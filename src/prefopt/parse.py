"""A configuration from what the user wrote, a YAML file and flags, or a complaint that says where."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefopt.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, UsableRowsConfig
from prefopt.errors import ConfigError

__all__ = ["flag_of", "parse_config"]

C = TypeVar("C", bound=BaseModel)
Place = tuple[str | int, ...]  # a key, and keys and list positions further in


def flag_of(name: str) -> str:
    """The flag that sets a field."""
    return "--" + name.replace("_", "-")


def parse_config(kind: type[C], file: Path | None, flags: Mapping[str, Any]) -> C:
    """A configuration from a YAML file and flags; flags win.

    Args:
        flags: The flags given, by field name; None means not given.

    Raises:
        ConfigError: unreadable file, unknown, repeated or missing key, value out of bounds, option
            without effect; names the file's line and key, or the flag.
    """
    given = _Given(kind, file, {name: value for name, value in flags.items() if value is not None})
    if file is not None:
        given.read(file)
    for name in (*given.flags, *given.keys):
        if name not in kind.model_fields:
            raise given.unknown(name)
    try:
        return kind.model_validate({**given.keys, **given.flags})
    except ValidationError as error:
        raise given.explain(error.errors()) from None


@dataclass
class _Given:
    """What the user wrote, and where: so that a complaint can point at it."""

    kind: type[BaseModel]
    file: Path | None
    flags: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)

    def read(self, file: Path) -> None:
        """Keys, values and lines of the YAML file."""
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            values = None if node is None else yaml.SafeLoader("").construct_document(node)
        except OSError as error:
            what = "The configuration file cannot be read."
            raise ConfigError(what, where=str(file), got=str(error.strerror)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            raise ConfigError(
                "The configuration file is no YAML.",
                where=f"{file}:{mark.line + 1}" if mark else str(file),
                got=str(getattr(error, "problem", None) or error),
                expected="lines such as `beta: 0.1`",
            ) from error
        if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
            what = "The configuration file holds no keys."
            raise ConfigError(what, where=str(file), expected="lines such as `beta: 0.1`")
        self._note_lines(file, node, (), set())
        self.keys = {str(name): value for name, value in values.items()}

    def _note_lines(self, file: Path, node: yaml.Node, place: Place, seen: set[int]) -> None:
        """The line of every key and list item; `seen` are nodes looked into, since an alias may hold itself."""
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner, line = (*place, str(key.value)), key.start_mark.line + 1
                if inner in self.lines:
                    raise ConfigError(
                        f"The key {_dotted(inner)!r} stands twice.",
                        where=f"{file}:{line}",
                        got=f"{_dotted(inner)} on lines {self.lines[inner]} and {line}",
                        expected="every key once",
                        todo="Delete one of them.",
                    )
                self.lines[inner] = line
                self._note_lines(file, value, inner, seen)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.lines[*place, number] = item.start_mark.line + 1
                self._note_lines(file, item, (*place, number), seen)

    def place(self, *where: str | int) -> str:
        """Where a setting was given: flag, or file, line and key; of one that is missing, what it is missing in."""
        if where and where[0] in self.flags:
            return f"flag {flag_of(str(where[0]))}"
        for end in range(len(where), 0, -1):
            if where[:end] in self.lines:
                return f"{self.file}:{self.lines[where[:end]]} key {_dotted(where[:end])}"
        return str(self.file or "command line")

    def unknown(self, name: str) -> ConfigError:
        """A key that is none of ours."""
        known = sorted(self.kind.model_fields)
        free = [k for k in known if k not in self.keys and k not in self.flags]
        near = difflib.get_close_matches(name.replace("-", "_").lower(), free, n=1)
        others = [
            k.__name__.removesuffix("Config").lower()
            for k in (SFTConfig, DPOConfig, RewardConfig, PPOConfig)
            if name in k.model_fields
        ]
        todo = f"Did you mean {near[0]}?" if near else None
        return ConfigError(
            f"There is no setting {name!r} here.",
            where=self.place(name),
            got=name,
            expected="one of " + ", ".join(known),
            todo=f"It is a setting of {others[0]}: delete it here." if others else todo,
        )

    def explain(self, errors: list[ErrorDetails]) -> ConfigError:
        """Pydantic's first complaint in our form; everything missing at once."""
        missing = [str(e["loc"][0]) for e in errors if e["type"] == "missing" and len(e["loc"]) == 1]
        if missing:
            file = ", or the same names as keys of a --config file" if issubclass(self.kind, UsableRowsConfig) else ""
            return ConfigError(
                f"{'Settings are' if len(missing) > 1 else 'A setting is'} missing: {', '.join(missing)}.",
                where=str(self.file or "command line"),
                expected="; ".join(f"{n}: {str(self.kind.model_fields[n].description).rstrip('.')}" for n in missing),
                todo=f"Give {' '.join(map(flag_of, missing))}{file}.",
            )
        first = errors[0]
        message = first["msg"].removeprefix("Value error, ")
        place: Place = (*first["loc"], *first.get("ctx", {}).get("inside", ()))
        if first["type"] in ("missing", "extra_forbidden"):
            return self._wrong_key(place, missing=first["type"] == "missing")
        if first["type"] != "value_error" or _model_at(self.kind, place) is None:
            return ConfigError(
                f"{_dotted(place)} is not right.",
                where=self.place(*place),
                got=_shown(self._value(place)),
                expected=_expected(first, message),
            )
        # Options without effect: the sentence names the settings, the one to complain of first.
        given = self._value(place)
        named = [n for n in re.findall(r"[a-z_]+", message) if n in given]
        return ConfigError(
            f"{message}.",
            where=self.place(*place, *named[:1]),
            got=", ".join(f"{n}: {_shown(given[n])}" for n in named) or None,
        )

    def _wrong_key(self, place: Place, *, missing: bool) -> ConfigError:
        """A key further in that is none of ours, or that has to be there."""
        fields = (_model_at(self.kind, place[:-1]) or self.kind).model_fields
        name = str(place[-1])
        near = difflib.get_close_matches(name, fields, n=1)
        return ConfigError(
            f"{_dotted(place)} is missing." if missing else f"There is no setting {_dotted(place)!r} here.",
            where=self.place(*place),
            expected=str(fields[name].description) if missing else "one of " + ", ".join(sorted(fields)),
            todo=f"Did you mean {near[0]}?" if near and not missing else None,
        )

    def _value(self, place: Place) -> Any:
        """What was given at a place; None where nothing was."""
        value: Any = {**self.keys, **self.flags}
        for part in place:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def _dotted(place: Place) -> str:
    """methods[2].sweep.beta"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _model_at(kind: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """The model that stands at a place, or in the list there; None where it is a plain value."""
    for part in place:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(part)
        models = [] if field is None else _models_in(field.annotation)
        if not models:
            return None
        kind = models[0]
    return kind


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


_WORDS = {"bool": "true or false", "float": "a number", "int": "a whole number", "path": "a path", "string": "text"}
_WORDS |= {"dict": "column names, each with the name it has in the data", "tuple": "a list", "list": "a list"}
_WORDS |= {"model": "settings, each with its name"}


def _expected(error: ErrorDetails, message: str) -> str:
    """What would have been right, in a person's words."""
    kind, _, failure = error["type"].partition("_")
    if kind in _WORDS and failure in ("type", "parsing", "from_float", "unicode"):
        return _WORDS[kind]
    return message.removeprefix("Input should be ").removeprefix("Tuple should have ").replace("'", "")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
