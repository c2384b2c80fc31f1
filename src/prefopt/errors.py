"""Errors for people: what happened, where, what was found, what was expected, what to do.

    PrefoptError
    ├── ConfigError (ValueError)        a flag or a configuration key is wrong
    ├── DataError (ValueError)          a file or its rows cannot be used
    ├── ModelError (ValueError)         a model folder cannot be used
    ├── RunError (RuntimeError)         a run folder is taken, damaged or does not match
    ├── RewardError (ValueError)        a reward function fails or does not give a number for each completion
    ├── EndpointError (RuntimeError)    a server refuses, fails, or answers in another form
    ├── MemoryFullError (MemoryError)   one row by itself is too large for the device
    └── NonFiniteError (ArithmeticError) a loss or gradient is NaN or infinite

Every one of them is the user's to mend: the command line prints the message alone and leaves with
exit code 2. Anything else that escapes is a bug and keeps its traceback.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "EndpointError",
    "MemoryFullError",
    "ModelError",
    "NonFiniteError",
    "PrefoptError",
    "RewardError",
    "RunError",
]


class PrefoptError(Exception):
    """A message a person can act on.

    Args:
        what: One sentence: what went wrong.
        where: File and line, configuration key, or flag.
        got: What was found there.
        expected: What would have been right.
        todo: The next step for the reader.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: str | None = None,
        expected: str | None = None,
        todo: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.todo = todo
        super().__init__(self.message())

    def message(self) -> str:
        """The whole message: the first line says what, the indented ones the rest."""
        parts = [
            ("where", self.where),
            ("got", self.got),
            ("expected", self.expected),
            ("to do", self.todo),
        ]
        lines = [self.what] + [f"  {name + ':':<10}{text}" for name, text in parts if text]
        return "\n".join(lines)


class ConfigError(PrefoptError, ValueError):
    """A flag or a configuration key is unknown, missing, out of bounds or without effect."""


class DataError(PrefoptError, ValueError):
    """A data file cannot be read, is empty, or holds too few usable rows."""


class ModelError(PrefoptError, ValueError):
    """A model folder is missing, incomplete, unsafe, or does not do what the command needs."""


class RunError(PrefoptError, RuntimeError):
    """A run folder is taken, damaged, or does not belong to what is asked of it."""


class RewardError(PrefoptError, ValueError):
    """A reward function cannot be found, fails, or does not give one finite number for each completion."""


class EndpointError(PrefoptError, RuntimeError):
    """A server that completes prompts refuses, fails, cannot be reached, or answers in another form."""


class MemoryFullError(PrefoptError, MemoryError):
    """A training step does not fit into memory though its rows are computed one at a time."""


class NonFiniteError(PrefoptError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; raised before the optimiser steps."""
