"""A reward model's scores are transformers' own: packed, padded, saved and loaded, with its own tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from architectures import ARCHITECTURES
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.tokenize import Renderer
from prefopt.errors import ModelError, RewardError
from prefopt.model.load import LoadedModel, load_model, save_model
from prefopt.model.logprobs import sequence_ids
from prefopt.model.reward import (
    RewardModel,
    choose_score_path,
    load_reward_model,
    sequence_scores,
    to_reward_model,
    transformers_scores,
)
from prefopt.records import Content, Message
from tiny import letters_tokenizer, model_of, random_groups, save_tiny_model
from tokenizers_for_tests import CHATML, byte_level

CPU = torch.device("cpu")
FAMILIES = ["Llama", "GPT-2", "Qwen2", "Gemma 2", "GPT-NeoX", "Mistral with windows", "OPT", "BLOOM", "GPT-J"]
LENGTHS = [(5, 4, 7), (9, 6, 3, 8), (3, 11, 2)]


def reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    loaded = LoadedModel(model, tokenizer, "sha256:0", "sha256:0", "sha256:0", "tiny")
    return to_reward_model(loaded, Renderer(tokenizer), template="auto", seed=0)


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, bias: float = 0.0) -> RewardModel:
    made = reward_model(model, tokenizer)
    made.config.reward_bias = bias
    save_model(made, tokenizer, folder)
    return load_reward_model(str(folder), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_gives_the_twins_scores_and_gradients(family: str) -> None:
    """Against transformers' classifier, one sequence at a time, and its autograd."""
    batch = pack(random_groups(LENGTHS))
    pull = torch.linspace(-1, 1, batch.sequences)
    model = reward_model(model_of(family), letters_tokenizer())
    truth = transformers_scores(model, batch)
    assert truth.std() > 1e-2
    twin = twin_gradients(model, batch, pull)
    for path in ARCHITECTURES[family].paths:
        scores = sequence_scores(model, batch, path)
        assert (scores - truth).abs().max() <= 1e-5
        model.zero_grad()
        (scores @ pull).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, twin[name], atol=2e-5, rtol=1e-3, msg=f"{path} {name}")
    assert choose_score_path(model, batch).path == ARCHITECTURES[family].paths[0]


