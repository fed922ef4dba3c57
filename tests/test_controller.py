"""The controller's probabilities and gradients are exact. Run: pytest tests/test_controller.py"""
import itertools

import pytest
import torch

from menas import (BASELINES, REWARDS, Config, Controller, Run, Stream, configure, leave_one_out, load_corpus,
                   moving_average, policy_loss, score, search, search_space, uniform_rows, worst_for_failures)

SMALL = Config(nodes=3, activations="tanh,relu", controller_hidden=5)


def small_controller(config=SMALL):
    controller = Controller(search_space(config), config).double()
    with torch.no_grad():
        for i, parameter in enumerate(controller.parameters()):  # away from the nearly uniform start
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return controller


def all_rows(decisions):
    return torch.tensor(list(itertools.product(*(d.choices for d in decisions))))


def flat_gradient(value, controller):
    grads = torch.autograd.grad(value, list(controller.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def test_probabilities_sum_to_one():
    """Oracle: enumeration of the space."""
    controller = small_controller()
    rows = all_rows(controller.decisions)
    assert len(rows) == 16  # 2 activations at 3 nodes, 2 predecessors of the last
    assert abs(controller(rows=rows).log_prob.exp().sum().item() - 1) < 1e-12


def test_samples_follow_the_probabilities():
    controller = small_controller()
    rows, sample = all_rows(controller.decisions), controller.sample(20000, 1)
    which = (sample.rows[:, None] == rows).all(2).double()
    assert (which.sum(1) == 1).all()
    expected = controller(rows=rows).log_prob.exp()
    error = (which.mean(0) - expected) / (expected * (1 - expected) / 20000).sqrt()
    assert error.abs().max() < 4  # standard errors


def test_sampling_and_scoring_agree():
    """The temperature and the tanh constant hold in both: one walk."""
    controller = small_controller()
    sample = controller.sample(50, 2)
    again = controller(rows=sample.rows)
    assert torch.equal(sample.rows, again.rows)
    assert torch.allclose(sample.log_prob, again.log_prob) and torch.allclose(sample.entropy, again.entropy)


def test_entropy_along_the_path_averages_to_the_policys():
    """Oracle: - sum p log p over the enumerated space."""
    controller = small_controller()
    sample = controller(rows=all_rows(controller.decisions))
    p = sample.log_prob.exp()
    assert torch.allclose((p * sample.entropy).sum(), -(p * sample.log_prob).sum())


def exact_objective(controller, reward, weight):
    sample = controller(rows=all_rows(controller.decisions))
    p = sample.log_prob.exp()
    return (p * (reward - weight * sample.log_prob)).sum()


@pytest.mark.parametrize("name", list(BASELINES))
def test_mean_policy_gradient_is_exact(name):
    """Oracle: the derivative of E[reward] + weight * entropy by enumeration, over all pairs (m, m')."""
    controller, weight = small_controller(), 0.3
    rows = all_rows(controller.decisions)
    reward = torch.linspace(-1, 2, len(rows), dtype=torch.float64) ** 2
    exact = flat_gradient(exact_objective(controller, reward, weight), controller)
    p = controller(rows=rows).log_prob.exp().detach()
    mean = torch.zeros_like(exact)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        sample = controller(rows=rows[[i, j]])
        memory = torch.tensor([3.0, 2.0], dtype=torch.float64)  # of the past, so independent of this pair
        value = reward[[i, j]] + weight * sample.entropy.detach()
        baseline, _ = BASELINES[name](value, memory, 0.95)
        mean -= p[i] * p[j] * flat_gradient(policy_loss(sample, reward[[i, j]], baseline, weight), controller)
    assert (mean - exact).abs().max() < 1e-10


def test_a_baseline_with_its_own_reward_is_biased():
    """The mutant of the test above: the batch mean, the known mistake, shrinks the gradient by (K - 1) / K."""
    controller = small_controller()
    rows = all_rows(controller.decisions)
    reward = torch.linspace(-1, 2, len(rows), dtype=torch.float64) ** 2
    exact = flat_gradient(exact_objective(controller, reward, 0.0), controller)
    p = controller(rows=rows).log_prob.exp().detach()
    mean = torch.zeros_like(exact)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        sample, r = controller(rows=rows[[i, j]]), reward[[i, j]]
        mean -= p[i] * p[j] * flat_gradient(policy_loss(sample, r, r.mean(), 0.0), controller)
    assert (mean - exact / 2).abs().max() < 1e-10


def test_leave_one_out_excludes_the_own_reward():
    baseline, _ = leave_one_out(torch.tensor([1.0, 2.0, 6.0]), None, None)
    assert baseline.tolist() == [4.0, 3.5, 1.5]


def test_moving_average_holds_the_past_only():
    """Oracle: a geometric mean of past batch means by hand, bias-corrected; it survives from call to call."""
    memory = torch.zeros(2)
    for reward in (1.0, 3.0, 8.0):
        baseline, memory = moving_average(torch.full((4,), reward), memory, 0.5)
    assert baseline.tolist() == [pytest.approx((0.5 * 1 + 1 * 3) / 1.5)] * 4


def test_a_failed_architecture_gets_the_worst_reward():
    rewards = worst_for_failures(torch.tensor([2.0, float("nan"), 1.0, float("inf"), -float("inf")]))
    assert rewards.tolist() == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert worst_for_failures(torch.tensor([float("nan")])).tolist() == [0.0]


def test_uniform_rows_are_uniform():
    decisions = search_space(SMALL)
    rows, found = all_rows(decisions), uniform_rows(decisions, 8000, 1)
    counts = (found[:, None] == rows).all(2).sum(0).double()
    assert ((counts - 500) / (500 * 15 / 16) ** 0.5).abs().max() < 4


def noise_of_the_gradient(config, weights, controller, corpus, steps=100):
    """{baseline: total variance of the policy gradient} for one fixed policy and supernet.

    Both baselines see the same samples and validation segments. Both are unbiased, so the gradient's signal per reward
    evaluation is the same and its signal-to-noise ratio goes as one over this variance."""
    valid, carried = Stream(corpus.valid, config.batch, config.bptt), torch.zeros(1, config.batch, config.hidden)
    found, memory = {name: [] for name in BASELINES}, {name: torch.zeros(2) for name in BASELINES}
    for step in range(steps):
        sample = controller.sample(10, "noise", step)
        losses, carried = score(config, weights, sample.rows, valid.next(), carried)
        rewards = REWARDS["perplexity"](losses)
        for name, baseline in BASELINES.items():
            b, memory[name] = baseline(rewards, memory[name], 0.95)
            found[name].append(flat_gradient(policy_loss(sample, rewards, b, 0.0), controller))
    return {name: torch.stack(gradients)[20:].var(0).sum().item() for name, gradients in found.items()}


def test_leave_one_out_has_the_stronger_signal(tmp_path):
    """It wins once the policy has learnt, when the minibatch's difficulty is most of the reward's noise. Before that,
    where random cells differ more than minibatches do, it costs at most K / (K - 1): a mean over K - 1 samples."""
    config = configure("search", "smoke", shared_steps=100, controller_steps=60, lr=10.0, batch=8, warm_epochs=1,
                       controller_lr=.02, out=str(tmp_path))
    corpus = load_corpus(config)
    with Run("search", config) as run:
        weights, trained = search(config, run, corpus)
    ratio = {}
    for name, controller in (("untrained", Controller(search_space(config), config)), ("trained", trained)):
        variance = noise_of_the_gradient(config, weights, controller, corpus)
        ratio[name] = variance["moving_average"] / variance["leave_one_out"]
    print("signal-to-noise of the controller's gradient per reward evaluation, leave_one_out / moving_average:", ratio)
    assert ratio["trained"] > 1.5 and ratio["untrained"] > 0.85
