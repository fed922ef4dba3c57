"""The extra gradient equals the derivative of the one-step objective. Run: pytest tests/test_gradients.py

Oracle: a space of 16 architectures, enumerated. Each one's training gradient is a constant, so omega'(theta) = omega -
lr clip(sum_m pi(m) grad L_T(omega; m)) - lr decay omega is a function of the 16 probabilities, and autograd through it
and through the plain loop at omega' gives dF/dtheta in float64, with no second derivative and no code of chapter 6."""
import inspect
import itertools

import pytest
import torch

import menas
from menas import (LOOKAHEAD, RESPONSE, REWARDS, Batch, Config, Controller, Search, Step, configure, draw_masks,
                   extra_rewards, fresh, load_corpus, look_ahead, network, reference_losses, remember, search_space,
                   shared_weights, train_step)

SMALL = dict(hidden=8, batch=8, nodes=3, input_dropout=.3, hidden_dropout=.3, weight_decay=.01)
CONFIG = Config(nodes=3, activations="tanh,relu", controller_hidden=5, hidden=4, batch=3, bptt=5, input_dropout=.3,
                hidden_dropout=.3, output_dropout=.3, init=.7)
WORDS = 7
REWARD = REWARDS["perplexity"]
SPACE = search_space(CONFIG)
ROWS = torch.tensor(list(itertools.product(*(d.choices for d in SPACE))))


def text(seed):
    return torch.randint(WORDS, (2, CONFIG.bptt, CONFIG.batch), generator=torch.Generator().manual_seed(seed))


def doubles(tensors):
    return {name: x.double() for name, x in tensors.items()}


