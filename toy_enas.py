"""An ENAS with one parameter, in which every quantity is known exactly: what the extra gradient is.

    python toy_enas.py       # ten seconds: tables of exact | estimate | error, runs/toy_enas.png

One logit theta chooses between two architectures that share one weight omega: pi = (1 - p, p) with
p = sigmoid(theta), and a = (1, 1.5), t = (2, 0), b = (1, 1.3), c = (0, .1) in

    L_T(omega; m) = a_m / 2 (omega - t_m)^2          L_V(omega; m) = b_m / 2 omega^2 + c_m
    omega*(theta) = E_m a_m t_m / H,  H = E_m a_m    F(theta) = E_m L_V(omega*; m)
    dF/dtheta = p (1 - p) { L_V(omega*; 1) - L_V(omega*; 0)                direct: all of ENAS
                            - [a_1 (omega* - t_1) - a_0 (omega* - t_0)] v / H }       response
    v = E_m b_m omega*

F is a loss: the controller descends. Architecture 1 scores a little worse at ANY omega (c_1 > c_0),
but training on it makes omega good for everyone (t_1 = 0), while 0 spoils it (t_0 = 2). The direct
term therefore leads to architecture 0, wherever it is evaluated, and F is best near 1.
"""
import argparse
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd.functional import jacobian

import menas

LR = 0.3              # of training
THETA = -math.log(3)  # where gradients are compared: pi = (3/4, 1/4), so that this
FOLD = [0, 0, 0, 1]   # fold is the whole policy, and g exact
NOISE = [[1.0, 0.4], [0.4, 0.7]]
TOLERANCE = 1e-8      # finite differences are right to 1e-10, all else to 1e-12
DIRECT = [("none", "none"), ("momentum", "none"), ("recent", "none"), ("fresh", "none")]
RESPONDING = [("fresh", "unrolled"), ("fresh", "sampled"), ("fresh", "neumann")]
TERMS = {"none": 0, "unrolled": 1, "sampled": 1, "neumann": 8}  # of H^-1 v = lr v + ...

# 1. Losses [2] of the two architectures under the shared weights w [D] ---------------------------
def train(w):
    """L_T(omega; m), w [1]."""
    return torch.cat([(w - 2) ** 2 / 2, 1.5 * w ** 2 / 2])

def valid(w):
    """L_V(omega; m), w [1]."""
    return torch.cat([w ** 2 / 2, 1.3 * w ** 2 / 2 + 0.1])

def inputs(seed):
    """x [2, 3, 8]: eight points for each architecture."""
    return torch.sin(seed * torch.arange(48.0) ** 2).view(2, 3, 8)

def layer(w, seed=1):
    """Mean of 1/2 (W x - y)' NOISE (W x - y), W [2, 3].

    With one weight a clipped step does not answer theta, and K-FAC is a division.
    """
    x = inputs(seed)
    y = x[:, 1:].flip(2)
    error = w.view(2, 3) @ x - y
    weighted = torch.tensor(NOISE) @ error
    return (error * weighted).sum((1, 2)) / 16

# 2. Exact gradients ------------------------------------------------------------------------------
def policy(theta):
    """pi [2]."""
    p = torch.as_tensor(theta).sigmoid()
    return torch.stack([1 - p, p])

def optimum(theta):
    """omega*(theta)."""
    q, p = policy(theta)
    return 2 * q / (q + 1.5 * p)

def closed_form(theta):
    """The two terms of dF/dtheta."""
    q, p = policy(theta)
    omega = optimum(theta)
    direct = 0.15 * omega ** 2 + 0.1
    pull = 1.5 * omega - (omega - 2)
    v = (q + 1.3 * p) * omega
    response = -pull * v / (q + 1.5 * p)
    return p * q * direct, p * q * response

def one_step(losses, w, step, theta):
    """omega' = omega - lr g min(1, c / |g|), g = E_m xi_m grad L_T(omega; m), c = clip E_m xi_m.

    Training takes xi_m clip(g_m), so the step foreseen may be as long as clip times the mean rate.
    """
    share = policy(theta) * step.rates(torch.eye(2))
    g = share @ jacobian(losses, w)
    c = step.clip * share.sum()
    return w - LR * g * (c / g.norm()).clamp(max=1)

def objective(scored, ahead, theta, inner):
    """E_m L_V(ahead(inner); m) at inner = theta: F if ahead is the optimum, F_1 if one step."""
    omega = ahead(inner).view(-1)
    return policy(theta) @ scored(omega)

