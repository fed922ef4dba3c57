"""Evaluation covers every token; K networks trained as one equal K trained alone. Run: pytest tests/test_training.py"""
import math

import pytest
import torch

import menas
from menas import (CELLS, Batch, Cell, Node, Config, Corpus, Run, encode, evaluate, network, perplexity, sgd_step,
                   shared_weights, standalone_weights, train_networks)

WORDS = 13
SMALL = [Cell(tuple(Node(*node) for node in nodes), output) for nodes, output in (
    (((0, "tanh"), (1, "relu"), (1, "sigmoid"), (2, "identity")), "leaves"), (((0, "sigmoid"),), "leaves"),
    (((0, "tanh"), (1, "tanh"), (2, "relu")), "all"), (((0, "identity"), (1, "tanh")), "leaves"))]


def small_corpus(length=400):
    """Random text with some structure: a word is often the one before plus one."""
    draw = torch.Generator().manual_seed(0)
    steps = torch.where(torch.rand(length, generator=draw) < 0.7, 1, torch.randint(WORDS, (length,), generator=draw))
    text = steps.cumsum(0) % WORDS
    return Corpus(text, text[:150], text[150:300], [str(i) for i in range(WORDS)], {})


def float64(weights):
    return {name: w.double() for name, w in weights.items()}


def train(folder, rows, seeds, change=None, **settings):
    """train_networks in float64; change(weights) may spoil them first."""
    config = Config(**{**dict(hidden=6, batch=5, bptt=7, init=.3, epochs=4, lr=2.0, clip=.5, dtype="float64",
                              eval_batch=4, word_dropout=.1, input_dropout=.2, hidden_dropout=.2, output_dropout=.2,
                              patience=2, out=str(folder)), **settings})
    weights = float64(standalone_weights(config, WORDS, rows, seeds))
    if change:
        change(weights)
    with Run("train", config) as run:
        return train_networks(config, run, small_corpus(), weights, rows, seeds)


CASES = {"plain": {}, "averaging": dict(average=True, epochs=8, patience=4, lr=20.0),
         "plateau": dict(plateau=4.0, lr=20.0, epochs=8), "early stopping": dict(lr=30.0, patience=1, epochs=8),
         "penalties": dict(activation_reg=.1, slowness_reg=.1), "random lengths": dict(random_bptt=True, bptt=10)}


@pytest.mark.parametrize("case", list(CASES))
def test_together_equals_alone(case, tmp_path):
    """Oracle: each network by itself; different sizes of cells, seeds, and epochs at which they stop."""
    rows, seeds = encode(SMALL), [1, 2, 3, 4]
    best, together = train(tmp_path / "together", rows, seeds, **CASES[case])
    for i in range(len(rows)):
        own, alone = train(tmp_path / str(i), rows[i:i + 1], seeds[i:i + 1], **CASES[case])
        for name, value in alone.items():
            assert together[name][i] == pytest.approx(value[0], abs=1e-6), name
        assert all((best[name][i] - own[name][0]).abs().max() < 1e-9 for name in own)
    if case == "early stopping":
        assert len(set(together["epochs"])) > 1  # else the case shows nothing


def test_one_networks_nan_never_touches_another(tmp_path):
    """Oracle: the same run without the broken network."""
    rows = encode(SMALL[2:3] * 3)
    def spoil(weights):
        weights["edges"][1] = math.nan
    best, found = train(tmp_path / "a", rows, [1, 2, 3], spoil)
    assert found["failed"] == [False, True, False] and found["epochs"][1] == 1
    kept, expected = train(tmp_path / "b", rows[:2], [1, 3])
    for i, j in ((0, 0), (2, 1)):
        assert found["best_loss"][i] == pytest.approx(expected["best_loss"][j], abs=1e-7)
        assert (best["edges"][i] - kept["edges"][j]).abs().max() < 1e-9


def test_a_failure_in_the_middle_keeps_the_best(tmp_path, monkeypatch):
    """A loss that turns NaN after two good epochs: the network stops with its best weights, which are finite."""
    real, calls = menas.network, []
    def breaks(*args, **kwargs):
        losses, state = real(*args, **kwargs)
        calls.append(1)
        return (losses * math.nan if len(calls) > 40 else losses), state
    monkeypatch.setattr(menas, "network", breaks)
    best, found = train(tmp_path / "a", encode(SMALL[:1]), [1], epochs=20)
    assert found["failed"] == [True] and found["best_epoch"][0] >= 1
    assert all(torch.isfinite(w).all() for w in best.values())


