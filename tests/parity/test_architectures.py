"""Sequence log-probabilities and gradients equal transformers' own, one sequence at a time.

`PREFOPT_GOLDEN=1 pytest tests/parity/test_architectures.py -k table` writes docs/models.md anew.
"""

import os
from collections.abc import Callable
from pathlib import Path as File

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from architectures import ARCHITECTURES
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import pack
from prefopt.model.logprobs import Path, plain_attention, sequence_logprob_sum
from prefopt.model.paths import choose_path, transformers_logprob_sum
from tiny import completion, group, model_of, random_groups

DOC = File(__file__).parents[2] / "docs" / "models.md"

# Prompts longer and shorter than the windows, one-token prompts and completions, K = 1, 2 and 3,
# and a completion in which only some tokens are trained on.
GROUPS = [
    *random_groups([(12, 9, 4), (1, 2, 11), (7, 1, 1), (9, 8), (3, 5, 6, 2)]),
    group([5, 6, 7, 8], completion(1, 2, 3, 4, 5, trainable=[True, False, False, True, True]), row=6),
]


def one_at_a_time(model: PreTrainedModel, groups: list[CompletionGroup]) -> Tensor:
    """What transformers itself says: a forward pass per sequence, log softmax over full logits."""
    sums = []
    for g in groups:
        for c in g.completions:
            ids = torch.tensor([[*g.prompt_ids.tolist(), *c.ids.tolist()]])
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            at = [len(g.prompt_ids) + i for i in range(len(c.ids)) if c.trainable[i]]
            sums.append(sum((logprobs[i - 1, ids[0, i]] for i in at), start=torch.zeros(())))
    return torch.stack(sums)


def gradients(model: PreTrainedModel, sums: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    model.set_attn_implementation(plain_attention(model))
    values = sums()
    # Unequal coefficients, as a preference loss gives, so that swapped sequences show.
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return values.detach(), grads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_gradients_equal_transformers_on_every_path(architecture: str) -> None:
    model = model_of(architecture)
    batch = pack(GROUPS)
    truth, true_grads = gradients(model, lambda: one_at_a_time(model, GROUPS))
    for path in ARCHITECTURES[architecture].paths:
        ours, our_grads = gradients(model, lambda path=path: sequence_logprob_sum(model, batch, path))  # type: ignore[misc]
        torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)
        assert our_grads.keys() == true_grads.keys()
        for name, grad in true_grads.items():
            torch.testing.assert_close(our_grads[name], grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_takes_the_best_path_it_can(architecture: str) -> None:
    choice = choose_path(model_of(architecture), pack(GROUPS))
    assert choice.path == ARCHITECTURES[architecture].paths[0]
    assert choice.max_difference <= 1e-4
    assert (choice.reason == "checked against transformers") == (choice.path == "shared")


@pytest.mark.parametrize("architecture", ["Llama", "Gemma 2", "Qwen2 with windows", "GPT-OSS", "Granite"])
@pytest.mark.parametrize("path", ["shared", "padded"])
def test_bfloat16_rounds_no_worse_than_transformers_does(architecture: str, path: Path) -> None:
    """Distance from float32 of ours and of transformers' own bfloat16, one sequence at a time."""
    model = model_of(architecture)
    batch = pack(GROUPS)
    exact, exact_grads = gradients(model, lambda: one_at_a_time(model, GROUPS))
    model.bfloat16()
    theirs, their_grads = gradients(model, lambda: one_at_a_time(model, GROUPS))
    ours, our_grads = gradients(model, lambda: sequence_logprob_sum(model, batch, path))
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()

    def distance(grads: dict[str, Tensor]) -> float:
        return float(torch.stack([(grads[n].float() - grad).norm() for n, grad in exact_grads.items()]).norm())

    assert distance(our_grads) <= 1.5 * distance(their_grads)


def test_the_first_batch_catches_a_model_that_only_seems_to_share() -> None:
    model = model_of("Llama")
    layer = model.model.layers[0].self_attn

    def peek(module: torch.nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        neighbour = torch.zeros_like(out[0])
        neighbour[:, 21:] = out[0][:, :-21]  # 21 slots back: only another sequence stands there
        return (out[0] + neighbour, *out[1:])

    layer.register_forward_hook(peek)
    choice = choose_path(model, pack(GROUPS))
    assert choice.path == "padded"
    assert "shared differs" in choice.reason
    assert "packed differs" in choice.reason


def _row(architecture: str) -> str:
    """A line of the table: path, windows, why not a better path, and measured differences on the path taken."""
    what = ARCHITECTURES[architecture]
    model = model_of(architecture)
    batch = pack(GROUPS)
    choice = choose_path(model, batch)
    truth, true_grads = gradients(model, lambda: one_at_a_time(model, GROUPS))
    ours, our_grads = gradients(model, lambda: sequence_logprob_sum(model, batch, choice.path))
    largest = max(float((our_grads[name] - grad).abs().max()) for name, grad in true_grads.items())
    windows = any("window" in key and value for key, value in what.arguments.items())
    cells = (
        architecture,
        f"`{model.config.model_type}`",
        choice.path,
        ", ".join(what.paths[1:]) or "-",
        "yes" if windows else "-",
        f"{float((ours - truth).abs().max()):.0e}",
        f"{largest:.0e}",
        "" if choice.path == "shared" else choice.reason,
    )
    return "| " + " | ".join(cells) + " |"


def test_the_table_in_the_docs_is_what_the_models_do() -> None:
    text = DOC.read_text()
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    head, rest = text.split(begin)
    table, tail = rest.split(end)
    if os.environ.get("PREFOPT_GOLDEN"):
        title = "| model | type | path | also exact | windows | values | gradients | why not a faster path |"
        rows = [title, "|---|---|---|---|---|---|---|---|", *(_row(name) for name in ARCHITECTURES)]
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        table = "\n".join(rows) + f"\n\nMeasured in float32 on a CPU with {versions}.\n"
        DOC.write_text(head + begin + table + end + tail)
    listed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:] if "|" in line]
    told = {cells[0]: (cells[2], *(c for c in cells[3].split(", ") if c != "-")) for cells in listed}
    assert told == {name: what.paths for name, what in ARCHITECTURES.items()}


def test_padding_takes_no_more_slots_than_there_are_tokens() -> None:
    """One long sequence among many short ones, which a budget of tokens puts into one micro-batch."""
    model, slots = model_of("BLOOM"), list[int]()
    batch = pack(random_groups([(60, 30, 2), *[(2, 2, 3)] * 12]))
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    padded = sequence_logprob_sum(model, batch, "padded")
    handle.remove()
    tokens = sum(len(prompt) + len(own) for prompt, own in batch.spans)
    assert sum(slots) < 2 * tokens < len(batch.spans) * 90 / 4, "a single rectangle would have many more"
    torch.testing.assert_close(padded, transformers_logprob_sum(model, batch), atol=1e-4, rtol=0)
