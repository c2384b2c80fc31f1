"""`prefopt reward` through the command line on a tiny model: what must not change a run, does not."""

import json
import signal
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefopt.model.reward import load_reward_model
from runs import close, metrics, prefopt, rows_by_step, start, wait_for_step
from tiny import save_tiny_model, write_pairs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 48)
    return folder


def rows(inputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def reward(
    inputs: Path, out: Path, *more: str, data: str | None = None, eval_share: str = "0.2", batch: str = "8"
) -> list[str]:
    return [
        *("reward", "--model", str(inputs / "model"), "--data", data or str(inputs / "pairs.jsonl")),
        *("--out", str(out), "--lr", "1e-2", "--batch-pairs", batch, "--eval-share", eval_share, *more),
    ]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == name]


def test_micro_batches_change_nothing(inputs: Path, tmp_path: Path) -> None:
    """8 pairs at once equal 8 pairs one by one, and 1 pair in 8."""
    prefopt(*reward(inputs, tmp_path / "whole", "--tokens-per-batch", "100000"), cache=tmp_path)
    prefopt(*reward(inputs, tmp_path / "single", "--tokens-per-batch", "64"), cache=tmp_path)
    close(metrics(tmp_path / "whole"), metrics(tmp_path / "single"), 1e-3)


@pytest.mark.parametrize("more", [(), ("--lora-rank", "4", "--lora-dropout", "0.1", "--dtype", "bfloat16")])
def test_a_resumed_run_equals_an_uninterrupted_one(inputs: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Bit for bit, after SIGINT in the middle and a kill -9 later on."""
    long = ("--epochs", "4", "--save-every", "3", "--eval-every", "4", "--normalize", "scale", *more)
    prefopt(*reward(inputs, tmp_path / "whole", *long), cache=tmp_path)

    run = tmp_path / "broken"
    process = start(reward(inputs, run, *long), tmp_path)
    wait_for_step(run, process, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    process = start(["resume", str(run)], tmp_path)
    wait_for_step(run, process, 10)
    process.kill()
    process.wait()
    prefopt("resume", str(run), cache=tmp_path)

    assert metrics(run) == metrics(tmp_path / "whole")
    for name in ("model/model.safetensors", "model/config.json", "outcome.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert rows_by_step(run) == rows_by_step(tmp_path / "whole")


@pytest.mark.parametrize("more", [(), ("--lora-rank", "4")])
def test_a_run_is_what_was_promised(inputs: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    done = prefopt(*reward(inputs, run, "--epochs", "4", "--json", *more), cache=tmp_path)
    assert json.loads(done.stdout)["final"]["accuracy"] == 1.0
    lines = metrics(run)
    assert lines[0]["step"] == 0 and lines[-1]["rewards/margins"] > 1
    assert lines[-1]["accuracy/low"] == pytest.approx(0.7225, abs=1e-4)  # Wilson, ten prompts of ten

    # The folder is a plain classifier, and what `prefopt score` writes is what it says.
    theirs = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prefopt(
        *("score", "--reward-model", str(run), "--data", str(inputs / "pairs.jsonl")),
        *("--out", str(tmp_path / "scores.jsonl")),
        cache=tmp_path,
    )
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in scored] == list(range(1, 49))
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] + "<eos>" for row in rows(inputs)]
        with torch.no_grad():
            logits = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        assert [line[f"scores/{side}"] for line in scored] == pytest.approx(logits.tolist(), abs=1e-5)
        shifted = (logits + theirs.config.reward_bias).tolist()
        assert [line[f"rewards/{side}"] for line in scored] == pytest.approx(shifted, abs=1e-5)

    # The training rows' chosen completions score 0 on average.
    trained = {int(row.rpartition(":")[2]) for part in rows_by_step(run).values() for row in part}
    assert len(trained) == 38
    chosen = [line["rewards/chosen"] for line in scored if line["row"] in trained]
    assert np.mean(chosen) == pytest.approx(0, abs=1e-5)


def test_the_prompt_is_computed_once_and_the_loss_is_the_pairs_mean(inputs: Path, tmp_path: Path) -> None:
    """A ranking of four in one group, and its six pairs: the same loss before any update, a third of the prompts."""
    rankings = [
        {"prompt": row["prompt"], "completions": [row["chosen"], " It is fine", " So so.", row["rejected"]]}
        for row in rows(inputs)[:8]
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": a, "rejected": b}
        for row in rankings
        for a, b in combinations(row["completions"], 2)
    ]
    found = {}
    for name, lines in (("rankings", rankings), ("pairs", pairs)):
        data = write(tmp_path / f"{name}.jsonl", lines)
        more = ("--max-steps", "1", "--centering", "0.1", "--max-grad-norm", "1000")
        prefopt(*reward(inputs, tmp_path / name, *more, data=data, batch="100", eval_share="0"), cache=tmp_path)
        (found[name],) = metrics(tmp_path / name)
    for name in ("loss", "rewards/accuracies", "grad_norm"):
        assert found["rankings"][name] == pytest.approx(found["pairs"][name], rel=1e-4), name
    assert not (tmp_path / "pairs" / "outcome.json").exists()


def test_pairs_and_rankings_soft_labels_margins_and_weights_go_together(inputs: Path, tmp_path: Path) -> None:
    lines = rows(inputs)
    lines[1] |= {"probability": 0.6, "margin": 0.5, "weight": 2}
    lines[2] = {"prompt": lines[2]["prompt"], "completions": [lines[2]["chosen"], " It is", lines[2]["rejected"]]}
    data = write(tmp_path / "mixed.jsonl", lines)
    prefopt(*reward(inputs, tmp_path / "mixed", data=data), cache=tmp_path)
    prefopt(*reward(inputs, tmp_path / "plain"), cache=tmp_path)
    assert metrics(tmp_path / "mixed")[-1]["rows"] == 10 and metrics(tmp_path / "plain")[-1]["pairs"] == 10
    assert metrics(tmp_path / "mixed")[1]["loss"] != metrics(tmp_path / "plain")[1]["loss"]


@pytest.mark.parametrize(("how", "bias"), [("scale", None), ("none", 0.0)])
def test_scores_are_normalised_as_asked(inputs: Path, tmp_path: Path, how: str, bias: float | None) -> None:
    run = tmp_path / "run"
    prefopt(*reward(inputs, run, "--normalize", how, eval_share="0"), cache=tmp_path)
    scorer = load_reward_model(str(run), dtype=torch.float32, device=torch.device("cpu"))
    prompts = [row["prompt"] for row in rows(inputs)]
    rewards = np.concatenate([scorer.score(prompts, [row[s] for row in rows(inputs)]) for s in ("chosen", "rejected")])
    if how == "scale":
        assert (rewards.mean(), rewards.std()) == pytest.approx((0.0, 1.0), abs=1e-5)
        assert events(run, "normalized")[0]["gain"] != 1
    else:
        assert scorer.bias == bias and not events(run, "normalized")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "How", "completion": " good"}, "a demonstration"),
        ({"prompt": "How", "completion": " good", "label": True}, "a rating"),
    ],
)
def test_rows_that_compare_nothing_are_refused_by_name(
    inputs: Path, tmp_path: Path, row: dict[str, Any], named: str
) -> None:
    data = write(tmp_path / "rows.jsonl", [*rows(inputs)[:3], row])
    done = prefopt(*reward(inputs, tmp_path / "run", data=data), cache=tmp_path, expect=2)
    assert "learns from comparisons" in done.stderr and named in done.stderr and f"{data}:4" in done.stderr
    assert not (tmp_path / "run").exists()


def test_options_that_do_nothing_are_refused(inputs: Path, tmp_path: Path) -> None:
    done = prefopt(*reward(inputs, tmp_path / "run", "--samples", "2"), cache=tmp_path, expect=2)
    assert "no flag --samples" in done.stderr
    score = ("score", "--data", str(inputs / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--reward-model", "rm")
    for more, said in (
        (("--beta", "0.1"), "beta does nothing with reward_model"),
        (("--reference", "m"), "reference does nothing with reward_model"),
        (("--model", "m"), "model or reward_model"),
    ):
        assert said in prefopt(*score, *more, cache=tmp_path, expect=2).stderr
    assert "model or reward_model" in prefopt(*score[:-2], cache=tmp_path, expect=2).stderr


def test_a_wrong_target_or_kind_of_model_leaves_no_run_behind(inputs: Path, tmp_path: Path) -> None:
    more = ("--lora-rank", "2", "--lora-targets")
    assert "q_proj" in prefopt(*reward(inputs, tmp_path / "run", *more, "lm_head"), cache=tmp_path, expect=2).stderr
    assert "q_proj" in prefopt(*reward(inputs, tmp_path / "run", *more, "score"), cache=tmp_path, expect=2).stderr
    prefopt(*reward(inputs, tmp_path / "made", "--max-steps", "1"), cache=tmp_path)
    again = reward(inputs, tmp_path / "run")
    again[again.index("--model") + 1] = str(tmp_path / "made")
    assert "This is a reward model" in prefopt(*again, cache=tmp_path, expect=2).stderr
    assert not (tmp_path / "run").exists()


def test_the_report_draws_the_calibration(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prefopt(*reward(inputs, run), cache=tmp_path)
    page = (run / "report.html").read_text()
    assert "Reward model" in page and "How well it knows the better one" in page
    assert "<h3>Calibration</h3>" in page and "95% interval" in page and "<h3>accuracy" not in page
