"""Where prompts end, what is trained on, what is cut: every expectation is a list of tokens written by hand.

Tokens of a completion that are not trained on stand in parentheses.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.audit import Audit
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import pack
from prefopt.data.tokenize import Renderer, tokenize
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.records import Comparison, Demonstration, Message, Rating, Record, Source
from tokenizers_for_tests import CHATML, GEMMA, LLAMA2, LLAMA3, MISTRAL, QWEN3, byte_level, sentencepiece_like

DATA = Path(__file__).parents[3] / "shared" / "data"
SOURCE = Source("rows.jsonl", 1, 1)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_HI = ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]


def turns(*pairs: str) -> tuple[Message, ...]:
    """turns("user:hi", "assistant:hello")."""
    found = []
    for pair in pairs:
        role, _, content = pair.partition(":")
        assert role in ("system", "user", "assistant", "tool")
        found.append(Message(role, content))  # type: ignore[arg-type]
    return tuple(found)


def chatml(template: str | None = CHATML, *words: str, **more: Any) -> PreTrainedTokenizerBase:
    settings: dict[str, Any] = {"specials": IM, "eos": "<|im_end|>", "template": template, **more}
    return byte_level("Ġthere", "there", "hello", "hi", "assistant", "user", *words, **settings)


def llama(template: str | None = None, **more: Any) -> PreTrainedTokenizerBase:
    return sentencepiece_like("▁there", "▁hello", "hello", "▁hi", template=template, **more)


def groups(
    tokenizer: PreTrainedTokenizerBase,
    *records: Record,
    template: Any = "auto",
    max_length: int = 200,
    max_prompt_length: int = 100,
    audit: Audit | None = None,
) -> list[CompletionGroup]:
    renderer = Renderer(tokenizer, template=template)
    audit = audit or counted(records)
    made = tokenize(records, renderer, max_length=max_length, max_prompt_length=max_prompt_length, audit=audit)
    return list(made)


def counted(records: Sequence[Record]) -> Audit:
    audit = Audit()
    for record in records:
        audit.row(record.source)
    return audit


def spelled(tokenizer: PreTrainedTokenizerBase, group: CompletionGroup) -> list[list[str]]:
    """Tokens of the prompt, then of each completion."""
    found = [list(tokenizer.convert_ids_to_tokens(group.prompt_ids.tolist()))]
    for completion in group.completions:
        tokens = tokenizer.convert_ids_to_tokens(completion.ids.tolist())
        found.append([t if on else f"({t})" for t, on in zip(tokens, completion.trainable, strict=True)])
    return found


def ids_of(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[t] for t in tokens]


def only(tokenizer: PreTrainedTokenizerBase, record: Record, template: Any = "auto") -> list[list[str]]:
    (group,) = groups(tokenizer, record, template=template)
    return spelled(tokenizer, group)


def refused(tokenizer: PreTrainedTokenizerBase, record: Record, **more: Any) -> tuple[str, str]:
    """Reason and detail of the one row's refusal."""
    audit = counted([record])
    assert groups(tokenizer, record, audit=audit, **more) == []
    (finding,) = audit.findings
    assert (finding.source, finding.state) == (SOURCE, "refused")
    assert audit.refused == 1
    return finding.reason, finding.detail


# --- chat templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        Comparison("hi", "hello", "hello there", SOURCE),
        Comparison(turns("user:hi"), turns("assistant:hello"), turns("assistant:hello there"), SOURCE),
        Comparison((), turns("user:hi", "assistant:hello"), turns("user:hi", "assistant:hello there"), SOURCE),
    ],
    ids=["strings", "messages", "shared first turn"],
)
def test_chatml_ends_at_end_of_turn_and_not_at_the_newline_behind_it(record: Comparison) -> None:
    assert only(chatml(), record) == [USER_HI, ["hello", "<|im_end|>"], ["hello", "Ġthere", "<|im_end|>"]]


def test_prompt_is_what_the_model_sees_at_inference() -> None:
    tokenizer = chatml()
    renderer = Renderer(tokenizer)
    seen = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert renderer.prompt_ids("hi").tolist() == renderer.prompt_ids(turns("user:hi")).tolist() == seen
    (group,) = groups(tokenizer, Demonstration("hi", "hello", SOURCE))
    np.testing.assert_array_equal(group.prompt_ids, renderer.prompt_ids("hi"))


