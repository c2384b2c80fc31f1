"""Each layout, row by row, and what is wrong with a row."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.formats import RECOGNISED, parse_row
from prefopt.data.turns import shared_beginning
from prefopt.records import Comparison, Demonstration, Message, Rating, Source

SOURCE = Source("f.jsonl", 1, 1)
SYSTEM, USER = Message("system", "Be kind."), Message("user", "Hi?")
GOOD, BAD = Message("assistant", "Hello!"), Message("assistant", "What.")


def _role(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _from(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


U, A, B = _role("user", "Hi?"), _role("assistant", "Hello!"), _role("assistant", "What.")
S, T = _role("system", "Be kind."), _role("tool", "42")
HH = "\n\nHuman: Hi?\n\nAssistant:"

PAIR = Comparison((USER,), (GOOD,), (BAD,), SOURCE)

PAIRS: list[tuple[str, dict[str, Any], Comparison]] = [
    (
        "preference pairs of text (prompt, chosen, rejected)",
        {"prompt": "Once", "chosen": " upon", "rejected": " more"},
        Comparison("Once", " upon", " more", SOURCE),
    ),
    (
        "preference pairs of text (prompt, chosen, rejected)",
        {"prompt": "", "chosen": "a ", "rejected": "b"},
        Comparison("", "a ", "b", SOURCE),
    ),
    ("preference pairs of messages (prompt, chosen, rejected)", {"prompt": [U], "chosen": [A], "rejected": [B]}, PAIR),
    ("preference pairs of messages (prompt, chosen, rejected)", {"prompt": "Hi?", "chosen": A, "rejected": B}, PAIR),
    (
        "preference pairs of messages (prompt, chosen, rejected)",
        {"prompt": [U], "chosen": "Hello!", "rejected": "What."},
        PAIR,
    ),
    (
        "preference pairs (chosen, rejected as whole message lists that begin with the prompt)",
        {"prompt": "Hi?", "chosen": [U, A], "rejected": [U, B], "messages": [U, A], "score_chosen": 8.0},
        PAIR,
    ),
    (
        "preference pairs (chosen, rejected as whole message lists that begin with the prompt)",
        {"prompt": [U], "chosen": [U, A], "rejected": [U, B]},
        PAIR,
    ),
    ("preference pairs with an implicit prompt (message lists)", {"chosen": [U, A], "rejected": [U, B]}, PAIR),
    (
        "preference pairs with an implicit prompt (message lists)",
        {"chosen": [S, U, A, U, A], "rejected": [S, U, A, U, B]},
        Comparison((SYSTEM, USER, GOOD, USER), (GOOD,), (BAD,), SOURCE),
    ),
    (
        # The tool answers differ: each is part of its completion, behind the call that both begin with.
        "preference pairs with an implicit prompt (message lists)",
        {"chosen": [U, A, T, A], "rejected": [U, A, _role("tool", "43"), B]},
        Comparison((USER,), (GOOD, Message("tool", "42"), GOOD), (GOOD, Message("tool", "43"), BAD), SOURCE),
    ),
    (
        "preference pairs with an implicit prompt (transcripts with Human:/Assistant: turns)",
        {"chosen": HH + " Hello!", "rejected": HH + " What."},
        PAIR,
    ),
    (
        "preference pairs with an implicit prompt (transcripts with Human:/Assistant: turns)",
        {
            "chosen": HH + " Hello!\n\nHuman: Oh \n\nAssistant: Yes",
            "rejected": HH + " Hello!\n\nHuman: Oh \n\nAssistant:No",
        },
        Comparison(
            (USER, GOOD, Message("user", "Oh ")), (Message("assistant", "Yes"),), (Message("assistant", "No"),), SOURCE
        ),
    ),
    (
        "preference pairs (prompt with Human:/Assistant: turns, chosen, rejected)",
        {"prompt": HH, "chosen": " Hello!", "rejected": " What."},
        PAIR,
    ),
    (
        "preference pairs (prompt with Human:/Assistant: turns, chosen, rejected)",
        {"prompt": HH, "chosen": HH + " Hello!", "rejected": HH + " What."},
        PAIR,
    ),
    (
        "preference pairs with an implicit prompt (the beginning that two texts share)",
        {"chosen": "The film was good fun.", "rejected": "The film was gory."},
        Comparison("The film was", " good fun.", " gory.", SOURCE),
    ),
    (
        "preference pairs (conversations with chosen and rejected)",
        {
            "conversations": [_from("system", "Be kind."), _from("human", "Hi?")],
            "chosen": _from("gpt", "Hello!"),
            "rejected": _from("gpt", "What."),
        },
        Comparison((SYSTEM, USER), (GOOD,), (BAD,), SOURCE),
    ),
    (
        "preference pairs (alpaca columns with chosen and rejected)",
        {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "system": "Be kind.", "weight": 0.5},
        Comparison(
            (SYSTEM, Message("user", "Add.\n1 2")),
            (Message("assistant", "3"),),
            (Message("assistant", "4"),),
            SOURCE,
            0.5,
        ),
    ),
    (
        "preference pairs (alpaca columns, output holds the better and the worse answer)",
        {"instruction": "Hi?", "input": "", "output": ["Hello!", "What."]},
        PAIR,
    ),
]


@pytest.mark.parametrize(("layout", "row", "record"), PAIRS)
def test_pairs(layout: str, row: dict[str, Any], record: Comparison) -> None:
    parsed = parse_row(row, SOURCE)
    assert parsed.refusal is None, parsed.refusal
    assert parsed.record == record
    assert parsed.layout == layout
    assert parsed.mends == ()


OTHERS: list[tuple[str, Any, Demonstration | Rating]] = [
    (
        "demonstrations (messages)",
        {"messages": [S, U, A, U, B]},
        Demonstration((SYSTEM, USER), (GOOD, USER, BAD), SOURCE),
    ),
    (
        "demonstrations (conversations)",
        {
            "conversations": [
                _from("human", "Hi?"),
                _from("function_call", "f()"),
                _from("observation", "42"),
                _from("gpt", "Hello!"),
            ]
        },
        Demonstration((USER,), (Message("assistant", "f()"), Message("tool", "42"), GOOD), SOURCE),
    ),
    (
        "demonstrations of text (prompt, completion)",
        {"prompt": "Once", "completion": " upon", "weight": "2"},
        Demonstration("Once", " upon", SOURCE, 2.0),
    ),
    (
        "demonstrations of messages (prompt, completion)",
        {"prompt": [U], "completion": [A]},
        Demonstration((USER,), (GOOD,), SOURCE),
    ),
    (
        "demonstrations (alpaca columns)",
        {"instruction": "Hi?", "input": None, "output": "Hello!", "history": [["Hi?", "What."]]},
        Demonstration((USER, BAD, USER), (GOOD,), SOURCE),
    ),
    ("demonstrations (text)", {"text": " Once upon "}, Demonstration("", " Once upon ", SOURCE)),
    ("demonstrations (text)", "Once upon", Demonstration("", "Once upon", SOURCE)),
    (
        "unpaired rows of text (prompt, completion, label)",
        {"prompt": "Once", "completion": " upon", "label": 0},
        Rating("Once", " upon", False, SOURCE),
    ),
    (
        "unpaired rows (messages, label)",
        {"messages": [U, A, U, B], "label": True},
        Rating((USER, GOOD, USER), (BAD,), True, SOURCE),
    ),
    (
        "unpaired rows (alpaca columns, label)",
        {"instruction": "Hi?", "output": "Hello!", "label": "False"},
        Rating((USER,), (GOOD,), False, SOURCE),
    ),
]


@pytest.mark.parametrize(("layout", "row", "record"), OTHERS)
def test_demonstrations_and_ratings(layout: str, row: Any, record: Demonstration | Rating) -> None:
    parsed = parse_row(row, SOURCE)
    assert parsed.refusal is None, parsed.refusal
    assert parsed.record == record
    assert parsed.layout == layout


REFUSED: list[tuple[str, Any]] = [
    ("identical_completions", {"prompt": "x", "chosen": "a", "rejected": "a"}),
    ("identical_completions", {"chosen": [U, A], "rejected": [U, A]}),
    ("identical_completions", {"chosen": HH + " a", "rejected": HH + " a"}),
    ("identical_completions", {"chosen": "one text", "rejected": "one text"}),
    ("empty_completion", {"prompt": "x", "chosen": " \n\t", "rejected": "a"}),
    ("empty_completion", {"chosen": HH, "rejected": HH + " a"}),
    ("empty_completion", {"prompt": [U], "chosen": [A], "rejected": []}),
    ("empty_completion", {"chosen": [], "rejected": [U, A]}),
    ("empty_completion", {"messages": [U, _role("assistant", "\u00a0")]}),
    ("empty_completion", {"text": "  "}),
    ("prompts_differ", {"chosen": HH + " a", "rejected": HH.replace("Hi", "Ho") + " b"}),
    ("prompts_differ", {"chosen": HH + " a", "rejected": HH + " a\n\nAssistant: b"}),
    ("prompts_differ", {"chosen": HH + " a", "rejected": "b"}),
    ("prompts_differ", {"chosen": [U, A], "rejected": [_role("user", "Ho?"), B]}),
    ("prompts_differ", {"chosen": [U, A, U, A], "rejected": [U, B, U, B]}),
    ("prompts_differ", {"chosen": [U, A], "rejected": [U, A, U, B]}),
    ("prompts_differ", {"prompt": "Ho?", "chosen": [U, A], "rejected": [U, B]}),
    ("prompts_differ", {"prompt": [U, A, U], "chosen": [U, A], "rejected": [U, B]}),
    ("wrong_type", 5),
    ("wrong_type", [U, A]),
    ("wrong_type", {"prompt": 1, "chosen": "a", "rejected": "b"}),
    ("wrong_type", {"prompt": "x", "chosen": 1.5, "rejected": "b"}),
    ("wrong_type", {"prompt": "x", "chosen": ["a"], "rejected": ["b"]}),
    ("wrong_type", {"chosen": [U, A], "rejected": "b"}),
    ("wrong_type", {"messages": "user: hi"}),
    ("wrong_type", {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}),
    ("wrong_type", {"messages": [U, {"role": "assistant", "content": [{"type": "image"}]}]}),
    ("wrong_type", {"prompt": "x", "completion": "y", "label": "maybe"}),
    ("wrong_type", {"prompt": "x", "completion": "y", "label": 0.5}),
    ("wrong_type", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": -0.5}),
    ("wrong_type", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "much"}),
    ("wrong_type", {"prompt": "x", "completion": "y", "weight": -1}),
    ("wrong_type", {"prompt": "x", "completion": "y", "weight": float("nan")}),
    ("wrong_type", {"prompt": "x", "completion": "y", "weight": True}),
    ("wrong_type", {"instruction": "x", "output": "y", "history": "z"}),
    ("wrong_type", {"instruction": "x", "output": ["a", "b", "c"]}),
    ("missing_columns", {"id": 4}),
    ("missing_columns", {}),
    ("missing_columns", {"prompt": "x", "chosen": "a", "rejected": None}),
    ("missing_columns", {"completion": "x"}),
    ("missing_columns", {"instruction": "x"}),
    ("missing_columns", {"question": "x", "chosen": "It is", "rejected": "It was"}),
    ("unknown_role", {"messages": [_role("narrator", "x"), A]}),
    ("roles_out_of_order", {"messages": [U, U, A]}),
    ("roles_out_of_order", {"messages": [A, U, A]}),
    ("roles_out_of_order", {"messages": [U, A, S, U, A]}),
    ("roles_out_of_order", {"messages": [U, T, A]}),
    ("roles_out_of_order", {"messages": [U, A, U], "label": True}),
    ("roles_out_of_order", {"prompt": [U], "chosen": [A, U], "rejected": [B]}),
    ("roles_out_of_order", {"prompt": [U], "chosen": [T, A], "rejected": [B]}),
    ("roles_out_of_order", {"prompt": [U, A], "chosen": [A], "rejected": [B]}),
    ("roles_out_of_order", {"chosen": HH + " a\n\nAssistant: b", "rejected": HH + " a\n\nAssistant: c"}),
    ("roles_out_of_order", {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c\n\nHuman: b"}),
    ("roles_out_of_order", {"messages": [S, U, A], "system": "Another."}),
    ("no_user_turn", {"prompt": [], "chosen": [A], "rejected": [B]}),
    ("no_user_turn", {"chosen": A, "rejected": B}),
    ("no_user_turn", {"instruction": "", "input": "", "output": "x"}),
    ("no_assistant_turn", {"messages": [U]}),
    ("no_assistant_turn", {"messages": []}),
]


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_refusals(reason: str, row: Any) -> None:
    parsed = parse_row(row, SOURCE)
    assert parsed.record is None
    assert parsed.refusal is not None
    assert parsed.refusal.reason == reason
    assert parsed.refusal.detail


def test_trailing_user_turn_of_a_demonstration_is_left_to_tokenising() -> None:
    parsed = parse_row({"messages": [U, A, U]}, SOURCE)
    assert parsed.record == Demonstration((USER,), (GOOD, USER), SOURCE)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    parsed = parse_row({"messages": [U, {"role": "assistant", "content": parts}]}, SOURCE)
    assert parsed.record == Demonstration((USER,), (GOOD,), SOURCE)


def test_nul_and_lone_surrogates_are_replaced_and_said() -> None:
    parsed = parse_row({"prompt": "a\0b", "chosen": "c\ud800", "rejected": "d\udfff\0", "id": "\0"}, SOURCE)
    assert parsed.record == Comparison("a\ufffdb", "c\ufffd", "d\ufffd\ufffd", SOURCE)
    assert set(parsed.mends) == {"nul_characters", "lone_surrogates"}


def test_a_pair_says_by_how_much_and_how_surely() -> None:
    row = {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "1.5", "probability": 0.7, "weight": 2}
    expected = Comparison("x", "y", "z", SOURCE, weight=2.0, probability=0.7, margin=1.5)
    assert parse_row(row, SOURCE).record == expected


def test_unused_columns_are_known() -> None:
    parsed = parse_row({"text": "x", "label": "pos", "id": 3}, SOURCE)
    assert set(parsed.used) == {"text"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ("", "", ""),
        ("one", "two", ""),
        ("same words here", "same words there", "same words"),
        ("prefix and more", "prefix", ""),  # nothing would be left of the second
        ("a b", "a b c", "a"),  # "a b" would leave the first nothing
        ("a b   ", "a b c", "a"),  # white space alone is nothing
        ("x  one", "x  two", "x"),  # white space goes with the completion
        ("Q: why?\nA: no", "Q: why?\nA: yes", "Q: why?\nA:"),
    ],
)
def test_shared_beginning_ends_at_a_word_and_leaves_both_a_completion(chosen: str, rejected: str, shared: str) -> None:
    assert shared_beginning(chosen, rejected) == shared
    assert shared_beginning(rejected, chosen) == shared


_CONTENT = st.one_of(
    st.none(), st.text(alphabet="ab \n\0\ud800", max_size=4), st.sampled_from([HH, HH + " a", 3, 0.5, True])
)
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", 7]), "content": _CONTENT}
)
_VALUE = st.one_of(_CONTENT, _TURN, st.lists(st.one_of(_TURN, _CONTENT), max_size=4))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(RECOGNISED)), _VALUE, max_size=6))
def test_any_row_is_a_record_or_a_reason(row: dict[str, Any]) -> None:
    parsed = parse_row(row, SOURCE)
    assert (parsed.record is None) != (parsed.refusal is None)
    if isinstance(parsed.record, Comparison):
        assert parsed.record.chosen != parsed.record.rejected
        assert type(parsed.record.prompt) is type(parsed.record.chosen) is type(parsed.record.rejected)


def test_a_finish_column_marks_what_broke_off() -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}

    def cut(values: dict[str, Any]) -> tuple[bool, ...]:
        record = parse_row(values, SOURCE).record
        assert record is not None
        return record.cut

    assert cut({**pair, "rejected_finish": "length"}) == (False, True)
    assert cut({**pair, "chosen_finish": "length", "rejected_finish": "stop"}) == (True, False)
    assert cut({**pair, "chosen_finish": "stop"}) == cut(pair) == ()
    assert cut({"prompt": "a", "completion": "b", "finish": "length"}) == (True,)
    assert cut({"prompt": "a", "completion": "b", "finish": "filtered"}) == (True,)
    refusal = parse_row({**pair, "chosen_finish": "cut"}, SOURCE).refusal
    assert refusal is not None and refusal.detail == "chosen_finish is 'cut', not stop, length or filtered"