def twin_gradients(model: PreTrainedModel, batch: PackedBatch, pull: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.set_attn_implementation("eager")
    for ids, weight in zip(sequence_ids(batch), pull, strict=True):
        (weight * model(input_ids=ids[None], use_cache=False).logits[0, 0]).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


PROMPTS = ["How is it?", "Why", "How is it?", "Why", "And then?"]
COMPLETIONS = [" good", " because of the weather", " not so good!", " no", " nothing"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_gives_the_same_scores_in_transformers(family: str, tmp_path: Path) -> None:
    """One by one and as the tokenizer pads them; the padding token was the end of text, as in GPT-2."""
    scorer = saved(model_of(family), letters_tokenizer(pad="<eos>"), tmp_path / "rm", bias=-0.75)
    scores = scorer.score(PROMPTS, COMPLETIONS)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    attention = "eager" if family == "Gemma 2" else None  # transformers' default loses its soft cap
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", attn_implementation=attention).eval()
    assert (theirs.config.num_labels, theirs.config.reward_bias) == (1, -0.75)
    texts = [p + c + "<eos>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        single = [theirs(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
        padded = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert np.abs(scores - (torch.stack(single).numpy() - 0.75)).max() <= 1e-5
    assert np.abs(scores - (padded.numpy() - 0.75)).max() <= 1e-5
    assert np.ptp(scores) > 1e-2


def test_the_head_is_drawn_as_the_papers_do() -> None:
    """2,048 wide: a standard deviation of 1 / sqrt(2049) = 0.0221; the same seed gives the same head."""
    changes = {"hidden_size": 2048, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = [reward_model(model_of("Llama", **changes), letters_tokenizer()).state_dict() for _ in range(2)]
    assert float(heads[0]["score.weight"].std()) == pytest.approx(2049**-0.5, rel=0.05)
    assert torch.equal(heads[0]["score.weight"], heads[1]["score.weight"])
    assert "score.bias" not in heads[0]


def test_the_padding_token_is_the_tokenizers_own_or_a_new_one() -> None:
    own = reward_model(model_of("Llama"), letters_tokenizer())
    assert own.config.pad_token_id == 0 and len(embedding(own)) == 97
    for pad in (None, "<eos>"):
        tokenizer = letters_tokenizer(pad=pad)
        room = reward_model(model_of("Llama"), tokenizer)
        assert room.config.pad_token_id == len(tokenizer) - 1 == tokenizer.pad_token_id
        assert len(embedding(room)) == 97, "there was a row for it"
        tokenizer = letters_tokenizer(pad=pad)
        full = reward_model(model_of("Llama", vocab_size=len(tokenizer)), tokenizer)
        assert len(embedding(full)) == len(tokenizer) == full.config.vocab_size
        assert not embedding(full)[-1].any()


def embedding(model: PreTrainedModel) -> torch.Tensor:
    rows: torch.Tensor = model.get_input_embeddings().state_dict()["weight"]
    return rows


def test_a_text_that_ends_with_the_padding_token_is_read_where_transformers_reads_it() -> None:
    """Foreign reward models have pad = eos: theirs is the score of the token before."""
    model = reward_model(model_of("Llama"), letters_tokenizer())
    groups = random_groups([(4, 5, 3)])
    groups[0].completions[0].ids[-2:] = 0
    groups[0].completions[1].ids[:] = 0
    batch = pack(groups)
    for path in ARCHITECTURES["Llama"].paths:
        torch.testing.assert_close(
            sequence_scores(model, batch, path), transformers_scores(model, batch), atol=1e-5, rtol=0
        )


def test_conversations_are_written_in_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = byte_level(
        *("How", "good", "user", "assistant"),
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=CHATML,
    )
    scorer = saved(model_of("Qwen2", vocab_size=len(tokenizer) + 4), tokenizer, tmp_path / "rm")
    asked = (Message("user", "How?"),)
    prompts: list[Content] = [asked, "How?", asked, asked]
    completions: list[Content] = ["good", "good", " good", (Message("assistant", "good"),)]
    scores = scorer.score(prompts, completions)
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-6)

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    text = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>"
    ids = AutoTokenizer.from_pretrained(tmp_path / "rm")(text, return_tensors="pt")["input_ids"]
    assert float(theirs(input_ids=ids).logits.detach()) == pytest.approx(scores[0], abs=1e-5)


def test_what_cannot_be_scored_is_named(tmp_path: Path) -> None:
    scorer = saved(model_of("Llama"), letters_tokenizer(), tmp_path / "rm")
    with pytest.raises(RewardError, match="'Why' with ' no'.*\n.*142 tokens, and the model holds 128"):
        scorer.score(["Why", "Why"], [" no", " no" * 46])  # 3 + 3 * 46 + 1 for the end
    assert scorer.score([], []).shape == (0,)


def test_a_language_model_is_no_reward_model_nor_the_other_way_round(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "lm")
    with pytest.raises(ModelError, match="This is not a reward model[^$]*LlamaForCausalLM[^$]*prefopt reward"):
        load_reward_model(str(tmp_path / "lm"), dtype=torch.float32, device=CPU)
    saved(model_of("Llama", tie_word_embeddings=True), letters_tokenizer(), tmp_path / "rm")
    with pytest.raises(ModelError, match="This is a reward model, not a language model"):
        load_model(str(tmp_path / "rm"), dtype=torch.float32, device=CPU)


def test_several_labels_are_refused(tmp_path: Path) -> None:
    made = reward_model(model_of("Llama"), letters_tokenizer())
    made.config.num_labels = 3
    made.score = torch.nn.Linear(32, 3, bias=False)
    save_model(made, letters_tokenizer(), tmp_path / "rm")
    with pytest.raises(ModelError, match="This is not a reward model[^$]*with 3 labels"):
        load_reward_model(str(tmp_path / "rm"), dtype=torch.float32, device=CPU)


def test_an_architecture_without_a_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="no sequence classifier of this architecture[^$]*CohereForCausalLM"):
        reward_model(model_of("Cohere"), letters_tokenizer())