def test_turns_that_are_not_the_assistants_are_not_trained_on() -> None:
    record = Demonstration(turns("user:hi"), turns("assistant:hello", "user:there", "assistant:hi"), SOURCE)
    between = [f"({t})" for t in ["Ċ", *USER_HI[:3], "there", *USER_HI[4:]]]
    assert only(chatml(), record) == [USER_HI, ["hello", "<|im_end|>", *between, "hi", "<|im_end|>"]]


def test_turns_behind_the_last_reply_are_left_out_and_said() -> None:
    record = Demonstration(turns("user:hi"), turns("assistant:hello", "user:there"), SOURCE)
    audit = counted([record])
    (group,) = groups(chatml(), record, audit=audit)
    assert spelled(chatml(), group) == [USER_HI, ["hello", "<|im_end|>"]]
    assert audit.mended == 1 and audit.reasons == {"trailing_turns_left_out": 1}


def test_llama3_writes_bos_once_and_the_completion_is_trimmed_as_the_template_does() -> None:
    specials = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
    tokenizer = chatml(LLAMA3, "ĊĊ", specials=specials, bos=specials[0], eos="<|end_of_text|>", adds_bos=True)
    prompt, chosen, rejected = only(tokenizer, Comparison("hi", "hello", "\nhello there ", SOURCE))
    # Before a word the byte-level pattern leaves the last blank of a run by itself: "ĊĊ" only at the end.
    head = ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "Ċ", "Ċ", "hi", "<|eot_id|>"]
    assert prompt == [*head, "<|start_header_id|>", "assistant", "<|end_header_id|>", "ĊĊ"]
    assert chosen == ["hello", "<|eot_id|>"]
    assert rejected == ["hello", "Ġthere", "<|eot_id|>"]
    stops = Renderer(tokenizer).stop_ids
    assert stops == frozenset(ids_of(tokenizer, "<|eot_id|>", "<|end_of_text|>"))


def test_llama2_leaves_the_space_behind_inst_to_the_model() -> None:
    prompt, chosen, rejected = only(llama(LLAMA2), Comparison("hi", "hello", " hello there", SOURCE))
    inst, end = ["▁", "[", "I", "N", "S", "T", "]"], ["▁", "[", "/", "I", "N", "S", "T", "]"]
    assert prompt == ["<s>", *inst, "▁hi", *end]
    assert chosen == ["▁hello", "▁", "</s>"]
    assert rejected == ["▁hello", "▁there", "▁", "</s>"]


def test_llama2_continues_over_several_turns_with_its_own_bos() -> None:
    record = Demonstration(turns("user:hi"), turns("assistant:hello", "user:there", "assistant:hi"), SOURCE)
    _, completion = only(llama(LLAMA2), record)
    inst, end = ["▁", "[", "I", "N", "S", "T", "]"], ["▁", "[", "/", "I", "N", "S", "T", "]"]
    between = [f"({t})" for t in ["<s>", *inst, "▁there", *end]]
    assert completion == ["▁hello", "▁", "</s>", *between, "▁hi", "▁", "</s>"]


def test_gemma_refuses_system_turns_row_by_row() -> None:
    tokenizer = sentencepiece_like(
        "model", "hello", specials=("<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>", eos="<eos>", template=GEMMA,
    )  # fmt: skip
    record = Demonstration(turns("system:be kind", "user:h"), turns("assistant:hello"), SOURCE)
    assert refused(tokenizer, record) == ("template_refused", "the chat template says: System role not supported")
    prompt, completion = only(tokenizer, Demonstration("h", "hello", SOURCE))
    assert prompt.count("<bos>") == 1 and prompt[-4:] == ["<start_of_turn>", "▁", "model", "<0x0A>"]
    assert completion == ["hello", "<end_of_turn>"]


def test_qwen3_thinking_block_of_the_last_turn_is_no_part_of_the_reply() -> None:
    tokenizer = chatml(QWEN3)
    assert only(tokenizer, Demonstration("hi", "hello", SOURCE)) == [USER_HI, ["hello", "<|im_end|>"]]
    record = Demonstration(turns("user:hi"), turns("assistant:hello", "user:there", "assistant:hi"), SOURCE)
    assert [t for t in only(tokenizer, record)[1] if t[0] != "("] == ["hello", "<|im_end|>", "hi", "<|im_end|>"]


def test_qwen3_keeps_thinking_the_row_has_and_refuses_it_in_a_turn_that_loses_it() -> None:
    tokenizer = chatml(QWEN3)
    (group,) = groups(tokenizer, Demonstration("hi", "<think>there</think>hello", SOURCE))
    assert tokenizer.decode(group.completions[0].ids) == "<think>\nthere\n</think>\n\nhello<|im_end|>"
    replies = turns("assistant:<think>there</think>hello", "user:there", "assistant:hi")
    assert refused(tokenizer, Demonstration(turns("user:hi"), replies, SOURCE))[0] == "template_not_prefix_stable"


OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
DROPPED = OPENED.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
CLOSED = OPENED.replace("{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (OPENED, "hello", "hello<|im_end|>"),
        (OPENED, "<think>\nhi</think>hello", "<think>\nhi</think>hello<|im_end|>"),
        (DROPPED, "<think>\nhi\n</think>hello", "hi\n</think>hello<|im_end|>"),
        (CLOSED, "hello", "\n</think>\n\nhello<|im_end|>"),
    ],
)
def test_thinking_that_the_generation_prompt_opens(template: str, content: str, expected: str) -> None:
    tokenizer = chatml(template)
    (group,) = groups(tokenizer, Demonstration("hi", content, SOURCE))
    assert str(tokenizer.decode(group.prompt_ids)).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(group.completions[0].ids) == expected


