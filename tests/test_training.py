"""Every token is scored once; K networks trained as one equal K trained alone.
Run: pytest tests/test_training.py"""
import json
import math
from functools import partial

import pytest
import torch

import menas
from menas import CELLS, GATE, GLU, HIGHWAY, SUM, Batch, Cell, Config, Corpus, Node, evaluate
from mutants import mutate
from reference import F64

WORDS = 13
STEPS = 3  # of an epoch
PLAIN = [
    menas.arc("0 1 0 2 1 3", menas.LEAVES),
    Cell((Node(0, activation=2),)),
    menas.arc("0 0 1 1"),
    Cell((Node(0, activation=3), Node(1))),
]
GATED = [
    CELLS["lstm_cell"],
    Cell((Node(0, activation=3), Node(1))),
    Cell((Node(0, GLU), Node(1, SUM, 1)), rate=-1, width=4),
    Cell((Node(0), Node(0, GATE, 1, 1), Node(2, HIGHWAY, 1))),
]


def corpus_of(length=100):
    """Text with some structure: a word is often the one before plus one."""
    draw = torch.Generator().manual_seed(0)
    jumps = torch.randint(WORDS, (length,), generator=draw)
    text = torch.where(torch.rand(length, generator=draw) < 0.7, 1, jumps).cumsum(0) % WORDS
    return Corpus(text, text[:41], text[40:80], [str(i) for i in range(WORDS)], {})


def networks(cells, units=0, first=1):
    """Weights in float64, rows, and seeds from the first on; LSTMs if there are units."""
    config = Config(hidden=6)
    seeds = list(range(first, first + len(cells)))
    if units:
        weights = menas.lstm_weights(config, WORDS, units, seeds)
        rows = torch.zeros(len(seeds), 9, dtype=torch.long)
    else:
        weights = menas.standalone_weights(config, WORDS, cells, seeds)
        rows = menas.encode(cells)
    return {name: w.double() for name, w in weights.items()}, rows, seeds


# evaluate

def naive(weights, rows, tokens):
    """A pass over the whole text as one segment of one stream."""
    batch = Batch(tokens[:-1, None], tokens[1:, None], menas.zero_state(weights, 1), {})
    with torch.no_grad():
        return menas.network(weights, rows, batch, F64)[0]


@pytest.mark.parametrize("length, bptt, cells, units", [
    (2, 20, PLAIN, 0), (71, 7, GATED, 0), (71, 70, PLAIN, 0), (100, 30, PLAIN, 5)])
def test_one_stream_is_the_naive_pass(length, bptt, cells, units):
    """Oracle: naive(); one segment, several, and a padded last one."""
    weights, rows, _ = networks(cells, units)
    tokens = corpus_of().train[:length]
    found = evaluate(weights, rows, tokens, F64, batch=1, bptt=bptt)
    assert (found - naive(weights, rows, tokens)).abs().max() < 1e-12


@pytest.mark.parametrize("batch, bptt", [(2, 7), (5, 70), (64, 1)])
def test_evaluate_scores_every_token_but_the_first_once(batch, bptt):
    """Oracle: a model that gives each word the constant probability of its bias: a count."""
    weights, rows, _ = networks(PLAIN[:1])
    weights["embedding"].zero_()
    weights["bias"][0] = torch.linspace(-3, 3, WORDS)
    tokens = corpus_of(391).train
    expected = -torch.log_softmax(weights["bias"][0], 0)[tokens[1:]].mean()
    found = evaluate(weights, rows, tokens, F64, batch=batch, bptt=bptt, warm_up=12)
    assert abs(found[0] - expected) < 1e-12


def test_a_stream_reads_the_words_before_it():
    """Oracle: one stream. After 70 words of warm-up its loss is within a thousandth."""
    weights, rows, _ = networks([CELLS["darts_v2"], PLAIN[0]])
    tokens = corpus_of(350).train
    score = partial(evaluate, weights, rows, tokens, F64, batch=4)
    far, near = (score(warm_up=n) - naive(weights, rows, tokens) for n in (1, 70))
    assert near.abs().max() < 1e-3
    assert near.abs().max() < far.abs().max() / 5