def naive_loss(weights, rows, tokens):
    """One stream, one segment: nothing to get wrong."""
    state = torch.zeros(1, 1, weights["edges"].shape[-2], dtype=torch.float64)
    batch = Batch(tokens[:-1, None], tokens[1:, None], state, {})
    with torch.no_grad():
        return network(weights, rows, batch, torch.float64)[0]


@pytest.mark.parametrize("length", [2, 71, 150, 301])
def test_evaluation_of_one_stream_is_exact(length):
    rows = encode([CELLS["enas"], CELLS["darts_v2"]])
    weights = float64(standalone_weights(Config(hidden=6, init=.5), WORDS, rows, [1, 2]))
    tokens = small_corpus().train[:length]
    found = evaluate(weights, rows, tokens, batch=1, bptt=20, dtype=torch.float64)
    assert (found - naive_loss(weights, rows, tokens)).abs().max() < 1e-12


@pytest.mark.parametrize("batch", [2, 3, 4, 64])
def test_streams_hardly_move_the_perplexity(batch):
    """Oracle: one stream. 0.1 % is the promise, for cells with recurrent weights large enough to remember."""
    rows = encode([CELLS["enas"], CELLS["chain"], CELLS["darts_v2"]])
    weights = float64(standalone_weights(Config(hidden=6, init=.7), WORDS, rows, [1, 2, 3]))
    tokens = small_corpus(3000).train
    one = evaluate(weights, rows, tokens, batch=1, dtype=torch.float64).exp()
    many = evaluate(weights, rows, tokens, batch=batch, dtype=torch.float64).exp()
    assert ((many - one) / one).abs().max() < 1e-3


def test_every_target_counts_once():
    """Oracle: a model that gives word w the constant log-probability of the decoder's bias, so the loss is a count."""
    rows = encode([CELLS["darts_v1"]])
    weights = float64(standalone_weights(Config(hidden=6), WORDS, rows, [1]))
    weights["embedding"].zero_()
    weights["bias"][0] = torch.linspace(-3, 3, WORDS)
    tokens = small_corpus(777).train
    expected = -torch.log_softmax(weights["bias"][0], 0)[tokens[1:]].mean()
    for batch in (1, 5, 64):
        assert abs(evaluate(weights, rows, tokens, batch=batch, dtype=torch.float64)[0] - expected) < 1e-12


def test_sgd_step_is_torchs_clip_and_sgd():
    """Oracle: torch.nn.utils.clip_grad_norm_ and torch.optim.SGD with weight decay."""
    mine = float64(shared_weights(Config(hidden=6, nodes=3), WORDS))
    theirs = {name: w.clone().requires_grad_() for name, w in mine.items()}
    grads = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
             for name, w in mine.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=3.0, weight_decay=1e-3)
    for name, w in theirs.items():
        w.grad = grads[name].clone()
    torch.nn.utils.clip_grad_norm_(theirs.values(), 0.25)
    optimizer.step()
    sgd_step(mine, grads, torch.tensor([3.0], dtype=torch.float64), 0.25, 1e-3)
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-5) for name in mine)


def test_perplexity_of_a_broken_loss_is_infinite():
    assert perplexity(math.nan) == perplexity(math.inf) == perplexity(1e6) == math.inf
    assert perplexity(math.log(80)) == pytest.approx(80)


def test_a_network_may_have_a_seed_of_its_own(text, tmp_path):
    """'chain@5' is the network that --seed 5 trains, whatever is trained beside it."""
    run = lambda name, **more: menas.run_study("train", menas.study_train, menas.configure(
        "train", "smoke", data=str(text), hidden=8, epochs=1, out=str(tmp_path / name), **more))["metrics"]["networks"]
    several = run("several", cell="tree,chain@5,chain@7", seed=2)
    assert [(n["cell"], n["seed"]) for n in several] == [("tree", 2), ("chain", 5), ("chain", 7)]
    alone, = run("alone", cell="chain", seed=5)
    assert several[1]["test_perplexity"] == pytest.approx(alone["test_perplexity"], rel=1e-3)
    assert several[1]["test_perplexity"] != several[2]["test_perplexity"]
