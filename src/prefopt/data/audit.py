"""What became of every row that was read: kept, mended or refused, with file, line and reason."""

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from prefopt.errors import DataError
from prefopt.records import Source

__all__ = ["Audit", "Finding", "Refusal", "State"]

State = Literal["mended", "refused"]

_STYLES = {"kept": "green", "mended": "yellow", "refused": "red"}
_FINDINGS_PER_REASON = 1000  # examples held in memory; the counts are exact whatever their number
_MENDED, _REFUSED, _FIRST_REASON = 1, 2, 4  # bits of what is known of a row


class Refusal(Exception):
    """A row that cannot be used; `reason` is counted, `detail` is shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found in one row, and what was done about it."""

    source: Source
    state: State
    reason: str
    detail: str = ""


class Audit:
    """Counts rows as they are read, mended and refused; rows = kept + mended + refused.

    A row's worst state counts, once, however much is found in it; each of its reasons counts once.
    That takes 8 bytes a row, and a bounded number of examples.

    Attributes:
        format: What the rows were read as, for people.
    """

    def __init__(self) -> None:
        self.format = ""
        self._rows = 0
        self._found: dict[str, array[int]] = {}  # file -> bits of its rows: states, then a bit a reason
        self._reason_bits: dict[str, int] = {}
        self._mended = self._refused = 0
        self._counts: Counter[tuple[State, str]] = Counter()
        self._findings: list[Finding] = []

    def row(self, source: Source) -> None:
        """Count a row that was read."""
        self._rows += 1

    def mend(self, source: Source, reason: str, detail: str = "") -> None:
        """The row is used, though not as it stands."""
        self._add(Finding(source, "mended", reason, detail))

    def refuse(self, source: Source, reason: str, detail: str = "") -> None:
        """The row is not used."""
        self._add(Finding(source, "refused", reason, detail))

    def _add(self, finding: Finding) -> None:
        reason = self._reason_bits.setdefault(finding.reason, _FIRST_REASON << len(self._reason_bits))
        bits = self._found.setdefault(finding.source.file, array("Q"))
        row = finding.source.row
        if len(bits) <= row:
            bits.frombytes(bytes(8 * (row + 1 - len(bits))))
        known = bits[row]
        bits[row] |= reason | (_MENDED if finding.state == "mended" else _REFUSED)
        self._refused += bool(bits[row] & _REFUSED) - bool(known & _REFUSED)
        self._mended += (bits[row] & 3 == _MENDED) - (known & 3 == _MENDED)
        if known & reason:
            return
        self._counts[finding.state, finding.reason] += 1
        if self._counts[finding.state, finding.reason] <= _FINDINGS_PER_REASON:
            self._findings.append(finding)

    @property
    def rows(self) -> int:
        """Rows read."""
        return self._rows

    @property
    def mended(self) -> int:
        """Rows used after mending."""
        return self._mended

    @property
    def refused(self) -> int:
        """Rows not used."""
        return self._refused

    @property
    def kept(self) -> int:
        """Rows used as they stand."""
        return self._rows - self._mended - self._refused

    @property
    def reasons(self) -> dict[str, int]:
        """Rows per reason, most frequent first; a row with two reasons is in both."""
        total: Counter[str] = Counter()
        for (_, reason), count in self._counts.items():
            total[reason] += count
        return dict(total.most_common())

    def refusals(self, source: Source) -> list[str]:
        """Why a row is refused, every reason; empty if it is used."""
        bits = self._found.get(source.file, ())
        known = bits[source.row] if source.row < len(bits) else 0
        if not known & _REFUSED:
            return []
        return [name for name, bit in self._reason_bits.items() if known & bit and ("refused", name) in self._counts]

    @property
    def findings(self) -> list[Finding]:
        """What was found, in the order found; at most the first 1000 per state and reason."""
        return list(self._findings)

    def as_json(self) -> dict[str, Any]:
        """The counts under the names scripts rely on."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "mended": self.mended,
            "refused": self.refused,
            "reasons": self.reasons,
            "format": self.format,
        }

    def summary(self) -> str:
        """One line: the counts and the reasons."""
        parts = [f"{self.kept:,} kept"]
        for state, count in (("mended", self.mended), ("refused", self.refused)):
            if count:
                reasons = ", ".join(f"{n:,} {reason}" for (s, reason), n in self._counts.most_common() if s == state)
                parts.append(f"{count:,} {state} ({reasons})")
        return f"{self.rows:,} read: " + ", ".join(parts)

    def table(self) -> Table:
        """The counts per state and reason, each with its share of the rows and its first example."""
        table = Table(title=Text(self.format) if self.format else None, title_justify="left")
        for name in ("outcome", "reason"):
            table.add_column(name)
        for name in ("rows", "share"):
            table.add_column(name, justify="right")
        table.add_column("first example", overflow="fold")
        table.add_row(Text("kept", _STYLES["kept"]), "", f"{self.kept:,}", self._share(self.kept), "")
        first = {(f.state, f.reason): f for f in reversed(self._findings)}
        for state in ("mended", "refused"):
            for (s, reason), count in self._counts.most_common():
                if s == state:
                    example = first[s, reason]
                    where = Text(f"{example.source}: {example.detail}" if example.detail else str(example.source))
                    table.add_row(Text(s, _STYLES[s]), reason, f"{count:,}", self._share(count), where)
        table.add_section()
        found = f"{self.kept:,} kept + {self.mended:,} mended + {self.refused:,} refused"
        table.add_row("all", "", f"{self.rows:,}", self._share(self.rows), found)
        return table

    def _share(self, count: int) -> str:
        return f"{count / self.rows:.1%}" if self.rows else "-"

    def enforce(self, max_refused: float, *, check: str = "") -> None:
        """Stop when too much of the data cannot be used.

        Args:
            max_refused: The largest share of refused rows that is let pass, 0 to 1.
            check: Flags with which `prefopt check` shows the same rows.

        Raises:
            DataError: more rows than that are refused.
        """
        if self.refused <= max_refused * self.rows:
            return
        example = next(f for f in self._findings if f.state == "refused")
        command = f"prefopt check {example.source.file} {check}".strip()
        raise DataError(
            f"{self.refused / self.rows:.1%} of the rows cannot be used.",
            where=f"first: {example.source}",
            got=f"{self.summary()}; there: {example.reason}" + (f", {example.detail}" if example.detail else ""),
            expected=f"at most {max_refused:.1%} of the rows refused (max_refused)",
            todo=f"`{command}` lists every reason; mend the file, name its columns with "
            "--columns, or raise --max-refused.",
        )
