"""Whole experiments through the command line on a tiny model: what they leave, and what a kill costs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.cli import main
from tiny import save_tiny_model

CONFIG: dict[str, Any] = {
    "reward": "regex:(?i)[aeiou]",
    "seeds": [0, 1],
    "start": {"lr": 1e-3, "max_steps": 2, "batch_rows": 8},
    "prompts": {"words": 2, "train": 16, "test": 6},
    "pairs": {"samples": 3, "max_new_tokens": 6},
    "evaluate": {"samples": 2, "max_new_tokens": 6, "every": 2},
    "methods": [
        {"name": "DPO", "recipe": "dpo", "settings": {"lr": 1e-2, "batch_pairs": 8, "epochs": 4, "max_steps": 3}},
        {"name": "Best-of-N", "recipe": "best_of_n", "reward": "truth", "n": [2, 4]},
    ],
}
DPO = CONFIG["methods"][0] | {"sweep": {"beta": [0.1, 1.0]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and an experiment that ran without a break."""
    path = tmp_path_factory.mktemp("frontier")
    save_tiny_model(path / "model")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeiou", k=4)) for _ in range(160)]
    rows = [{"text": " ".join(words[i : i + 5])} for i in range(0, 160, 4)]
    (path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "frontier", str(written(path, "whole"))]) == 0
    return path