def by_differences(f, eps=1e-5):
    """df/dtheta."""
    up = f(THETA + eps, THETA + eps)
    down = f(THETA - eps, THETA - eps)
    return (up - down) / (2 * eps)

# 3. Estimators -----------------------------------------------------------------------------------
def neumann(v, weights, g, step, cells, terms=TERMS["neumann"]):
    """- <grad L_T(omega; m), u>, u = lr sum_{j < terms} (1 - lr H)^j v: many unclipped steps.

    It tends to H^-1 v if lr times H's largest eigenvalue is below 2. The losses are quadratic here,
    so lr H v = grad(omega + lr v) - grad(omega), exactly.
    """
    total = v
    for _ in range(terms - 1):
        moved, _ = menas.fresh(menas.plus(weights, v, step.lr), step)
        v = menas.plus(menas.plus(v, g), moved, -1)
        total = menas.plus(total, v)
    return -step.lr * menas.directional(step, weights, cells, total)

def kfac(v, weights, g, step, cells):
    """- <grad L_T(omega; m), u>, u = (G (x) A)^-1 v = G^-1 V A^-1, V [2, 3] being v.

    G is the covariance of the output's gradient under the model's own distribution, A that of the
    input (Martens & Grosse 2015). For a linear layer G (x) A = H.
    """
    squares = inputs(1) @ inputs(1).mT / 8               # [2, 3, 3]
    a = torch.tensordot(step.cells.mean(0), squares, 1)  # over the fold
    g_inverse = torch.tensor(NOISE).inverse()            # y ~ N(W x, NOISE^-1)
    u = g_inverse @ v["w"].view(2, 3) @ a.inverse()
    return -menas.directional(step, weights, cells, {"w": u.flatten()})

def values(losses, sign, weights, cells):
    """[K], and no state. A row of cells [2] is an architecture, or a mixture of both."""
    return sign * cells @ losses(weights["w"]), None

def each(losses, weights, cells, v):
    """|g_m| and <g_m, v>."""
    g = cells @ jacobian(losses, weights["w"])  # [K, D]
    return g.norm(dim=1), g @ v["w"]

def a_step(losses, fold, **more):
    """The next step of training, on these architectures."""
    cells = torch.eye(2)[fold]
    mixed = partial(values, losses, 1)
    return menas.Step(mixed, cells, LR, each=partial(each, losses), **more)

def scores(pair, scored, w, step, others):
    """Reward and response of both architectures, summed [2]; a reward is minus a loss."""
    rewards = partial(values, scored, -1)
    found = menas.extra_rewards(*pair, {"w": w}, torch.eye(2), others, rewards, step)
    return found[0] + found[1]

def estimate(pair, scored, w, step, theta=THETA):
    """dF/dtheta = - E_m [ score_m dlog pi_m/dtheta ] = p (1 - p) (score_0 - score_1)."""
    pi = policy(theta)
    score = scores(pair, scored, w, step, pi[None])
    return pi.prod() * (score[0] - score[1])

# 4. Checks: (name, exact, estimate) --------------------------------------------------------------
def faster(cells):
    """Rates: a step on architecture 1 has four times the learning rate."""
    return cells @ torch.tensor([1.0, 4.0])

def check_step(name, losses, scored, w, **more):
    """dF_1/dtheta."""
    step = a_step(losses, FOLD, **more)
    ahead = partial(one_step, losses, w, step)
    f = partial(objective, scored, ahead)
    theta = torch.tensor(THETA)
    direct, response = jacobian(f, (theta, theta))
    got = estimate(("fresh", "unrolled"), scored, w, step)
    yield f"{name}: unrolled, autograd", direct + response, got
    yield f"{name}: unrolled, differences", by_differences(f), got
    # the other response: what v sees of a step on architecture 1 alone, less one on 0 alone
    v = policy(theta) @ jacobian(scored, ahead(theta))
    moved = ahead(math.inf) - ahead(-math.inf)
    response = policy(theta).prod() * (v @ moved)
    got = estimate(("fresh", "sampled"), scored, w, step)
    yield f"{name}: sampled, own steps", direct + response, got

