"""Our own decoding draws what transformers' generate draws, token for token, whatever is batched with what."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import chi2
from torch import Tensor
from transformers import PreTrainedModel

from architectures import ARCHITECTURES, VOCABULARY
from prefopt import progress
from prefopt.errors import ConfigError, NonFiniteError
from prefopt.model import sample as room
from prefopt.model.attention import SEGMENTS
from prefopt.model.choose import Request, Sampled, choose, uniforms
from prefopt.model.decode import DECODE
from prefopt.model.engine import Engine
from prefopt.model.generate import attention, generate
from prefopt.model.load import add_lora
from prefopt.model.logprobs import plain_attention, plain_model
from prefopt.model.sample import sample
from tiny import model_of

# Longer and shorter than the windows of 6, one of a single token; a stop id in 16 ends samples at different lengths.
PROMPTS = [np.random.default_rng(n).integers(1, VOCABULARY, n).astype(np.int32) for n in (12, 1, 7, 9, 3, 20, 2)]
STOPS = frozenset({5, 6, 7, 40, 50, 60})
NEW = 14
PLUGGABLE = [name for name, known in ARCHITECTURES.items() if "shared" in known.paths]


def request(samples: int = 3, temperature: float = 1.0, top_p: float = 1.0, batch_tokens: int = 100) -> Request:
    return Request(PROMPTS, (NEW,) * len(PROMPTS), samples, temperature, top_p, STOPS, 0, batch_tokens)


def run(model: PreTrainedModel, wanted: Request) -> tuple[list[Sampled], Engine]:
    with attention(model, DECODE), torch.no_grad():
        engine = Engine(model, wanted)
        return in_order(list(engine.run())), engine


def in_order(drawn: list[Sampled]) -> list[Sampled]:
    return sorted(drawn, key=lambda one: (one.prompt_index, one.sample_index))


def tokens(drawn: list[Sampled]) -> list[list[int]]:
    return [one.ids.tolist() for one in drawn]


def teacher_forced(model: torch.nn.Module, one: Sampled) -> Tensor:
    """Log-probabilities of a sample's tokens in one plain forward pass."""
    prompt = PROMPTS[one.prompt_index]
    ids = torch.from_numpy(np.concatenate([prompt, one.ids]).astype(np.int64))[None]
    with torch.no_grad(), attention(plain_model(model), plain_attention(plain_model(model))):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    picked: Tensor = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return picked


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(room, "say", progress.Reporter(Console(file=out)).say)
    return out


@pytest.mark.parametrize("architecture", PLUGGABLE)
def test_greedy_is_transformers_greedy(architecture: str) -> None:
    model = model_of(architecture)
    drawn, _ = run(model, request(temperature=0.0))
    model.generation_config.eos_token_id = sorted(STOPS)
    for one in drawn:
        prompt = torch.from_numpy(PROMPTS[one.prompt_index].astype(np.int64))[None]
        with attention(model, plain_attention(model)):
            truth = model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )
        assert one.ids.tolist() == truth[0, prompt.shape[1] :].tolist()
    assert len(drawn) == 3 * len(PROMPTS)


