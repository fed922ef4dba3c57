"""Statistics: small, each held to enumeration, published values or simulation in tests/test_stats.py. Samples are
sequences of numbers; what is drawn at random is a function of their size, so it is the same again.
"""
import math
from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F

from menas import rng

EXACT = 20000  # up to so many rearrangements are enumerated, beyond that drawn

def sample_of(values):
    return torch.as_tensor(values, dtype=torch.float64)

@lru_cache(maxsize=8)
def student_t(df):
    """Student's distribution on a grid from 0: t and its cumulative probability."""
    t = torch.linspace(0, 500, 1000001, dtype=torch.float64)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = torch.exp(log_c - (df + 1) / 2 * torch.log1p(t * t / df))
    return t, 0.5 + F.pad(torch.cumulative_trapezoid(density, t), (1, 0))

def from_t(mean, error, df, tests):
    """What t_test and welch say of a mean with its standard error and degrees of freedom."""
    t, p = student_t(df)
    quantile = lambda q: t[torch.searchsorted(p, q)].item() if q <= p[-1] else math.inf
    at = int(min(abs(mean) / max(error, 1e-300) / 500, 1) * (len(p) - 1))
    least = (quantile(1 - .025 / tests) + quantile(.8)) * error
    return mean, quantile(.975) * error, min(1.0, tests * 2 * (1 - p[at].item())), least

def t_test(values, tests=1):
    """Of a sample [n]: mean, half of its 95 % interval, p of the mean being 0, Bonferroni-corrected for so many tests,
    and the smallest true mean that this corrected test finds in about 80 of 100 cases (of a few values: 70)."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return values[0] if len(values) == 1 else math.nan, math.nan, math.nan, math.nan
    values = sample_of(values)
    return from_t(values.mean().item(), values.std().item() / math.sqrt(len(values)), len(values) - 1, tests)

def welch(a, b, tests=1):
    """Of two samples of unequal variances: mean of b minus mean of a, half of its 95 % interval, p, corrected for that
    many tests, and the smallest true difference found in about 80 of 100 cases, of small samples 70 (Welch 1947)."""
    a, b = sample_of(a), sample_of(b)
    u, v = (x.var().item() / len(x) if len(x) > 1 else math.nan for x in (a, b))
    if not u + v > 0:
        return (b.mean() - a.mean()).item(), math.nan, math.nan, math.nan
    df = round((u + v) ** 2 / (u * u / (len(a) - 1) + v * v / (len(b) - 1)), 3)
    return from_t((b.mean() - a.mean()).item(), math.sqrt(u + v), df, tests)

def sign_flips(values, draws=9999):
    """Two-sided p of a sample of differences having mean 0: the share of ways to flip their signs with a mean as far
    from 0, the permutation test of pairs. Exact for few values, else drawn."""
    x = sample_of(values)
    exact = 2 ** len(x) <= EXACT
    signs = torch.cartesian_prod(*[torch.tensor((-1.0, 1.0))] * len(x)).view(-1, len(x)) if exact else \
        torch.randint(2, (draws, len(x)), generator=rng("flips", len(x))) * 2.0 - 1
    as_much = int(((signs.double() @ x).abs() >= x.sum().abs() - 1e-12).sum())
    return as_much / len(signs) if exact else (as_much + 1) / (len(signs) + 1)

def splits(n, k, draws):
    """Which of n are in the first group of k: all ways [ways, k], or if they are many so many at random."""
    if math.comb(n, k) <= EXACT:
        return torch.tensor(list(combinations(range(n), k)))
    return torch.rand(draws, n, generator=rng("splits", n, k)).argsort(1)[:, :k]

def permutation_test(a, b, draws=9999):
    """Two-sided p of two samples coming from one distribution, by the difference of their means: the share of the ways
    to deal the values out that differ as much. Exact for few values, else drawn; the data count as a draw."""
    a, b = sample_of(a), sample_of(b)
    both, which = torch.cat([a, b]), splits(len(a) + len(b), len(a), draws)
    means = both[which].mean(1)
    gaps = (means - both.mean()).abs()
    as_much = int((gaps >= (a.mean() - both.mean()).abs() - 1e-12).sum())
    exact = len(which) == math.comb(len(both), len(a))
    return as_much / len(which) if exact else (as_much + 1) / (len(which) + 1)

def ranks(values):
    """1 for the least; equal ones share the mean of theirs."""
    x = sample_of(values)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) + 1) / 2

def mann_whitney(a, b):
    """P(x < y) + P(x = y) / 2 of a value x of a and y of b, and the two-sided p of its being 1/2 (Mann and Whitney
    1947): the permutation test of the ranks."""
    order = ranks([*a, *b])
    first = order[:len(a)].sum().item()
    less = (len(a) * len(b) + len(a) * (len(a) + 1) / 2 - first) / (len(a) * len(b))
    return less, permutation_test(order[:len(a)], order[len(a):])

def bootstrap(statistic, *samples, draws=2000):
    """95 % percentile interval of a statistic of samples, each drawn anew with replacement (Efron 1979)."""
    samples = [sample_of(x) for x in samples]
    drawn = lambda x, i, j: x[torch.randint(len(x), (len(x),), generator=rng("bootstrap", i, j))]
    values = sample_of([statistic(*(drawn(x, i, j) for j, x in enumerate(samples))) for i in range(draws)])
    return tuple(values.nanquantile(sample_of((.025, .975))).tolist())

def kendall(x, y):
    """Kendall's tau-b: concordant minus discordant pairs, divided by the geometric mean of the numbers of pairs that
    differ in x and in y (Kendall 1945); nan if there are none."""
    sign = lambda values: torch.sign(sample_of(values)[:, None] - sample_of(values)[None])
    x, y = sign(x), sign(y)
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()

def correlation(x, y):
    """Pearson's; nan if one of them does not vary."""
    x, y = (sample_of(values) - sample_of(values).mean() for values in (x, y))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()

