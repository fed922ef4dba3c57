"""Chapter 4: the controller's probabilities and its policy gradient are exact.
Run: pytest tests/test_controller.py

Oracle: small spaces, enumerated."""
import math
from itertools import product

import pytest
import torch

import menas
from menas import (Config, Controller, Sample, leave_one_out, policy_loss, rng, search_space,
                   uniform, uniform_rows, worst_for_failures)

TWO = dict(activations="tanh,relu")
SPACES = {
    "tiny": dict(nodes=2, **TWO),
    "enas": dict(nodes=3, **TWO),
    "sizes": dict(nodes=3, min_nodes=1, **TWO),
    "gated": dict(nodes=2, operations="highway,glu,gate,sum", memory=True, **TWO),
    "gated sizes": dict(nodes=2, min_nodes=1, operations="highway,sum", memory=True, **TWO),
    "one activation": dict(nodes=3, min_nodes=2, one_activation=True, **TWO),
    "widths, rates": dict(nodes=2, widths="4,8", rates="0.5,1,2", hidden=8, **TWO)}


@pytest.fixture(autouse=True)
def a_few_units(monkeypatch):
    monkeypatch.setattr(menas, "CONTROLLER_UNITS", 8)


def a_controller(space, **how):
    """In float64, away from the nearly uniform start."""
    controller = Controller(search_space(Config(**SPACES[space])), 1, **how).double()
    for name, parameter in controller.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng(name), dtype=torch.float64)
    return controller


def everything(controller):
    """The rows of a space, each path through its decisions, and their probabilities if each
    decision is uniform."""
    paths = {(0,) * controller.length: 1.0}
    for d in controller.decisions:
        grown = {}
        for row, p in paths.items():
            matters = all(row[i] in values for i, values in d.when)
            for value in d.choices if matters else (0,):
                new = tuple(value if i in d.columns else x for i, x in enumerate(row))
                grown[new] = p / len(d.choices) if matters else p
        paths = grown
    return torch.tensor(list(paths)), torch.tensor(list(paths.values()))


@pytest.mark.parametrize("space", SPACES)
def test_probabilities_and_entropies_are_those_of_the_space(space):
    """They sum to 1, entropies along the paths average to - sum p log p, and rows come back as they
    are. So a decision that does not matter is 0, and costs nothing: the rows are all different."""
    controller = a_controller(space)
    rows, _ = everything(controller)
    sample = controller(rows=rows)
    p = sample.log_prob.exp()
    assert torch.equal(sample.rows, rows) and p.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(p @ sample.entropy, -(p @ sample.log_prob))


@pytest.mark.parametrize("policy", ["a controller", "uniform"])
@pytest.mark.parametrize("space", SPACES)
def test_samples_follow_the_probabilities(space, policy):
    """Oracle: chi squared, at 5 standard deviations; a uniform policy's probabilities by hand.
    Scoring the samples is the same walk, with the same temperature; a key draws the same again."""
    controller, k = a_controller(space), 4000
    rows, by_hand = everything(controller)
    if policy == "uniform":
        controller = uniform(controller.decisions)
        torch.testing.assert_close(controller(rows=rows).log_prob.exp(), by_hand)
    sample = controller.sample(k, "draws")
    drawn = uniform_rows(controller.decisions, k, "draws")
    assert torch.equal(drawn, sample.rows) == (policy == "uniform")
    for again in (controller(rows=sample.rows), controller.sample(k, "draws")):
        for one, other in zip(sample, again):
            torch.testing.assert_close(one, other)
    expected = k * controller(rows=rows).log_prob.exp()
    place = {row: i for i, row in enumerate(map(tuple, rows.tolist()))}
    seen = torch.bincount(torch.tensor([place[tuple(row)] for row in sample.rows.tolist()]),
                          minlength=len(rows))
    chi, enough = (seen - expected).square() / expected, expected > 5
    assert chi[enough].sum() < enough.sum() + 5 * math.sqrt(2 * enough.sum())


def test_no_choice_is_more_than_e_to_the_5_times_as_probable_as_another():
    """Logits are 2.5 tanh(.) (Pham et al. 2018, appendix A), however large the weights."""
    controller = Controller(search_space(Config(nodes=1)), 1)
    controller.head.data.normal_(0, 10000, generator=rng("head"))
    logp = controller(rows=everything(controller)[0]).log_prob
    assert (logp.max() - logp.min()).item() == pytest.approx(5, abs=1e-4)


def test_what_is_asked_moves_the_policy_and_0_does_not():
    controller = a_controller("sizes", asked=True)
    rows, _ = everything(controller)
    none, zero, one = (controller(rows=rows, asked=x).log_prob
                       for x in (None, torch.zeros(len(rows)), torch.ones(len(rows))))
    assert torch.equal(none, zero) and (none - one).abs().max() > .1
    assert one.exp().sum().item() == pytest.approx(1, abs=1e-12)


def gradient_miss(space, k, weight=0.3):
    """Of the expected gradient of menas.policy_loss over all K-tuples of the space from that of
    E[reward] + w H, relative to the latter."""
    controller = a_controller(space)
    everyone, parameters = controller(rows=everything(controller)[0]), list(controller.parameters())
    rewards = torch.linspace(-1, 2, len(everyone.rows), dtype=torch.float64) ** 2
    p, expected = everyone.log_prob.exp(), 0.0
    for some in map(list, product(range(len(p)), repeat=k)):
        sample = Sample(*(x[some] for x in everyone))
        loss = menas.policy_loss(sample, rewards[some], weight)
        expected = expected + p[some].prod().detach() * loss
    exact = p @ (rewards - weight * everyone.log_prob)
    ours, right = (torch.cat([g.flatten() for g in torch.autograd.grad(
        x, parameters, retain_graph=True)]) for x in (-expected, exact))
    return ((ours - right).norm() / right.norm()).item()


@pytest.mark.parametrize("space, k", [("tiny", 2), ("tiny", 4), ("enas", 2), ("gated sizes", 2)])
def test_the_mean_policy_gradient_is_exact(space, k):
    assert gradient_miss(space, k) < 1e-10


MUTANTS = {
    "a baseline with the own reward": ("leave_one_out", lambda rewards: rewards.mean()),
    "no entropy in the bracket": ("policy_loss", lambda sample, rewards, w: policy_loss(
        sample, rewards - w * sample.entropy.detach(), w)),
    "no entropy outside": ("policy_loss", lambda sample, rewards, w: policy_loss(
        sample._replace(entropy=sample.entropy.detach()), rewards, w)),
    "sign": ("policy_loss", lambda *x: -policy_loss(*x))}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(name, monkeypatch):
    monkeypatch.setattr(menas, *MUTANTS[name])
    assert gradient_miss("enas", 2) > .01


def test_a_failed_architecture_gets_the_worst_reward_and_a_baseline_is_of_the_others():
    nan, inf = math.nan, math.inf
    assert worst_for_failures(torch.tensor([2, nan, 1, inf, -inf])).tolist() == [2, 1, 1, 1, 1]
    assert worst_for_failures(torch.tensor([nan, inf])).tolist() == [0, 0]
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0])).tolist() == [4.0, 3.5, 1.5]
