"""Chapter 6: the extra gradient is the derivative of the one-step objective.
Run: pytest tests/test_gradients.py

Oracle: 16 architectures, a policy softmax(theta), a real network in float64. Each one's training
gradient, by autograd through tests/reference.py, is a constant, so omega'(theta) is a function of
the 16 probabilities, and autograd through it and the reference at omega' gives dF_1/dtheta. A fold
in which each architecture stands as often as it is probable is the whole policy."""
from functools import lru_cache
from itertools import count

import pytest
import torch
from torch.testing import assert_close

import menas
from menas import (LOOKAHEAD, RESPONSE, Anticipation, Batch, Config, Corpus, Step, decode, fresh,
                   look_ahead, rates_of, rng, search_space, train_step, zero_state)
from mutants import mutate
from reference import every_row, naive_network

CONFIG = dict(nodes=3, activations="tanh,identity", hidden=4, batch=3, bptt=5, lr=2.0, clip=100.0,
              weight_decay=0.0, input_dropout=.3, hidden_dropout=.3, output_dropout=.3,
              dtype="float64", device="cpu")
TEXT = torch.randint(7, (46,), generator=rng("text"))
CORPUS = Corpus(TEXT, TEXT, TEXT, list("abcdefg"), {})  # one text, so that the response is large
ROWS, _ = every_row(search_space(Config(**CONFIG)))                                      # [16, D]
RATED = ROWS.clone()
RATED[:, menas.WHOLE.index("rate")] = torch.tensor([-1, 0, 2, 1] * 4)
COUNTS = torch.tensor([1, 3, 2, 4, 1, 1, 2, 5, 3, 1, 1, 2, 4, 1, 2, 3])                  # 36 pi
THETA = COUNTS.double().log()


def a_game(**settings):
    """In float64; the step that it foresees and its rewards are both on the first segment."""
    game = Anticipation(Config(**CONFIG | settings), CORPUS)
    game.s["weights"] = {name: w.double() for name, w in game.s["weights"].items()}
    game.s["state"] = dict.fromkeys(game.s["state"], zero_state(game.s["weights"], 3))
    return game


OMEGA = a_game().s["weights"]
SEGMENT = a_game().streams["train"].segment(0)
VALID = Batch(SEGMENT.inputs, SEGMENT.targets, zero_state(OMEGA, 3), {})
TRAIN = VALID._replace(masks=a_game().masks("ahead"))


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in OMEGA])


def unflat(x):
    parts = x.split([w.numel() for w in OMEGA.values()])
    return {name: part.view_as(w) for (name, w), part in zip(OMEGA.items(), parts)}


def own_gradient(row):
    w = flat(OMEGA).requires_grad_()
    return torch.autograd.grad(naive_network(unflat(w), decode(row), TRAIN)[0], w)[0]


GRADIENTS = torch.stack([own_gradient(row) for row in ROWS])                      # [16, weights]
SOMEWHERE = torch.randn(GRADIENTS.shape[1], generator=rng("u"), dtype=torch.float64)


def rewards_at(w):
    """Of each architecture, at flat weights."""
    losses = [naive_network(unflat(w), decode(row), VALID)[0] for row in ROWS]
    return 80 * torch.exp(-torch.stack(losses))


def slope(value, at):
    return torch.autograd.grad(value, at, retain_graph=True)[0]


CASES = {
    "plain": (ROWS, {}),
    "decay": (ROWS, dict(weight_decay=.05)),
    "clip": (ROWS, dict(clip=.1)),
    "rates": (RATED, {}),
    "rates, clip": (RATED, dict(clip=.1)),
    "rates, clip, decay": (RATED, dict(clip=.1, weight_decay=.05)),
}


@lru_cache
def exact(case):
    """dF_1/dtheta, and its part with omega' held fixed. The step is the mean of those that training
    takes, with the mean gradient, the mean bound on its norm, and the mean decay."""
    rows, settings = CASES[case]
    config = Config(**CONFIG | settings)
    theta = THETA.clone().requires_grad_()
    pi = theta.softmax(0)
    xi = rates_of(rows).double()
    g = (pi * xi) @ GRADIENTS
    step = g * (config.clip * (pi @ xi) / g.norm()).clamp(max=1)
    decay = config.weight_decay * (pi @ xi) * flat(OMEGA)
    reached = rewards_at(flat(OMEGA) - config.lr * (step + decay))
    return slope(pi @ reached, theta), slope(pi @ reached.detach(), theta)


def errors(case, step=None):
    """Of the estimator's mean, with the whole policy as both folds, relative to the response; and
    of its direct part."""
    rows, settings = CASES[case]
    game, fold = a_game(**settings), rows.repeat_interleave(COUNTS, 0)
    rewards = game.rewards_on(game.next("valid"))
    step = step or game.foresee(0.0, fold)
    direct, response, *_ = menas.extra_rewards(
        "fresh", "unrolled", OMEGA, rows, fold, rewards, step)
    theta = THETA.clone().requires_grad_()
    ours = slope(theta.softmax(0) @ (direct + response), theta)
    our_part = slope(theta.softmax(0) @ direct, theta)
    whole, part = exact(case)
    return ((ours - whole).norm() / (whole - part).norm()).item(), (our_part - part).norm().item()


