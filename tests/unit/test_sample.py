"""Samples are the model's own, whatever its folder or its trainer has set, and nothing of theirs is left changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from prefopt.errors import ConfigError
from prefopt.model.attention import SEGMENTS
from prefopt.model.load import LoadedModel, add_lora, load_model
from prefopt.model.logprobs import plain_model
from prefopt.model.sample import sample
from tiny import save_tiny_model

CPU = torch.device("cpu")
POSITIONS = 128  # of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path / "tiny")
    return path / "tiny"


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype=torch.float32, device=CPU)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def long(n: int) -> np.ndarray:
    return (np.arange(n) % 40 + 2).astype(np.int32)


def greedy(model: torch.nn.Module, prompts: list[np.ndarray], new: int = 6, n: int = 1) -> list[list[int]]:
    drawn = sample(model, prompts, completions=n, max_new_tokens=new, temperature=0.0, stop_ids=frozenset(), seed=0)
    return [one.ids.tolist() for one in drawn]


def test_the_folders_generation_defaults_are_not_applied(loaded: LoadedModel) -> None:
    prompt = ids(5, 6, 7)
    wanted = greedy(loaded.model, [prompt])
    first = wanted[0][0]
    defaults = GenerationConfig(
        repetition_penalty=50.0, num_beams=3, suppress_tokens=[first], eos_token_id=[first], min_new_tokens=2
    )
    loaded.model.generation_config = defaults
    assert greedy(loaded.model, [prompt]) == wanted
    assert loaded.model.generation_config is defaults
    with torch.no_grad():  # and the tokens are the likeliest ones, one after the other
        context = prompt.tolist()
        for token in wanted[0]:
            assert int(loaded.model(torch.tensor([context])).logits[0, -1].argmax()) == token
            context.append(token)


@pytest.mark.parametrize("lora", [False, True])
def test_a_training_model_is_left_as_it_was(loaded: LoadedModel, lora: bool) -> None:
    wanted = greedy(loaded.model, [ids(5, 6, 7)])
    model: torch.nn.Module = loaded.model
    if lora:  # an adapter starts as the identity
        model = add_lora(loaded.model, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    plain_model(model).set_attn_implementation(SEGMENTS)
    model.train()
    state = torch.random.get_rng_state()
    assert greedy(model, [ids(5, 6, 7)]) == wanted
    assert model.training and plain_model(model).config._attn_implementation == SEGMENTS
    assert torch.equal(torch.random.get_rng_state(), state)


def test_left_as_it_was_when_interrupted(loaded: LoadedModel) -> None:
    loaded.model.set_attn_implementation(SEGMENTS)
    loaded.model.train()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(loaded.model, [ids(5)], max_new_tokens=1, temperature=1.0, stop_ids=frozenset(), seed=0, on_prompt=stop)
    assert loaded.model.training and loaded.model.config._attn_implementation == SEGMENTS


def test_a_long_prompt_does_not_shorten_its_neighbours(loaded: LoadedModel) -> None:
    drawn = sample(
        loaded.model,
        [long(POSITIONS - 2), ids(5, 6), long(POSITIONS - 9), ids(7)],
        max_new_tokens=9,
        temperature=1.0,
        stop_ids=frozenset(),
        seed=0,
    )
    assert [len(one.ids) for one in drawn] == [2, 9, 9, 9]
    assert not any(one.finished for one in drawn)


def test_a_prompt_without_room_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no room"):
        greedy(loaded.model, [ids(5), long(POSITIONS)])


def test_every_prompt_gets_its_number_of_completions_greedily_too(loaded: LoadedModel) -> None:
    prompts = [ids(5, 6, 7), ids(9)]
    one = greedy(loaded.model, prompts)
    assert greedy(loaded.model, prompts, n=3) == [one[0]] * 3 + [one[1]] * 3


def test_the_seed_decides_and_padding_does_not(loaded: LoadedModel) -> None:
    prompts = [ids(5, 6, 7), long(30)]

    def draw(seed: int) -> list[list[int]]:
        drawn = sample(
            loaded.model, prompts, completions=2, max_new_tokens=8, temperature=1.0, stop_ids=frozenset(), seed=seed
        )
        assert [one.prompt_index for one in drawn] == [0, 0, 1, 1]
        return [one.ids.tolist() for one in drawn]

    assert draw(3) == draw(3) and draw(3) != draw(4)
    together = greedy(loaded.model, prompts)
    assert together == greedy(loaded.model, prompts[:1]) + greedy(loaded.model, prompts[1:])


def test_top_p_leaves_out_the_tail(loaded: LoadedModel) -> None:
    assert isinstance(loaded.model, LlamaForCausalLM)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    likeliest = int(logits.argmax())
    nucleus = sample(
        loaded.model,
        [ids(5, 6, 7)],
        completions=50,
        max_new_tokens=1,
        temperature=1.0,
        top_p=1e-4,
        stop_ids=frozenset(),
        seed=0,
    )
    assert {int(one.ids[0]) for one in nucleus} == {likeliest}
