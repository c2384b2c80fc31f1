"""A reward that is a Python function of the user's, named `package.module:function`."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from prefopt.errors import RewardError
from prefopt.records import Content
from prefopt.rewards.reward import Reward, cases

__all__ = ["function_reward"]


def function_reward(name: str) -> Reward:
    """The function that `name` (`package.module:function`) names, found from the current folder on.

    It is called as `function(prompts, completions)`: a prompt is text, or a list of
    {"role": ..., "content": ...} for a conversation; completions are texts. The current folder goes to
    the front of `sys.path` and stays there. The fingerprint is of the module's file and the name, not
    of what that file imports.

    Raises:
        RewardError: there is no such module or function, it cannot be imported or called.
    """
    module_name, _, attribute = name.partition(":")
    module = _import(name, module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        own = (n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module_name)
        there = [n for n in own if not n.startswith("_")]
        raise RewardError(
            f"{attribute!r} is {'not in' if function is None else 'no function of'} the module.",
            where=f"reward {name}",
            got=f"functions {', '.join(there)}" if there else f"no function in {module.__file__ or module_name}",
            expected="package.module:function with a function of prompts and completions",
        )
    file = Path(module.__file__) if module.__file__ else None
    source = file.read_bytes() if file else b""
    fingerprint = hashlib.sha256(name.encode() + b"\0" + source).hexdigest()
    return Reward(name, fingerprint, _guarded(name, function, file), code=True)


def _import(name: str, module: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
        files = sorted(p.stem for p in Path.cwd().glob("*.py"))
        raise RewardError(
            f"There is no module {error.name!r}.",
            where=f"reward {name}",
            got=f"modules {', '.join(files[:8])} in {here}" if files else f"no module in {here}",
            expected="package.module:function, importable from the current folder",
            todo="Check the spelling, or run the command in the folder that the module is in.",
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> RewardError:
    return RewardError(
        "The reward's module cannot be imported.",
        where=f"reward {name}, {_place(error, None)}",
        got=f"{type(error).__name__}: {error}",
        expected="a module that imports without an error",
    )


def _guarded(
    name: str, function: Callable[..., object], file: Path | None
) -> Callable[[Sequence[Content], Sequence[str]], object]:
    """`function`, whose own errors become messages for its author."""

    def call(prompts: Sequence[Content], completions: Sequence[str]) -> object:
        given = [p if isinstance(p, str) else [{"role": m.role, "content": m.content} for m in p] for p in prompts]
        try:
            return function(given, list(completions))
        except Exception as error:  # the user's code may raise anything
            raise RewardError(
                "The reward function fails.",
                where=f"reward {name}, {_place(error, file)}",
                got=f"{type(error).__name__}: {error}",
                expected="a number for each completion",
                todo=f"It was called for {len(completions)} completions: {cases(prompts, completions)}",
            ) from error

    return call


def _place(error: Exception, file: Path | None) -> str:
    """File and line where the error comes from: the last one in the function's own file, or the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if file is not None and f.filename == str(file)]
    last = (own or frames)[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return f"{last.filename}:{last.lineno}"