@pytest.mark.parametrize("case", CASES)
def test_fresh_and_unrolled_is_the_gradient_of_the_one_step_objective(case):
    """Oracle: exact(); the direct part alone, and its sum with the response."""
    whole, direct = errors(case)
    assert direct < 1e-9
    assert whole < 1e-3  # of the finite difference, see below


MUTANTS = {
    "sign": ("unrolled", "return -", "return "),
    "/ eps": ("directional", "(2 * eps)", "eps"),
    "no rate of the scored": ("directional", "step.rates(rows) * ", ""),
    "response at omega'": ("extra_rewards", "[respond](v, weights", "[respond](v, ahead"),
    "v at omega": ("extra_rewards", "others), ahead)", "others), weights)"),
    "no J": ("through_clip", "scale * (v[name] - along * g[name])", "step.lr * v[name]"),
    "no lr": ("through_clip", "step.lr * (clip", "(clip"),
    "no projection": ("through_clip", " - along * g[name]", ""),
    "a step not clipped is projected": ("through_clip", "norm > clip,", "norm > 0,"),
    "no longer step": ("unrolled", " - longer * step.rates(rows)", ""),
    "no decay in the response": ("unrolled", "(bound + step.decay * dot(v, weights))", "bound"),
    "bound without rates": ("foreseen_clip", " * mean_rate(step)", ""),
    "no decay": ("look_ahead", "step.decay * mean_rate(step)", "0.0"),
    "clipped before the mean": (
        "fresh", "* losses",
        "* (step.clip / step.each(w, step.fold, w)[0]).clamp(max=1) * losses"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(monkeypatch, name):
    """In one case at least."""
    function, right, wrong = MUTANTS[name]
    mutate(monkeypatch, function, (right, wrong))
    assert any(errors(case)[0] > .02 for case in CASES)


def test_masks_that_differ_between_the_two_passes_fail():
    """The known mistake: a difference of losses under other masks, divided by a small eps."""
    foreseen = a_game().foresee(0.0, ROWS.repeat_interleave(COUNTS, 0))
    draws = count(1)

    def redrawn(weights, cells):
        game = a_game()
        game.s["step"] = next(draws)
        return game.foresee(0.0, cells).losses(weights, cells)
    assert errors("plain", foreseen._replace(losses=redrawn))[0] > 1


def test_directional_is_the_gradient_up_to_eps_squared():
    """Oracle: autograd. Losses that see a change of omega enlarged have as much larger an eps."""
    step = a_game().foresee(0.0, RATED)
    right = rates_of(RATED) * (GRADIENTS @ SOMEWHERE)
    found = []
    for zoom in (10.0, 1.0):
        def losses(weights, cells):
            there = {name: w + zoom * (weights[name] - w) for name, w in OMEGA.items()}
            return step.losses(there, cells)
        zoomed = step._replace(losses=losses)
        ours = menas.directional(zoomed, OMEGA, RATED, unflat(SOMEWHERE)) / zoom
        found.append(((ours - right).norm() / right.norm()).item())
    assert found[1] < 1e-4 and found[1] < .015 * found[0]


def test_a_response_without_direction_is_zero():
    """By hand: v = 0, and no 0 / 0."""
    nothing, step = unflat(0 * SOMEWHERE), a_game().foresee(0.0, ROWS)
    g, _ = fresh(OMEGA, step)
    for respond in RESPONSE.values():
        assert not respond(nothing, OMEGA, g, step, ROWS).any()
    assert not menas.directional(step, OMEGA, ROWS, nothing).any()


@pytest.mark.parametrize("clip, decay", [(100.0, 0.0), (.4, .05)])
def test_sampled_is_the_step_on_one_clipped_architecture(clip, decay):
    """Oracle: <the step of train_step on it alone, v>, with v by autograd through the reference."""
    game, w = a_game(clip=clip, lr=.1, weight_decay=decay), flat(OMEGA).requires_grad_()
    v = slope(THETA.softmax(0) @ rewards_at(w), w)
    steps = []
    for row, rate in zip(RATED, rates_of(RATED)):
        weights = {name: x.clone() for name, x in OMEGA.items()}
        train_step(weights, row[None], TRAIN, .1 * rate[None], game.config)
        steps.append(flat(weights).detach() - flat(OMEGA))
    step = game.foresee(0.0, RATED)
    ours = RESPONSE["sampled"](unflat(v), OMEGA, None, step, RATED)
    assert_close(ours, torch.stack(steps) @ v, rtol=1e-6, atol=1e-9)


def test_lookaheads_are_what_they_say():
    """Oracle: means of past gradients by hand."""
    past, gs = {}, [SOMEWHERE * scale + 1 for scale in (1, 2, 3)]
    for g in gs:
        past = menas.remember(past, unflat(g), keep=.5)
    step = Step(None, ROWS, 2.0, past=past)
    assert_close(flat(LOOKAHEAD["recent"](OMEGA, step)[0]), gs[2])
    expected = (gs[2] + .5 * gs[1] + .25 * gs[0]) / 1.75
    assert_close(flat(LOOKAHEAD["momentum"](OMEGA, step)[0]), expected)
    for name in ("none", "recent", "momentum"):  # without a past there is nowhere to look
        assert LOOKAHEAD[name](OMEGA, step._replace(past={}))[0] is None
    assert look_ahead(OMEGA, None, step) is OMEGA
