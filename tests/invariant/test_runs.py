"""Through the command line on a tiny model: what must not change a run, does not."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM

from prefopt.run import RunFolder
from runs import close, events, metrics, prefopt, rows_by_step, start, wait_for_step, weights
from tiny import save_tiny_model, write_pairs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 48)
    return folder


def dpo(inputs: Path, out: Path, *more: str, lr: str = "1e-3") -> list[str]:
    return [
        *("dpo", "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--out", str(out)),
        *("--beta", "0.1", "--lr", lr, "--batch-pairs", "8", "--eval-share", "0.2", "--samples", "2"),
        *("--sample-tokens", "8", *more),
    ]


def test_micro_batches_change_nothing(inputs: Path, tmp_path: Path) -> None:
    """8 pairs at once equal 8 pairs one by one: the budget is memory, not mathematics."""
    prefopt(*dpo(inputs, tmp_path / "whole", "--tokens-per-batch", "100000"), cache=tmp_path)
    prefopt(*dpo(inputs, tmp_path / "single", "--tokens-per-batch", "64"), cache=tmp_path)
    close(metrics(tmp_path / "whole"), metrics(tmp_path / "single"), 2e-4)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "single")[name], tensor, atol=2e-4, rtol=1e-3)


def test_the_token_budget_is_found_once_and_kept(inputs: Path, tmp_path: Path) -> None:
    done = prefopt(*dpo(inputs, tmp_path / "auto"), cache=tmp_path)
    assert "tokens a micro-batch (auto" in done.stderr
    (found,) = events(tmp_path / "auto", "budget")
    asked = str(found["tokens"])
    done = prefopt(*dpo(inputs, tmp_path / "asked", "--tokens-per-batch", asked), cache=tmp_path)
    assert "(auto" not in done.stderr
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "asked")


@pytest.mark.parametrize("which", ["selective", "all"])
def test_checkpointed_activations_change_nothing(inputs: Path, tmp_path: Path, which: str) -> None:
    prefopt(*dpo(inputs, tmp_path / "kept"), cache=tmp_path)
    prefopt(*dpo(inputs, tmp_path / "recomputed", "--checkpoint-activations", which), cache=tmp_path)
    close(metrics(tmp_path / "kept"), metrics(tmp_path / "recomputed"), 1e-5)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--lora-rank", "4", "--lora-dropout", "0.1", "--checkpoint-activations", "selective"),
        ("--lora-rank", "4", "--lora-dropout", "0.1", "--lora-targets", "q_proj", "lm_head"),
        ("--dtype", "bfloat16"),
        ("--loss", "bco_pair", "--move-reference-every", "2", "--move-reference-share", "0.5"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(inputs: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Bit for bit, after SIGINT in the middle and a kill -9 later on."""
    long = ("--epochs", "4", "--save-every", "3", "--eval-every", "4", *more)
    prefopt(*dpo(inputs, tmp_path / "whole", *long), cache=tmp_path)

    run = tmp_path / "broken"
    process = start(dpo(inputs, run, *long), tmp_path)
    wait_for_step(run, process, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert not (run / "model").exists()

    process = start(["resume", str(run)], tmp_path)
    wait_for_step(run, process, 10)
    process.kill()
    process.wait()
    prefopt("resume", str(run), cache=tmp_path)

    assert metrics(run) == metrics(tmp_path / "whole")
    name = "adapter_model.safetensors" if "--lora-rank" in more else "model.safetensors"
    assert (run / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    assert rows_by_step(run) == rows_by_step(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_interrupted_as_soon_as_there_is_a_run_folder(inputs: Path, tmp_path: Path, recipe: str) -> None:
    run = tmp_path / "run"
    lock = RunFolder.lock

    def lock_and_interrupt(self: RunFolder) -> None:
        lock(self)
        signal.raise_signal(signal.SIGINT)

    data = ("--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--out", str(run))
    arguments = ("sft", *data, "--max-steps", "2") if recipe == "sft" else (*dpo(inputs, run), "--max-steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "lock", lock_and_interrupt)
        told = prefopt(*arguments, cache=tmp_path, expect=130).stderr.splitlines()
    assert told[-1] == f"interrupted before the first step; go on with: prefopt resume {run}"
    prefopt("resume", str(run), cache=tmp_path)
    assert RunFolder(run).finished


def test_a_run_is_what_was_promised(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = prefopt(*dpo(inputs, run, "--json"), cache=tmp_path)
    printed = json.loads(done.stdout)
    assert printed["run"] == str(run)

    lines = metrics(run)
    assert lines[0]["step"] == 0 and lines[0]["split"] == "eval"
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 1e-4
    train = [line for line in lines if line["split"] == "train"]
    assert train[-1]["rewards/margins"] > train[0]["rewards/margins"]
    assert train[0]["importance_weight"] == pytest.approx(0.5, abs=1e-5)

    seen = rows_by_step(run)
    everything = [row for rows in seen.values() for row in rows]
    assert len(everything) == len(set(everything)), "a pair twice within an epoch"

    loading: Any = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    trained, report = loading
    assert not report["missing_keys"]
    assert trained.get_input_embeddings().weight.shape[0] > 0
    assert (run / "report.html").stat().st_size > 0
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2


def test_another_beta_reuses_the_reference_cache(inputs: Path, tmp_path: Path) -> None:
    first = prefopt(*dpo(inputs, tmp_path / "a", "--seed", "0"), cache=tmp_path)
    arguments = dpo(inputs, tmp_path / "b", "--seed", "3")
    arguments[arguments.index("--beta") + 1] = "0.5"
    second = prefopt(*arguments, cache=tmp_path)
    assert "sequences to score" in first.stderr
    assert "found in the cache" in second.stderr


def test_score_agrees_with_a_run_and_with_itself(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prefopt(*dpo(inputs, run), cache=tmp_path)
    out = tmp_path / "scores.jsonl"
    prefopt(
        *("score", "--model", str(run), "--reference", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl")),
        *("--out", str(out), "--beta", "0.1"),
        cache=tmp_path,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 49))
    for line in lines:
        for side in ("chosen", "rejected"):
            gap = line[f"logps/{side}"] - line[f"ref_logps/{side}"]
            assert line[f"rewards/{side}"] == pytest.approx(0.1 * gap)
    accurate = sum(line["rewards/chosen"] > line["rewards/rejected"] for line in lines)
    assert accurate > 24


@pytest.mark.parametrize("targets", [(), ("--lora-targets", "lm_head")])
def test_lora_merges_into_the_same_scores(inputs: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    run = tmp_path / "lora"
    prefopt(*dpo(inputs, run, "--lora-rank", "4", *targets, lr="1e-2"), cache=tmp_path)
    assert metrics(run)[-1]["kl"] > 1e-4
    prefopt("merge", str(run), "--out", str(tmp_path / "merged"), cache=tmp_path)
    scores = []
    for name, model in (("adapter", run), ("merged", tmp_path / "merged")):
        out = tmp_path / f"{name}.jsonl"
        arguments = ("score", "--model", str(model), "--data", str(inputs / "pairs.jsonl"), "--out", str(out))
        prefopt(*arguments, cache=tmp_path)
        scores.append([json.loads(line)["logps/chosen"] for line in out.read_text().splitlines()])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_sft_learns_and_takes_pairs(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "sft"
    done = prefopt(
        *("sft", "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--out", str(run)),
        *("--lr", "1e-2", "--epochs", "4", "--batch-rows", "8", "--samples", "0", "--eval-share", "0.2"),
        cache=tmp_path,
    )
    assert "imitates the chosen completion of 48 pairs" in done.stderr
    held_out = [m["loss"] for m in metrics(run) if m["split"] == "eval"]
    assert held_out[-1] < held_out[0] - 0.5


def test_changed_data_is_refused_on_resume(inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text((inputs / "pairs.jsonl").read_text())
    run = tmp_path / "run"
    arguments = dpo(inputs, run, "--epochs", "20")
    arguments[arguments.index("--data") + 1] = str(data)
    process = start(arguments, tmp_path)
    wait_for_step(run, process, 2)
    process.terminate()
    assert process.wait(120) == 143
    data.write_text(data.read_text().replace("good", "Good", 1))
    done = prefopt("resume", str(run), cache=tmp_path, expect=2)
    assert str(data) in done.stderr and "changed" in done.stderr


def test_a_wrong_lora_target_leaves_no_run_behind(inputs: Path, tmp_path: Path) -> None:
    arguments = dpo(inputs, tmp_path / "run", "--lora-rank", "2", "--lora-targets", "w_q")
    done = prefopt(*arguments, cache=tmp_path, expect=2)
    assert "q_proj" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_array_that_breaks_at_its_end_leaves_nothing_behind(inputs: Path, tmp_path: Path) -> None:
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    data, out, cache = tmp_path / "pairs.json", tmp_path / "out", tmp_path / "cache"
    data.write_text("[" + ",\n".join(rows) + ',\n{"prompt": "How is it?", "chos')
    train = dpo(inputs, out)
    train[train.index("--data") + 1] = str(data)
    for arguments in (train, ["score", "--model", str(inputs / "model"), "--data", str(data), "--out", str(out)]):
        done = prefopt(*arguments, cache=cache, expect=2)
        assert f"{data}:{len(rows) + 1}" in done.stderr and "never closed" in done.stderr
        assert not done.stdout
    assert list(tmp_path.iterdir()) == [data]
    data.write_text(data.read_text() + 'en": " good", "rejected": " bad"}]')
    prefopt(*arguments, cache=cache)
    assert len(out.read_text().splitlines()) == len(rows) + 1


def test_a_run_with_relative_names_is_resumed_from_anywhere(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    run = tmp_path / "run"
    process = start(dpo(Path("."), run, "--epochs", "4"), tmp_path)
    wait_for_step(run, process, 2)
    process.terminate()
    assert process.wait(120) == 143
    monkeypatch.chdir(tmp_path)
    done = prefopt("resume", "run", "--json", cache=tmp_path)
    assert json.loads(done.stdout)["run"] == "run"
    assert Path.cwd() == tmp_path
    rows = {row for rows in rows_by_step(run).values() for row in rows}
    assert len(rows) < 48 and all(row.startswith("pairs.jsonl:") for row in rows)


def test_a_sweep_of_betas_runs_the_reference_once(inputs: Path, tmp_path: Path) -> None:
    """Counted in the model itself: the second and third run make only the passes of training."""
    passes = []
    for beta in ("0.1", "0.3", "0.5"):
        arguments = dpo(inputs, tmp_path / beta, "--max-steps", "2")
        arguments[arguments.index("--beta") + 1] = beta
        calls: list[str] = []
        hook = register_module_forward_hook(lambda module, *_, calls=calls: calls.append(type(module).__name__))
        prefopt(*arguments, cache=tmp_path)
        hook.remove()
        passes.append(calls.count("LlamaModel"))
    assert passes[0] > passes[1] == passes[2]
