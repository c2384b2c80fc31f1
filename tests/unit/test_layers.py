"""Who may import whom: the design, read off the source."""

import ast
from pathlib import Path

import prefopt

ROOT = Path(prefopt.__file__).parent


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("prefopt.")}


def sources(room: str = "") -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_losses_see_nothing_but_losses() -> None:
    for path in sources("losses"):
        assert all(name.startswith("prefopt.losses") for name in imports(path)), path


def test_training_sees_closures_and_never_a_loss() -> None:
    for path in sources("train"):
        mine = {n for n in imports(path) if n.startswith("prefopt.losses")}
        assert mine <= {"prefopt.losses.total", "prefopt.losses.total.LossTotal"}, path
        assert not any(n.startswith(("prefopt.recipes", "prefopt.model")) for n in imports(path)), path


def test_recipes_never_import_each_other() -> None:
    for path in sources("recipes"):
        assert not any(name.startswith("prefopt.recipes") for name in imports(path)), path


def test_the_command_line_is_imported_by_nobody() -> None:
    for path in sources():
        if path.name not in ("__main__.py", "cli.py"):
            assert not any(name.startswith("prefopt.cli") for name in imports(path)), path


def test_data_knows_no_model() -> None:
    for path in sources("data"):
        outside = ("prefopt.model", "prefopt.train", "prefopt.recipes", "prefopt.losses")
        assert not any(name.startswith(outside) for name in imports(path)), path


def test_curation_knows_no_model() -> None:
    for path in sources("curate"):
        outside = ("prefopt.model", "prefopt.train", "prefopt.recipes", "prefopt.losses", "prefopt.report")
        assert not any(name.startswith(outside) for name in imports(path)), path


def test_files_stay_readable() -> None:
    long = {p.name: n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
