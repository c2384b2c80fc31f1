"""What curation finds, on hand-made cases: each finds what it is for and leaves alone what only looks like it."""

import numpy as np
import pytest

from prefopt.curate.columns import Columns, tone
from prefopt.curate.leakage import EvaluationPrompt, EvaluationSet
from prefopt.curate.lengths import Interval, length_gap
from prefopt.curate.near import Near, NearIndex, jaccard
from prefopt.curate.oddities import oddities, script
from prefopt.curate.refusals import refusal
from prefopt.curate.text import WordIds, run_hashes, shingles, whole_hash, words
from prefopt.records import Source

QUESTION = "How does a lighthouse keep ships away from the rocks on a dark and stormy night"
FIRST = (
    "A lighthouse sends a strong beam over the water, and its rhythm of flashes tells captains which coast is near. "
    "Charts list the rhythm of every tower, so one glance is enough to know the place and to steer clear of the reef."
)
SECOND = (
    "Ships stay away since the keeper rings a bell. In older days fires of wood were lit on the hills, and wreckers "
    "are said to have lit false ones to lead merchants astray, though there is little evidence that they ever did so."
)


def set_of(text: str) -> np.ndarray:
    return shingles(text, run_hashes(WordIds().of(words(text)), 5))


def near(*rows: tuple[str, str, tuple[str, ...]]) -> list[Near]:
    index = NearIndex()
    for kind, prompt, completions in rows:
        index.add(kind, set_of(prompt), [set_of(text) for text in completions])
    return list(index.found())


# --- words -----------------------------------------------------------------------------------------


def test_words_have_no_case_punctuation_or_composition() -> None:
    assert words("Don't STOP — it's a well-known cafe\u0301!") == words("don t stop it s a well known CAF\u00c9")
    assert words("\uff21\uff22\uff23 \u7532\u4e59") == ["abc", "\u7532", "\u4e59"]  # full width; no space between words
    assert words("What is 5 + 3?") == ["what", "is", "5", "+", "3"] != words("What is 5 - 3?")
    assert words("...") == []


def test_hashes_of_runs_are_those_of_the_words_in_them() -> None:
    ids = WordIds().of(["a", "b", "c", "a", "b"])
    runs = run_hashes(ids, 6)
    assert [len(hashes) for hashes in runs] == [0, 5, 4, 3, 2, 1, 0]
    assert runs[2][0] == runs[2][3] != runs[2][1]  # "a b" stands twice
    assert [int(runs[n][0]) for n in range(1, 6)] == [whole_hash(ids[:n]) for n in range(1, 6)]
    assert whole_hash(ids[:2]) != whole_hash(ids[1::-1])  # the order of words counts


def test_jaccard_by_hand() -> None:
    # "a b c d e f" has the runs abcde, bcdef; "a b c d e g" abcde, bcdeg: 1 shared of 3.
    assert jaccard(set_of("a b c d e f"), set_of("a b c d e g")) == pytest.approx(1 / 3)
    assert jaccard(set_of("yes"), set_of("Yes!")) == 1
    assert jaccard(set_of("!!!"), set_of("???")) == 0  # without words a text is itself
    assert jaccard(set_of(""), set_of("")) == 1


# --- near duplicates -------------------------------------------------------------------------------


def test_a_near_duplicate_is_found() -> None:
    # 43 words, so 39 runs; one word more at the end makes 40, of which 39 are shared.
    assert len(words(FIRST)) == 43
    (found,) = near(("pair", QUESTION, (FIRST, SECOND)), ("pair", QUESTION + "?", (FIRST + " Always!", SECOND)))
    assert (found.place, found.of, found.opposite) == (1, 0, False)
    assert found.similarity == pytest.approx(39 / 40)


def test_similar_rows_are_no_near_duplicates() -> None:
    other = FIRST.replace("lighthouse", "beacon").replace("rhythm", "pattern").replace("captains", "pilots")
    assert near(("pair", QUESTION, (FIRST, SECOND)), ("pair", QUESTION, (other, SECOND))) == []
    assert near(("pair", QUESTION, (FIRST, SECOND)), ("pair", SECOND, (FIRST, SECOND))) == []  # another question
    assert near(("pair", QUESTION, (FIRST, SECOND)), ("ranking", QUESTION, (FIRST, SECOND))) == []
    assert near(("prompt", "Add 5 and 3.", ()), ("prompt", "Add 5 and 4.", ())) == []


def test_a_dialogue_with_other_answers_is_no_near_duplicate() -> None:
    history = " ".join((QUESTION, FIRST, SECOND))
    assert near(("pair", history, ("Yes, always.", "No.")), ("pair", history, ("It depends.", "Never."))) == []