def test_mistral_moves_the_system_text_so_several_turns_are_refused_and_one_is_not() -> None:
    tokenizer = llama(MISTRAL)
    first = turns("system:hi", "user:hi")
    more = turns("assistant:hello", "user:hi", "assistant:there")
    assert refused(tokenizer, Demonstration(first, more, SOURCE))[0] == "template_not_prefix_stable"
    assert only(tokenizer, Demonstration(first, more[:1], SOURCE))[1][-1] == "</s>"
    reason, detail = refused(tokenizer, Demonstration(turns("user:hi", "user:hi"), more[:1], SOURCE))
    assert (reason, detail) == ("template_refused", "the chat template says: roles must alternate")


def test_a_header_the_generation_prompt_does_not_write_is_the_models_to_write() -> None:
    bare = CHATML.partition("{% if add_generation_prompt")[0]
    prompt, completion = only(chatml(bare), Demonstration("hi", "hello", SOURCE))
    assert prompt == USER_HI[:6]
    assert completion == ["<|im_start|>", "assistant", "Ċ", "hello", "<|im_end|>"]


def test_a_template_without_end_of_turn_token_gets_eos() -> None:
    tokenizer = chatml("{% for m in messages %}{{ m.content }}\n{% endfor %}", eos="<|endoftext|>")
    assert only(tokenizer, Demonstration("hi", "hello", SOURCE)) == [["hi", "Ċ"], ["hello", "<|endoftext|>"]]


def test_text_that_is_templated_already_is_refused_unless_plain() -> None:
    record = Demonstration("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello", SOURCE)
    reason, detail = refused(chatml(), record)
    assert reason == "already_templated" and "--template plain" in detail
    assert only(chatml(), record, template="plain") == [USER_HI, ["hello", "<|im_end|>"]]


def test_completions_without_reply_or_with_different_first_turns_are_refused() -> None:
    hi = turns("user:hi")
    assert refused(chatml(), Demonstration(hi, turns("user:there"), SOURCE))[0] == "no_assistant_turn"
    different = Comparison((), turns("user:hi", "assistant:hello"), turns("user:there", "assistant:hello"), SOURCE)
    assert refused(chatml(), different)[0] == "prompts_differ"
    assert refused(chatml(), Demonstration((), turns("assistant:hello"), SOURCE))[0] == "template_refused"


# --- plain text -----------------------------------------------------------------------------------------


def test_sentencepiece_completion_gains_no_space() -> None:
    tokenizer = llama()
    record = Comparison("hi", ", there", "hello", SOURCE)
    assert only(tokenizer, record) == [["<s>", "▁hi"], [",", "▁there", "</s>"], ["hello", "</s>"]]


def test_a_token_that_would_span_the_boundary_is_split_there() -> None:
    # Together "Say hello" holds "▁hello"; the prompt alone ends in "▁".
    tokenizer = llama()
    assert only(tokenizer, Comparison("hi ", "hello", " hello", SOURCE)) == [
        ["<s>", "▁hi", "▁"],
        ["hello", "</s>"],
        ["▁hello", "</s>"],
    ]
    tokenizer = chatml(None)
    assert only(tokenizer, Demonstration("hi ther", "e there", SOURCE)) == [
        ["hi", "Ġther"],
        ["e", "Ġthere", "<|im_end|>"],
    ]