@pytest.mark.parametrize("architecture", PLUGGABLE)
def test_samples_and_logprobs_are_those_of_generate(architecture: str) -> None:
    model = model_of(architecture)
    wanted = request(temperature=0.8, top_p=0.9)
    ours, _ = run(model, wanted)
    with torch.no_grad():
        theirs = in_order(list(generate(model, wanted)))
    assert tokens(ours) == tokens(theirs)
    assert [one.finished for one in ours] == [one.finished for one in theirs] == [one.ids[-1] in STOPS for one in ours]
    assert 0 < sum(one.finished for one in ours) < len(ours)
    for mine, other in zip(ours, theirs, strict=True):
        truth = teacher_forced(model, mine)  # at temperature 1 and of the whole vocabulary
        torch.testing.assert_close(torch.from_numpy(mine.logprobs), truth, atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(other.logprobs), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma 2"])
def test_batches_do_not_change_samples_and_no_step_is_spent_on_what_has_ended(architecture: str) -> None:
    model = model_of(architecture)
    large, _ = run(model, request(samples=5, batch_tokens=10**6))
    for budget in (1, 60, 150, 400):
        small, engine = run(model, request(samples=5, batch_tokens=budget))
        assert tokens(small) == tokens(large)
        assert engine.row_steps == sum(len(one.ids) - 1 for one in small)
        # More samples than places: they have taken each other's.
        assert engine.own.places <= max(1, budget // NEW) < len(small)
        assert engine.prompts.places * engine.prompts.tokens <= max(budget, 20)


def test_a_place_that_comes_free_is_taken_before_the_others_end() -> None:
    model = model_of("Llama")
    budget = 20 + 4 * NEW  # the longest prompt with four samples at a time
    drawn, engine = run(model, request(samples=8, batch_tokens=budget))
    spent = sum(len(one.ids) - 1 for one in drawn)
    in_turn = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    waiting_for_the_longest = sum(max(len(one.ids) for one in batch) - 1 for batch in in_turn)
    assert spent / 4 / 1.5 < engine.steps < waiting_for_the_longest


def test_a_prompt_is_kept_once_whatever_the_number_of_samples() -> None:
    model = model_of("Llama")
    wanted = [run(model, request(samples=n, batch_tokens=10**6))[1] for n in (1, 8)]
    layers, kv_heads, dim = 2, 2, 8
    for engine in wanted:
        assert engine.prompts.elements == 2 * layers * kv_heads * dim * len(PROMPTS) * 20
    one, eight = (engine.own.elements for engine in wanted)
    assert one == 2 * layers * kv_heads * dim * len(PROMPTS) * NEW and eight == 8 * one


def test_two_tokens_deep_the_distribution_is_the_models() -> None:
    model = model_of("Llama")
    prompt, n = PROMPTS[0], 4000
    drawn = sample(model, [prompt], completions=n, max_new_tokens=2, temperature=0.7, stop_ids=frozenset(), seed=1)
    with torch.no_grad():
        contexts = [[*prompt.tolist(), token] for token in range(VOCABULARY)]
        logits = model(torch.tensor(contexts)).logits[:, -2:] / 0.7
    first, second = logits[0, 0].double().softmax(-1), logits[:, 1].double().softmax(-1)
    expected = (n * first @ second).numpy()  # of the second token, whatever the first
    counts = np.bincount([int(one.ids[1]) for one in drawn], minlength=VOCABULARY)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert len(expected) > 20 and statistic < chi2.ppf(0.999, len(expected) - 1)


def test_the_draw_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(4, -1)
    noise = torch.tensor([0.0, 0.49, 0.51, 0.76])
    drawn, logprobs = choose(logits, noise, 1.0, 1.0)
    assert drawn.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.5, 0.25, 0.25]).log())
    # The nucleus of 0.75 is the first two, with 2/3 and 1/3; of two equals the lower id is in it.
    drawn, logprobs = choose(logits, torch.tensor([0.66, 0.67, 0.99, 0.1]), 1.0, 0.75)
    assert drawn.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.25, 0.25, 0.5]).log())
    # At temperature 0.5 probabilities are squared: 4/6, 1/6, 1/6.
    assert choose(logits, torch.tensor([0.66, 0.67, 0.84, 0.0]), 0.5, 1.0)[0].tolist() == [0, 1, 2, 0]
    # Nothing impossible is drawn at either end.
    impossible = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    assert choose(impossible, torch.tensor([0.0, 1 - 2**-24]), 1.0, 1.0)[0].tolist() == [1, 1]
    assert choose(logits, noise, 0.0, 1.0)[0].tolist() == [0] * 4


def test_noise_belongs_to_the_sample() -> None:
    assert np.array_equal(uniforms(0, 1, 2, 5), uniforms(0, 1, 2, 9)[:5])
    streams = {uniforms(*key, 1)[0] for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(streams) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_with_an_adapter_samples_with_it(dtype: torch.dtype, said: io.StringIO) -> None:
    base = model_of("Llama").to(dtype)  # type: ignore[arg-type]
    policy = add_lora(base, rank=2, alpha=8, dropout=0.0, targets=None, seed=0)
    plain_model(policy).set_attn_implementation(SEGMENTS)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    drawn = sample(
        policy, PROMPTS, completions=2, max_new_tokens=NEW, temperature=1.0, stop_ids=STOPS, seed=0, batch_tokens=80
    )
    assert plain_model(policy).config._attn_implementation == SEGMENTS
    assert not said.getvalue()  # by our own decoding
    for one in drawn:
        off = (torch.from_numpy(one.logprobs) - teacher_forced(policy, one)).abs()
        assert off.max() < (2e-5 if dtype == torch.float32 else 0.3) and off.mean() < 5e-2


@pytest.mark.parametrize("architecture", ["BLOOM", "Mamba"])
def test_what_cannot_plug_in_is_left_to_generate_and_that_is_said_once(architecture: str, said: io.StringIO) -> None:
    model = model_of(architecture)
    for _ in range(2):
        drawn = sample(
            model, PROMPTS[:3], completions=2, max_new_tokens=4, temperature=1.0, stop_ids=frozenset(), seed=0
        )
    assert said.getvalue().count("has no pluggable attention") == 1
    for one in drawn:
        truth = teacher_forced(model, one)
        torch.testing.assert_close(torch.from_numpy(one.logprobs), truth, atol=1e-4, rtol=0)


def test_a_model_that_only_seems_to_plug_in_is_found_out(said: io.StringIO) -> None:
    model = model_of("Llama")

    def peek(module: torch.nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (out[0] + 0.1 * out[0].roll(1, dims=0), *out[1:])  # another row's

    model.model.layers[0].self_attn.register_forward_hook(peek)
    sample(model, PROMPTS[:1], max_new_tokens=3, temperature=1.0, stop_ids=frozenset(), seed=0)
    assert "our own decoding differs from transformers" in said.getvalue()


def test_nothing_is_drawn_from_nan(said: io.StringIO) -> None:
    model = model_of("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        sample(model, PROMPTS[:2], max_new_tokens=3, temperature=1.0, stop_ids=frozenset(), seed=0)
    with pytest.raises(ConfigError, match="prompt 2"):
        sample(model, [PROMPTS[0], PROMPTS[0][:0]], max_new_tokens=3, temperature=1.0, stop_ids=frozenset(), seed=0)
