"""Chapter 4: the controller's probabilities and its policy gradient are exact.
Run: pytest tests/test_controller.py

Oracle: small spaces, enumerated."""
import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

import menas
from menas import Config, Controller, Sample, rng, search_space
from mutants import mutate
from reference import EVERY_OPERATION, F64, every_row

TWO = dict(activations="tanh,relu")
SPACES = {
    "tiny": dict(nodes=2, **TWO),
    "enas": dict(nodes=3, **TWO),
    "sizes": dict(nodes=3, min_nodes=1, **TWO),
    "gated": dict(nodes=2, operations=EVERY_OPERATION, memory=True, **TWO),
    "gated sizes": dict(nodes=2, min_nodes=1, operations="highway,sum", memory=True, **TWO),
    "one activation": dict(nodes=3, min_nodes=2, one_activation=True, **TWO),
    "widths, rates": dict(nodes=2, widths="4,8", rates="0.5,1,2", hidden=8, **TWO),
}


@pytest.fixture(autouse=True)
def a_few_units(monkeypatch):
    monkeypatch.setattr(menas, "CONTROLLER_UNITS", 8)


def a_controller(space):
    """In float64, away from the nearly uniform start; and the rows of its space."""
    decisions = search_space(Config(**SPACES[space]))
    controller = Controller(decisions, 1).double()
    for name, parameter in controller.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng(name), dtype=F64)
    return controller, every_row(decisions)[0]


@pytest.mark.parametrize("space", SPACES)
def test_probabilities_and_entropies_are_those_of_the_space(space):
    """They sum to 1, entropies along the paths average to - sum p log p, and rows come back as they
    are. So a decision that does not matter is 0, and costs nothing: the rows are all different."""
    controller, rows = a_controller(space)
    sample = controller(rows=rows)
    p = sample.log_prob.exp()
    assert torch.equal(sample.rows, rows)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert_close(p @ sample.entropy, -(p @ sample.log_prob))


def surprise(rows, drawn, p):
    """Chi squared of drawn rows against their probabilities, in standard deviations."""
    place = {row: i for i, row in enumerate(map(tuple, rows.tolist()))}
    drawn = torch.tensor([place[tuple(row)] for row in drawn.tolist()])
    seen = torch.bincount(drawn, minlength=len(rows))
    expected = len(drawn) * p
    often = expected > 5
    chi = ((seen - expected).square() / expected)[often].sum()
    return (chi - often.sum()) / math.sqrt(2 * often.sum())


@pytest.mark.parametrize("space", SPACES)
def test_samples_follow_the_probabilities(space):
    """Oracle: chi squared over the enumerated space. Scoring the samples is the same walk, with the
    same temperature; a key draws the same again."""
    controller, rows = a_controller(space)
    sample = controller.sample(4000, "draws")
    for again in (controller(rows=sample.rows), controller.sample(4000, "draws")):
        assert_close(tuple(again), tuple(sample))
    assert surprise(rows, sample.rows, controller(rows=rows).log_prob.exp()) < 5


@pytest.mark.parametrize("space", SPACES)
def test_uniform_rows_are_uniform_at_every_decision(space):
    """Oracle: probabilities by hand, and chi squared. In ENAS's space all cells are alike."""
    decisions = search_space(Config(**SPACES[space]))
    rows, p = every_row(decisions)
    found = menas.uniform(decisions)(rows=rows).log_prob
    assert_close(found.exp(), p)
    assert surprise(rows, menas.uniform_rows(decisions, 4000, "draws"), p) < 5
    assert (found.max() - found.min() < 1e-4) == (space in ("tiny", "enas", "widths, rates"))


def test_logits_are_bounded_and_soft():
    """2.5 tanh(x / 5) (Pham et al. 2018, appendix A): however large x, no choice is more than e^5
    times as probable as another."""
    controller = Controller(search_space(Config(nodes=1)), 1)
    logits = {}
    for size in (1.0, 10000.0):
        controller.head.data.normal_(0, size, generator=rng("head"))
        x = controller.lstm(controller.start[None])[0] @ controller.head[0]
        logits[size] = (2.5 * torch.tanh(x / 5)).log_softmax(1)[0]
        rows, _ = every_row(controller.decisions)
        assert_close(controller(rows=rows).log_prob, logits[size])
    assert (logits[10000.0].max() - logits[10000.0].min()).item() == pytest.approx(5, abs=1e-4)


# The policy gradient

def gradient_miss(space, k, weight=0.3):
    """Of the expected gradient of menas.policy_loss over all K-tuples of the space from that of
    E[reward] + w H, relative to the latter."""
    controller, rows = a_controller(space)
    everyone, parameters = controller(rows=rows), list(controller.parameters())
    rewards = torch.linspace(-1, 2, len(rows), dtype=F64) ** 2
    p = everyone.log_prob.exp()
    expected = 0.0
    for some in map(list, product(range(len(p)), repeat=k)):
        sample = Sample(*(x[some] for x in everyone))
        loss = menas.policy_loss(sample, rewards[some], weight)
        expected = expected + p[some].prod().detach() * loss

    def gradient(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in found])
    right = gradient(p @ (rewards - weight * everyone.log_prob))
    return ((gradient(-expected) - right).norm() / right.norm()).item()


@pytest.mark.parametrize("space, k", [("tiny", 2), ("tiny", 4), ("enas", 2), ("gated sizes", 2)])
def test_the_mean_policy_gradient_is_exact(space, k):
    """Oracle: autograd through the enumerated E[reward] + w H."""
    assert gradient_miss(space, k) < 1e-10


@pytest.mark.parametrize("function, right, wrong", [
    ("leave_one_out", "(rewards.sum() - rewards) / (len(rewards) - 1)", "rewards.mean()"),
    ("policy_loss", "rewards + entropy_weight * sample.entropy", "rewards"),  # in the bracket
    ("policy_loss", " + entropy_weight * sample.entropy).mean()", ").mean()"),
    ("policy_loss", "return -", "return "),
])
def test_a_wrong_policy_gradient_is_found(function, right, wrong, monkeypatch):
    """Mutants: the same enumeration refuses each."""
    mutate(monkeypatch, function, (right, wrong))
    assert gradient_miss("enas", 2) > .01


def test_a_failed_architecture_gets_the_worst_reward():
    """By hand; if all failed it is 0."""
    rewards = torch.tensor([2, math.nan, 1, math.inf, -math.inf])
    assert menas.worst_for_failures(rewards).tolist() == [2, 1, 1, 1, 1]
    assert menas.worst_for_failures(rewards[[1, 3]]).tolist() == [0, 0]