def test_round_trip_with_newlines_accents_and_blanks() -> None:
    renderer, tokenizer = Renderer(llama()), llama()
    for prompt, completion in [
        ("hi\n", "\nhello"), ("hi  ", " there"), ("né", "é—ü"), ("", " hi"), ("hi", "\t<b>x</b>  y "),
    ]:  # fmt: skip
        (group,) = groups(tokenizer, Demonstration(prompt, completion, SOURCE))
        ids = [*group.prompt_ids.tolist(), *group.completions[0].ids.tolist()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
        assert renderer.decode(ids) == prompt + completion
        if prompt:
            assert renderer.decode(group.completions[0].ids) == completion


def test_bos_and_eos_that_the_text_brings_along_are_not_doubled() -> None:
    tokenizer = llama()
    assert only(tokenizer, Demonstration("", "<s>hello</s>\n", SOURCE)) == [["<s>"], ["▁hello", "</s>"]]
    assert only(tokenizer, Demonstration("<s>hi", " there", SOURCE)) == [["<s>", "▁hi"], ["▁there", "</s>"]]


def test_plain_text_stays_plain_where_there_is_a_template() -> None:
    assert only(chatml(), Demonstration("", "hi there", SOURCE)) == [["<|im_end|>"], ["hi", "Ġthere", "<|im_end|>"]]


def test_empty_prompt_is_bos_else_eos_else_the_first_token() -> None:
    record = Demonstration("", "hello there", SOURCE)
    assert only(llama(adds_bos=False), record) == [["<s>"], ["▁hello", "▁there", "</s>"]]
    assert only(chatml(None, eos="<|endoftext|>"), record)[0] == ["<|endoftext|>"]
    bare = chatml(None, eos=None)
    assert only(bare, record) == [["hello"], ["Ġthere"]]
    assert refused(bare, Comparison("", "hello", "there", SOURCE))[0] == "empty_prompt"
    assert refused(bare, Demonstration("", "hello", SOURCE))[0] == "nothing_to_train"


def test_conversations_without_template_are_human_assistant_text() -> None:
    prompt = turns("system:Be kind.", "user:hi", "assistant:hello", "user:there")
    record = Demonstration(prompt, turns("assistant:hi"), SOURCE)
    tokenizer = chatml(None)
    (group,) = groups(tokenizer, record)
    text = "Be kind.\n\nHuman: hi\n\nAssistant: hello\n\nHuman: there\n\nAssistant:"
    assert tokenizer.decode(group.prompt_ids) == text
    assert tokenizer.decode(group.completions[0].ids) == " hi<|im_end|>"


def test_rating_weight_and_margin_are_carried() -> None:
    pair = Comparison("hi", "hello", "there", SOURCE, weight=0.25, margin=1.5)
    weighted, rated = groups(llama(), pair, Rating("hi", " hello", True, SOURCE))
    assert (weighted.weight, rated.weight, len(rated.completions)) == (0.25, 1.0, 1)
    assert (weighted.margin, rated.margin) == (1.5, 0.0)
    assert pack([weighted, rated]).margins.tolist() == [1.5, 0.0]


# --- length ---------------------------------------------------------------------------------------------


def test_prompt_is_cut_first_and_keeps_its_bos_and_its_end() -> None:
    tokenizer = llama()
    record = Comparison("hi there hello hi", " hello", " there", SOURCE)
    audit = counted([record])
    (group,) = groups(tokenizer, record, max_length=6, max_prompt_length=3, audit=audit)
    assert spelled(tokenizer, group) == [["<s>", "▁hello", "▁hi"], ["▁hello", "</s>"], ["▁there", "</s>"]]
    assert audit.reasons == {"prompt_cut": 1} and (audit.kept, audit.mended) == (0, 1)


def test_completions_are_cut_next_and_lose_their_eos() -> None:
    tokenizer = llama()
    record = Comparison("hi there hello", " hello there hi there", " there", SOURCE)
    audit = counted([record])
    (group,) = groups(tokenizer, record, max_length=5, max_prompt_length=2, audit=audit)
    assert spelled(tokenizer, group) == [["<s>", "▁hello"], ["▁hello", "▁there", "▁hi"], ["▁there", "</s>"]]
    assert audit.reasons == {"prompt_cut": 1, "completion_cut": 1} and audit.mended == 1
    assert group.truncated


def test_a_row_that_just_fits_is_kept_whole() -> None:
    record = Demonstration("hi there", " hello", SOURCE)  # 3 + 2 tokens
    audit = counted([record])
    (group,) = groups(llama(), record, max_length=5, max_prompt_length=1, audit=audit)
    assert group.tokens == 5 and (audit.kept, audit.reasons) == (1, {})


def test_rows_that_cutting_or_tokenising_makes_useless_are_refused() -> None:
    tokenizer = llama()
    late = Comparison("hi", " hello hello hello there", " hello hello hello hi", SOURCE)
    assert refused(tokenizer, late, max_length=4, max_prompt_length=2)[0] == "identical_after_cut"
    assert refused(llama(LLAMA2), Comparison("hi", "hello", " hello ", SOURCE))[0] == "identical_tokens"
    with pytest.raises(ConfigError, match="no room"):
        groups(tokenizer, late, max_length=4, max_prompt_length=4)


# --- choices and errors ---------------------------------------------------------------------------------


def test_description_says_how_text_becomes_tokens() -> None:
    assert Renderer(chatml()).description == "chat template of the model"
    assert Renderer(llama()).description.startswith("no chat template: conversations are written as Human:/Assistant:")
    assert Renderer(chatml(), template="plain").description.startswith("chat template not used")
    assert "ends of completions are not trained" in Renderer(chatml(None, eos=None)).description
    assert "not trained" not in Renderer(chatml(eos=None)).description


def test_stop_ids_are_the_models_the_tokenizers_and_the_templates() -> None:
    tokenizer = chatml(eos="<|endoftext|>")
    ends = ids_of(tokenizer, "<|endoftext|>", "<|im_end|>")
    assert Renderer(tokenizer, eos_ids=frozenset({3})).stop_ids == frozenset({3, *ends})
    assert Renderer(tokenizer, template="plain").stop_ids == frozenset(ends[:1])


def test_chat_without_a_template_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(llama(), template="chat")


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages | length }}", {"a": CHATML, "b": CHATML}])
def test_templates_that_cannot_be_used_are_refused(template: Any) -> None:
    with pytest.raises(ModelError):
        Renderer(chatml(template))


