"""An ENAS with one parameter, in which every quantity is known exactly, to see what the extra gradient is.

    python toy_enas.py        # ten seconds: a table of exact | estimate | error, a figure, and one sentence

One logit theta chooses between two architectures, pi = (1 - p, p) with p = sigmoid(theta), which share a weight omega:

    L_T(omega; m) = a_m / 2 (omega - t_m)^2,   L_V(omega; m) = b_m / 2 omega^2 + c_m
    omega*(theta) = sum_m pi_m a_m t_m / sum_m pi_m a_m,   F(theta) = sum_m pi_m L_V(omega*; m)
    dF/dtheta = p (1 - p) { L_V(omega*; 1) - L_V(omega*; 0)                             the direct term: all of ENAS
                            + v [a_1 (t_1 - omega*) - a_0 (t_0 - omega*)] / sum_m pi_m a_m },    the response;
    v = sum_m pi_m b_m omega*

F is a loss here: the controller descends. Architecture 1 scores a little worse at ANY omega (c_1 > c_0), but training
on it makes omega good for everyone (t_1 = 0), while 0 spoils it (t_0 = 2). The direct term alone therefore always
leads to architecture 0; F is best near 1.

What is checked are the functions of menas.py, by their own interface. A row of cells is a mixture of architectures, so
the row (1, 0) is an architecture and the row pi their mean over the policy. Where a clipped step or K-FAC would be
trivial in one dimension, the weight is a linear layer W [2, 3] instead."""
import itertools
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from menas import (RESPONSE, Sample, Step, directional, extra_rewards, fresh, leave_one_out, look_ahead, neumann,
                   policy_loss, remember)
from results.report import table

DTYPE = torch.float64  # of the constants here, and torch's default while main runs
PAIRS = [("none", "none"), ("momentum", "none"), ("recent", "none"), ("fresh", "none"), ("fresh", "unrolled"),
         ("fresh", "neumann"), ("fresh", "sampled"), ("fresh", "kfac")]
ONE = torch.eye(2, dtype=DTYPE)  # the two architectures as rows


# 1. Problems: every loss is that of a linear layer W [out, in] -------------------------------------------------------

class Losses(NamedTuple):
    """L(W; m) = 1/2 tr(noise W S_m W') - tr(noise W C_m') + c_m: mean of 1/2 (Wx - y)' noise (Wx - y) over m's data."""
    s: torch.Tensor      # [M, in, in] mean of x x'
    c: torch.Tensor      # [M, out, in] mean of y x'
    const: torch.Tensor  # [M]
    noise: torch.Tensor  # [out, out] inverse covariance of y given x


def losses(weights, cells, problem):
    """[K] of mixtures [K, M], as menas.py calls it: (weights, cells, batch)."""
    w = weights["w"]
    nw = problem.noise @ w
    each = 0.5 * ((nw.t() @ w) * problem.s).sum((1, 2)) - (nw * problem.c).sum((1, 2)) + problem.const
    return cells @ each


def scalar(curvature, target, const):
    """curvature_m / 2 (omega - target_m)^2 + const_m."""
    a, t, c = (torch.tensor(x, dtype=DTYPE) for x in (curvature, target, const))
    return Losses(a[:, None, None], (a * t)[:, None, None], c + a * t * t / 2, torch.ones(1, 1, dtype=DTYPE))


