"""The statistics hold against enumeration, published values and simulation, and known wrong
versions fail the same checks. Run: pytest tests/test_statistics.py"""
from itertools import combinations, product
from math import isnan
from statistics import mean

import pytest
import torch

import menas
from mutants import mutate


def normal(*shape, key=0):
    return torch.randn(*shape, generator=menas.rng("test", key), dtype=torch.float64)


def pairs(n, key=0, gap=0.0):
    """Two samples of n."""
    return normal(n, key=(key, "a")).tolist(), (normal(n, key=(key, "b")) + gap).tolist()


def flips_by_hand(a, b):
    """p over every choice of signs of the differences."""
    gaps = [y - x for x, y in zip(a, b)]
    signs = product((-1, 1), repeat=len(gaps))
    sums = [abs(sum(s * x for s, x in zip(some, gaps))) for some in signs]
    return mean(x >= abs(sum(gaps)) - 1e-9 for x in sums)


def deals_by_hand(a, b):
    """p over every way to deal the values out."""
    both, gaps = [*a, *b], []
    for first in combinations(range(len(both)), len(a)):
        rest = [x for i, x in enumerate(both) if i not in first]
        gaps.append(abs(mean(both[i] for i in first) - mean(rest)))
    return mean(gap >= gaps[0] - 1e-9 for gap in gaps)  # the first deal is the data


def check_p_value():
    """Oracle: plain Python over all flips; over all deals, of which p_value draws 9999."""
    for n, gap in ((2, 0.0), (5, 1.0), (7, 0.7)):
        a, b = pairs(n, gap=gap)
        assert menas.p_value(a, b, True) == pytest.approx(flips_by_hand(a, b))
        assert menas.p_value(b, a, True) == menas.p_value(a, b, True)
    for a, b in ((a, b), ([1.0, 1, 2], [2.0, 1, 1]), ([5.0], [1.0, 2, 3])):
        assert menas.p_value(a, b, False) == pytest.approx(deals_by_hand(a, b), abs=.015)
    assert menas.p_value([0.0] * 6, [1.0] * 6, True) == 2 / 64
    assert menas.p_value([0.0] * 6, [1.0] * 6, True, 1.0) == 1
    for paired in (True, False):  # the data count as one of the draws
        assert menas.p_value([*range(40)], [*range(90, 130)], paired) == pytest.approx(1 / 9999)


def check_interval():
    """Oracle: the test itself, at shifts a little within and beyond the ends. By hand: of six pairs
    a shift is refused if all differences are on one side, of five none can be."""
    for paired in (True, False):
        a, b = pairs(9 if paired else 6, gap=1.0)
        low, high = menas.interval(a, b, paired)
        assert low < mean(b) - mean(a) < high
        for end, side in ((low, -1), (high, 1)):
            assert menas.p_value(a, b, paired, end - side * 1e-6) > .05
            assert menas.p_value(a, b, paired, end + side * 1e-6) <= .05
    a, b = pairs(6)
    gaps = [y - x for x, y in zip(a, b)]
    assert menas.interval(a, b, True) == pytest.approx([min(gaps), max(gaps)], abs=1e-6)
    assert menas.interval(a[:5], b[:5], True) is None
    assert menas.interval([1.0] * 6, [1.0] * 6, True) == pytest.approx([0, 0], abs=1e-6)


def check_kendall():
    """Oracle: pairs counted one by one, with ties in both."""
    for seed in range(5):
        x, y = torch.randint(5, (2, 12), generator=menas.rng(seed, "ties")).tolist()
        signs = []
        for i, j in combinations(range(12), 2):
            signs.append(((x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])))
        agree = sum(a * b for a, b in signs)
        differ = sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
        assert menas.kendall(x, y) == pytest.approx(agree / differ ** .5)
    assert isnan(menas.kendall([1, 2, 3], [4, 4, 4]))


def check_probe():
    """By construction: what is linear in x is found on the folds left out, of noise nothing is; a
    column that never changes does no harm."""
    x = normal(200, 40)
    assert menas.probe(x, x @ torch.arange(40.0).double() + 3) > .99
    assert menas.probe(x, normal(200, key=2)) < .05
    assert menas.probe(x, x[:, 0] ** 2) < .1
    still = torch.cat([x, torch.ones(200, 1).double()], 1)
    assert menas.probe(still, x[:, 0]) == pytest.approx(menas.probe(x, x[:, 0]))


BOTH = "(x.square().sum() * y.square().sum()).sqrt()"
MUTANTS = [
    (check_p_value, "p_value", "gaps.abs()", "gaps"),                       # one side
    (check_p_value, "p_value", "if paired else", "if not paired else"),
    (check_p_value, "p_value", "y - shift", "y"),
    (check_p_value, "dealt_differences", "order[0] =", "order[:] ="),       # nothing is dealt
    (check_p_value, "flipped_means", "<= EXACT", "<= 4"),                   # not enumerated
    (check_interval, "interval", "middle) > 0.05", "middle) > 0.1"),
    (check_interval, "interval", "return None", "break"),
    (check_kendall, "kendall", BOTH, "(x.numel() - len(x))"),               # tau-a
    (check_kendall, "kendall", BOTH, "(x * y).abs().sum()"),                # gamma
    (check_probe, "probe", "fold != i", "fold >= 0"),                       # nothing is left out
    (check_probe, "probe", "1 - (", "("),
]


@pytest.mark.parametrize("check", [check_p_value, check_interval, check_kendall, check_probe])
def test_a_statistic_is_that_of_its_oracle(check):
    check()


@pytest.mark.parametrize("check, name, old, new", MUTANTS)
def test_a_wrong_statistic_fails_the_same_check(check, name, old, new, monkeypatch):
    mutate(monkeypatch, name, (old, new))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("most, error", [(15, 1e-9), (14, .007)])
def test_fishers_example(most, error, monkeypatch):
    """Published, of Darwin's maize, crossed minus self-fertilized plants: of 32,768 sums of signed
    differences 863 are 314 or more (Fisher 1935, 21); enumerated, and drawn."""
    monkeypatch.setattr(menas, "EXACT", most)
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert menas.p_value([0] * 15, maize, True) == pytest.approx(2 * 863 / 32768, abs=error)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 480000.1])
def test_the_unit_of_measurement_is_no_evidence(paired, scale):
    """Oracle: invariance; weights of a cell are numbers such as 480,000. An interval scales."""
    a, b = pairs(8, gap=3.0)
    scaled = [scale * x for x in a], [scale * x for x in b]
    assert menas.p_value(*scaled, paired) == menas.p_value(a, b, paired) > 0
    ends = [scale * x for x in menas.interval(a, b, paired)]
    assert menas.interval(*scaled, paired) == pytest.approx(ends, rel=1e-4)
