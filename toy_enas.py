"""An ENAS with one logit and one weight, in which everything is known exactly.

    python toy_enas.py     ten seconds: a table of exact | found | error, and runs/toy_enas.png

Two architectures m share one weight omega. The logit theta decides how often each is drawn:
pi = (q, p), p = sigmoid(theta), q = 1 - p.

    training loss    L_T(omega; 0) = (omega - 2)^2 / 2    L_T(omega; 1) = omega^2
    reward           R(omega; 0) = -omega^2 / 2           R(omega; 1) = -3/4 omega^2 - 1/10

Architecture 1 scores worse, whatever omega is. But training on it leads omega to 0, where rewards
are best; training on architecture 0 leads omega to 2. So the controller should climb

    F(theta) = E_m R(omega*(theta); m)     omega* = argmin E_m L_T(omega; m), where training ends

which is best at p = .94. Its derivative has a direct term, with omega held fixed, and a response,
for theta moves omega* too. ENAS climbs the direct term alone, and ends at p = .00; with a response
one step long it ends at .89, with one of eight steps at .93.

The letters are those of chapter 6 of menas.py, whose functions are put to the test here:

    g, H     first and second derivative of E_m L_T by omega
    v        derivative of E_m R by omega
    lr, xi   a step of training on m is omega - lr xi_m grad L_T(omega; m); xi_m is 1, or m's choice
"""
import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd.functional import jacobian

import menas

double = partial(torch.tensor, dtype=torch.float64)
BOTH = double([[1, 0], [0, 1]])  # the two architectures [2, 2]
THETA = -double(3.0).log()       # where gradients are compared: pi = (3/4, 1/4)
OMEGA = double(1.0)              # where training stands
LR = 0.3
TOLERANCE = 1e-8                 # finite differences are right to 1e-10, all else to 1e-12

# 1. The world -------------------------------------------------------------------------------------
def policy(theta):
    """pi = (q, p) [2]."""
    p = theta.sigmoid()
    return torch.stack([1 - p, p])

def train(omega):
    """L_T(omega; m) [2]."""
    return torch.stack([(omega - 2) ** 2 / 2, omega ** 2])

def reward(omega):
    """R(omega; m) [2]. In chapter 5 omega is a matrix, and omega^2 the sum of its squares."""
    square = (omega ** 2).sum()
    return torch.stack([-square / 2, -0.75 * square - 0.1])

# 2. The gradient in three ways --------------------------------------------------------------------
def optimum(theta):
    """omega* = 2 q / (1 + p): there g = q (omega - 2) + 2 p omega is 0."""
    q, p = policy(theta)
    return 2 * q / (1 + p)

def closed_form(theta):
    """dF/dtheta = p q [R_1 - R_0] - p q [grad L_1 - grad L_0] v / H at omega*.

    Direct and response. The direct term is below 0 whatever omega is: alone it never finds p = 1.
    """
    q, p = policy(theta)
    omega = optimum(theta)
    direct = -omega ** 2 / 4 - 0.1   # R_1 - R_0
    v = -(1 + p / 2) * omega         # E_m grad R = - q omega - 3/2 p omega
    H = 1 + p
    response = -(omega + 2) * v / H  # grad L_1 = 2 omega, grad L_0 = omega - 2
    return p * q * direct, p * q * response

def objective(answer, theta, inner):
    """E_m R(answer(inner); m), m ~ pi(theta): it is F at inner = theta, if omega* is the answer."""
    return policy(theta) @ reward(answer(inner))

def by_autograd(answer):
    """Direct and response: the derivatives by theta, omega held fixed, and by inner."""
    return jacobian(partial(objective, answer), (THETA, THETA))

def by_differences(answer, eps=1e-5):
    """Their sum, by moving both."""
    up = THETA + eps
    down = THETA - eps
    return (objective(answer, up, up) - objective(answer, down, down)) / (2 * eps)

def check_closed_form():
    """Every check is rows of the one table: (name, exact, found)."""
    direct, response = closed_form(THETA)
    found = by_autograd(optimum)
    yield "F: direct, by autograd", direct, found[0]
    yield "F: response, by autograd", response, found[1]
    yield "F: both, by differences", direct + response, by_differences(optimum)