def check_steps():
    """One weight; a layer where the clip binds (100 never does), rates are decided on, and both."""
    w = torch.ones(6)
    problem = (layer, partial(layer, seed=2), w)
    yield from check_step("one weight", train, valid, w[:1], clip=100.0)
    yield from check_step("layer, clip", *problem, clip=0.5)
    yield from check_step("layer, rates", *problem, clip=100.0, rates=faster)
    yield from check_step("layer, both", *problem, clip=0.5, rates=faster)
    step = a_step(layer, [1], clip=0.25, rates=faster)
    g, _ = menas.fresh({"w": w}, step)
    ahead = menas.look_ahead({"w": w}, g, step)["w"]
    yield "length of a step: rate 4, clip .25", LR * 4 * 0.25, (ahead - w).norm()

def check_inverse():
    """The series makes u = [1 - (1 - lr H)^terms] H^-1 v, K-FAC all of H^-1 v; H dense."""
    w = torch.arange(6.0)  # and v
    hessians = jacobian(partial(jacobian, layer, create_graph=True), w)
    h = torch.tensordot(policy(THETA), hessians, 1)
    step = a_step(layer, FOLD)
    g, _ = menas.fresh({"w": w}, step)
    ways = {n: partial(neumann, terms=n) for n in (1, 4, 64)}
    ways[1000] = kfac
    for n, response in ways.items():
        rest = torch.matrix_power(torch.eye(6) - LR * h, n) @ w
        u = torch.linalg.solve(h, w - rest)
        exact = -jacobian(layer, w) @ u
        got = response({"w": w}, {"w": w}, g, step, torch.eye(2))
        name = "K-FAC" if response is kfac else f"Neumann, terms: {n}"
        yield f"layer, dense H: {name}", exact[1], got[1]

def check_optimum():
    """dF/dtheta: ENAS has the direct term, unrolled one term of the series; H = 9/8."""
    direct, response = closed_form(THETA)
    f = partial(objective, valid, optimum)
    yield "omega*: closed form, differences of F", by_differences(f), direct + response
    w = optimum(THETA).view(1)
    step = a_step(train, FOLD)
    for name, terms in TERMS.items():
        exact = direct + response * (1 - (1 - LR * 9 / 8) ** terms)
        yield f"omega*: fresh, {name}", exact, estimate(("fresh", name), valid, w, step)

# 5. Folds of one architecture --------------------------------------------------------------------
def folds(pair, share=False):
    """Scores [2, 2, 2] of each m: omega' made from fold i, v from fold j, or with share from i.

    The past are a step on i and one on j, at another omega.
    """
    w = torch.ones(1)
    found = torch.zeros(2, 2, 2)
    for i, j in itertools.product((0, 1), repeat=2):
        past = {}
        for k in (i, j):
            g, _ = menas.fresh({"w": w + 0.1}, a_step(train, [k]))
            past = menas.remember(past, g)
        step = a_step(train, [i], past=past)
        others = torch.eye(2)[[i if share else j]]
        found[i, j] = scores(pair, valid, w, step, others)
    return found

def by_policy_loss(score):
    """dF/dtheta from 4 architectures: the mean over all that they and the two folds can be."""
    theta = torch.tensor(THETA, requires_grad=True)
    mean = 0.0
    for i, j, *m in itertools.product((0, 1), repeat=6):
        sample = menas.Sample(m, policy(theta).log()[m], torch.zeros(4))
        loss = menas.policy_loss(sample, score[i, j, m], 0.0)
        mean += policy(THETA)[[i, j, *m]].prod() * loss
    return torch.autograd.grad(mean, theta)[0]

def check_folds():
    """By hand: p (1 - p) { E[.15 omega'^2] + .1 - (g_1 - g_0) E[b] E[omega' u / v] }."""
    pi = policy(THETA)
    a = torch.tensor([1.0, 1.5])
    b = torch.tensor([1.0, 1.3])
    g = torch.tensor([-1.0, 1.5])    # at omega = 1
    old = torch.tensor([-0.9, 1.65])  # at 1.1
    zero = torch.zeros(2, 2)         # folds i, j
    momentum = (0.9 * old[:, None] + old) / 1.9
    along = {"none": zero, "momentum": momentum, "recent": zero + old, "fresh": zero + g[:, None]}
    for look, respond in DIRECT + RESPONDING:
        ahead = 1 - LR * along[look]
        reach = (1 - (1 - LR * a) ** TERMS[respond]) / a
        direct = 0.15 * pi @ ahead ** 2 @ pi + 0.1
        response = -2.5 * (pi @ b) * ((pi * reach) @ ahead @ pi)
        got = by_policy_loss(folds((look, respond)))
        yield f"{look}, {respond}", pi.prod() * (direct + response), got
    # scoring the architectures that omega' and v are made from is another matter
    ahead = 1 - LR * g
    own = b * ahead ** 2 / 2 - LR * g * b * ahead
    score = folds(RESPONDING[0], share=True)
    got = score[0, 0, 0] - score[1, 1, 1]
    yield "the fold scores itself", pi.prod() * (own[1] + 0.1 - own[0]), pi.prod() * got