def test_nearly_the_opposite_is_told_apart() -> None:
    pairs = near(("pair", QUESTION, (FIRST, SECOND)), ("pair", QUESTION, (SECOND + " Indeed.", FIRST)))
    assert [(n.place, n.of, n.opposite) for n in pairs] == [(1, 0, True)]
    rated = near(("good", QUESTION, (FIRST,)), ("bad", QUESTION, (FIRST + " Indeed.",)))
    assert [(n.place, n.of, n.opposite) for n in rated] == [(1, 0, True)]


def test_each_copy_is_near_the_first() -> None:
    rows = [("demonstration", QUESTION, (FIRST + end,)) for end in ("", " Yes.", " Indeed.")]
    assert [(n.place, n.of) for n in near(*rows)] == [(1, 0), (2, 0)]


def test_recall_is_what_the_bands_promise() -> None:
    # Of sets with a Jaccard index of 0.85 or more, 1 - (1 - 0.85^8)^20 = 0.998 are found, at least.
    rng = np.random.default_rng(0)
    index, pairs = NearIndex(), 300
    for _ in range(pairs):
        prompt, text = (np.sort(rng.choice(2**32, 185, replace=False)).astype(np.uint32) for _ in range(2))
        index.add("good", prompt[:170], [text[:170]])
        index.add("good", prompt[15:], [text[15:]])  # 155 of 185 are shared: 0.838
    found = list(index.found())
    assert all(n.of == n.place - 1 for n in found)
    assert len(found) >= 0.97 * pairs


# --- leaks -----------------------------------------------------------------------------------------

SHORT, MIDDLE = "Why is the sky blue?", "Name the three largest moons of Jupiter, largest first."
EVALUATION = [EvaluationPrompt(Source("bench.jsonl", n, n), t) for n, t in enumerate((QUESTION, SHORT, MIDDLE, "?"), 1)]


def leaks(prompt: str, completion: str = "") -> list[tuple[str, str, int]]:
    ids = WordIds()
    asked, said = (ids.of(words(text)) for text in (prompt, completion))
    parts = [("prompt", run_hashes(asked, 13)), ("chosen", run_hashes(said, 13))]
    found = EvaluationSet(EVALUATION, ids).leaks(Source("pairs.jsonl", 7, 7), [asked], parts)
    return [(leak.part, leak.kind, leak.prompt.source.row) for leak in found]


def test_planted_leaks_are_found() -> None:
    assert leaks(f"  {QUESTION.upper()}?!  ") == [("prompt", "exact", 1)]
    assert leaks("why is the sky BLUE") == [("prompt", "exact", 2)]
    thirteen = " ".join(QUESTION.split()[2:15])
    assert leaks(f"Tell me: {thirteen}, please.") == [("prompt", "run", 1)]
    assert leaks("Write a quiz.", f"1. {MIDDLE} 2. What is rain?") == [("chosen", "run", 3)]


def test_what_is_no_leak() -> None:
    twelve = " ".join(QUESTION.split()[2:14])
    assert leaks(f"Tell me: {twelve}, please.") == []
    assert leaks(f"My child asks: {SHORT}") == []  # 5 words within other text are too common
    assert leaks("Name the three largest moons of Saturn, largest first.") == []
    assert leaks("?") == leaks("") == []


# --- lengths ---------------------------------------------------------------------------------------


def test_length_gap_by_hand() -> None:
    # Gaps 2, 2, -1, 0: mean 3/4. The better one is longer in 2, equal in 1: (1 + 1 + 0 + 1/2) / 4.
    found = length_gap([5, 6, 3, 4], [3, 4, 4, 4], [0, 1, 2, 3], "words")
    assert (found.pairs, found.prompts, found.equal) == (4, 4, 1)
    assert (found.better, found.worse) == (4.5, 3.75)
    assert found.gap.value == 0.75
    assert found.longer_is_better.value == 0.625
    assert found.gap.low < 0.75 < found.gap.high


def test_intervals_are_over_prompts() -> None:
    # One prompt has all pairs: it is drawn every time, so nothing varies.
    assert length_gap([5, 6, 3], [3, 4, 4], [9, 9, 9], "words").gap == Interval(1.0, 1.0, 1.0)
    # 2 prompts of 100 pairs each, gaps 1 and 3: a sample has mean 1, 2 or 3 (1/4, 1/2, 1/4).
    better, prompts = [1] * 100 + [3] * 100, [0] * 100 + [1] * 100
    assert length_gap(better, [0] * 200, prompts, "words").gap == Interval(2.0, 1.0, 3.0)
    apart = length_gap(better, [0] * 200, range(200), "words").gap  # standard error 1 / sqrt(200) = 0.071
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * 0.0707, rel=0.1)


