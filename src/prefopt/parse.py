"""A configuration from what the user wrote, a YAML file and flags, or a complaint that says where."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefopt.config import DPOConfig, RewardConfig, SFTConfig, UsableRowsConfig
from prefopt.errors import ConfigError

__all__ = ["flag_of", "parse_config"]

C = TypeVar("C", bound=BaseModel)


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
    lines: dict[str, int] = field(default_factory=dict)

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
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in self.lines:
                raise ConfigError(
                    f"The key {name!r} stands twice.",
                    where=f"{file}:{line}",
                    got=f"{name} on lines {self.lines[name]} and {line}",
                    expected="every key once",
                    todo="Delete one of them.",
                )
            self.lines[name] = line
        self.keys = {str(name): value for name, value in values.items()}

    def place(self, name: str) -> str:
        """Where `name` was given: flag, or file, line and key."""
        if name in self.flags:
            return f"flag {flag_of(name)}"
        if name in self.lines:
            return f"{self.file}:{self.lines[name]} key {name}"
        return str(self.file or "command line")

    def unknown(self, name: str) -> ConfigError:
        """A key that is none of ours."""
        known = sorted(self.kind.model_fields)
        free = [k for k in known if k not in self.keys and k not in self.flags]
        near = difflib.get_close_matches(name.replace("-", "_").lower(), free, n=1)
        others = [
            k.__name__.removesuffix("Config").lower()
            for k in (SFTConfig, DPOConfig, RewardConfig)
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
        missing = [str(e["loc"][0]) for e in errors if e["type"] == "missing"]
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
        if first["loc"]:
            name = str(first["loc"][0])
            return ConfigError(
                f"{name} is not right.",
                where=self.place(name),
                got=_shown({**self.keys, **self.flags}[name]),
                expected=_expected(first, message),
            )
        # Options without effect: the sentence names the settings, the one to complain of first.
        named = [n for n in re.findall(r"[a-z_]+", message) if n in self.flags or n in self.lines]
        return ConfigError(
            f"{message}.",
            where=self.place(named[0]) if named else self.place(""),
            got=", ".join(f"{n}: {_shown({**self.keys, **self.flags}[n])}" for n in named) or None,
        )


_WORDS = {"bool": "true or false", "float": "a number", "int": "a whole number", "path": "a path", "string": "text"}
_WORDS |= {"dict": "column names, each with the name it has in the data", "tuple": "a list"}


def _expected(error: ErrorDetails, message: str) -> str:
    """What would have been right, in a person's words."""
    kind, _, failure = error["type"].partition("_")
    if kind in _WORDS and failure in ("type", "parsing", "from_float", "unicode"):
        return _WORDS[kind]
    return message.removeprefix("Input should be ").removeprefix("Tuple should have ").replace("'", "")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