# 6. Training -------------------------------------------------------------------------------------
def trajectory(pair, steps):
    """theta [steps]: by turns a step on omega and one on theta, both with the policy's mean."""
    theta = 0.0
    weights = {"w": torch.tensor([1.5])}
    past = {}
    found = []
    for _ in range(steps):
        step = a_step(train, FOLD)._replace(cells=policy(theta)[None])
        g, _ = menas.fresh(weights, step)
        past = menas.remember(past, g)
        weights = menas.look_ahead(weights, g, step)
        step = step._replace(past=past)
        theta -= estimate(pair, valid, weights["w"], step, theta).item()
        found.append(theta)
    return found

def draw(path, ways):
    """Left: F, and below it its derivative and the direct term; right: theta in training."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = [["loss", "ways"], ["slope", "ways"]]
    loss, right, slope = figure.subplot_mosaic(panels).values()
    theta = torch.linspace(-5, 5, 201)
    f = torch.stack([objective(valid, optimum, x, x) for x in theta])
    direct, response = closed_form(theta)
    loss.plot(theta, f, "k")
    loss.set(ylabel=r"$F(\theta)$", xticklabels=[])
    slope.axhline(0, color="gray", lw=1)
    slope.plot(theta, direct, "tab:red", label="direct term only")
    slope.plot(theta, direct + response, "tab:blue", label="with the response")
    slope.set(ylabel=r"$dF/d\theta$", xlabel=r"logit $\theta$ (large: architecture 1)")
    groups = {
        "direct: none, momentum,\nrecent, fresh": (DIRECT, "tab:red"),
        "unrolled, sampled": (RESPONDING[:2], "tab:blue"),
        "neumann": (RESPONDING[2:], "tab:cyan"),
    }
    for label, (pairs, color) in groups.items():
        lines = right.plot(torch.tensor([ways[pair] for pair in pairs]).T, color)
        lines[0].set_label(label)
    right.set(ylabel=r"$\theta$", xlabel="steps of training")
    best = theta[f.argmin()].item()
    right.axhline(best, color="gray", ls=":", label=r"best $\theta$")
    slope.legend()
    right.legend()
    figure.savefig(path, dpi=150)

# 7. Main -----------------------------------------------------------------------------------------
def show(title, rows):
    """Print a table; the names of the checks that fail, nan among them."""
    lines = []
    failed = []
    for name, exact, got in rows:
        error = abs(got - exact)
        lines.append((name, f"{exact:.8f}", f"{got:.8f}", f"{error:.0e}"))
        if not error <= TOLERANCE:
            failed.append(name)
    print(menas.table((title, "exact", "estimate", "error"), lines), "\n")
    return failed

def report(path, steps):
    """Print and draw everything; the names of the checks that fail."""
    failed = show("check", [*check_steps(), *check_inverse(), *check_optimum()])
    failed += show("folds of one", check_folds())
    ways = {pair: trajectory(pair, steps) for pair in DIRECT + RESPONDING}
    print(f"probability of architecture 1 after {steps} steps:")
    for pair, way in ways.items():
        p = policy(way[-1])[1].item()
        print(f"    {', '.join(pair)}: {p:.2f}")
        if (p > 0.5) == (pair in DIRECT):
            failed.append(f"the end of {', '.join(pair)}")
    draw(path, ways)
    return failed

def main(arguments=None, steps=250):
    """The exit code: 1 if a check failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/toy_enas.png", type=Path, help="the figure")
    path = parser.parse_args(arguments).out
    if path.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {path} must end in .png, .pdf or .svg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {path}: {error.strerror}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    menas.RESPONSE["neumann"] = neumann
    try:
        failed = report(path, steps)
    finally:
        torch.set_default_dtype(default)
        del menas.RESPONSE["neumann"]
    if failed:
        print(f"\nFAILED: {'; '.join(failed)}")
        return 1
    print("\nShown: the direct term alone trains the wrong architecture, wherever it is evaluated;")
    print(f"with the response it trains the right one. Every check holds; figure: {path}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
