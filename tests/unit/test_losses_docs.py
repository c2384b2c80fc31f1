"""docs/losses.md says what the docstrings say, and every docstring says what it must.

`PREFOPT_GOLDEN=1 pytest tests/unit/test_losses_docs.py` writes the entries anew;
`python benchmarks/losses_plot.py` the drawings.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import prefopt.losses
from prefopt.losses import LossTotal

DOC = Path(__file__).parents[2] / "docs" / "losses.md"
BEGIN, END = "<!-- losses -->\n", "<!-- end of losses -->"
SECTIONS = ("Args", "Returns", "Raises", "Elsewhere")

# In the order of the page; a module that is not named here comes last.
MODULES = (
    "preference",
    "margins",
    "divergence",
    "anchored",
    "transport",
    "lengths",
    "unreferenced",
    "unpaired",
    "ranked",
    "reward",
    "likelihood",
    "total",
    "weighting",
)


@dataclass(frozen=True)
class Entry:
    """A docstring, taken apart."""

    summary: str
    body: str  # before the sections: paragraphs, and the equation as a block of code
    equations: int
    parameters: dict[str, str]  # each with what it means
    sections: dict[str, str]


def functions() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(prefopt.losses, name) for name in prefopt.losses.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def drawn() -> set[str]:
    """As benchmarks/losses_plot.py has it: losses of tensors by keyword."""
    signatures = {name: inspect.signature(function) for name, function in functions().items()}
    return {
        name
        for name, signature in signatures.items()
        if signature.return_annotation is LossTotal
        and all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())
    }


def flowed(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())


def entry(docstring: str) -> Entry:
    """Summary, body and sections of a docstring in the form that all losses keep."""
    summary, *lines = inspect.cleandoc(docstring).splitlines()
    heads = [i for i, line in enumerate(lines) if line.rstrip(":") in SECTIONS and line.endswith(":")]
    body = lines[: heads[0]] if heads else lines
    sections = {
        lines[start][:-1]: lines[start + 1 : end] for start, end in zip(heads, [*heads[1:], len(lines)], strict=True)
    }
    blocks, equations = [], 0
    for block in "\n".join(body).strip("\n").split("\n\n"):
        part = block.splitlines()
        if all(line.startswith("    ") for line in part):
            equations += 1
            blocks.append("\n".join(["```text", *(line[4:] for line in part), "```"]))
        else:
            blocks.append(flowed(part))
    items: list[list[str]] = []  # of Args; an item starts where the indentation falls back
    for line in sections.pop("Args", []):
        if re.match(r"    \S", line):
            items.append([])
        items[-1].append(line)
    parameters = dict(flowed(item).split(": ", 1) for item in items)
    return Entry(
        summary=summary,
        body="\n\n".join(blocks),
        equations=equations,
        parameters=parameters,
        sections={name: flowed(text) for name, text in sections.items()},
    )


def linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def default(function: Callable[..., Any], names: str) -> str:
    """What is taken if nothing is given, of each parameter of a row."""
    parameters = inspect.signature(function).parameters
    given = [parameters[name].default for name in names.split(", ")]
    told = ["" if value is inspect.Parameter.empty else f"`{value}`" for value in given]
    return told[0] if len(set(told)) == 1 else ", ".join(told)


def rendered(name: str, function: Callable[..., Any]) -> str:
    """A loss's part of the page."""
    about = entry(function.__doc__ or "")
    lines = [f"### {name}", "", about.summary, "", linked(about.body), ""]
    if name in drawn():
        lines += [f"![loss and pull of {name}](losses/{name}.svg)", ""]
    lines += ["| parameter | default | meaning |", "|---|---|---|"]
    for names, meaning in about.parameters.items():
        ticked = ", ".join(f"`{n}`" for n in names.split(", "))
        lines.append(f"| {ticked} | {default(function, names)} | {meaning.replace('|', chr(92) + '|')} |")
    for section in SECTIONS[1:]:
        if section in about.sections:
            lines += ["", f"*{section}.* {linked(about.sections[section])}"]
    return "\n".join([*lines, ""])


def page() -> str:
    """All entries, room by room."""
    rooms: dict[str, list[str]] = {}
    for name, function in sorted(functions().items()):
        rooms.setdefault(function.__module__.rpartition(".")[2], []).append(rendered(name, function))
    parts = []
    for room in sorted(rooms, key=lambda room: (MODULES.index(room) if room in MODULES else len(MODULES), room)):
        about = inspect.getdoc(sys.modules[f"prefopt.losses.{room}"]) or room
        parts += [f"## {about.splitlines()[0].rstrip('.')}", "", *rooms[room]]
    return "\n".join(parts)


def test_the_page_says_what_the_docstrings_say() -> None:
    head, rest = DOC.read_text().split(BEGIN)
    written, tail = rest.split(END)
    if os.environ.get("PREFOPT_GOLDEN"):
        written = "\n" + page() + "\n"
        DOC.write_text(head + BEGIN + written + END + tail)
    assert written == "\n" + page() + "\n", "stale: PREFOPT_GOLDEN=1 pytest tests/unit/test_losses_docs.py"


def test_every_drawn_loss_has_its_drawing_and_no_other_is_kept() -> None:
    kept = {file.stem for file in (DOC.parent / "losses").glob("*.svg")}
    assert kept == drawn(), "stale: python benchmarks/losses_plot.py"


@pytest.mark.parametrize("name", functions())
def test_a_docstring_has_source_equation_every_parameter_and_the_others(name: str) -> None:
    function = functions()[name]
    about = entry(function.__doc__ or "")
    assert about.summary.endswith(".")
    assert re.search(r"arXiv \d{4}\.\d{4,5}", about.body)
    assert about.equations == 1
    documented = [n for names in about.parameters for n in names.split(", ")]
    assert documented == list(inspect.signature(function).parameters)
    assert "TRL" in about.sections["Elsewhere"]


def test_a_docstring_is_taken_apart_as_written() -> None:
    about = entry("""What for.

    Someone 2024 (arXiv 2401.00001,
    equation 1).

        m    = |y|
        loss = -m

    Args:
        a,
            b: Both
            of them.
        c: A third: with a colon.

    Raises:
        ValueError: never.

    Elsewhere:
        TRL: none.
    """)
    assert about.summary == "What for."
    assert about.body == "Someone 2024 (arXiv 2401.00001, equation 1).\n\n```text\nm    = |y|\nloss = -m\n```"
    assert about.parameters == {"a, b": "Both of them.", "c": "A third: with a colon."}
    assert about.sections == {"Raises": "ValueError: never.", "Elsewhere": "TRL: none."}