def layer(seed, noise):
    """A linear layer 3 -> 2 and two data sets of 8 points."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 8, size, generator=draw, dtype=DTYPE) for size in (3, 2))
    const = 0.5 * torch.einsum("mno,op,mnp->mn", y, noise, y).mean(1)
    return Losses(x.mT @ x / 8, y.mT @ x / 8, const, noise)


TRAIN, VALID = scalar([1.0, 1.5], [2.0, 0.0], [0.0, 0.0]), scalar([1.0, 1.3], [0.0, 0.0], [0.0, 0.1])
NOISE = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=DTYPE)
LAYER_TRAIN, LAYER_VALID = layer(1, NOISE), layer(2, NOISE)


def policy(theta):
    """pi [2]."""
    theta = torch.as_tensor(theta)
    return torch.stack([torch.sigmoid(-theta), torch.sigmoid(theta)])


def optimum(theta, train):
    """omega*(theta): sum_m pi_m (W S_m - C_m) = 0."""
    pi = policy(theta)[:, None, None]
    return torch.linalg.solve((pi * train.s).sum(0), (pi * train.c).sum(0), left=False)


# 2. Exact gradients --------------------------------------------------------------------------------------------------

def one_step_objective(theta, w, train, valid, lr, clip):
    """F_1(theta) = sum_m pi_m L_V(omega'; m), omega' = omega - lr g min(1, clip / |g|), g = sum_m pi_m grad L_T."""
    pi = policy(theta)
    g = torch.einsum("m,mij->ij", pi, train.noise @ (w @ train.s - train.c))
    ahead = w - lr * g * torch.where(g.norm() > clip, clip / g.norm(), 1.0)
    return losses({"w": ahead}, pi[None], valid)[0]


def objective(theta, train, valid):
    """F(theta) at the inner optimum."""
    return losses({"w": optimum(theta, train)}, policy(theta)[None], valid)[0]


def by_autograd(f, theta):
    """df/dtheta."""
    theta = torch.tensor(theta, requires_grad=True)
    return torch.autograd.grad(f(theta), theta)[0].item()


def by_differences(f, theta, eps=1e-5):
    """df/dtheta, central."""
    return ((f(theta + eps) - f(theta - eps)) / (2 * eps)).item()


def closed_form(theta, w, xi):
    """Direct and response term of the scalar problem for one unclipped step; for xi = None at the inner optimum w."""
    p, (a, b) = torch.sigmoid(torch.tensor(theta)).item(), (x.s.flatten().tolist() for x in (TRAIN, VALID))
    pull = a[1] * (w - 0.0) - a[0] * (w - 2.0)                    # grad L_T(omega; 1) - grad L_T(omega; 0)
    step = 1 / ((1 - p) * a[0] + p * a[1]) if xi is None else xi
    ahead = w if xi is None else w - xi * ((1 - p) * a[0] * (w - 2.0) + p * a[1] * w)
    direct = (b[1] - b[0]) / 2 * ahead ** 2 + 0.1                 # L_V(omega'; 1) - L_V(omega'; 0)
    return p * (1 - p) * direct, p * (1 - p) * -step * ((1 - p) * b[0] + p * b[1]) * ahead * pull


# 3. The estimators of menas.py ---------------------------------------------------------------------------------------

def estimate(look, respond, theta, w, train, valid, step):
    """(direct, response) terms of dF/dtheta, scored architectures summed over the policy. Losses: so minus rewards."""
    direct, response = extra_rewards(look, respond, {"w": w}, ONE, policy(theta)[None],
                                     lambda weights, cells: -losses(weights, cells, valid), step)
    slope = torch.sigmoid(torch.tensor(theta)) * torch.sigmoid(torch.tensor(-theta))           # d pi_1 / dtheta
    return [(-slope * (reward[1] - reward[0])).item() for reward in (direct, response)]


def each(weights, cells, problem, v):
    """|grad L(w; m)| and <grad L(w; m), v> of every row, as menas.sampled asks for them."""
    g = torch.einsum("km,mij->kij", cells, problem.noise @ (weights["w"] @ problem.s - problem.c))
    return g.flatten(1).norm(dim=1), (g * v["w"]).sum((1, 2))


def a_step(theta, train, lr, clip=math.inf, past=()):
    """The step whose fold is the whole policy, so g is exact."""
    return Step(losses, train, policy(theta)[None], lr, clip, 0.0, past, each)


def inverse_fisher(v, step, damping):
    """u = (G (x) A + damping)^-1 v = Q_G [ (Q_G' v Q_A) / (l_G l_A' + damping) ] Q_A', with G = Q_G diag(l_G) Q_G' the
    covariance of the output's gradient under the model's own distribution (the true Fisher) and A that of the input
    (Martens & Grosse 2015); one input a sample, so there is no time to share over."""
    g_values, g_basis = torch.linalg.eigh(step.batch.noise)      # y ~ N(Wx, noise^-1): the gradient's covariance
    a_values, a_basis = torch.linalg.eigh((step.cells[0][:, None, None] * step.batch.s).sum(0))
    inside = (g_basis.t() @ v["w"] @ a_basis) / (g_values[:, None] * a_values + damping)
    return {"w": g_basis @ inside @ a_basis.t()}


def kfac(v, weights, g, step, cells, damping=1e-12):
    """- <grad L_T(omega; m), u>, u by K-FAC."""
    return -directional(step, weights, cells, inverse_fisher(v, step, damping))


# 4. Checks: rows of (name, exact, estimate, error, tolerance) --------------------------------------------------------

def compare(name, exact, got, tolerance=1e-7):
    """A row of the table."""
    return name, exact, got, abs(got - exact), tolerance


def check_terms():
    """Both terms against closed forms, autograd and finite differences, with and without a clipped step."""
    theta, w, lr = -0.4, torch.tensor([[1.3]]), 0.3
    direct, response = estimate("fresh", "unrolled", theta, w, TRAIN, VALID, a_step(theta, TRAIN, lr))
    exact = closed_form(theta, w.item(), lr)
    yield compare("direct term, one step, closed form", exact[0], direct)
    yield compare("response term, one step, closed form", exact[1], response)
    clipped = estimate("fresh", "unrolled", theta, w, TRAIN, VALID, a_step(theta, TRAIN, lr, 0.1))
    yield compare("response, one weight, step clipped: none", 0.0, clipped[1])
    p, clipped = torch.sigmoid(torch.tensor(theta)).item(), 0.1 * torch.tensor([-1.0, 1.0])   # of t_0 = 2, of t_1 = 0
    slow = a_step(theta, TRAIN, lr, 0.1)
    got = estimate("fresh", "sampled", theta, w, TRAIN, VALID, slow)[1]
    ahead = look_ahead({"w": w}, fresh({"w": w}, slow), slow)["w"].item()
    exact = -p * (1 - p) * lr * ((1 - p) * 1.0 + p * 1.3) * ahead * (clipped[1] - clipped[0]).item()
    yield compare("response, one weight, sampled steps clipped", exact, got)
    w = 3 * torch.eye(2, 3)
    for label, clip in (("", 100.0), (", step clipped", 0.5)):
        f = lambda x: one_step_objective(x, w, LAYER_TRAIN, LAYER_VALID, lr, clip)
        whole = sum(estimate("fresh", "unrolled", theta, w, LAYER_TRAIN, LAYER_VALID,
                             a_step(theta, LAYER_TRAIN, lr, clip)))
        yield compare(f"both terms, layer{label}, autograd through the step", by_autograd(f, theta), whole)
        yield compare(f"both terms, layer{label}, finite differences", by_differences(f, theta), whole)


def at_the_optimum(respond, theta, train, valid, step):
    """(direct, response) at omega*(theta), where the fold is the whole policy."""
    return estimate("none", respond, theta, optimum(theta, train), train, valid, step)


def check_implicit():
    """The converged inner problem: Neumann's series from one term, which is unrolled, to H^-1 v; K-FAC at once."""
    theta, lr = -0.4, 0.4
    step, w = a_step(theta, TRAIN, lr), optimum(theta, TRAIN)
    g, v = fresh({"w": w}, step), {"w": torch.tensor([[0.7]])}
    one = [f(v, {"w": w}, g, step, ONE)[0].item() for f in (RESPONSE["unrolled"], partial(neumann, terms=1))]
    yield compare("Neumann, 1 term: unrolled", *one)
    exact = closed_form(theta, w.item(), None)
    for terms in (1, 4, 16, 64):
        RESPONSE["series"] = partial(neumann, terms=terms)  # forgotten below
        direct, response = at_the_optimum("series", theta, TRAIN, VALID, step)
        hessian = (policy(theta) * TRAIN.s.flatten()).sum().item()
        yield compare(f"response at omega*, Neumann, {terms} term{'s' * (terms > 1)}",
                      exact[1] * (1 - (1 - lr * hessian) ** terms), response)
    yield compare("response at omega*, Neumann, 64 terms, implicit", exact[1], response)
    yield compare("both terms at omega*, finite differences of F",
                  by_differences(lambda x: objective(x, TRAIN, VALID), theta), direct + response, 1e-6)
    step, f = a_step(theta, LAYER_TRAIN, 0.4), lambda x: objective(x, LAYER_TRAIN, LAYER_VALID)
    whole = sum(at_the_optimum("kfac", theta, LAYER_TRAIN, LAYER_VALID, step))
    yield compare("both terms at omega*, layer, K-FAC, autograd through W*", by_autograd(f, theta), whole)
    del RESPONSE["series"]
    pi, v = policy(theta)[:, None, None], torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    hessian = torch.kron(NOISE, (pi * LAYER_TRAIN.s).sum(0))
    u = inverse_fisher({"w": v}, step, 0.0)["w"]
    yield compare("|K-FAC inverse - dense inverse Hessian|", 0.0, (hessian @ u.flatten() - v.flatten()).norm().item())


def check_learning_rate():
    """The decision is the step's own size xi_m, and nothing else: omega' = omega - sum_m pi_m xi_m grad L_T(omega).

    Its xi_m stands inside the expectation, as a factor of the training loss; both choices score alike, so only the
    response tells them apart. And it looks one step ahead only: for a horizon of one step a large rate looks good."""
    theta, w, xi = 0.3, torch.tensor([[1.3]]), torch.tensor([0.05, 0.6])
    train, valid = (x._replace(**{name: getattr(x, name)[:1] for name in ("s", "c", "const")}) for x in (TRAIN, VALID))
    own = lambda weights, cells, batch: (cells @ xi) * losses(weights, torch.ones(1, 1), batch)
    rewards = lambda weights, cells: -losses(weights, cells.sum(1, keepdim=True), valid)

    def f(x):
        ahead = w - (policy(x) @ xi) * (w @ train.s[0] - train.c[0])
        return losses({"w": ahead}, torch.ones(1, 1), valid)[0]

    step = Step(own, train, policy(theta)[None], 1.0)
    slope = torch.sigmoid(torch.tensor(theta)) * torch.sigmoid(torch.tensor(-theta))
    for look, respond in PAIRS[:1] + PAIRS[3:5]:
        direct, response = extra_rewards(look, respond, {"w": w}, ONE, policy(theta)[None], rewards, step)
        got = (-slope * (direct + response).diff()).item()
        exact = by_autograd(f, theta) if respond == "unrolled" else 0.0
        yield compare(f"learning rate as a decision, ({look}, {respond})", exact, got)


# 5. Monte Carlo: each estimator against its own target ---------------------------------------------------------------

def worlds(look, respond, theta, w, lr, share=False):
    """All that the folds (one architecture each) can be: their probabilities [N], the architecture of g [N], rewards
    [N, 2] of both architectures. For momentum and recent, the fold is the last two shared steps'."""
    pi, found = policy(theta), []
    for i, j in itertools.product(range(2), repeat=2):
        if look in ("momentum", "recent"):
            past = {}
            for k in (i, j):
                past = remember(past, fresh({"w": w + 0.1}, a_step(theta, TRAIN, lr)._replace(cells=ONE[[k]])))
            step = a_step(theta, TRAIN, lr, past=past)
        else:
            step = a_step(theta, TRAIN, lr)._replace(cells=ONE[[i]])
        direct, response = extra_rewards(look, respond, {"w": w}, ONE, ONE[[i if share else j]],
                                         lambda weights, cells: -losses(weights, cells, VALID), step)
        found.append((pi[i] * pi[j], i, direct + response))
    probabilities, first, rewards = zip(*found)
    return torch.stack(probabilities), torch.tensor(first), torch.stack(rewards)


def monte_carlo(look, respond, theta, w, lr, draws=20000, k=4):
    """(target, mean, standard error, variance) of dF/dtheta from policy_loss with K = 4, leave-one-out baseline."""
    probabilities, _, rewards = worlds(look, respond, theta, w, lr)
    slope = torch.sigmoid(torch.tensor(theta)) * torch.sigmoid(torch.tensor(-theta))
    target = -(probabilities * slope * rewards.diff(dim=1)[:, 0]).sum().item()
    draw = torch.Generator().manual_seed(PAIRS.index((look, respond)))
    which = torch.multinomial(probabilities, draws, replacement=True, generator=draw)
    m = (torch.rand(draws, k, generator=draw) < policy(theta)[1]).long()

    def loss(logit, m, reward):
        log_prob = torch.nn.functional.logsigmoid(logit * (2 * m - 1))
        baseline, _ = leave_one_out(reward, None, None)
        return policy_loss(Sample(m, log_prob, torch.zeros(k)), reward, baseline, 0.0)

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(torch.tensor(theta), m, rewards[which].gather(1, m))
    return target, each.mean().item(), (each.std() / math.sqrt(draws)).item(), each.var().item()


def check_monte_carlo():
    """Rows of (estimator, own target, mean, standard error, variance, exact one-step gradient - target)."""
    theta, w, lr = -0.4, torch.tensor([[1.3]]), 0.3
    whole = by_autograd(lambda x: one_step_objective(x, w, TRAIN, VALID, lr, 1e9), theta)
    for pair in PAIRS:
        target, mean, error, variance = monte_carlo(*pair, theta, w, lr)
        yield f"({', '.join(pair)})", target, mean, error, variance, target - whole


def check_folds():
    """The bias of scoring the architecture that omega' was built on, and what is left of it with two folds."""
    theta, w, lr = -0.4, torch.tensor([[1.3]]), 0.3
    pi, (a, b) = policy(theta), (x.s.flatten().tolist() for x in (TRAIN, VALID))
    score = torch.stack([-pi[1], pi[0]])                                            # d log pi_m / dtheta
    slope = (pi[0] * pi[1]).item()
    exact = sum(estimate("fresh", "unrolled", theta, w, TRAIN, VALID, a_step(theta, TRAIN, lr)))
    probabilities, _, rewards = worlds("fresh", "unrolled", theta, w, lr)
    disjoint = -(probabilities * slope * rewards.diff(dim=1)[:, 0]).sum().item()
    _, first, rewards = worlds("fresh", "unrolled", theta, w, lr, share=True)
    shared = -sum((probabilities[i] * score[m] * rewards[i, m]).item() for i, m in enumerate(first.tolist()))
    pull = a[1] * w.item() - a[0] * (w.item() - 2.0)                                # grad L_T(omega; 1) - that of 0
    variance = slope * (lr * pull) ** 2                                             # of omega' over a fold of one
    curved = exact + slope * (b[1] - b[0]) / 2 * variance                             # b_m / 2 Var(omega') in each L_V
    return exact, shared, disjoint, curved


# 6. The bilinear game x y: x descends, y ascends ---------------------------------------------------------------------
# It is an ENAS: two architectures with s = (-1, 1), x = sum_m pi_m s_m, L_V(omega; m) = s_m omega = -L_T(omega; m).

def player(x, y, look, respond, lr):
    """d/dx of x omega'(x) by menas.py, for the player x who knows that y takes a step of ascent."""
    s, pi = torch.tensor([-1.0, 1.0]), torch.stack([(1 - x) / 2, (1 + x) / 2])
    linear = lambda sign: (lambda weights, cells, batch=None: sign * (cells @ s) * weights["w"].sum())
    step = Step(linear(-1.0), None, pi[None], lr)
    direct, response = extra_rewards(look, respond, {"w": y.reshape(1, 1)}, ONE, pi[None], linear(-1.0), step)
    return -0.5 * (direct + response).diff()[0]


def play(point, pair, lr, both, alternate):
    """One step of both players."""
    x, y = point
    new_x = x - lr * player(x, y, *pair, lr)
    seen = new_x if alternate else x
    # The game is antisymmetric: y ascends x y as x descends it, with x's sign turned.
    return torch.stack([new_x, y + lr * (-player(y, -seen, *pair, lr) if both else seen)])


def radius(pair, both, alternate, lr=0.15):
    """Spectral radius of a step, which is linear: its matrix from the unit vectors."""
    matrix = torch.stack([play(e, pair, lr, both, alternate) for e in torch.eye(2)], 1)
    return torch.linalg.eigvals(matrix).abs().max().item()


def check_game(lr=0.15):
    """Exact: complex eigenvalues, so the radius is sqrt(det). With k = 0, 1, 2 for plain, extrapolation, unrolled, a
    player who looks ahead shrinks its own coordinate by 1 - k lr^2."""
    for k, pair in enumerate((("none", "none"), ("fresh", "none"), ("fresh", "unrolled"))):
        d = 1 - k * lr ** 2
        for both, alternate, det in ((True, False, d * d + lr ** 2), (True, True, d * d), (False, False, d + lr ** 2),
                                     (False, True, d)):
            who, how = "both" if both else "one", "alternating" if alternate else "simultaneous"
            yield compare(f"radius, {who} ({', '.join(pair)}), {how}", math.sqrt(det), radius(pair, both, alternate))


# 7. Trajectories and the figure --------------------------------------------------------------------------------------

def trajectory(look, respond, steps=250, lr=0.3, theta_lr=1.0):
    """(theta, omega) [steps, 2]: a step of SGD, then one of the controller, gradients summed over the policy."""
    theta, weights, past, found = 0.0, {"w": torch.tensor([[1.5]])}, {}, []
    for _ in range(steps):
        found.append((theta, weights["w"].item()))
        step = a_step(theta, TRAIN, lr)
        g = fresh(weights, step)
        past = remember(past, g)
        weights = look_ahead(weights, g, step)
        theta -= theta_lr * sum(estimate(look, respond, theta, weights["w"], TRAIN, VALID, step._replace(past=past)))
    return torch.tensor(found)


def draw(path, paths):
    """F with both gradients; the ways of the estimators; the game's fields and ways."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    ax, thetas = axes[0, 0], torch.linspace(-5, 5, 101)
    f = torch.stack([objective(x, TRAIN, VALID) for x in thetas])
    ax.plot(thetas, f, color="black", label="$F(\\theta)$")
    for x in torch.linspace(-3.5, 3.5, 8).tolist():
        y, terms = objective(x, TRAIN, VALID).item(), closed_form(x, optimum(x, TRAIN).item(), None)
        for value, colour, lift in ((terms[0], "tab:red", .12), (sum(terms), "tab:blue", -.12)):
            ax.annotate("", (x - math.copysign(.8, value), y + lift), (x, y + lift),
                        arrowprops=dict(arrowstyle="-|>", color=colour, lw=2))
    for colour, label in (("tab:red", "where the direct term leads"), ("tab:blue", "where direct + response leads")):
        ax.plot([], [], color=colour, label=label)
    ax.set(ylim=(-0.2, 2.2), xlabel="controller's logit $\\theta$   (left: architecture 0, right: 1)",
           ylabel="validation loss", title="One logit, one weight: the direct term leads uphill")
    ax.legend()
    ax, colours = axes[0, 1], dict(zip(PAIRS, ("tab:red", "tab:orange", "tab:brown", "tab:pink", "tab:blue", "tab:cyan",
                                                     "tab:purple", "tab:green")))
    ax.plot(thetas, [optimum(x, TRAIN).item() for x in thetas], color="#bbbbbb", lw=5, label="$\\omega^*(\\theta)$")
    for pair, points in paths.items():
        style = dict(zip(PAIRS, ("-", "--", "-.", ":", "-", "--", "-.", ":")))[pair]
        ax.plot(*points.t(), style, color=colours[pair], lw=2, label=f"({', '.join(pair)})")
        ax.plot(*points[-1], "o", color=colours[pair])
    ax.plot(*paths[PAIRS[0]][0], "ks", label="start")
    best = thetas[f.argmin()]
    ax.axvline(best.item(), color="black", lw=1, ls=":", label="best $\\theta$")
    ax.set(xlabel="$\\theta$", ylabel="shared weight $\\omega$", title="Training: only the response turns right",
           xlim=(-5, 5))
    ax.legend(fontsize=8)
    grid = torch.linspace(-1.5, 1.5, 9)
    for ax, alternate in zip(axes[1], (False, True)):
        for pair, name, colour in zip((("none", "none"), ("fresh", "none"), ("fresh", "unrolled")),
                                      ("plain", "extrapolation", "unrolled"), ("tab:red", "tab:orange", "tab:blue")):
            points = [torch.tensor([1.0, 0.0])]
            for _ in range(60):
                points.append(play(points[-1], pair, 0.15, True, alternate))
            ax.plot(*torch.stack(points).t(), color=colour, marker=".", ms=3, lw=1,
                    label=f"{name}: radius {radius(pair, True, alternate):.3f}")
            if pair != ("fresh", "none"):
                x, y = torch.meshgrid(grid, grid, indexing="xy")
                move = torch.stack([play(torch.stack(p), pair, 0.15, True, alternate) - torch.stack(p)
                                    for p in zip(x.flatten(), y.flatten())])
                ax.quiver(x, y, move[:, 0], move[:, 1], color=colour, alpha=.35, width=.003)
        ax.plot(0, 0, "k+", ms=10)
        ax.set(xlabel="x (descends x y)", ylabel="y (ascends x y)", aspect="equal", xlim=(-1.8, 1.8), ylim=(-1.8, 1.8),
               title=f"The game x y, {'alternating' if alternate else 'simultaneous'}, step .15, both look ahead")
        ax.legend(fontsize=8, loc="upper right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# 8. Main -------------------------------------------------------------------------------------------------------------

def main(path="results/toy_enas.png"):
    """Print every check and draw the figure, in float64; 1 if a check failed."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    RESPONSE["kfac"] = kfac  # a new estimator is a function in a dictionary
    try:
        return check_all(path)
    finally:
        torch.set_default_dtype(default)
        del RESPONSE["kfac"]


def check_all(path):
    """The exit code."""
    rows = [row for check in (check_terms, check_implicit, check_learning_rate, check_game) for row in check()]
    failed = [row[0] for row in rows if not row[3] <= row[4]]
    number = lambda x: f"{x:.9f}"
    print(table(("check", "exact", "estimate", "error"),
                [(name, number(exact), number(got), f"{error:.0e}") for name, exact, got, error, _ in rows]))
    sampled = list(check_monte_carlo())
    failed += [name for name, target, mean, error, *_ in sampled if not abs(mean - target) <= 3.5 * error]
    print("\nMonte Carlo, 20,000 times 4 architectures; a fold of one architecture makes omega', another one v:\n")
    print(table(("estimator", "its own target", "mean +- 95 %", "variance", "target - exact gradient of one step"),
                [(name, number(target), f"{mean:.5f} +- {1.96 * error:.5f}", f"{variance:.4f}", f"{bias:+.5f}")
                 for name, target, mean, error, variance, bias in sampled]))
    exact, shared, disjoint, curved = check_folds()
    print("\nThe fold that omega' is made from, (fresh, unrolled), enumerated:\n")
    print(table(("which architectures are scored", "mean", "bias"),
                [("the whole policy, omega' exact", number(exact), number(0.0)),
                 ("the fold itself", number(shared), number(shared - exact)),
                 ("others (two folds)", number(disjoint), number(disjoint - exact)),
                 ("predicted for others: (b_1 - b_0) / 2 Var(omega')", number(curved), number(curved - exact))]))
    if not (abs(disjoint - curved) <= 1e-7 and abs(shared - exact) > 3 * abs(disjoint - exact)):
        failed.append("the bias of the folds")
    paths = {pair: trajectory(*pair) for pair in PAIRS}
    ends = {pair: torch.sigmoid(points[-1, 0]).item() for pair, points in paths.items()}
    print("\nprobability of architecture 1 after 250 steps:",
          ", ".join(f"({', '.join(pair)}) {p:.2f}" for pair, p in ends.items()))
    failed += [str(pair) for pair, p in ends.items() if not (p > 0.5 if pair[1] != "none" else p < 0.5)]
    draw(path, paths)
    if failed:
        print(f"\nFAILED: {'; '.join(failed)}")
        return 1
    print("\nShown: the direct term alone, wherever it is evaluated, trains the wrong architecture; with the response "
          "it trains the\nright one, and is the exact gradient where the fold is the whole policy "
          f"(all {len(rows)} checks and {len(sampled)} intervals hold; {path}).")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
