"""How values are written on a report's page."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

__all__ = ["as_clock", "as_duration", "as_number", "as_text", "as_value"]

_LONG_TEXT = 500  # characters; longer samples scroll in a box that the keyboard reaches


def as_number(value: Any) -> str:
    """Three significant digits for people; counts in full."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    if not math.isfinite(value):
        return str(value)
    text = f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2e}" if value else "0"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def as_value(value: Any) -> str:
    """A configuration value as YAML would have it on one line."""
    if isinstance(value, list | tuple):
        return ", ".join(as_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_value(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def as_duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts: Sequence[tuple[int, str]] = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "under a second"


def as_clock(time: Any) -> str:
    """Date and time to the second, as the event has it."""
    try:
        return datetime.fromisoformat(str(time)).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return str(time or "")


def as_text(value: Any) -> dict[str, Any]:
    """A sample's text, without the space that joins a continuation to its prompt."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return {"text": text.removeprefix(" "), "long": len(text) > _LONG_TEXT}
