"""The statistics against enumeration, published values and simulation. Run: pytest tests/test_stats.py"""
from itertools import combinations, permutations, product

import pytest
import torch

from menas import rng
from results.stats import (bootstrap, correlation, detectable, kendall, mann_whitney, paired_bootstrap,
                           permutation_test, probe, ranks, shares_interval, spearman, t_test, unbiased_shares,
                           variance_shares)


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
    assert kendall(y, y) == spearman(y, y) == pytest.approx(1) and correlation(y, [1.0] * 8) != correlation(y, y)


def test_intervals_cover():
    """Oracle: simulation. A 95 % interval holds the truth in about 95 of 100 samples, and the power is about 80 %."""
    mean = lambda x: x.mean().item()
    inside = [low < 0 < high for low, high in (bootstrap(mean, normal(30, key=i), draws=300) for i in range(100))]
    assert 86 <= sum(inside) <= 100
    x, noise = normal(40, key="x"), normal(40, key="noise")
    low, high = paired_bootstrap(correlation, x, x + noise, draws=500)
    assert low < correlation(x, x + noise) < high and low > .3
    gap = 2.8016 * (2 / 50) ** .5
    assert detectable(normal(5000), normal(5000, key=1)) == pytest.approx(gap / 10, rel=.03)
    found = [permutation_test(normal(50, key=("a", i)), normal(50, key=("b", i)) + gap, draws=199) for i in range(100)]
    assert 68 <= sum(p <= .05 for p in found) <= 93


def test_shares_of_the_variance():
    """Oracle: sums of squares written out; effects without noise; and simulation with shares that are known."""
    a, b, n = 3, 4, 6
    values = normal(a, b, n)
    shares = variance_shares(values)
    grand = sum(x for row in values.tolist() for cell in row for x in cell) / (a * b * n)
    total = ((values - grand) ** 2).sum().item()
    first = sum(b * n * (values[i].mean().item() - grand) ** 2 for i in range(a))
    assert shares[0] == pytest.approx(first / total) and sum(shares) == pytest.approx(1)
    effect = torch.tensor([1.0, 0, -1])[:, None, None].expand(a, b, n)
    assert variance_shares(effect)[0] == pytest.approx(1) == unbiased_shares(effect)[0]
    true, covered, means = 2 / 3 / (2 / 3 + 1), 0, []
    for i in range(60):
        drawn = effect + normal(a, b, n, key=("shares", i))
        means.append(unbiased_shares(drawn))
        covered += (interval := shares_interval(drawn, 200))[0][0] < true < interval[0][1]
    means = torch.tensor(means).mean(0)
    assert means[0] == pytest.approx(true, abs=.05) and means[1:3].abs().max() < .02 and covered >= 52


def test_probe():
    """What is linear in x is found on the folds left out; of noise nothing is."""
    x = normal(200, 5)
    assert probe(x, x @ torch.arange(5.0).double() + 3) > .99 and probe(x, normal(200, key=2)) < .05
    assert probe(x, x[:, 0] ** 2) < .1
