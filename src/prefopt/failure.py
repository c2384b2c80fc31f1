"""How a command ends when it does not end well: one message in our form, and the right exit code."""

import difflib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cyclopts.exceptions import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from prefopt.errors import ConfigError, PrefoptError
from prefopt.run import RunFolder, unfinished

__all__ = ["disk_full", "exit_code", "interrupted"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "database or disk is full", "Disk quota exceeded")
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class _SystemRefused(PrefoptError, OSError):
    """The operating system does not let us write or read where the user wants us to."""


def exit_code(run: Callable[[], object], tokens: Sequence[str], commands: Mapping[str, object]) -> int:
    """Run a command: 0 done, 2 the user's mistake, 130 interrupted; bugs and SystemExit pass through.

    Args:
        tokens: The command line, to know whether JSON is wanted.
        commands: Names of all commands, for a hint; a subcommand's begins with its parent's.
    """
    try:
        code = _attempt(run, tokens, commands)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has left
        return 141
    except OSError as error:
        refused = disk_full(error, None) or _forbidden(error)
        if refused is None:
            raise
        return _fail(refused, tokens)


def _attempt(run: Callable[[], object], tokens: Sequence[str], commands: Mapping[str, object]) -> int:
    try:
        run()
        return 0
    except CycloptsError as error:
        return _fail(_explain(error, commands), tokens)
    except PrefoptError as error:
        return _fail(error, tokens)


def _forbidden(error: OSError) -> PrefoptError | None:
    if error.errno not in _FORBIDDEN or error.filename is None:
        return None
    return _SystemRefused(
        "The system does not allow this.",
        where=str(error.filename),
        got=error.strerror,
        expected="a place that can be read and written",
        todo="Check the path and its permissions.",
    )


def _drop_output() -> None:
    """What is still buffered must not complain when Python leaves."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: PrefoptError, tokens: Sequence[str]) -> int:
    print(f"error: {error.message()}", file=sys.stderr)
    if "--json" in tokens:
        fields = ("what", "where", "got", "expected", "todo")
        print(json.dumps({"error": {name: getattr(error, name) for name in fields}}, ensure_ascii=False))
    return 2


def interrupted(path: Path | None) -> KeyboardInterrupt:
    """Ctrl-C, with how to go on where it leaves a run unfinished.

    Args:
        path: What the command was making; None: nothing.
    """
    if path is None or not unfinished(path):
        return KeyboardInterrupt()
    when = "" if RunFolder(path).stepped else " before the first step"
    return KeyboardInterrupt(f"interrupted{when}; go on with: prefopt resume {path}")


def disk_full(error: Exception, path: Path | None) -> PrefoptError | None:
    """The message if `error` says that a disk is full, by its number or in a library's words.

    Args:
        path: What was being written; None: only standard output.
    """
    if getattr(error, "errno", None) not in _FULL and not any(text in str(error) for text in _FULL_TEXTS):
        return None
    if path is None:
        _drop_output()
        return _SystemRefused("The results cannot be written.", where="standard output", got="no space left there")
    where = Path(getattr(error, "filename", None) or path)
    if type(error).__module__ == "sqlite3":
        from prefopt.model.reference import cache_folder

        where = cache_folder()
    there = next(p for p in (where, *where.absolute().parents) if p.exists())
    return _SystemRefused(
        "The disk is full.",
        where=str(where),
        got=f"{shutil.disk_usage(there).free / 1e6:,.0f} MB free",
        expected="room for the output",
        todo="Free some room. What was saved before is whole: `prefopt resume RUN` goes on with a training run.",
    )


def _explain(error: CycloptsError, commands: Mapping[str, object]) -> ConfigError:
    """A complaint of the command-line parser in our form."""
    where = " ".join(("prefopt", *(error.command_chain or ())))
    todo = f"`{where} --help` lists what it takes."
    if isinstance(error, UnknownCommandError):
        return _unknown_command((error.unused_tokens or [""])[0], error.command_chain or (), commands)
    if isinstance(error, UnknownOptionError):
        return _unknown_flag(error, where, todo)
    if isinstance(error, UnusedCliTokensError):
        return ConfigError(
            f"{where} does not know what to do with this.",
            where="command line",
            got=" ".join(error.unused_tokens or []),
            expected="a flag before every value; a value that begins with - as --flag=-value",
            todo=todo,
        )
    name = _name(error)
    if isinstance(error, MissingArgumentError):
        given = error.keyword is not None or bool(error.argument and error.argument.tokens)
        about = error.argument.parameter.help if error.argument else None
        return ConfigError(
            f"{name} {'needs a value' if given else 'is missing'}.", where=where, expected=about, todo=todo
        )
    if isinstance(error, RepeatArgumentError):
        return ConfigError(f"{name} is given twice.", where=where, expected="every flag once", todo=todo)
    if isinstance(error, CoercionError):
        got = error.token.value if error.token else None
        return ConfigError(f"{name} is a switch.", where=where, got=got, expected="no value", todo=todo)
    error.verbose = False
    return ConfigError(str(error), where=where, todo=todo)


def _unknown_command(given: str, parents: Sequence[str], commands: Mapping[str, object]) -> ConfigError:
    depth = len(parents)
    words = [name.split() for name in commands]
    here = list(dict.fromkeys(name[depth] for name in words if tuple(name[:depth]) == tuple(parents)))
    near = difflib.get_close_matches(given, here, n=1)
    parent = " ".join(("prefopt", *parents))
    return ConfigError(
        f"There is no command {given!r}.",
        where=parent if parents else "command line",
        got=given,
        expected="one of " + ", ".join(here),
        todo=f"Did you mean `{parent} {near[0]}`?" if near else f"`{parent} --help` says what each does.",
    )


def _unknown_flag(error: UnknownOptionError, where: str, todo: str) -> ConfigError:
    given = (error.token.keyword or error.token.value).partition("=")[0]
    known = [n for a in error.argument_collection if a.parse for n in a.names if n.startswith("--")]
    near = difflib.get_close_matches(given, known, n=1)
    return ConfigError(
        f"There is no flag {given} here.",
        where=where,
        got=given,
        expected=f"one of {', '.join(known)}" if known else "no flags",
        todo=f"Did you mean {near[0]}? {todo}" if near else todo,
    )


def _name(error: CycloptsError) -> str:
    """The flag or argument that is complained of."""
    token = getattr(error, "token", None)
    keyword = getattr(error, "keyword", None) or (token.keyword if token else None)
    if keyword:
        return str(keyword)
    return error.argument.name if error.argument else "An argument"
