"""The statistics against enumeration, published values and simulation. Run: pytest tests/test_stats.py"""
from itertools import combinations, permutations, product
from math import inf, isnan

import pytest
import torch

from menas import rng
from results.stats import (bootstrap, correlation, effect_shares, kendall, mann_whitney, permutation_test, probe,
                           ranks, shares_interval, sign_flips, spearman, t_test, variance_shares, welch)


def normal(*shape, key=0):
    return torch.randn(*shape, generator=rng("test", key), dtype=torch.float64)


def test_t_test():
    """Oracle: a published table of Student's t, 9 degrees of freedom: .975: 2.2622, .8: .8834; p of 1.8331 is .1."""
    values = [-1.0, 1.0] * 5
    mean, half, p, least = t_test([x + .5 for x in values])
    error = torch.tensor(values, dtype=torch.float64).std().item() / 10 ** .5
    assert mean == pytest.approx(.5) and half == pytest.approx(2.2622 * error, rel=1e-3)
    assert least == pytest.approx((2.2622 + .8834) * error, rel=1e-3)
    assert t_test([x + 1.8331 * error for x in values])[2] == pytest.approx(.1, abs=1e-3)
    assert t_test([1.0, 1.0, 1.0])[:2] == (1.0, 0.0) and t_test([0.0, 0.0])[2] == 1.0
    assert t_test([0.0, 1.0], tests=100)[3] == inf  # with one degree of freedom, beyond the distribution's table


@pytest.mark.parametrize("a, b", [([1.0, 4, 2], [3.0, 6, 5, 7]), ([1.0, 1, 2], [2.0, 1, 1]), ([5.0], [1.0, 2, 3])])
def test_permutation_test_enumerates(a, b):
    """Oracle: every order of the values, in plain Python."""
    gap = lambda x, y: abs(sum(x) / len(x) - sum(y) / len(y))
    orders = list(permutations([*a, *b]))
    p = sum(gap(x[:len(a)], x[len(a):]) >= gap(a, b) - 1e-9 for x in orders) / len(orders)
    assert permutation_test(a, b) == pytest.approx(p)


def test_permutation_test_draws_what_it_cannot_enumerate():
    """Oracle: the exact p of 9 and 9 values, 48,620 ways, enumerated here; and no difference has a p of about 1/2."""
    a, b = normal(9), normal(9, key=1) + .8
    both, total = torch.cat([a, b]), (a.sum() + b.sum()).item()
    sums = torch.tensor([both[list(which)].sum().item() for which in combinations(range(18), 9)])
    exact = ((sums - total / 2).abs() >= abs(a.sum().item() - total / 2) - 1e-9).double().mean().item()
    assert permutation_test(a, b) == pytest.approx(exact, abs=.01)
    ps = [permutation_test(normal(12, key=i), normal(12, key=-1 - i), draws=199) for i in range(100)]
    assert .4 < sum(ps) / 100 < .6 and min(ps) >= 1 / 200


def test_mann_whitney():
    """Oracle: pairs counted one by one; Mann and Whitney's table: of 4 and 5 values, U = 1 has a two-sided p of .0317;
    ties count half."""
    a, b = [1.0, 2, 3, 6], [4.0, 5, 7, 8, 9]
    less, p = mann_whitney(a, b)
    assert less == sum(x < y for x, y in product(a, b)) / 20 == 18 / 20
    assert mann_whitney([1.0, 2, 3, 5], [4.0, 6, 7, 8, 9])[1] == pytest.approx(.0317, abs=1e-4)
    assert mann_whitney([1.0, 2], [1.0, 2])[0] == .5 and p > .0317
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_kendall_and_spearman(seed):
    """Oracle: pairs counted one by one, with ties; Pearson's of the ranks by torch; the published 6 sum d^2 formula."""
    x, y = (torch.randint(5, (9,), generator=rng(seed, name)).tolist() for name in "xy")
    sign = lambda a: (a > 0) - (a < 0)
    pairs = [(sign(x[i] - x[j]), sign(y[i] - y[j])) for i, j in combinations(range(9), 2)]
    expected = sum(a * b for a, b in pairs) / (sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)) ** .5
    assert kendall(x, y) == pytest.approx(expected)
    assert spearman(x, y) == pytest.approx(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item())
    x, y = torch.randperm(8, generator=rng(seed)).tolist(), list(range(8))
    assert spearman(x, y) == pytest.approx(1 - 6 * sum((a - b) ** 2 for a, b in zip(x, y)) / (8 * 63))
    assert kendall(y, y) == spearman(y, y) == pytest.approx(1) and isnan(correlation(y, [1.0] * 8))


