"""Samples, pairs made from them, comparisons by them, chat, and the story in small."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.evaluate import estimate
from prefopt.evaluate.estimate import Estimate
from prefopt.evaluate.policy import draw
from prefopt.evaluate.sampled import compare, pairs_from_samples
from prefopt.model.load import LoadedModel, load_model
from prefopt.model.sample import sample
from prefopt.quickstart import story
from prefopt.records import Content, Message
from prefopt.rewards import Reward
from prefopt.sampling.completions import Completed, Settings
from prefopt.sampling.local import LocalModel
from prefopt.serve.chat import chat
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path / "tiny")
    return path / "tiny"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def reward_of(number: Callable[[str], float]) -> Reward:
    """A reward of prompt and completion as one text."""

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        return [number(f"{p}{c}") for p, c in zip(prompts, completions, strict=True)]

    return Reward("test", "0", score)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_samples_follow_the_models_own_distribution(loaded: LoadedModel) -> None:
    prompt = ids(5, 6, 7)
    drawn = sample(
        loaded.model, [prompt], completions=4000, max_new_tokens=1, temperature=1.0, stop_ids=frozenset(), seed=0,
        batch_tokens=10**9,
    )  # fmt: skip
    counts = Counter(int(s.ids[0]) for s in drawn)
    with torch.no_grad():
        wanted = loaded.model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    for token in range(len(wanted)):
        p = float(wanted[token])
        assert abs(counts[token] / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5 + 1e-9


def test_greedy_decoding_by_hand_order_and_stops(loaded: LoadedModel) -> None:
    prompts = [ids(5, 6, 7, 8, 9), ids(3), ids(10, 11)]
    drawn = sample(loaded.model, prompts, max_new_tokens=4, temperature=0.0, stop_ids=frozenset(), seed=0)
    assert [s.prompt_index for s in drawn] == [0, 1, 2]
    for s, prompt in zip(drawn, prompts, strict=True):
        context = prompt.tolist()
        for token in s.ids.tolist():
            with torch.no_grad():
                assert int(loaded.model(torch.tensor([context])).logits[0, -1].argmax()) == token
            context.append(token)
    stop = int(drawn[0].ids[1])
    stopped = sample(loaded.model, prompts, max_new_tokens=4, temperature=0.0, stop_ids=frozenset({stop}), seed=0)[0]
    assert stopped.finished and stopped.ids.tolist()[-1] == stop and len(stopped.ids) <= 2


def test_pairs_are_best_against_worst_and_ties_are_counted(loaded: LoadedModel) -> None:
    prompts = ["How is x?", "What is y?"]
    drawn = draw(LocalModel.of(loaded), prompts, 3, Settings(5), "drawing")
    rows, tied = pairs_from_samples(prompts, drawn, reward_of(lambda text: float(len(text)) if "How" in text else 1.0))
    assert tied == 1 or len({len(s.ids) for s in drawn[0]}) == 1
    for row in rows:
        assert row["prompt"] == "How is x?" and len(row["chosen"]) > len(row["rejected"])


def test_a_model_against_itself_gains_nothing_and_pays_no_kl(folder: Path) -> None:
    result = compare(
        str(folder),
        str(folder),
        ["How is x?", "Who?"],
        reward_of(lambda text: float(len(text))),
        completions=2,
        max_new_tokens=4,
        seed=0,
    )
    assert result.gain.mean == 0 and result.kl.mean == pytest.approx(0, abs=1e-6)
    assert result.win_rate.mean == 0.5


def test_a_local_model_completes_texts_and_conversations(loaded: LoadedModel) -> None:
    model = LocalModel.of(loaded)
    prompts: list[Content] = ["How is x?", (Message("user", "Who?"),)]
    handed: dict[int, Sequence[Completed]] = {}
    found = model.complete(prompts, 3, Settings(9, temperature=0.8, seed=4), on_prompt=handed.__setitem__)
    assert handed == dict(enumerate(found)) and [len(mine) for mine in found] == [3, 3]
    for one in (one for mine in found for one in mine):
        ended = one.ids[-1] in model.renderer.stop_ids
        assert one.text == model.renderer.decode(one.ids) and one.finish == ("stop" if ended else "length")
        assert one.tokens == len(one.ids) == len(one.logprobs) == (len(one.text) + ended)


def test_a_stop_text_ends_a_completion_and_is_not_part_of_it(loaded: LoadedModel) -> None:
    model = LocalModel.of(loaded)
    (whole,) = model.complete(["How is x?"], 1, Settings(20, seed=1))[0]
    assert len(whole.text) > 6
    mark = whole.text[4:6]  # a letter a token
    at = whole.text.find(mark)
    (cut,) = model.complete(["How is x?"], 1, Settings(20, seed=1, stop=("@", mark)))[0]
    assert (cut.text, cut.finish, cut.tokens) == (whole.text[:at], "stop", at + 2)
    assert cut.ids.tolist() == whole.ids[: at + 2].tolist() and len(cut.logprobs) == at + 2


def test_intervals_resample_prompts() -> None:
    values = np.array([0.0, 1.0] * 50)
    found = Estimate.of(values, seed=0)
    assert found.mean == 0.5
    # Normal approximation: 0.5 +- 1.96 * 0.5 / sqrt(100) = 0.402 .. 0.598.
    assert found.low == pytest.approx(0.402, abs=0.015) and found.high == pytest.approx(0.598, abs=0.015)
    assert estimate._RESAMPLES >= 1000


def test_chat_answers_piped_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How is x?\n\n/help\nWho\n"))
    chat(str(folder), system=None, temperature=0.0, max_new_tokens=5, seed=0, template="auto")
    said = capsys.readouterr()
    assert len(said.out.strip("\n")) > 0
    assert "/reset" in said.err


def test_the_story_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"_TEXTS": 300, "_DEMONSTRATIONS": 60, "_PROMPTS": 40, "_TEST_PROMPTS": 10}
    for name, value in {**sizes, "_FRONTIER_PROMPTS": 12, "_FRONTIER_TEST": 4}.items():
        monkeypatch.setattr(story, name, value)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    report = story.run_story(tmp_path / "story", seed=1)
    assert "Did it work?" in report.read_text()
    for run in ("pretrain", "sft", "dpo"):
        assert (tmp_path / "story" / run / "model" / "model.safetensors").exists()