class World:
    """A supernet, a policy away from uniform, a training and a validation minibatch, all in float64."""
    omega = doubles(shared_weights(CONFIG, WORDS))
    masks = doubles(draw_masks(CONFIG, WORDS, CONFIG.batch, [1], 0))
    zeros = torch.zeros(1, CONFIG.batch, CONFIG.hidden, dtype=torch.float64)
    train, valid = Batch(*text(1), zeros, masks), Batch(*text(1), zeros, {})  # the same text: a large response
    controller = Controller(SPACE, CONFIG).double()
    with torch.no_grad():
        for i, parameter in enumerate(controller.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    policy = controller(rows=ROWS)
    pi = policy.log_prob.exp()
    params = list(controller.parameters())


def of_theta(value):
    """d value / dtheta, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, World.params, retain_graph=True)])


def losses(weights, cells, batch):
    """[K]; for cells = None the policy's mean [1], so that a fold is the whole policy and g and v are exact."""
    if cells is None:
        return (World.pi.detach() * losses(weights, ROWS, batch)).sum(0, keepdim=True)
    return network(weights, cells, batch, torch.float64)[0]


def rewards(weights, cells):
    if cells is None:
        return (World.pi.detach() * rewards(weights, ROWS)).sum(0, keepdim=True)
    return REWARD(losses(weights, cells, World.valid))


def a_step(clip=100.0, lr=2.0, **more):
    return Step(losses, World.train, None, lr, clip, 1e-2, **more)


def plain(weights, batch):
    return torch.stack([reference_losses(weights, row, batch)[0] for row in ROWS])


def training_gradients():
    """[16] dicts of each architecture's gradient of L_T at omega, by autograd through the plain loop."""
    leaf = {name: w.clone().requires_grad_() for name, w in World.omega.items()}
    values = plain(leaf, World.train)
    return [{n: torch.zeros_like(leaf[n]) if g is None else g for n, g in zip(leaf, torch.autograd.grad(
        value, list(leaf.values()), retain_graph=True, allow_unused=True))} for value in values]


GRADIENTS = training_gradients()


def exact(step):
    """dF/dtheta of F = sum_m pi(m) R(omega'(theta); m), and its part with omega' held fixed."""
    g = {name: sum(p * grad[name] for p, grad in zip(World.pi, GRADIENTS)) for name in World.omega}
    norm = sum(x.square().sum() for x in g.values()).sqrt()
    scale = step.lr * (step.clip / norm).clamp(max=1)
    ahead = {name: w * (1 - step.lr * step.decay) - scale * g[name] for name, w in World.omega.items()}
    reached = REWARD(plain(ahead, World.valid))
    return of_theta((World.pi * reached).sum()), of_theta((World.pi * reached.detach()).sum())


def estimate(step, look="fresh", respond="unrolled"):
    """The mean of the estimator given omega' and v': its two terms, summed over the space instead of sampled."""
    direct, response = extra_rewards(look, respond, World.omega, ROWS, None, rewards, step)
    return of_theta((World.pi * (direct + response)).sum()), of_theta((World.pi * direct).sum())


def error(step):
    """Of the whole gradient, relative to the response."""
    (right, direct), ours = exact(step), estimate(step)[0]
    return ((ours - right).norm() / (right - direct).norm()).item()


CLIPS = [100.0, .1]  # of a gradient of norm about 1: not clipped, and clipped


@pytest.mark.parametrize("clip", CLIPS)
def test_fresh_and_unrolled_is_the_gradient_of_the_one_step_objective(clip):
    step = a_step(clip)
    (whole, direct), (our_whole, our_direct) = exact(step), estimate(step)
    assert torch.allclose(our_direct, direct, rtol=1e-9, atol=1e-12)
    assert error(step) < 3e-3  # of the finite difference, see the next test


def test_the_error_is_the_finite_differences(monkeypatch):
    """It falls with eps squared."""
    errors = []
    for size in (1e-2, 1e-3):
        monkeypatch.setattr(menas, "nudge", lambda u: size / menas.dot(u, u).sqrt())
        errors.append(error(a_step(.1)))
    assert errors[1] < .02 * errors[0] and errors[1] < 3e-5


def mutate(monkeypatch, function, old, new):
    """The function of chapter 6 with one piece of its text replaced; wherever a dictionary holds it, too."""
    source = inspect.getsource(getattr(menas, function))
    assert source.count(old) == 1
    space = dict(vars(menas))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(menas, function, space[function])
    for table in (LOOKAHEAD, RESPONSE):
        for name, known in table.items():
            if known.__name__ == function:
                monkeypatch.setitem(table, name, space[function])
    return space[function]


MUTANTS = {"wrong sign": ("extra_rewards", "direct, RESPONSE", "direct, -RESPONSE"),
           "/ 2 * eps": ("directional", "/ (2 * eps)", "/ 2 * eps"),
           "missing xi": ("through_clip", "scale = step.lr * (", "scale = ("),
           "missing clip scale": ("through_clip", "(step.clip / norm).clamp(max=1)", "1.0"),
           "missing clip projection": ("through_clip", "dot(v, g) / norm ** 2", "0.0 * norm"),
           "projection of an unclipped step": ("through_clip", "norm > step.clip", "norm > 0"),
           "v at omega": ("extra_rewards", "rewards(w, others), ahead)", "rewards(w, others), weights)"),
           "response at omega'": ("extra_rewards", "](v, weights,", "](v, ahead,"),
           "no decay ahead": ("look_ahead", "step.decay)", "0.0)"),
           "v of the loss": ("extra_rewards", "w: rewards(w, others)", "w: -step.losses(w, others, step.batch)")}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(monkeypatch, name):
    function = mutate(monkeypatch, *MUTANTS[name])
    if MUTANTS[name][0] == "extra_rewards":
        monkeypatch.setitem(globals(), "extra_rewards", function)
    assert max(error(a_step(clip)) for clip in CLIPS) > .05


def test_masks_redrawn_between_the_two_passes_fail():
    """The known mistake: the difference of two losses under other masks, divided by a small eps."""
    draws = itertools.count()

    def redrawn(weights, cells, batch):
        masks = doubles(draw_masks(CONFIG, WORDS, CONFIG.batch, [1], next(draws)))
        return losses(weights, cells, batch._replace(masks=masks))
    assert error(a_step()._replace(losses=redrawn)) > 1


def test_a_clipped_step_ignores_the_length_of_the_gradient():
    """J^T v is orthogonal to g: lengthening g does not move omega'."""
    step = a_step(.1)
    g = fresh(World.omega, step)
    v = {name: torch.randn_like(x) for name, x in g.items()}
    assert abs(menas.dot(menas.through_clip(v, g, step), g)) < 1e-12


def test_neumann_with_one_term_is_unrolled():
    step = a_step(.1)
    g = fresh(World.omega, step)
    v = {name: torch.randn_like(x) for name, x in g.items()}
    one = menas.neumann(v, World.omega, g, step, ROWS, terms=1)
    assert torch.equal(one, RESPONSE["unrolled"](v, World.omega, g, step, ROWS)) and one.abs().max() > 1e-3


@pytest.mark.parametrize("clip", CLIPS)
def test_neumann_is_the_many_step_unroll(clip):
    """Oracle: the recurrence p <- (1 - lr decay) p - H lr J p with the Hessian of the plain loop's mean loss, by
    autograd twice."""
    step = a_step(clip, lr=.5)
    leaf = {name: w.clone().requires_grad_() for name, w in World.omega.items()}
    mean = (World.pi.detach() * plain(leaf, World.train)).sum()
    first = torch.autograd.grad(mean, list(leaf.values()), create_graph=True)
    hessian = lambda x: flat(torch.autograd.grad(flat(first) @ x, list(leaf.values()), retain_graph=True))
    g, norm = flat(first).detach(), flat(first).detach().norm()
    clipped = lambda x: clip / norm * (x - g * (g @ x) / norm ** 2) if norm > clip else x
    p = torch.randn(len(g), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    split = dict(zip(leaf, p.split([w.numel() for w in leaf.values()])))
    v = {name: x.view_as(leaf[name]) for name, x in split.items()}
    expected = 0
    for _ in range(3):
        expected = expected + step.lr * clipped(p)
        p = (1 - step.lr * step.decay) * p - hessian(step.lr * clipped(p))
    ours = RESPONSE["neumann"](v, World.omega, fresh(World.omega, step), step, ROWS)
    expected = torch.stack([flat(grad.values()) for grad in GRADIENTS]) @ expected
    assert (ours + expected).norm() < 1e-4 * expected.norm()


def test_a_response_without_direction_is_zero():
    """v = 0: no 0 / 0."""
    zero = {name: torch.zeros_like(w) for name, w in World.omega.items()}
    assert not menas.directional(a_step()._replace(cells=ROWS), World.omega, ROWS, zero).any()
    for name in ("unrolled", "neumann"):
        assert not RESPONSE[name](zero, World.omega, fresh(World.omega, a_step()), a_step(), ROWS).any()


def test_lookaheads_are_what_they_say():
    """Oracle: the means of past gradients by hand; omega' by hand."""
    past, gs = {}, [{name: torch.randn_like(w) for name, w in World.omega.items()} for _ in range(3)]
    for g in gs:
        past = remember(past, g, decay=.5)
    step = a_step(past=past)
    mean = {name: (gs[2][name] + .5 * gs[1][name] + .25 * gs[0][name]) / 1.75 for name in World.omega}
    for name, expected in (("recent", gs[2]), ("momentum", mean)):
        got = LOOKAHEAD[name](World.omega, step)
        assert all(torch.allclose(got[n], expected[n]) for n in expected)
    for name in ("none", "recent", "momentum"):  # without a past there is nowhere to look
        assert LOOKAHEAD[name](World.omega, a_step()) is None
    assert look_ahead(World.omega, None, step) is World.omega


def enumerated_mean(folds, step, share=False):
    """E over a fold of one architecture for g and one for v of the estimator's mean: all 16 x 16 pairs. share: one
    architecture for both, which then is scored, too."""
    whole = 0
    for i, j in itertools.product(range(16), repeat=2):
        if share and i != j:
            continue
        direct, response = extra_rewards("fresh", "unrolled", World.omega, ROWS, ROWS[[j]], rewards,
                                         step._replace(cells=ROWS[[i]]))
        weight = World.pi[i].detach() * (1 if share else World.pi[j].detach())
        score = World.policy.log_prob[i] if share else (World.pi * (direct + response)).sum()
        whole = whole + weight * (of_theta(score) * (direct + response)[i] if share else of_theta(score))
    return whole


def test_scoring_the_architectures_that_omega_was_made_from_is_biased():
    """Oracle: enumeration. For a short step F is nearly linear, so disjoint folds have a bias of the second order;
    scoring the fold itself one of the first."""
    step = a_step(lr=.02)
    right, plain_ = exact(step)[0], estimate(a_step(lr=0.0), "none", "none")[0]
    scale = (right - plain_).norm()  # what looking ahead by this step changes
    assert (enumerated_mean(None, step) - right).norm() < .1 * scale
    assert (enumerated_mean(None, step, share=True) - right).norm() > .3 * scale


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def test_sampled_is_the_gradient_of_the_step_on_one_clipped_architecture():
    """Oracle: E_m' E_m R(omega - lr clip(g_m'); m), all 16 x 16 pairs; what m' changes of it, to first order in lr."""
    errors, clip = [], .3
    for lr in (.02, .01):
        reached = []
        for grad in GRADIENTS:
            scale = lr * (clip / flat(grad.values()).norm()).clamp(max=1)
            ahead = {name: w - scale * grad[name] for name, w in World.omega.items()}
            reached.append((World.pi.detach() * REWARD(plain(ahead, World.valid))).sum())
        exact = of_theta((World.pi * torch.stack(reached).detach()).sum())
        each = lambda weights, cells, batch, v: (torch.stack([flat(g.values()).norm() for g in GRADIENTS]),
                                                 torch.stack([menas.dot(g, v) for g in GRADIENTS]))
        step = a_step(clip, lr=lr, each=each)._replace(decay=0.0)
        response = extra_rewards("none", "sampled", World.omega, ROWS, None, rewards, step)[1]
        errors.append(((of_theta((World.pi * response).sum()) - exact).norm() / exact.norm()).item())
    assert errors[0] < .1 and errors[1] < .6 * errors[0]  # it falls with lr


def test_each_gives_every_architectures_own_gradient():
    """Oracle: the plain loop's gradients, one architecture at a time."""
    config = configure("search", "smoke", **SMALL, lr=3.0)
    game = Search(config, load_corpus(config))
    cells = game.controller.sample(3, 1).rows
    step = game.foresee(0.0, cells)
    v = {name: torch.randn_like(w) for name, w in game.s["weights"].items()}
    norms, along = step.each(game.s["weights"], cells, step.batch, v)
    batch = Batch(step.batch.inputs, step.batch.targets, torch.zeros(1, 8, 8), game.masks(("ahead", 0)))
    for k in range(3):
        g = menas.mean_gradient(lambda w: reference_losses(w, cells[k], batch)[0][None], game.s["weights"])
        assert norms[k].item() == pytest.approx(menas.dot(g, g).sqrt().item(), rel=1e-4)
        assert along[k].item() == pytest.approx(menas.dot(g, v).item(), rel=1e-3, abs=1e-4)


# The search uses these functions as the tests above do.

def test_the_step_foreseen_is_the_step_taken():
    """Oracle: train_step on the same architectures, segment, state and masks."""
    config = configure("search", "smoke", **SMALL, lookahead="fresh", lr=3.0)
    game = Search(config, load_corpus(config))
    cells = game.controller.sample(2, 1).rows
    step = game.foresee(0.0, cells)
    ahead = look_ahead(game.s["weights"], fresh(game.s["weights"], step), step)
    batch = Batch(step.batch.inputs, step.batch.targets, torch.zeros(1, 8, 8), game.masks(("ahead", 0)))
    taken = {name: w.clone() for name, w in game.s["weights"].items()}
    train_step(taken, cells, batch, torch.full((1,), 3.0), config)
    for name in taken:
        assert torch.allclose(ahead[name], taken[name], atol=1e-6)
        assert not torch.equal(taken[name], game.s["weights"][name]) or name == "bias"


@pytest.mark.parametrize("look", list(LOOKAHEAD))
@pytest.mark.parametrize("respond", list(RESPONSE))
def test_every_pair_searches_and_moves_the_controller(look, respond):
    config = configure("search", "smoke", **SMALL, lookahead=look, response=respond, controller_samples=3)
    game = Search(config, load_corpus(config))
    before = {name: w.clone() for name, w in game.controller.state_dict().items()}
    game.shared_step(0.0)
    game.controller_step(0.0)
    line = game.line(0)
    assert ("response" in line) == (respond != "none") and all(map(torch.isfinite, map(torch.tensor, line.values())))
    assert any(not torch.equal(w, before[name]) for name, w in game.controller.state_dict().items())


@pytest.mark.parametrize("respond, clip", [("unrolled", 1000.0), ("neumann", 1000.0), ("sampled", 1000.0),
                                           ("sampled", .1)])
def test_a_learning_rate_as_a_decision(respond, clip):
    """Three architectures that differ in nothing but their rate. The direct term is blind to it; oracle of the
    response: a finite difference of the mean reward after the steps that training takes, in their probabilities."""
    config = configure("search", "smoke", hidden=8, batch=8, nodes=1, activations="tanh", rates=".5,1,2", lr=.02,
                       weight_decay=0.0, lookahead="none" if respond == "sampled" else "fresh", response=respond,
                       clip=clip)
    game = Search(config, load_corpus(config))
    cells = game.controller.sample(64, 1).rows.unique(dim=0)
    assert cells.shape == (3, 9)
    omega, step = game.s["weights"], game.foresee(0.0, cells)
    rewards = game.rewards_on(game.streams["valid"].next())
    direct, response = extra_rewards(config.lookahead, respond, omega, cells, cells, rewards, step)
    assert direct.std() < 1e-6 and (response[1:] / response[:-1] - 2).abs().max() < 1e-3  # rates 1/2, 1, 2

    def reward_after(rate):
        """The mean reward after a step of training at that factor of the rate."""
        weights = {name: w.clone() for name, w in omega.items()}
        batch = Batch(step.batch.inputs, step.batch.targets, torch.zeros(1, 8, 8), {})
        train_step(weights, cells[:1], batch, torch.full((1,), config.lr * rate), config)
        with torch.no_grad():
            return rewards(weights, cells[:1]).item()

    mean_rate = (.5 + 1 + 2) / 3 if respond != "sampled" else 0.0  # where v is taken
    if respond != "neumann":  # more than one step
        slope = (reward_after(mean_rate + .5) - reward_after(mean_rate - .5))
        assert response[1].item() == pytest.approx(slope, rel=2e-2)
    assert response[1].abs() > 1e-4