def test_welch():
    """Oracle: a published table of Student's t, 24 degrees of freedom, .975: 2.0639, .8: .8569; and simulation, where
    the variances and sizes differ, the other way round than the sizes would have it."""
    a = normal(13)
    error = (2 * a.var() / 13).sqrt().item()
    difference, half, p, least = welch(a, a + 2.0639 * error)
    assert difference == pytest.approx(half, rel=1e-3) and p == pytest.approx(.05, abs=1e-3)
    assert least == pytest.approx((2.0639 + .8569) * error, rel=1e-3) and welch([1.0], [2.0, 3.0])[0] == 1.5
    sure = [welch(normal(10, key=("a", i)) * 3, normal(60, key=("b", i)))[2] < .05 for i in range(100)]
    assert 1 <= sum(sure) <= 11


def test_sign_flips():
    """Oracle: every choice of signs, in plain Python; and of a hundred values without a mean p is about 1/2."""
    values = [1.0, 2.0, -.5, 3.0, .25]
    flips = [abs(sum(s * x for s, x in zip(signs, values))) for signs in product((-1, 1), repeat=5)]
    assert sign_flips(values) == sum(x >= sum(values) - 1e-9 for x in flips) / 32
    assert sign_flips([1.0] * 10) == 2 / 1024
    assert .3 < sum(sign_flips(normal(20, key=i), 499) for i in range(60)) / 60 < .7


def test_intervals_cover():
    """Oracle: simulation. A 95 % interval holds the truth in about 95 of 100 samples, and the power is about 80 %."""
    mean = lambda x: x.mean().item()
    inside = [low < 0 < high for low, high in (bootstrap(mean, normal(30, key=i), draws=300) for i in range(100))]
    assert 86 <= sum(inside) <= 100
    x, noise = normal(40, key="x"), normal(40, key="noise")
    low, high = bootstrap(lambda at: correlation(x[at.long()], (x + noise)[at.long()]), range(40), draws=500)
    assert low < correlation(x, x + noise) < high and low > .3
    gap = welch(normal(5000), normal(5000, key=1))[3] * 10
    assert gap == pytest.approx(2.8016 * (2 / 50) ** .5, rel=.03)
    found = [permutation_test(normal(50, key=("a", i)), normal(50, key=("b", i)) + gap, draws=199) for i in range(100)]
    assert 68 <= sum(p <= .05 for p in found) <= 93


def test_shares_of_the_variance():
    """Oracle: sums of squares written out; effects without noise; and simulation with shares that are known, with
    values that are independent and with ones that share a part in a replicate, as those of one search do."""
    a, b, n = 3, 4, 6
    values = normal(a, b, n)
    shares = variance_shares(values)
    grand = sum(x for row in values.tolist() for cell in row for x in cell) / (a * b * n)
    total = ((values - grand) ** 2).sum().item()
    first = sum(b * n * (values[i].mean().item() - grand) ** 2 for i in range(a))
    assert shares[0] == pytest.approx(first / total) and sum(shares) == pytest.approx(1)
    effect = torch.tensor([1.0, 0, -1])[:, None, None].expand(a, b, n)
    assert variance_shares(effect)[0] == pytest.approx(1) == effect_shares(effect)[0]
    for alike in (0.0, .5):
        true, covered, means = 2 / 3 / (2 / 3 + 1 + alike), 0, []
        for i in range(100):
            drawn = effect + normal(a, b, n, key=("shares", i)) + alike ** .5 * normal(1, 1, n, key=("replicate", i))
            means.append(effect_shares(drawn))
            (low, high), *_ = shares_interval(drawn)
            covered += low < true < high
        means = torch.tensor(means).mean(0)
        assert means[0] == pytest.approx(true, abs=.05) and means[1:3].abs().max() < .03 and covered >= 85
    assert shares_interval(values[..., :2])[0][0] != shares_interval(values[..., :2])[0][0]  # nan: too few to say


def test_probe():
    """What is linear in x is found on the folds left out; of noise nothing is."""
    x = normal(200, 5)
    assert probe(x, x @ torch.arange(5.0).double() + 3) > .99 and probe(x, normal(200, key=2)) < .05
    assert probe(x, x[:, 0] ** 2) < .1
    still = torch.cat([x, 1 + 1e-9 * normal(200, 1, key=3)], 1)  # constant but for rounding: of no use, and of no harm
    assert probe(still, x[:, 0]) == pytest.approx(probe(x, x[:, 0]))