def test_a_prompt_that_cannot_be_rendered_is_said() -> None:
    with pytest.raises(DataError, match="roles must alternate"):
        Renderer(llama(MISTRAL)).prompt_ids(turns("user:hi", "user:hi"))
    with pytest.raises(DataError, match="empty"):
        Renderer(chatml(None, eos=None)).prompt_ids("")


@pytest.mark.parametrize("chat", [False, True])
def test_a_completion_that_broke_off_has_no_end(chat: bool) -> None:
    """Only the marked side loses its end; what the model is taught to say is otherwise the same."""
    renderer = Renderer(chatml(CHATML) if chat else llama())
    whole = Comparison("Say it.", " yes", " no, not at all", SOURCE)
    (plain,) = renderer.groups([whole], Audit())
    (cut,) = renderer.groups([replace(whole, cut=(False, True))], Audit())
    assert not plain.truncated and cut.truncated
    assert cut.completions[0].ids.tolist() == plain.completions[0].ids.tolist()
    rejected, full = cut.completions[1].ids.tolist(), plain.completions[1].ids.tolist()
    assert full[: len(rejected)] == rejected and full[len(rejected)] in renderer.stop_ids
    assert not set(rejected) & renderer.stop_ids
    assert renderer.decode(rejected).strip() == "no, not at all"


# --- real files -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_stories_tokenizer_keeps_boundaries() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    assert only(tokenizer, Comparison("Once upon a time", ", there was", " there was", SOURCE)) == [
        ["<s>", "▁Once", "▁upon", "▁a", "▁time"],
        [",", "▁there", "▁was", "<s>"],
        ["▁there", "▁was", "<s>"],
    ]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_dialogues_survive_the_round_trip() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    records: list[Record] = []
    with gzip.open(DATA / "hh-rlhf" / "helpful-base.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row, line in zip(range(1, 61), lines, strict=False):
            head, marker, reply = json.loads(line)["chosen"].rpartition("\n\nAssistant:")
            records.append(Demonstration(head + marker, reply, Source("hh", row, row)))
    made = groups(tokenizer, *records, max_length=10**6, max_prompt_length=10**5)
    assert len(made) == 60
    for group, record in zip(made, records, strict=True):
        assert isinstance(record, Demonstration)
        ids = [*group.prompt_ids.tolist(), *group.completions[0].ids.tolist()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{record.prompt}{record.completion}"
