"""Rewards by name: the built-in ones by hand, Python functions, and what is said when one fails."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.errors import RewardError
from prefopt.records import Message
from prefopt.rewards import Reward, open_reward

CPU = torch.device("cpu")
CONVERSATION = (Message("system", "Be kind."), Message("user", "Who?"))


def scores(spec: str, *completions: str) -> list[float]:
    return [float(s) for s in open_reward(spec, device=CPU).score(["p"] * len(completions), completions)]


def refusal(spec: str) -> RewardError:
    with pytest.raises(RewardError) as caught:
        open_reward(spec, device=CPU)
    return caught.value


@pytest.fixture
def lexicon(tmp_path: Path) -> str:
    file = tmp_path / "lexicon.txt"
    file.write_text("good\t1.9\t0.9\t[2, 1]\nBad\t-2.5\nno\t-1.2\t0.7\n\nself-confident\t2.5\n:)\t2.0\n")
    return str(file)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0.0),
        ("A cat sat here.", 0.0),
        ("Good, GOOD dog", 1.9 + 1.9),
        ("good and bad", 1.9 - 2.5),
        ("goodness, badly", 0.0),  # whole words alone
        ("self-confident :)", 2.5),
        ("not good", -1.9),
        ("It wasn't a very good film", -1.9),  # three words before
        ("It wasn’t a very good film", -1.9),
        ("It wasn't at all a good film", 1.9),  # four
        ("No. Good!", 1.9),  # another clause
        ("no good", -1.9),  # a negation has no valence of its own
        ("no", 0.0),
        ("not never bad", -2.5),  # turned twice
        ("never good or bad", -1.9 + 2.5),
    ],
)
def test_sentiment_by_hand(text: str, total: float, lexicon: str) -> None:
    # s / sqrt(s^2 + 15): for "good" 1.9 / sqrt(3.61 + 15) = 1.9 / 4.31393 = 0.44043.
    assert scores(f"sentiment:{lexicon}", text) == [pytest.approx(total / math.sqrt(total**2 + 15), abs=1e-12)]
    assert scores(f"sentiment:{lexicon}", "good") == [pytest.approx(0.44043, abs=1e-5)]


def test_sentiment_is_of_the_completion_alone(lexicon: str) -> None:
    reward = open_reward(f"sentiment:{lexicon}", device=CPU)
    assert reward.score(["not bad", ""], ["good", "good"]).tolist() == [pytest.approx(0.44043, abs=1e-5)] * 2


def test_length_by_hand() -> None:
    # Words 0, 2, 4, 6, 12 against 4: -4/4, -2/4, 0, -2/4, -8/4.
    texts = ["", "a b", " a\nb  c d ", "a b c d e f", "a " * 12]
    assert scores("length:4", *texts) == [-1.0, -0.5, 0.0, -0.5, -2.0]


def test_regex_is_searched_for() -> None:
    assert scores("regex:(?i)thank(s| you):?$", "Thank you", "No thanks:", "thank you!", "") == [1.0, 1.0, 0.0, 0.0]


def test_fingerprints_follow_the_content(lexicon: str, tmp_path: Path) -> None:
    def of(spec: str) -> str:
        return open_reward(spec, device=CPU).fingerprint

    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(lexicon).read_bytes())
    assert of(f"sentiment:{copy}") == of(f"sentiment:{lexicon}")
    copy.write_text("good\t2.0\n")
    assert of(f"sentiment:{copy}") != of(f"sentiment:{lexicon}")
    assert len({of("length:4"), of("length:5"), of("regex:4"), of("regex:5")}) == 4


@pytest.mark.parametrize(
    ("spec", "what", "more"),
    [
        ("length:", "The target length is not right.", "nothing"),
        ("length:0", "The target length is not right.", "0"),
        ("length:ten", "The target length is not right.", "ten"),
        ("regex:(", "The pattern is no regular expression.", "unterminated subpattern"),
        ("sentiment:none.txt", "The sentiment lexicon cannot be read.", "No such file"),
        ("sentiments:none.txt", "This is not a reward.", "sentiment:..., length:..., regex:..., package.module:f"),
        ("no_such_module:f", "There is no module 'no_such_module'.", "package.module:function"),
        ("prefopt.nothing:f", "There is no module 'prefopt.nothing'.", "package.module:function"),
        ("prefopt.errors:f", "'f' is not in the module.", "no function in"),
        ("prefopt.errors:__doc__", "'__doc__' is no function of the module.", "no function in"),
        (
            "prefopt.quickstart.corpus:truth",
            "'truth' is not in the module.",
            "functions reviews, openings, ground_truth, t",
        ),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_is_loaded(spec: str, what: str, more: str) -> None:
    error = refusal(spec)
    assert error.what == what and more in error.message()


@pytest.mark.parametrize(
    ("content", "line"), [(b"good\t1.9\nbad -2.5\n", ":2"), (b"good\tvery\n", ":1"), (b"\n", ""), (b"\xff\t1\n", "")]
)
def test_a_damaged_lexicon_is_refused_with_its_line(content: bytes, line: str, tmp_path: Path) -> None:
    file = tmp_path / "lexicon.txt"
    file.write_bytes(content)
    assert refusal(f"sentiment:{file}").where == f"{file}{line}"


# --- Python functions ---------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_function_of_the_current_folder(here: Path) -> None:
    (here / "judges").mkdir()
    (here / "judges" / "mine.py").write_text(
        "seen = []\n"
        "def words(prompts, completions):\n"
        "    seen.append((prompts, completions))\n"
        "    return [len(c.split()) for c in completions]\n"
    )
    reward = open_reward("judges.mine:words", device=CPU)
    found = reward.score(["How?", CONVERSATION], ("a b", "c"))
    assert reward.name == "judges.mine:words"
    assert found.dtype == np.float64 and found.tolist() == [2.0, 1.0]
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    assert sys.modules["judges.mine"].seen == [(["How?", turns], ["a b", "c"])]
    assert reward.score([], []).tolist() == [] and len(sys.modules["judges.mine"].seen) == 1


def test_a_functions_fingerprint_is_of_its_file_and_name(here: Path) -> None:
    source = "def f(prompts, completions):\n    return [0] * len(prompts)\ng = f\n"
    for name, text in {"one": source, "two": source, "three": source + "# longer\n"}.items():
        (here / f"{name}.py").write_text(text)
    specs = ("one:f", "one:g", "two:f", "three:f")
    prints = [open_reward(spec, device=CPU).fingerprint for spec in specs]
    assert len(set(prints)) == 4 and prints[0] == open_reward("one:f", device=CPU).fingerprint


def test_the_quickstarts_truth_is_a_reward_by_name() -> None:
    reward = open_reward("prefopt.quickstart.corpus:ground_truth", device=CPU)
    found = reward.score(["I saw this film.", "The plot was not"], [" It was bad and good and good.", " bad."])
    assert found.tolist() == [pytest.approx((2 - 1) / 3), 1.0]


@pytest.mark.parametrize(
    "answer",
    ["[1, 2.5]", "(1, 2.5)", "np.array([1, 2.5])", "torch.tensor([1, 2.5], requires_grad=True)",
     "torch.tensor([1, 2.5]).bfloat16()", "[np.float32(1), torch.tensor(2.5)]"],
)  # fmt: skip
def test_numbers_in_any_sequence_are_taken(answer: str, here: Path) -> None:
    (here / "any.py").write_text(f"import numpy as np, torch\ndef f(prompts, completions):\n    return {answer}\n")
    assert open_reward("any:f", device=CPU).score(["p", "q"], ["a", "b"]).tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ([1.0], "1 numbers for 2 completions"),
        ([1.0, 2.0, 3.0], "3 numbers for 2 completions"),
        (3.0, "a single number"),
        (None, "NoneType None"),
        ([1.0, None], "list [1.0, None]"),
        (["1", "2"], "list ['1', '2']"),
        ([[1.0], [2.0]], "list of shape (2, 1)"),
        ([[1.0], [2.0, 3.0]], "list [[1.0], [2.0, 3.0]]"),
        ({"a": 1, "b": 2}, "dict {'a': 1, 'b': 2}"),
    ],
)
def test_anything_but_a_number_for_each_is_refused(answer: object, got: str) -> None:
    reward = Reward("mine", "0", lambda prompts, completions: answer)
    with pytest.raises(RewardError) as caught:
        reward.score(["How?", CONVERSATION], ["well", "x" * 300])
    error = caught.value
    assert error.what == "The reward does not give a number for each completion." and error.where == "mine"
    assert str(error.got).startswith(got)
    assert "'How?' -> 'well'; user: 'Who?' -> 'xxx" in str(error.got) and len(str(error.got)) < 300


def test_a_reward_that_is_not_finite_names_its_completions() -> None:
    values = [0.0, math.nan, 1.0, math.inf, math.nan, -math.inf]
    reward = Reward("mine", "0", lambda prompts, completions: values)
    with pytest.raises(RewardError) as caught:
        reward.score([f"p{i}" for i in range(6)], [f"c{i}" for i in range(6)])
    assert caught.value.got == (
        "-inf, inf, nan for 4 of 6 completions: 'p1' -> 'c1'; 'p3' -> 'c3'; 'p4' -> 'c4'; and 1 more"
    )


def test_a_function_that_raises_is_named_with_its_line_and_cases(here: Path) -> None:
    (here / "raising.py").write_text(
        "import math\ndef f(prompts, completions):\n    return [inner(c) for c in completions]\n"
        "def inner(text):\n    return math.log(len(text))\n"
    )
    reward = open_reward("raising:f", device=CPU)
    assert reward.score(["p"], ["abc"]).tolist() == [pytest.approx(math.log(3))]
    with pytest.raises(RewardError) as caught:
        reward.score(["p", "q"], ["abc", ""])
    error = caught.value
    assert isinstance(error.__cause__, ValueError) and "ValueError" in str(error.got)
    assert error.where == f"reward raising:f, {here / 'raising.py'}:5"
    assert error.todo == "It was called for 2 completions: 'p' -> 'abc'; 'q' -> ''"


@pytest.mark.parametrize(
    ("source", "got", "line"),
    [
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'", 1),
        ("\n1 / 0\n", "ZeroDivisionError: division by zero", 2),
        ("def f(:\n", "SyntaxError: ", 1),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(source: str, got: str, line: int, here: Path) -> None:
    (here / "broken.py").write_text(source)
    error = refusal("broken:f")
    assert error.what == "The reward's module cannot be imported." and str(error.got).startswith(got)
    assert error.where == f"reward broken:f, {here / 'broken.py'}:{line}"


def test_errors_of_our_own_keep_their_traceback() -> None:
    def broken(prompts: object, completions: object) -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Reward("ours", "0", broken).score(["p"], ["c"])