def written(folder: Path, name: str, **changes: Any) -> Path:
    """The experiment with an output folder of that name."""
    texts = str(folder / "texts.jsonl")
    config = CONFIG | {
        "methods": [DPO, CONFIG["methods"][1]],
        "out": str(folder / name),
        "model": str(folder / "model"),
    }
    config |= {"start": CONFIG["start"] | {"data": texts}, "prompts": CONFIG["prompts"] | {"data": texts}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    return file


def points(folder: Path, name: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What was measured, by method, setting, seed and step."""
    lines = [json.loads(line) for line in (folder / name / "points.jsonl").read_text().splitlines()]
    who = ("method", "setting", "seed", "step")
    found = {tuple(line[k] for k in who): (line["reward_by_prompt"], line["kl_by_prompt"]) for line in lines}
    assert len(found) == len(lines)  # nothing was measured twice
    return found


def test_every_checkpoint_of_every_method_is_measured(folder: Path) -> None:
    found = points(folder, "whole")
    # Steps 2 and 3 (the last) of two betas, two N and the start, at two seeds.
    assert len(found) == 2 * (2 * 2 + 2 + 1)
    assert {step for method, _, _, step in found if method == "DPO"} == {2, 3}
    for (method, setting, _, _), (reward, kl) in found.items():
        assert len(reward) == len(kl) == 6
        assert all(0 <= r <= 1 for r in reward)
        if method == "start":
            assert kl == pytest.approx([0.0] * 6, abs=1e-6)
        elif method == "Best-of-N":  # log N - (N - 1) / N: log 2 - 1/2, log 4 - 3/4
            assert kl == pytest.approx([0.193147 if setting == "n 2" else 0.636294] * 6, abs=1e-6)
        else:
            assert min(kl) > 0
    assert (folder / "whole" / "frontier.svg").read_text().startswith("<?xml")
    table = (folder / "whole" / "frontier.md").read_text()
    assert "| DPO | beta 0.1 | 2 | 3 |" in table and "over seeds 0, 1" in table


def test_a_second_call_measures_nothing_and_prints_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "whole" / "points.jsonl").read_bytes()
    assert main(["evaluate", "frontier", str(folder / "whole.yaml")]) == 0
    assert capsys.readouterr().out.rstrip() == (folder / "whole" / "frontier.md").read_text().rstrip()
    assert main(["evaluate", "frontier", str(folder / "whole.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {area["method"] for area in told["areas"]} == {"DPO", "Best-of-N"}
    assert told["differences"][0]["sentence"]
    assert (folder / "whole" / "points.jsonl").read_bytes() == before


def test_a_kill_loses_nothing_and_processes_change_nothing(folder: Path) -> None:
    name = "killed"
    command = [
        sys.executable,
        "-m",
        "prefopt",
        "evaluate",
        "frontier",
        str(written(folder, name, seeds=[0])),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    file = folder / name / "points.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with file.open("ab") as torn:
        torn.write(b'{"step": 1, "key')
    measured = file.read_bytes().count(b"\n")
    for _ in range(200):  # workers leave once they see that the first process is gone
        if main(["evaluate", "frontier", str(folder / f"{name}.yaml")]) == 0:
            break
        time.sleep(0.1)
    found = points(folder, name)
    whole = {key: value for key, value in points(folder, "whole").items() if key[2] == 0}
    assert measured >= 3 and found.keys() == whole.keys()
    for key, (reward, kl) in whole.items():
        assert found[key][0] == reward
        assert found[key][1] == pytest.approx(kl, rel=1e-4, abs=1e-6)


def test_runs_by_folder_are_measured_at_their_start(folder: Path) -> None:
    run = folder / "whole" / "seed-1" / "dpo-beta-0.1"
    file = written(folder, "given", methods=[{"name": "Mine", "runs": [str(run)]}], pairs=None)
    # The start of another folder is trained to the same weights, so the run began there.
    assert main(["evaluate", "frontier", str(file)]) == 0
    found, whole = points(folder, "given"), points(folder, "whole")
    mine = {key: value for key, value in found.items() if key[0] == "Mine"}
    assert set(mine) == {("Mine", "dpo-beta-0.1", 1, 2), ("Mine", "dpo-beta-0.1", 1, 3)}
    for (_, _, seed, step), value in mine.items():
        assert value == whole["DPO", "beta 0.1", seed, step]


def test_a_run_that_began_elsewhere_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "whole" / "seed-0" / "start"  # began at the model itself
    file = written(folder, "given", methods=[{"name": "Mine", "runs": [str(run)]}], pairs=None)
    assert main(["evaluate", "frontier", str(file)]) == 2
    assert "a run that began at another model" in capsys.readouterr().err


def test_another_run_in_the_folder_is_named_with_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = DPO | {"settings": DPO["settings"] | {"lr": 2e-2}}
    file = written(folder, "whole", methods=[changed])
    assert main(["evaluate", "frontier", str(file)]) == 2
    error = capsys.readouterr().err
    written(folder, "whole")
    assert "Another run stands in this run's folder." in error
    assert "lr: 0.01, not 0.02" in error


def test_other_prompts_need_another_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(folder / "texts.jsonl")
    file = written(folder, "whole", prompts={"data": texts, "words": 3, "train": 16, "test": 6})
    assert main(["evaluate", "frontier", str(file)]) == 2
    written(folder, "whole")
    assert "The folder holds another experiment's prompts." in capsys.readouterr().err


def test_too_few_prompts_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(folder / "texts.jsonl")
    file = written(folder, "few", prompts={"data": texts, "tokens": [2, 4], "train": 1600, "test": 6})
    assert main(["evaluate", "frontier", str(file)]) == 2
    error = capsys.readouterr().err
    assert "There are too few distinct prompts." in error and "1,600 to train on and 6 to measure on" in error


def test_measured_checkpoints_are_removed_where_that_is_asked_for(folder: Path) -> None:
    evaluate = CONFIG["evaluate"] | {"keep_checkpoints": False}
    file = written(
        folder, "lean", evaluate=evaluate, seeds=[0], methods=[CONFIG["methods"][0] | {"sweep": {"beta": [1]}}]
    )
    assert main(["evaluate", "frontier", str(file)]) == 0
    kept = list((folder / "lean" / "seed-0" / "dpo-beta-1" / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-000003"]
    before = points(folder, "lean")
    assert main(["evaluate", "frontier", str(file)]) == 0  # all is known
    assert points(folder, "lean") == before
