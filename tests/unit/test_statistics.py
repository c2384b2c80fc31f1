"""Statistics of next-token distributions equal those of full log softmax."""

import math

import pytest
import torch

from prefopt.model import tiles
from prefopt.model.head import Head, target_logprobs
from prefopt.model.statistics import target_statistics


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, several blocks."""
    monkeypatch.setattr(tiles, "_ROWS", (1, 16))
    monkeypatch.setattr(tiles, "_BLOCK_ELEMENTS", 50)


def test_equal_full_log_softmax() -> None:
    torch.manual_seed(0)
    bias = torch.randn(50)
    p, q = Head(torch.randn(50, 8), None, 0.5, 3.0), Head(torch.randn(50, 6), bias, 1.0, None)
    hidden, others, targets = torch.randn(40, 8), torch.randn(40, 6), torch.randint(0, 50, (40,))
    found = target_statistics(p, hidden, targets, entropy=True, rank=True, top=True, against=(q, others))
    log_p = (3.0 * torch.tanh(0.5 * (hidden @ p.weight.T) / 3.0)).double().log_softmax(-1)
    log_q = (others @ q.weight.T + bias).double().log_softmax(-1)
    picked = log_p.gather(1, targets[:, None])
    assert found.entropy is not None and found.kl is not None and found.rank is not None and found.top is not None
    torch.testing.assert_close(found.logprob.double(), picked[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logprob, target_logprobs(p, hidden, targets))
    torch.testing.assert_close(found.entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-5, rtol=1e-5)
    assert found.rank.tolist() == (log_p > picked).sum(-1).tolist()
    assert found.top.tolist() == log_p.argmax(-1).tolist()


def test_by_hand() -> None:
    """Logits ln 1, ln 2, ln 2, ln 3: probabilities 1/8, 1/4, 1/4, 3/8."""
    head = Head(torch.tensor([1.0, 2.0, 2.0, 3.0]).log()[:, None], None, 1.0, None)
    uniform = Head(torch.zeros(4, 1), None, 1.0, None)
    hidden, targets = torch.ones(4, 1), torch.arange(4)
    found = target_statistics(head, hidden, targets, entropy=True, rank=True, top=True, against=(uniform, hidden))
    assert found.logprob.exp().tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 4, 3 / 8])
    assert found.rank is not None and found.rank.tolist() == [3, 1, 1, 0]  # ties share the better rank
    assert found.top is not None and found.top.tolist() == [3, 3, 3, 3]
    entropy = math.log(8) / 8 + math.log(4) / 2 + 3 / 8 * math.log(8 / 3)
    assert found.entropy is not None and found.entropy.tolist() == pytest.approx([entropy] * 4)
    assert found.kl is not None and found.kl.tolist() == pytest.approx([math.log(4) - entropy] * 4, abs=1e-6)


def test_nothing_is_computed_unasked_and_no_targets_are_fine() -> None:
    head = Head(torch.randn(5, 3), None, 1.0, None)
    found = target_statistics(head, torch.randn(2, 3), torch.tensor([0, 4]))
    assert found.entropy is found.rank is found.top is found.kl is None
    hidden, none = torch.randn(0, 3), torch.zeros(0, dtype=torch.long)
    found = target_statistics(head, hidden, none, entropy=True, rank=True, top=True, against=(head, hidden))
    for values in (found.logprob, found.entropy, found.rank, found.top, found.kl):
        assert values is not None and values.shape == (0,)


def test_a_distribution_has_no_divergence_from_itself() -> None:
    torch.manual_seed(0)
    head, hidden = Head(torch.randn(50, 8) * 10, None, 1.0, None), torch.randn(40, 8)
    kl = target_statistics(head, hidden, torch.zeros(40, dtype=torch.long), against=(head, hidden)).kl
    assert kl is not None and kl.tolist() == [0.0] * 40
