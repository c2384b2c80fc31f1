"""The head as models carry it: tied, adapted, compiled, sharded over processes."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from prefopt.data.pack import pack
from prefopt.errors import ModelError
from prefopt.model.adapter import add_lora
from prefopt.model.head import head_of, target_logprobs
from prefopt.model.kl import ReferenceStates, sequence_kl_sum
from prefopt.model.logprobs import plain_model, sequence_logprob_sum
from tiny import model_of, random_groups

GROUPS = random_groups([(12, 9, 4), (1, 2, 11), (7, 1, 1)])
COEFFICIENTS = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])


def llama(tied: bool) -> PreTrainedModel:
    model = model_of("Llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def distributions(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Of each completion its ids and the whole model's own log-probabilities, one sequence at a time."""
    found = []
    for g in GROUPS:
        for c in g.completions:
            ids = torch.tensor([*g.prompt_ids.tolist(), *c.ids.tolist()])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(g.prompt_ids) - 1 : -1]
            found.append((ids[len(g.prompt_ids) :], logits.log_softmax(-1)))
    return found


def plain(model: torch.nn.Module) -> Tensor:
    return torch.stack([logprobs.gather(1, ids[:, None]).sum() for ids, logprobs in distributions(model)])


def gradients(model: torch.nn.Module, sums: Tensor) -> dict[str, Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((sums * COEFFICIENTS).sum(), list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


def same(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, grad in truth.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_weight_gets_its_gradient_from_both_ends(tied: bool) -> None:
    model = llama(tied)
    truth = plain(model)
    ours = sequence_logprob_sum(model, pack(GROUPS), "padded")
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)
    same(gradients(model, ours), gradients(model, truth))
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tied


def adapted(
    model: PreTrainedModel, targets: tuple[str, ...] = ("q_proj", "lm_head"), dropout: float = 0.0
) -> PeftModel:
    result = add_lora(model, rank=3, alpha=6, dropout=dropout, targets=targets, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_is_scored_and_trained(tied: bool) -> None:
    base = llama(tied)
    off = plain(base).detach()
    model = adapted(base)
    truth = plain(model)
    ours = sequence_logprob_sum(model, pack(GROUPS), "padded")
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(ours, off, atol=0.1)
    grads = gradients(model, ours)
    assert any("lm_head.lora_A" in name for name in grads) and any("lm_head.lora_B" in name for name in grads)
    same(grads, gradients(model, truth))
    with model.disable_adapter():
        torch.testing.assert_close(sequence_logprob_sum(model, pack(GROUPS), "padded"), off, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sequence_logprob_sum(model, pack(GROUPS), "padded"), truth, atol=1e-4, rtol=1e-5)


def test_the_kl_to_a_reference_knows_the_adapter_on_the_head_on_either_side() -> None:
    model, batches = adapted(llama(True)), [pack(GROUPS)]
    with model.disable_adapter():
        off = ReferenceStates.of(model, batches, "padded")
        q = distributions(model)
    on = ReferenceStates.of(model, batches, "padded")
    truth = [(p.exp() * (p - q)).sum() for (_, p), (_, q) in zip(distributions(model), q, strict=True)]
    torch.testing.assert_close(sequence_kl_sum(model, off, batches, "padded"), torch.stack(truth), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sequence_kl_sum(model, on, batches, "padded"), torch.zeros(6), atol=1e-6, rtol=0)


def test_the_adapters_dropout_falls_on_its_own_hidden_states_alone() -> None:
    model = adapted(llama(False), ("lm_head",), dropout=0.5)
    hidden, targets = torch.randn(30, 32), torch.randint(0, 97, (30,))
    head = head_of(plain_model(model.train()))
    assert head.adapter is not None
    torch.manual_seed(2)
    ours = target_logprobs(head, hidden, targets)
    torch.manual_seed(2)
    truth = plain_model(model).lm_head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    evaluated = target_logprobs(head_of(plain_model(model.eval())), hidden, targets)
    assert not torch.allclose(ours, evaluated, atol=1e-2)


def test_an_unknown_adapter_on_the_head_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    model = get_peft_model(llama(False), config)
    with pytest.raises(ModelError, match="unknown kind"):
        head_of(model.get_base_model())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at it
def test_under_compile_values_and_gradients_are_the_same() -> None:
    model = llama(True)
    hidden, targets = torch.randn(30, 32, requires_grad=True), torch.randint(0, 97, (30,))
    head = head_of(model)

    def loss(hidden: Tensor) -> Tensor:
        logprobs = target_logprobs(head, hidden * 2, targets)
        return torch.nn.functional.logsigmoid(logprobs).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        value = function(hidden)
        results.append([value, *torch.autograd.grad(value, [hidden, model.lm_head.weight])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_sharded_over_two_processes_equals_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _rank, args=(str(tmp_path / "rendezvous"),), nprocs=2
    )


def _rank(rank: int, rendezvous: str) -> None:
    """Every rank scores the same rows with half of the weights; the gradient is the sum over ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for tied in (False, True):
        whole = llama(tied)
        batch = pack(GROUPS)
        truth = sequence_logprob_sum(whole, batch, "padded")
        grads = gradients(whole, truth)
        model = copy.deepcopy(whole)
        for part in (*model.model.layers, model.model, *(() if tied else (model,))):
            fully_shard(part, mesh=mesh)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no reduction with a factor
        if tied:  # FSDP ties what lies within one of its modules; the head does not
            model.lm_head.weight = model.model.embed_tokens.weight
        scored: Any = sequence_logprob_sum(model, batch, "padded")
        torch.testing.assert_close(scored, truth, atol=1e-5, rtol=1e-5)
        (scored * COEFFICIENTS).sum().backward()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor), name
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            torch.testing.assert_close(parameter.grad.full_tensor(), 2 * grads[name], atol=1e-4, rtol=1e-5)
    _head_alone(mesh)
    dist.destroy_process_group()


def _head_alone(mesh: Any) -> None:
    """Unequal rows on the two ranks; the gradient of the hidden states is each rank's own."""
    model = llama(False)
    hidden, targets = torch.randn(30, 32), torch.randint(0, 97, (30,))
    mine = slice(0, 10) if dist.get_rank() == 0 else slice(10, 30)
    weight = model.lm_head.weight
    leaf = hidden.clone().requires_grad_()
    truth = torch.autograd.grad(target_logprobs(head_of(model), leaf, targets).sum(), [leaf, weight])
    fully_shard(model.lm_head, mesh=mesh)
    sharded = model.lm_head.weight
    assert isinstance(sharded, DTensor)
    own = hidden[mine].clone().requires_grad_()
    logprobs = target_logprobs(head_of(model), own, targets[mine])
    assert not isinstance(logprobs, DTensor)
    ours = torch.autograd.grad(logprobs.sum(), [own, sharded])
    torch.testing.assert_close(ours[0], truth[0][mine])
    assert isinstance(ours[1], DTensor)
    torch.testing.assert_close(ours[1].full_tensor(), truth[1])
    with torch.no_grad():
        torch.testing.assert_close(target_logprobs(head_of(model), own, targets[mine]), logprobs.detach())
