"""The quickstart's language, its ground truth, and the model it starts from."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prefopt.quickstart.corpus import openings, reviews, true_reward
from prefopt.quickstart.seed_model import new_model, save_seed_model, train_tokenizer

REVIEWS = reviews(3000, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(review.text for review in REVIEWS[:1000])


def test_reviews_are_short_varied_and_of_both_sentiments() -> None:
    words = [len(review.text.split()) for review in REVIEWS]
    assert min(words) >= 15 and max(words) <= 35
    assert len({review.text for review in REVIEWS}) > 2990
    assert 1350 < sum(review.sentiment == 1 for review in REVIEWS) < 1650
    vocabulary = {word.lower() for review in REVIEWS for word in re.findall(r"[A-Za-z']+", review.text)}
    assert 100 < len(vocabulary) < 500


def test_a_seed_decides_the_texts() -> None:
    assert reviews(20, seed=7) == reviews(20, seed=7)
    assert reviews(20, seed=7) != reviews(20, seed=8)
    assert openings(20, seed=7) == openings(20, seed=7)
    assert openings(20, seed=7) != openings(20, seed=8)


def test_the_truth_agrees_with_every_reviews_sentiment() -> None:
    assert all(true_reward(review.text) * review.sentiment > 0 for review in REVIEWS)
    # A concession and one more opinion: (2 - 1) / 3. The reward is graded, not a coin.
    assert {1.0, -1.0, 1 / 3, -1 / 3} <= {true_reward(review.text) for review in REVIEWS}


def test_no_a_before_a_vowel() -> None:
    assert not [review.text for review in REVIEWS if re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", review.text)]


def test_openings_are_distinct_neutral_beginnings_of_reviews() -> None:
    # Films: 2 x (2 verbs x 8 things x 10 times x 8 people) + 2 x (2 x 8 x 6 places x 10) = 4480.
    # Products: 2 x (3 verbs x 8 things x 10 times x 6 rooms) + 8 people x 3 x 8 x 10 + 8 x 8 x 10 = 5440.
    every = set(openings(9920, seed=1))
    assert len(every) == 9920
    assert {true_reward(text) for text in every} == {0.0}
    assert {review.text.split(".")[0] + "." for review in REVIEWS} <= every
    with pytest.raises(ValueError):
        openings(9921, seed=1)


def test_the_opening_does_not_give_the_sentiment_away() -> None:
    """No word of the opening goes with either sentiment more than chance would have it."""
    first = [(review.text.split(". ")[0].lower(), review.sentiment) for review in REVIEWS]
    words = {word for opening, _ in first for word in opening.split()}
    for word in words:
        signs = [sentiment for opening, sentiment in first if word in opening.split()]
        # 5 standard errors of a fair coin: about one in two million for each of some 90 words.
        assert abs(sum(signs)) <= 5 * len(signs) ** 0.5, word


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("We watched it at home.", 0.0),
        ("The plot was good.", 1.0),
        ("The plot was good and the music was great and funny.", 1.0),  # a mean: more is not better
        ("The plot was awful.", -1.0),
        ("The plot was good, but the music was dull.", 0.0),  # (1 - 1) / 2
        ("Good, great, bad.", 1 / 3),  # (1 + 1 - 1) / 3
        ("It was not good.", -1.0),
        ("It was never boring.", 1.0),
        ("It was not a very good film.", -1.0),  # the third word on
        ("It was not what I would call good.", 1.0),  # out of reach
        ("It was not good and lovely.", 0.0),  # only the next word is turned round
        ("It was not ours. Good colour.", 1.0),  # a negation ends with its sentence
        ("GOOD!", 1.0),
        ("goodness", 0.0),
    ],
)
def test_true_reward(text: str, reward: float) -> None:
    assert true_reward(text) == pytest.approx(reward)


@pytest.mark.parametrize("text", [REVIEWS[0].text, "  two  spaces\n\nand a tab\t", "Grüße, 你好 \U0001f600", ""])
def test_the_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_is_about_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = REVIEWS[0].text
    pieces = re.findall(r"\w+|[^\w\s]", text)
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= len(pieces) + 3


def test_the_seed_model_is_a_plain_untrained_folder(tmp_path: Path) -> None:
    save_seed_model(tmp_path / "model", seed=3)
    assert not list((tmp_path / "model").glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 600_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(REVIEWS[5].text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, 1] != tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == REVIEWS[5].text
    # Untrained: close to the uniform distribution's ln(vocabulary), nowhere near a trained model's 1 nat.
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert 4 < loss < 9


def test_a_seed_decides_the_weights_and_leaves_torchs_generator_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, same, other = new_model(tokenizer, 0), new_model(tokenizer, 0), new_model(tokenizer, 1)
    assert torch.equal(torch.rand(3), expected)
    first = one.model.embed_tokens.weight
    assert torch.equal(first, same.model.embed_tokens.weight)
    assert not torch.equal(first, other.model.embed_tokens.weight)