# 3. The gradient as menas estimates it ------------------------------------------------------------
def of_cells(values, weights, cells):
    """Values [K] as menas asks for them, and no state to carry on.

    A row of cells [K, 2] is an architecture, or pi: then its value is the policy's mean.
    """
    return cells @ values(weights["omega"]), None

def each(weights, cells, v):
    """|grad L_T(omega; m)| and <grad L_T(omega; m), v> [K]: what menas.sampled asks for."""
    g = cells @ jacobian(train, weights["omega"])
    return g.abs(), g * v["omega"]

def next_step(losses, cells, **more):
    """The next step of training, on these architectures."""
    return menas.Step(partial(of_cells, losses), cells, LR, each=each, **more)

def estimate(look, respond, omega, step, theta=THETA):
    """What menas climbs: REINFORCE with two draws, the reward of each the other's baseline.

    Exactly its mean, where ENAS has Monte Carlo: all four pairs, each as often as it is drawn.
    """
    theta = theta.clone().requires_grad_()
    pi = policy(theta)
    others = pi.detach()[None]  # those of v
    rewards = partial(of_cells, reward)
    direct, response, _, _ = menas.extra_rewards(
        look, respond, {"omega": omega}, BOTH, others, rewards, step)
    mean = 0.0
    for m in ([0, 0], [0, 1], [1, 0], [1, 1]):
        sample = menas.Sample(m, pi[m].log(), torch.zeros(2))
        loss = menas.policy_loss(sample, (direct + response)[m], 0.0)
        mean += pi[m].prod().detach() * loss
    return -torch.autograd.grad(mean, theta)[0]

# 4. One step ahead, and a learning rate that is decided on ----------------------------------------
def one_step(xi, theta):
    """omega' = omega - lr E_m xi_m grad L_T(omega; m)."""
    g = policy(theta) @ (xi * jacobian(train, OMEGA))
    return OMEGA - LR * g

def check_one_step():
    """E_m R(omega'; m): unrolled has all of its derivative; sampled too, where nothing is clipped.

    If architecture 1 trains four times as fast, xi_1 = 4, that is one more reason to choose it.
    """
    fold = BOTH[[0, 0, 0, 1]]  # four draws that are the policy
    for xi in (double([1, 1]), double([1, 4])):
        answer = partial(one_step, xi)
        direct, response = by_autograd(answer)
        both = direct + response
        step = next_step(train, fold, rates=lambda cells: cells @ xi)
        name = f"a step, xi_1 = {xi[1]:.0f}"
        for respond, exact in {"none": direct, "unrolled": both, "sampled": both}.items():
            yield f"{name}: {respond}", exact, estimate("fresh", respond, OMEGA, step)
        yield f"{name}: by differences", both, by_differences(answer)

# 5. All steps ahead -------------------------------------------------------------------------------
# At omega* the exact response to m is - <grad L_T(omega*; m), u>, where H u = v. Two ways to such
# a u follow. For menas they are two more entries in its table RESPONSE, see main.
TERMS = 8

def neumann(v, weights, g, step, cells):
    """u <- u + lr (v - H u) from 0, TERMS times: the Neumann series sum_j lr (1 - lr H)^j v.

    TERMS steps of training, all foreseen; with one it is unrolled. Losses are quadratic here, so
    H u is g at omega + u less g at omega.
    """
    u = 0 * v["omega"]
    for _ in range(TERMS):
        moved, _ = menas.fresh({"omega": weights["omega"] + u}, step)
        product = moved["omega"] - g["omega"]
        u = u + step.lr * (v["omega"] - product)
    return -menas.directional(step, weights, cells, {"omega": u})

A = double([[[2, 1], [1, 1]], [[1, 0], [0, 3]]])  # E x x' of the inputs that architecture m sees
T = double([[[2, 0], [1, 1]], [[0, 0], [0, 0]]])  # where training on m leads W
G = double([[1.0, 0.4], [0.4, 0.7]])              # what errors of the two outputs cost

def layer(W):
    """L_T(W; m) = E_x e' G e / 2, e = (W - T_m) x: a linear layer W [2, 2] in omega's place."""
    error = W - T
    return (G @ error @ A * error).sum((1, 2)) / 2

