"""`prefopt ppo` through the command line on a tiny model: what must not change a run, and what must stop it."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from architectures import COMMON
from prefopt.train.checkpoint import load_latest
from runs import close, events, metrics, prefopt, rows_by_step, start, weights
from tiny import letters_tokenizer, model_of, save_tiny_model, write_pairs
from tokenizers_for_tests import byte_level

# A reward that does as the file `plan` says: after so many calls it kills, fails or answers wrongly, once.
REWARDS = """
import os
from pathlib import Path

def score(prompts, completions):
    scores = [sum(c in "aeiou" for c in text) - 0.1 * len(text) for text in completions]
    plan = Path("plan")
    if not plan.exists():
        return scores
    left, what = plan.read_text().split()
    if int(left):
        plan.write_text(f"{int(left) - 1} {what}")
        return scores
    plan.unlink()
    if what == "raise":
        raise ValueError("out of order")
    if what.isdigit():
        os.kill(os.getpid(), int(what))
    return {"nan": [*scores[:-1], float("nan")], "short": scores[1:]}.get(what, scores)


def stretched(prompts, completions):
    return [8 * value + 100 for value in score(prompts, completions)]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    (folder / "planned.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are found from the current folder on."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys, "path", list(sys.path))


def plan(calls: int, what: str) -> None:
    """After so many calls of the reward: one is the evaluation before the first step, then one a step."""
    Path("plan").write_text(f"{calls} {what}")


def ppo(out: Path, *more: str, model: str = "model", reward: str = "planned:score") -> list[str]:
    """`more` wins over what every run here has."""
    usual = {
        **{"--batch-prompts": "4", "--completions": "2", "--max-new-tokens": "8", "--ppo-epochs": "2", "--lr": "1e-3"},
        **{"--eval-share": "0.2", "--eval-every": "3", "--save-every": "2", "--epochs": "2", "--max-steps": "6"},
        **{"--samples": "2", "--sample-tokens": "8", "--tokens-per-batch": "4096"},
    }
    kept = [part for flag, value in usual.items() if flag not in more for part in (flag, value)]
    # Left as they are, unless asked for: the plans count how often the reward is called.
    scale = () if any("normalize-reward" in flag for flag in more) else ("--no-normalize-reward",)
    given = ("--model", model, "--data", "pairs.jsonl", "--reward", reward, "--out", str(out))
    return ["ppo", *given, *kept, *scale, *more]


def samples(run: Path) -> list[Any]:
    return [(event["step"], event["samples"]) for event in events(run, "samples")]


def same(run: Path, other: Path, file: str = "model.safetensors") -> None:
    """Bit for bit."""
    assert metrics(run) == metrics(other)
    assert (run / "model" / file).read_bytes() == (other / "model" / file).read_bytes()
    assert samples(run) == samples(other)
    assert rows_by_step(run) == rows_by_step(other)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        prefopt(*ppo(run), cache=run.parent)
    return run


def test_a_run_is_what_was_promised(whole: Path, tmp_path: Path) -> None:
    lines = metrics(whole)
    first, *_, last = (line for line in lines if line["split"] == "train")
    assert first["kl"] == 0 and last["kl"] > 0
    assert all(line["ratio/first"] == pytest.approx(1, abs=1e-5) for line in lines if line["split"] == "train")
    assert all(line["ratio/sampled"] == pytest.approx(1, abs=1e-5) for line in lines)
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 3, 6]
    assert {"reward", "kl", "entropy", "lengths/sampled", "finished", "prompts"} <= lines[0].keys()
    shown = events(whole, "samples")[0]["samples"]
    assert len(shown) == 4 and {one["kl"] for one in shown} == {0.0}
    for one in shown:
        assert one["reward"] == sum(c in "aeiou" for c in one["completion"]) - 0.1 * len(one["completion"])
    for rows in rows_by_step(whole).values():
        assert len(set(rows)) == 4
    assert "reward" in (whole / "report.html").read_text()