# --- refusals and oddities -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I\u2019m sorry, but I can\u2019t provide instructions for this.",
        "As an AI language model, I have no opinion.",
        "Thank you for asking. I am not able to answer medical questions.",
        "I must decline.",
    ],
)
def test_refusals(text: str) -> None:
    assert refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is how you can do it.",
        "I cannot believe how good this is.",
        "He said that I cannot swim.",
        "Some say " + "very " * 60 + "long stories end. I cannot say more.",
        "",
    ],
)
def test_no_refusals(text: str) -> None:
    assert refusal(text) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It\u00e2\u20ac\u2122s late", ["mojibake"]),
        ("caf\u00c3\u00a9", ["mojibake"]),
        ("It\u00e2\x80\x99s late", ["mojibake", "control_characters"]),  # read as Latin-1
        ("the end.\u00e2\u20ac", ["mojibake"]),  # a closing quote whose last byte was dropped
        (
            "\u00d0\u0178\u00d1\u20ac\u00d0\u00b8\u00d0\u00b2\u00d0\u00b5\u00d1\u201a",
            ["mojibake"],
        ),  # a Russian greeting
        ("\u00f0\u0178\u02dc\u20ac", ["mojibake"]),  # a smiling face
        ("a \ufffd b", ["replacement_characters"]),
        ("a\x08b", ["control_characters"]),
        ("\ufeffHello", ["control_characters"]),
        ("p\u0430ypal", ["mixed_script_words"]),  # the second letter is Cyrillic
        ("tab\tline\r\n", []),
        ("\u201cCAF\u00c9\u201d \u2014 \u00dcber M\u00fcnchen, S\u00c3O PAULO: 5 \u20ac, na\u00efve", []),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, Anna", []),
        ("\u0394x = 5 \u03bcm", []),
        ("\U0001f469\u200d\U0001f4bb", []),  # an emoji joined of two
    ],
)
def test_oddities(text: str, found: list[str]) -> None:
    assert oddities(text) == found


def test_every_mojibake_of_common_letters_is_found() -> None:
    letters = (
        "\u00e0\u00e9\u00ef\u00f1\u00fc\u00df\u00c4\u00c9\u201c\u201d\u2018\u2019\u2026\u2013\u2014\u20ac\u00a3\u00b0"
    )
    for letter in letters:
        broken = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in letter.encode())
        assert "mojibake" in oddities(f"a {broken} b"), letter
        assert "mojibake" not in oddities(f"a {letter} b"), letter


def test_scripts() -> None:
    assert script("Hello, \u041c\u0438\u0440") == "latin"
    assert script("\u041f\u0440\u0438\u0432\u0435\u0442, Bob") == "cyrillic"
    assert script("\u4f60\u597d") == "cjk"
    assert script("\u3053\u3093\u30cb\u30c1") == "kana"
    assert script("1 + 1 = 2") == script("") == ""


# --- columns ---------------------------------------------------------------------------------------


def columns_of(*rows: object) -> Columns:
    columns = Columns()
    for n, row in enumerate(rows, 1):
        columns.add(Source("pairs.jsonl", n, n), row)
    return columns


def test_origins_are_counted() -> None:
    columns = columns_of(
        {"source": "flan", "chosen-model": "a"}, {"source": "flan"}, {"source": "evol"}, ["no", "columns"]
    )
    assert columns.origins == {"source": {"flan": 2, "evol": 1}, "chosen-model": {"a": 1}}


def test_a_column_of_texts_is_no_origin() -> None:
    assert columns_of(*({"source": f"text {n}"} for n in range(1001))).origins == {}


def test_scores_by_hand() -> None:
    rows = [{"score_chosen": c, "score_rejected": r} for c, r in ((5, 1), ("3", 3), (1, 4), (None, 2), ("?", 2))]
    columns = columns_of(*rows)
    scores = columns.scores["score_chosen"]
    assert (scores.rows, scores.odd, scores.mean) == (3, 1, 3)  # 5, 3, 1
    assert scores.sd == pytest.approx((8 / 3) ** 0.5)
    assert scores.quartiles == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert columns.order == {"higher": 1, "equal": 1, "lower": 1}
    assert [source.row for source in columns.reversed] == [3]
    assert columns_of({"scores": [1, 3, True]}).scores["scores"].odd == 1


def test_scores_against_critiques() -> None:
    assert tone("The answer is incorrect and fails to mention the reef.") == -1
    assert tone("Clear and helpful.") == 1
    assert tone("Clear, but incorrect and misleading.") == tone("Fine.") == tone("Incorrect.") == 0
    blame, praise = "Incorrect and unhelpful.", "Clear and helpful."
    rows = [(10, blame), (9, blame), (8, blame), (1, praise), (3, praise), (10, praise), (1, blame), (5, "Fine.")]
    columns = columns_of(*({"overall_score": score, "critique": critique} for score, critique in rows))
    # Scores go from 1 to 10: a fifth is 1.8, so 8.2 and above is high, 2.8 and below is low.
    assert [(c.source.row, c.score, c.tone) for c in columns.conflicts()] == [(1, 10, -1), (2, 9, -1), (4, 1, 1)]
    assert list(columns_of({"score": 3, "critique": blame}, {"score": 3, "critique": praise}).conflicts()) == []
