"""One row of a file under our column names: what it holds, of the right type, or a refusal."""

import math
from typing import Any

from prefopt.data.audit import Refusal
from prefopt.data.turns import Mends, clean, kind_of, messages
from prefopt.records import Content, Message

__all__ = ["Row"]

_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Row:
    """Columns of one row that hold something."""

    def __init__(self, values: Any) -> None:
        self.layout: str | None = None
        self.mends: Mends = []
        self.used: list[str] = []
        if isinstance(values, str):  # a JSON array of texts
            values = {"text": values}
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}
        self.is_object = isinstance(values, dict)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        self.used.append(name)
        return self._values[name]

    def get(self, name: str, default: Any) -> Any:
        """What a column holds, or `default`."""
        if name not in self:
            return default
        return self[name]

    def text(self, name: str) -> str:
        """The text in a column; "" where there is none."""
        value = self.get(name, "")
        if not isinstance(value, str):
            raise Refusal("wrong_type", f"{name} is {kind_of(value)}, not text")
        return clean(value, self.mends)

    def content(self, value: Any, name: str) -> Content:
        """Text or messages."""
        if isinstance(value, str):
            return clean(value, self.mends)
        if not isinstance(value, (list, dict)):
            raise Refusal("wrong_type", f"{name} is {kind_of(value)}, not text or messages")
        return messages(value, name, self.mends)

    def turns(self, name: str) -> tuple[Message, ...]:
        """The messages in a column."""
        return messages(self[name], name, self.mends)

    def require(self, *names: str) -> None:
        """Refuse a row that lacks one of these columns."""
        missing = [name for name in names if name not in self]
        if missing:
            raise Refusal("missing_columns", f"no {' and '.join(missing)}; the row has {self.columns()}")

    def columns(self) -> str:
        """The row's columns, for people."""
        names = [repr(n) for n in self._values if n in self]
        return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "no column"

    @property
    def weight(self) -> float:
        """The row's weight, 1 by default."""
        return self._number("weight", 1.0, math.inf, "a number of at least 0")

    @property
    def probability(self) -> float:
        """A judge's probability that the chosen completion is the better one, or a label right; 1 by default."""
        return self._number("probability", 1.0, 1.0, "a number from 0 to 1")

    @property
    def margin(self) -> float:
        """By how much the chosen completion is the better one; 0 by default."""
        return self._number("margin", 0.0, math.inf, "a number of at least 0")

    def _number(self, name: str, default: float, most: float, expected: str) -> float:
        if name not in self:
            return default
        value = self[name]
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and 0 <= number <= most):
            raise Refusal("wrong_type", f"{name} is {value!r:.40}, not {expected}")
        return number

    def cut(self, *names: str) -> tuple[bool, ...]:
        """Of each completion whether its column says that it has no end of its own. () if none says so."""
        found = []
        for name in names:
            value = self.get(name, "stop")
            if value not in ("stop", "length", "filtered"):
                raise Refusal("wrong_type", f"{name} is {value!r:.40}, not stop, length or filtered")
            found.append(value != "stop")
        return tuple(found) if any(found) else ()

    @property
    def label(self) -> bool:
        """The row's label as true or false."""
        value = self["label"]
        found = _TRUTH.get(str(value).strip().lower())
        if found is None:
            raise Refusal("wrong_type", f"label is {value!r:.40}, not true or false")
        return found