def layer_optimum(theta):
    """W* = E[T_m A_m] (E A_m)^-1: there g = E_m G (W - T_m) A_m is 0."""
    pi = policy(theta)
    return torch.tensordot(pi, T @ A, 1) @ torch.tensordot(pi, A, 1).inverse()

def kfac(v, weights, g, step, cells):
    """u = G^-1 v (E A_m)^-1, for H is the Kronecker product of the two (Martens & Grosse 2015)."""
    mean = torch.tensordot(step.fold.mean(0), A, 1)
    u = G.inverse() @ v["omega"] @ mean.inverse()
    return -menas.directional(step, weights, cells, {"omega": u})

def check_inverse():
    """A series of n terms has all but (1 - lr H)^n of the response; K-FAC has all of it."""
    direct, response = closed_form(THETA)
    fold = policy(THETA)[None]
    step = next_step(train, fold)
    for respond, n in {"unrolled": 1, "neumann": TERMS}.items():
        exact = direct + response * (1 - (1 - LR * 5 / 4) ** n)  # H = 1 + p
        yield f"F: {respond}", exact, estimate("fresh", respond, optimum(THETA), step)
    step = next_step(layer, fold)
    found = estimate("fresh", "kfac", layer_optimum(THETA), step)
    yield "F of the layer: kfac", sum(by_autograd(layer_optimum)), found

# 6. Training --------------------------------------------------------------------------------------
WAYS = {
    "ENAS": ("none", "none"),
    "unrolled": ("fresh", "unrolled"),
    "Neumann": ("fresh", "neumann"),
}

def trajectory(look, respond, steps):
    """p [steps] of ENAS: by turns a step of training and one of the controller, both the mean."""
    theta = double(0.0)
    omega = OMEGA
    found = []
    for _ in range(steps):
        step = next_step(train, policy(theta)[None])
        g, _ = menas.fresh({"omega": omega}, step)
        omega = menas.look_ahead({"omega": omega}, g, step)["omega"]
        theta = theta + estimate(look, respond, omega, step, theta)
        found.append(theta.sigmoid().item())
    return found

def draw(path, found):
    """Left dF/dtheta without and with the response, right where training leads."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    theta = torch.linspace(-6, 6, 201, dtype=torch.float64)
    p = theta.sigmoid()
    direct, response = closed_form(theta)
    left.axhline(0, color="lightgray")
    left.plot(p, direct, label="direct (ENAS)")
    left.plot(p, direct + response, "k", label="with response")
    left.set(xlabel="p", ylabel=r"$dF / d\theta$", ylim=(-0.15, 0.85))
    for name, way in found.items():
        right.plot(way, label=name)
    best = p[direct + response > 0].max()
    right.axhline(best, color="k", ls=":", label="best p")
    right.set(xlabel="steps", ylabel="p")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=200)

# 7. Main ------------------------------------------------------------------------------------------
def failures():
    """Print the table of checks; the names of those that fail, nan among them."""
    lines = []
    failed = []
    checks = itertools.chain(check_closed_form(), check_one_step(), check_inverse())
    for name, exact, found in checks:
        error = (found - exact).abs()
        lines.append((name, f"{exact:.8f}", f"{found:.8f}", f"{error:.0e}"))
        if not error <= TOLERANCE:
            failed.append(name)
    print(menas.table(("dF/dtheta", "exact", "found", "error"), lines))
    return failed

def out_path(arguments):
    """--out, in a folder that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/toy_enas.png", type=Path, help="the figure")
    path = parser.parse_args(arguments).out
    if path.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {path} must end in .png, .pdf or .svg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {path}: {error.strerror}")
    return path

def main(arguments=None, steps=250):
    """The exit code: 1 if a check failed, 2 for a wrong argument."""
    path = out_path(arguments)
    menas.RESPONSE.update(neumann=neumann, kfac=kfac)
    failed = failures()
    found = {name: trajectory(*way, steps) for name, way in WAYS.items()}
    for name, way in found.items():
        print(f"{name}: p = {way[-1]:.2f} after {steps} steps")
        if (way[-1] < 0.5) != (name == "ENAS"):
            failed.append(name)
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
        return 1
    draw(path, found)
    print(f"Every check holds, and only with a response is architecture 1 found; figure: {path}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