def test_normalized_rewards_have_no_scale_of_their_own(inputs: Path, tmp_path: Path) -> None:
    """Shifted and stretched, a reward trains the same policy; left as they are, the two train others."""
    found: dict[tuple[str, str], list[float]] = {}
    for kept in ("--normalize-reward", "--no-normalize-reward"):
        for reward in ("planned:score", "planned:stretched"):
            run = tmp_path / f"{kept}-{reward}".replace(":", "-")
            prefopt(*ppo(run, kept, "--max-steps", "3", reward=reward), cache=tmp_path)
            found[kept, reward] = [line["loss"] for line in metrics(run) if line["split"] == "train"]
    assert found["--normalize-reward", "planned:stretched"] == pytest.approx(
        found["--normalize-reward", "planned:score"], rel=1e-3
    )
    assert found["--no-normalize-reward", "planned:stretched"] != pytest.approx(
        found["--no-normalize-reward", "planned:score"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("more", "then"),
    [
        (("--target-kl", "0.1", "--kl-horizon", "40"), signal.SIGKILL),
        (("--lora-rank", "4", "--tokens-per-batch", "auto"), None),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    more: tuple[str, ...], then: signal.Signals | None, tmp_path: Path
) -> None:
    """Bit for bit: Ctrl-C in the middle of one rollout, kill -9 in that of a later one."""
    prefopt(*ppo(tmp_path / "whole", *more), cache=tmp_path)
    run = tmp_path / "broken"
    plan(3, str(signal.SIGINT.value))  # in step 2, which is finished and saved
    with pytest.raises(SystemExit, match="130"):
        prefopt(*ppo(run, *more), cache=tmp_path)
    assert not (run / "model").exists() and metrics(run)[-1]["step"] == 2
    if then is not None:
        plan(3, str(then.value))  # behind the evaluation at 3: in step 5
        assert start(["resume", str(run)], tmp_path).wait(120) == -then
    prefopt("resume", str(run), cache=tmp_path)
    assert [event["step"] for event in events(run, "resumed")] == ([3, 4] if then else [3])
    same(run, tmp_path / "whole", "adapter_model.safetensors" if "--lora-rank" in more else "model.safetensors")
    prices = [line["kl_coef"] for line in metrics(run) if line["split"] == "train"]
    assert (len(set(prices)) == 6) == ("--target-kl" in more)


def test_a_second_interruption_leaves_at_once(tmp_path: Path) -> None:
    reward = "import os, signal\ndef score(p, c):\n    for _ in 'ab':\n        os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "impatient.py").write_text(reward)
    sys.path.insert(0, str(tmp_path))
    prefopt(*ppo(tmp_path / "run", reward="impatient:score"), cache=tmp_path, expect=130)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_micro_batches_change_nothing(whole: Path, tmp_path: Path) -> None:
    prefopt(*ppo(tmp_path / "single", "--tokens-per-batch", "64"), cache=tmp_path)
    close(metrics(whole), metrics(tmp_path / "single"), 2e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "single")[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("calls", "what", "said", "step"),
    [
        (3, "nan", "nan for 1 of 8 completions", 2),
        (3, "raise", "ValueError: out of order", 2),
        # Behind steps 0, 1 and 2, in an evaluation, which has a sample of each of the 4 held-out prompts.
        (4, "short", "3 numbers for 4 completions", 3),
    ],
)
def test_a_reward_that_fails_costs_nothing(
    calls: int, what: str, said: str, step: int, whole: Path, tmp_path: Path
) -> None:
    """The run stops before the step, says where, and goes on to the same numbers."""
    run = tmp_path / "run"
    plan(calls, what)
    done = prefopt(*ppo(run, "--save-every", "4"), cache=tmp_path, expect=2)
    assert said in done.stderr and "'How is " in done.stderr and " -> " in done.stderr
    assert [line["step"] for line in metrics(run) if line["split"] == "train"] == list(range(step))
    checkpoint = load_latest(run / "checkpoints", on_damage=pytest.fail)
    assert checkpoint is not None and checkpoint.step == step, "what was done is not lost, though no save was due"
    prefopt("resume", str(run), cache=tmp_path)
    same(run, whole)


def test_a_mended_function_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a function may change while a run waits for it; that is said and kept."""
    monkeypatch.syspath_prepend(tmp_path)
    module, run = tmp_path / "mendable.py", tmp_path / "run"
    module.write_text("def score(prompts, completions):\n    return [len(text) / 0 for text in completions]\n")
    done = prefopt(*ppo(run, "--max-steps", "1", reward="mendable:score"), cache=tmp_path, expect=2)
    assert f"{module}:2" in done.stderr and "ZeroDivisionError" in done.stderr
    module.write_text("def score(prompts, completions):\n    return [len(text) / 10 for text in completions]\n")
    monkeypatch.delitem(sys.modules, "mendable")
    done = prefopt("resume", str(run), cache=tmp_path)
    assert "mendable:score has changed" in done.stderr
    assert len(events(run, "reward")) == 1 and len(events(run, "finished")) == 1


def test_too_far_from_the_reference_the_run_ends_and_stays_ended(tmp_path: Path) -> None:
    more = ("--lr", "1e-2", "--max-kl", "0.5", "--eval-every", "100", "--kl-coef", "0")
    done = prefopt(*ppo(tmp_path / "whole", *more, "--json"), cache=tmp_path)
    kl = [line["kl"] for line in metrics(tmp_path / "whole") if line["split"] == "train"]
    assert len(kl) < 6 and kl[-1] > 0.5 and max(kl[:-1]) <= 0.5
    printed = json.loads(done.stdout)
    assert printed["steps"] == len(kl) and printed["final"]["kl"] > 0
    assert "beyond max_kl 0.5" in done.stderr
    assert [event["step"] for event in events(tmp_path / "whole", "warned")] == [len(kl) - 1]

    plan(1 + len(kl), "raise")  # in the evaluation at the end
    prefopt(*ppo(tmp_path / "broken", *more), cache=tmp_path, expect=2)
    prefopt("resume", str(tmp_path / "broken"), cache=tmp_path)
    same(tmp_path / "broken", tmp_path / "whole")


def test_too_far_from_its_samples_a_batch_is_left(tmp_path: Path) -> None:
    """At the first minibatch nothing has moved; after one step everything has."""
    more = ("--max-update-kl", "1e-12", "--max-steps", "2", "--minibatches", "2", "--ppo-epochs", "4")
    prefopt(*ppo(tmp_path / "run", *more), cache=tmp_path)
    updates = [line["updates"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert updates == [2, 2], "of 8"


def test_the_value_model_has_its_own_learning_rate(tmp_path: Path) -> None:
    """Adam's first step is lr * g / (|g| + eps): at most lr, and nearly that where g is far above 1e-5."""
    one = ("--max-steps", "1", "--ppo-epochs", "1", "--save-every", "1", "--warmup", "0", "--value-coef", "1")
    prefopt(*ppo(tmp_path / "run", *one, "--value-lr", "1e-2"), cache=tmp_path)
    checkpoint = load_latest(tmp_path / "run" / "checkpoints", on_damage=pytest.fail)
    assert checkpoint is not None
    tensors = checkpoint.tensors("weights")
    assert tensors["value.head.weight"].abs().max() == pytest.approx(1e-2, rel=0.01)
    for name, rate in (("policy", 1e-3), ("value.backbone", 0)):  # below a head of zeros nothing moves yet
        assert (tensors[f"{name}.model.norm.weight"] - 1).abs().max() == pytest.approx(rate, rel=0.05), name


# --- rewards that are models, and policies of other kinds ---------------------------------------


def save_reward_model(folder: Path, tokenizer: Any, pad: int) -> None:
    """As transformers itself saves a sequence classifier."""
    torch.manual_seed(3)
    own = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(**{**COMMON, **own, "num_labels": 1, "bos_token_id": None})
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_reward_model_with_another_tokenizer(tmp_path: Path) -> None:
    theirs = byte_level("How", "Ġis", specials=("<|pad|>", "<|endoftext|>"))
    save_reward_model(tmp_path / "rm", theirs, theirs.get_vocab()["<|pad|>"])
    arguments = ppo(tmp_path / "run", "--max-steps", "1", reward=str(tmp_path / "rm"))
    done = prefopt(*arguments, cache=tmp_path)
    assert "a tokenizer of its own" in done.stderr
    assert metrics(tmp_path / "run")[0]["reward/std"] > 0
    arguments[arguments.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    done = prefopt(*arguments, "--value-from", "reward", cache=tmp_path, expect=2)
    assert "another vocabulary" in done.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize("more", [(), ("--lora-rank", "4")])
def test_a_value_model_from_the_reward_model(more: tuple[str, ...], tmp_path: Path) -> None:
    save_reward_model(tmp_path / "rm", letters_tokenizer(), 0)
    arguments = ppo(tmp_path / "run", "--value-from", "reward", "--max-steps", "2", *more, reward=str(tmp_path / "rm"))
    done = prefopt(*arguments, cache=tmp_path)
    assert "a tokenizer of its own" not in done.stderr
    checkpoint = load_latest(tmp_path / "run" / "checkpoints", on_damage=pytest.fail)
    assert checkpoint is not None
    trained = [name for name in checkpoint.tensors("weights") if name.startswith("value.")]
    assert "value.head.weight" in trained and not any("score" in name for name in trained)


def test_a_value_model_from_a_function_is_refused(tmp_path: Path) -> None:
    done = prefopt(*ppo(tmp_path / "run", "--value-from", "reward"), cache=tmp_path, expect=2)
    assert "reward planned:score" in done.stderr and "--value-from policy" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_without_pluggable_attention(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    model_of("BLOOM", vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    arguments = ppo(
        tmp_path / "run", "--max-steps", "2", "--samples", "0", "--sample-tokens", "96", model=str(tmp_path / "bloom")
    )
    done = prefopt(*arguments, cache=tmp_path)
    assert "padded path" in done.stderr and "sampling by transformers' generate" in done.stderr
    for line in metrics(tmp_path / "run"):
        assert line.get("ratio/first", 1) == pytest.approx(1, abs=1e-5)


def test_another_reference(tmp_path: Path) -> None:
    """With a reference of another architecture each model takes its own path, and KL does not start at 0."""
    tokenizer = letters_tokenizer()
    model_of("BLOOM", vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    done = prefopt(*ppo(tmp_path / "run", "--reference", str(tmp_path / "bloom"), "--max-steps", "1"), cache=tmp_path)
    assert "shared path" in done.stderr and "padded path" in done.stderr
    assert abs(metrics(tmp_path / "run")[0]["kl"]) > 0.1


def test_every_row_that_is_not_used_is_counted_and_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"How is {word}?"} for word in "abcdefgh"]
    rows += [{"prompt": "x" * 125}, {"prompt": " "}, rows[0]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ppo(tmp_path / "run", "--max-steps", "1")
    arguments[arguments.index("pairs.jsonl")] = str(tmp_path / "prompts.jsonl")
    done = prefopt(*arguments, cache=tmp_path)
    room = COMMON["max_position_embeddings"] - 8
    assert f"prompts.jsonl:9: prompt too long: 125 tokens, and there is room for {room}" in done.stderr
    assert "prompts.jsonl:10: empty prompt" in done.stderr
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert audit["reasons"] == {"prompt_too_long": 1, "empty_prompt": 1, "prompt_repeated": 1}
    assert (audit["rows"], audit["refused"], audit["train"] + audit["held_out"]) == (11, 2, 8)