# training: the oracle is each network by itself

@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Validation in segments of ten words, which is quick."""
    monkeypatch.setattr(menas, "evaluate", partial(evaluate, bptt=10, warm_up=10))


def train(folder, some, **settings):
    """(best weights, what is found, lines of metrics) of networks trained as one, in float64."""
    weights, rows, seeds = some
    rates = dict(word_dropout=.1, input_dropout=.2, hidden_dropout=.2, output_dropout=.2)
    given = dict(batch=5, bptt=7, epochs=4, lr=2.0, clip=.1, patience=2)
    config = Config(hidden=6, dtype="float64", out=str(folder), **rates | given | settings)
    run = menas.Run("train", config)
    run.folder.mkdir()
    best, found = menas.train_networks(config, run, corpus_of(), weights, rows, seeds)
    return best, found, [json.loads(line) for line in run.metrics.read_text().splitlines()]


def gaps(folder, cells, units=0, **settings):
    """Largest differences of losses and of weights, together and alone; what is found together."""
    best, together, _ = train(folder / "together", networks(cells, units), **settings)
    losses, weights = [], []
    for k, cell in enumerate(cells):
        own, found, _ = train(folder / str(k), networks([cell], units, k + 1), **settings)
        losses.append(abs(together["best_loss"][k] - found["best_loss"][0]))
        losses += [together[x][k] != found[x][0] for x in ("best_epoch", "epochs")]
        for name in best.keys() & own.keys():
            w = own[name][0]
            weights.append((best[name][k][:len(w)] - w).abs().max())
    return max(losses), max(weights), together


CASES = {
    "averaging": (PLAIN, 0, dict(average=True, epochs=5, patience=4, lr=20.0)),
    "early stopping": (PLAIN, 0, dict(schedule="cosine", lr=30.0, patience=1, epochs=8)),
    "gated": (GATED, 0, dict(average=True, epochs=2, lr=20.0)),
    "LSTM": (PLAIN[:3], 5, dict(schedule="plateau", lr=20.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_together_equals_alone(case, tmp_path):
    """Sizes, seeds, masks, norms, learning rates and the epochs at which they stop all differ."""
    cells, units, settings = CASES[case]
    loss, weight, found = gaps(tmp_path, cells, units, **settings)
    assert loss < 1e-6 and weight < 1e-7
    if case == "early stopping":
        assert len(set(found["epochs"])) > 1  # else it shows nothing


@pytest.mark.parametrize("name, right, wrong", [
    ("sgd_step", ".norm(dim=0)", ".norm().repeat(len(lr))"),          # clipped by the norm of all
    ("draw_masks", "for seed in seeds]", "for seed in seeds[:1] * len(seeds)]"),
])
def test_shared_clipping_or_masks_would_be_seen(name, right, wrong, tmp_path, monkeypatch):
    """Mutants: together no longer equals alone."""
    mutate(monkeypatch, name, (right, wrong))
    loss, weight, _ = gaps(tmp_path, PLAIN[:3], epochs=2)
    assert loss > 1e-3 and weight > 1e-3


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_failure_is_marked_and_touches_no_other(epoch, tmp_path, monkeypatch):
    """Oracle: the same run without the network that breaks; it keeps its best weights."""
    weights, rows, seeds = networks(PLAIN[2:3] * 3)
    others = {name: w[::2].clone() for name, w in weights.items()}
    kept, expected, _ = train(tmp_path / "others", (others, rows[::2], seeds[::2]))
    right, steps = menas.train_step, []

    def breaks(weights, rows, *rest):
        losses, state, grads = right(weights, rows, *rest)
        steps.append(losses)
        if len(steps) == epoch * STEPS - 1:
            losses[1] = state[:, 1] = math.nan
            weights["nodes"].data[1] = math.inf
        return losses, state, grads
    monkeypatch.setattr(menas, "train_step", breaks)
    best, found, lines = train(tmp_path / "run", (weights, rows, seeds))
    assert found["failed"] == [0, epoch, 0]
    assert (found["epochs"][1], found["best_epoch"][1]) == (epoch, epoch - 1)
    assert all(w.isfinite().all() for w in best.values())
    assert [line["networks"] for line in lines] == [[0, 1, 2]] * epoch + [[0, 2]] * (4 - epoch)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert found["best_loss"][::2] == pytest.approx(expected["best_loss"], abs=1e-7)
    assert max((best[name][::2] - w).abs().max() for name, w in kept.items()) < 1e-9


# by hand: two networks whose validation losses are these, whatever they learn
SCRIPT = [(3.0, 3.0), (2.0, 4.0), (2.5, 3.5), (1.5, 2.9), (1.4, 3.1), (1.7, 3.2), (1.8, 3.3)]


@pytest.fixture
def scripted(monkeypatch):
    """Of each step the learning rates, the state before, the dropout and the weights after it; the
    weights that were judged."""
    seen = {"lr": [], "state": [], "dropout": [], "after": [], "judged": []}
    right = menas.train_step

    def step(weights, rows, batch, lr, config):
        out = right(weights, rows, batch, lr, config)
        seen["lr"].append(lr.tolist())
        seen["state"].append(batch.state)
        seen["dropout"].append(batch.masks["hidden"])
        seen["after"].append(weights["nodes"][0].detach().clone())
        return out

    def judge(weights, rows, tokens, dtype):
        seen["judged"].append(weights["nodes"][0].detach().clone())
        return torch.tensor(SCRIPT[len(seen["judged"]) - 1])[:len(rows)]
    monkeypatch.setattr(menas, "train_step", step)
    monkeypatch.setattr(menas, "evaluate", judge)
    return seen


def test_patience_and_plateau_by_hand(scripted, tmp_path):
    """The second stops when two epochs did not improve; the first goes on alone. The state is 0 at
    the start of the text, and only there."""
    settings = dict(schedule="plateau", lr=8.0, epochs=20)
    _, found, _ = train(tmp_path / "run", networks(PLAIN[:2]), **settings)
    assert found["best_loss"] == pytest.approx([1.4, 3.0]) and found["best_epoch"] == [5, 1]
    assert found["epochs"] == [7, 3] and found["failed"] == [0, 0]
    assert scripted["lr"][::STEPS] == [[8, 8], [8, 8], [8, 2], [2], [2], [2], [.5]]
    assert [x.any().item() for x in scripted["state"]] == [False, True, True] * 7


def test_a_schedule_goes_by_the_share_of_epochs_done(scripted, tmp_path):
    """By hand: half a cosine over the six steps of two epochs; each has another mask."""
    train(tmp_path / "run", networks(PLAIN[:1]), schedule="cosine", lr=8.0, epochs=2, patience=9)
    assert sum(scripted["lr"], []) == pytest.approx([4 + 4 * math.cos(math.pi * i / 6) for i in range(6)])
    assert not any(a.equal(b) for a, b in zip(scripted["dropout"], scripted["dropout"][1:]))


def test_averaging_is_a_running_mean_by_hand(scripted, tmp_path):
    """The weights; after the first epoch that did not improve, the mean of all since. And late is
    what the last two epochs gained."""
    some = networks(PLAIN[:1])
    _, found, _ = train(tmp_path / "run", some, average=True, epochs=5, patience=9)
    assert found["late"] == pytest.approx([2.0 - 1.4])
    after = torch.stack(scripted["after"])
    for epoch, judged in enumerate(scripted["judged"], 1):
        first = 3 * STEPS if epoch > 3 else epoch * STEPS - 1
        expected = after[first:epoch * STEPS].mean(0)
        assert (judged - expected).abs().max() < 1e-8  # shares are float32


# steps and schedules, by hand

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sgd_step_by_hand(bad):
    """Four networks: clipped from norm 5 to 1, not clipped, not finite, and of gradient 0."""
    weights = {"a": torch.ones(4, 1), "b": 2 * torch.ones(4, 1)}
    a, b = torch.tensor([[3.0, .3, bad, 0], [4.0, .4, 1, 0]])[..., None]
    menas.sgd_step(weights, {"a": a, "b": b}, torch.tensor([.5, 2.0, 1.0, 1.0]), clip=1.0, decay=.1)
    assert weights["a"][:, 0].tolist() == pytest.approx([.95 - .5 * .6, .8 - 2 * .3, 1.0, .9])
    assert weights["b"][:, 0].tolist() == pytest.approx([1.9 - .5 * .8, 1.6 - 2 * .4, 2.0, 1.8])


@pytest.mark.parametrize("name, values", [
    ("constant", {0: 1, 7.5: 1}),
    ("cosine", {0: 1, 2.5: .853553, 5: .5, 10: 0, 11: 0}),
    ("decay", {0: 1, 14.9: 1, 15: .96, 16.5: .9216, 24: .96 ** 10}),
])
def test_schedules_by_hand(name, values):
    for epoch, factor in values.items():
        assert menas.SCHEDULES[name](epoch, 10) == pytest.approx(factor, abs=1e-6)


def test_perplexity_of_a_broken_loss_is_infinite():
    assert [menas.perplexity(x) for x in (math.nan, math.inf, 1e6)] == [math.inf] * 3
    assert menas.perplexity(math.log(80)) == pytest.approx(80)


# deriving, and inputs that are perturbed

def test_derive_sorts_and_scores_each_distinct_row_once(monkeypatch):
    """Oracle: the naive pass under the shared weights, one architecture at a time."""
    config, corpus = Config(hidden=6, nodes=4), corpus_of()
    weights = {name: 2 * w for name, w in menas.shared_weights(config, WORDS).items()}
    rows = menas.uniform_rows(menas.search_space(config), 12, "derive")[torch.arange(24) * 5 % 12]
    scored = []

    def counts(weights, rows, *rest, **how):
        scored.extend(map(tuple, rows.tolist()))
        return evaluate(weights, rows, *rest, **how)
    monkeypatch.setattr(menas, "evaluate", counts)
    found, losses = menas.derive(config, weights, rows, corpus)
    assert len(scored) == len(set(scored)) == len(rows.unique(dim=0))
    assert sorted(found.tolist()) == sorted(rows.tolist())
    assert losses.tolist() == sorted(losses.tolist())
    double = {name: w.double() for name, w in weights.items()}
    expected = [naive(double, row[None], corpus.valid).item() for row in found]
    assert losses.tolist() == pytest.approx(expected, abs=2e-4)


def test_derive_scores_the_perturbed_text(monkeypatch):
    """Oracle: where every word is dropped, weights of 0 for the input."""
    config, corpus = Config(hidden=6, nodes=4, reward_input="words"), corpus_of()
    weights = menas.shared_weights(config, WORDS)
    rows = menas.uniform_rows(menas.search_space(config), 1, "derive")
    monkeypatch.setitem(menas.INPUTS, "words",
                        lambda inputs, words, hidden, *key: {"word": torch.zeros(1, words)})
    _, losses = menas.derive(config, weights, rows, corpus)
    weights["input"] = torch.zeros_like(weights["input"])
    assert losses.item() == pytest.approx(evaluate(weights, rows, corpus.valid).item(), abs=1e-5)


def test_perturbed_inputs_are_what_they_say():
    """Oracle: statistics of many draws: a fifth of the words is 0, the noise is of half the root
    mean square of the embeddings. Each is a function of its key alone."""
    weights = menas.shared_weights(Config(hidden=6, nodes=2), 2000)
    tokens = torch.arange(2000).view(40, 50)

    def embedded(name, *key):
        masks = menas.perturbation(name, weights, 1)(tokens, *key)
        return menas.embed(weights, Batch(tokens, tokens, None, masks))
    plain, words, noisy = (embedded(name, 0) for name in ("plain", "words", "noise"))
    for name, first in (("words", words), ("noise", noisy)):
        assert embedded(name, 0).equal(first)
        assert not embedded(name, 1).equal(first)
    dropped = (words == 0).all(-1)
    assert dropped.float().mean().item() == pytest.approx(.2, abs=.03)
    assert words[~dropped].equal(plain[~dropped])
    noise = noisy - plain
    size = noise.square().mean().sqrt() / weights["embedding"].square().mean().sqrt()
    assert size.item() == pytest.approx(.5, abs=.01)
    assert abs(noise.mean()) < .01 and abs((noise * plain).mean()) < .01