def spearman(x, y):
    """The correlation of the ranks (Spearman 1904)."""
    return correlation(ranks(x), ranks(y))

def variance_shares(table):
    """Of values [A, B, n], n for each combination of two factors: the shares of the total sum of squares due to the
    first, the second, their interaction and the rest (two-way analysis of variance, Fisher 1925)."""
    values = sample_of(table)
    mean, cell = values.mean(), values.mean(2)
    first, second = cell.mean(1) - mean, cell.mean(0) - mean
    both = cell - mean - first[:, None] - second
    n_a, n_b, n = values.shape
    parts = [n_b * n * first.square().sum(), n_a * n * second.square().sum(), n * both.square().sum(),
             (values - cell[..., None]).square().sum()]
    return [(part / sum(parts)).item() for part in parts]

def effect_shares(table):
    """The same with each effect's share less what chance alone would give it (omega squared, Hays 1963); the rest is
    what is left."""
    values = sample_of(table)
    (n_a, n_b, n), shares = values.shape, variance_shares(values)
    error = shares[3] / (n_a * n_b * (n - 1))  # the rest's, a degree of freedom
    free = (n_a - 1, n_b - 1, (n_a - 1) * (n_b - 1))
    found = [(share - df * error) / (1 + error) for share, df in zip(shares, free)]
    return [*found, 1 - sum(found)]

def shares_interval(table):
    """95 % intervals of effect_shares: jackknife over the n replicates, each left out from all combinations at once, as
    what stems from one search may be alike (Tukey 1958)."""
    values = sample_of(table)
    n, found = values.shape[2], sample_of(effect_shares(table))
    if n < 3:  # a replicate left out leaves no variance within
        return [(math.nan, math.nan)] * 4
    others = [values[..., [j for j in range(n) if j != i]] for i in range(n)]
    pseudo = n * found - (n - 1) * sample_of([effect_shares(x) for x in others])            # [n, 4]
    return [(mean - half, mean + half) for mean, half, *_ in (t_test(column.tolist()) for column in pseudo.t())]

def ridge(x, y, penalty=1.0):
    """The weights w [d] of a ridge regression of y [n] on x [n, d], both centred; the penalty is on w in units of x's
    standard deviations."""
    x, y = sample_of(x), sample_of(y)
    spread = x.std(0)
    spread = spread.where(spread > 1e-6 * x.abs().amax(0), math.inf)  # what is constant but for rounding says nothing
    z = (x - x.mean(0)) / spread
    penalized = z.t() @ z + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.solve(penalized, z.t() @ (y - y.mean())) / spread

def probe(x, y, folds=5):
    """R^2 of that regression on the folds left out: what of y is linear in x."""
    x, y = sample_of(x), sample_of(y)
    fold, guess = torch.randperm(len(x), generator=rng("probe", len(x))) % folds, torch.empty_like(y)
    for i in range(folds):
        known = fold != i
        guess[~known] = (x[~known] - x[known].mean(0)) @ ridge(x[known], y[known]) + y[known].mean()
    return 1 - ((y - guess).square().sum() / (y - y.mean()).square().sum()).item()
