"""K architectures at once equal one naive network after the other, values and gradients, and
torch's own LSTM. Run: pytest tests/test_network.py"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck

import menas
from menas import CELLS, INPUT, Batch, Cell, Config, Node, encode, network, unroll
from mutants import mutate
from reference import (DROPOUT, EVERY_OPERATION, HIDDEN, NODES, STREAMS, WORDS, derivatives,
                       distance, naive_network, random_cell, setting)

F64 = torch.float64


def doubles(seed, *shapes):
    """Random tensors in float64 with gradients."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=F64).requires_grad_() for shape in shapes]


def plain_batch(hidden=HIDDEN, steps=5):
    """Some text, a state of 0, no masks."""
    tokens = torch.arange(steps * STREAMS).view(steps, STREAMS) ** 2 % WORDS
    return Batch(tokens, tokens.flip(0), torch.zeros(2, 1, STREAMS, hidden, dtype=F64), {})


def in_double(weights):
    return {name: w.double().requires_grad_() for name, w in weights.items()}


# Against the naive network

@pytest.mark.parametrize("kind", ["enas", "gated", "narrow"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("masked, size", [(True, 1.0), (False, 40.0)])
def test_the_network_is_the_naive_one(kind, shared, k, masked, size):
    """Losses, states, and gradients of every weight and of the state; large states are bounded."""
    for seed in range(2):
        weights, cells, batch = setting(kind, shared, k, seed, masked=masked, size=size)
        losses, states = network(weights, encode(cells), batch, F64)
        naive = [naive_network(weights, cell, batch, i) for i, cell in enumerate(cells)]
        wanted = torch.stack([loss for loss, _ in naive])
        wanted_states = torch.stack([state for _, state in naive], 1)
        assert distance([losses, states], [wanted, wanted_states]) < 1e-10
        found = derivatives(losses, weights, batch)
        assert distance(found, derivatives(wanted, weights, batch)) < 1e-10


def both_recurrences(size, k=4):
    """[h, its derivatives] of FastRecurrence and of the plain one."""
    weights, _, batch = setting("enas", True, k, steps=6, size=size)
    rows = encode([random_cell(seed, False) for seed in range(k)])
    results = []
    for recurrence in (menas.fast_recurrence, menas.plain_recurrence):
        h, _ = unroll(weights, rows, batch, F64, recurrence)
        results.append([h, *derivatives(h, weights, batch)])
    return results


@pytest.mark.parametrize("k", [1, 4])
def test_the_fast_recurrence_is_the_plain_one(k):
    """Values and gradients with masks, within the bound of 25 and at it."""
    for size in (1.0, 40.0):
        fast, plain = both_recurrences(size, k)
        assert distance(fast, plain) < 1e-10
        longest = plain[0].norm(dim=-1).max().item()
        assert longest == pytest.approx(25) if size > 1 else longest < 25


@pytest.mark.parametrize("function, right, wrong", [
    ("local_derivatives", "y.sub_(p)", "y"), ("local_derivatives", ".add_(constant)", ""),
    ("local_derivatives", "torch.sub(1, c, out=keep)", "keep.copy_(c)"),
    ("bound_backward", "value=-1", "value=0"), ("FastRecurrence", "dp.mul_(mask)", "pass"),
    ("FastRecurrence", "read_by(i) * mask[:, None]", "read_by(i)"),
    ("FastRecurrence", "dh.copy_(values[0])", "pass")])
def test_a_wrong_backward_is_found(monkeypatch, function, right, wrong):
    """Mutants: no -p in the gate's; no constant in act'; c for 1 - c; the bound's factor constant,
    as in ENAS-pytorch; masks dropped from dp, from dW; no gradient through time."""
    mutate(monkeypatch, function, (right, wrong))
    assert distance(*both_recurrences(40.0)) > 1e-4


def slope_error(run, *inputs, eps=1e-6):
    """Of autograd's slope of run along a random direction, against finite differences."""
    directions = doubles(8, *(x.shape for x in inputs))
    out = run(*inputs)
    factors = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    slopes = grad((out * factors).sum(), inputs)
    ahead = run(*(x + eps * d for x, d in zip(inputs, directions)))
    back = run(*(x - eps * d for x, d in zip(inputs, directions)))
    slope = sum((g * d).sum() for g, d in zip(slopes, directions))
    return (slope - ((ahead - back) * factors).sum() / (2 * eps)).abs().item()


def small_cells(gated):
    return menas.parse(encode([random_cell(seed, gated, 3) for seed in (6, 9)], 3))


@pytest.mark.parametrize("size", [1.0, 20.0])
def test_the_fast_recurrence_has_the_slope_of_finite_differences(size):
    """By weights, input and state; of size 20 it is bounded."""
    mask = torch.tensor([1.0, 0.0, 1.25], dtype=F64).expand(2, 2, 3)

    def run(w, xw, h):
        return menas.fast_recurrence(small_cells(False), w, xw, size * h, None, mask)[0]
    assert slope_error(run, *doubles(1, (3, 2, 3, 6), (2, 1, 2, 2, 6), (2, 2, 3))) < 1e-6


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [0.0, 1.0, 20.0])
def test_the_plain_recurrence_is_differentiable_twice(gated, size):
    """Oracle: finite differences of its gradients; from a state of 0, too, and without a memory."""
    w, xw, h = doubles(1, (3, 2, 3, 6), (2, 3, 3, 1, 6), (2, 1, 3))
    memory = torch.zeros(2, 1, 3, dtype=F64)

    def gradient(*inputs):
        w, xw, h = inputs
        states, _ = menas.plain_recurrence(small_cells(gated), w, xw, size * h, memory)
        first = grad(states.square().sum(), inputs, create_graph=True)
        return torch.cat([g.flatten() for g in first])
    assert slope_error(gradient, w, xw, h) < 1e-4


def test_two_passes_alive_at_once():
    """Oracle: each alone. Whatever stands in buffers that are used again does not matter."""
    settings = [setting("enas", False, 5, 0)]
    shape = settings[0][0]["nodes"].shape
    settings.append(next(x for x in (setting("enas", False, 5, seed) for seed in range(1, 99))
                         if x[0]["nodes"].shape == shape))
    alone = [derivatives(network(w, encode(cells), b, F64)[0], w, b) for w, cells, b in settings]
    for buffer in menas.FREE:
        buffer.fill_(math.nan)
    losses = [network(w, encode(cells), b, F64)[0] for w, cells, b in settings]
    with torch.no_grad():
        network(settings[0][0], encode(settings[0][1]), settings[0][2], F64)
    together = [derivatives(loss, w, b) for loss, (w, _, b) in zip(losses, settings)]
    assert all(distance(a, b) == 0 for a, b in zip(alone, together))


def test_a_second_backward_is_refused():
    """The first one uses its buffers up: the second would be silently wrong."""
    weights, cells, batch = setting("enas", True, 2)
    h, _ = unroll(weights, encode(cells), batch, F64)
    h.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        h.sum().backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, .05)])
def test_low_precision_is_near(dtype, tolerance):
    """Oracle: float64; the losses, and the direction of the gradient."""
    weights, cells, batch = setting("enas", True, 4, steps=8, masked=False)
    exact, _ = network(weights, encode(cells), batch, F64)
    low = {name: w.detach().float().requires_grad_() for name, w in weights.items()}
    batch = batch._replace(state=batch.state.detach().float())
    losses, _ = network(low, encode(cells), batch, dtype)
    assert distance([losses], [exact]) < tolerance
    slope = grad(losses.sum(), low["edges"])[0].double().flatten()
    exact_slope = grad(exact.sum(), weights["edges"])[0].flatten()
    assert torch.cosine_similarity(slope, exact_slope, 0) > 1 - tolerance


# The loss

def softmax_distance(rows=11, words=6, chunk=4):
    """From F.cross_entropy: two losses and the gradients of their difference, with ignored rows."""
    h, decoder, bias = doubles(rows, (2, rows, 3), (2, words, 3), (2, words))
    targets = torch.arange(rows) % words
    targets[::2] = -1
    factors = torch.tensor([2.0, -3.0], dtype=F64)
    mine = menas.SoftmaxLoss.apply(True, h, decoder, bias, targets, chunk)
    logits = h @ decoder.transpose(1, 2) + bias[:, None]
    wanted = torch.stack([F.cross_entropy(x, targets, ignore_index=-1) for x in logits])
    both = [[x, *grad(x @ factors, (h, decoder, bias))] for x in (mine, wanted)]
    return distance(*both)


@pytest.mark.parametrize("rows, words, chunk", [(11, 6, 4), (12, 6, 4), (1200, 50, 512)])
def test_softmax_loss_is_torchs_cross_entropy(rows, words, chunk):
    assert softmax_distance(rows, words, chunk) < 1e-12


@pytest.mark.parametrize("right, wrong", [
    ("full_like(y, -1,", "full_like(y, 1,"), (".mul_(part)", ""), ("dh * grad.to(dh.dtype)", "dh"),
    ("targets >= 0", "targets > -9")])
def test_a_wrong_softmax_loss_is_found(monkeypatch, right, wrong):
    """Mutants: the target's sign; rows not weighed; not scaled; a mean over ignored rows, too."""
    mutate(monkeypatch, "SoftmaxLoss", (right, wrong))
    assert softmax_distance() > 1e-3


def test_gradcheck_of_the_softmax_loss_and_bfloat16_is_near():
    """Oracle: finite differences of all inputs; then float64."""
    inputs = doubles(1, (2, 7, 4), (2, 5, 4), (2, 5))
    targets = torch.tensor([0, 3, -1, 2, 1, 1, 0])

    def run(*inputs):
        return menas.SoftmaxLoss.apply(True, *inputs, targets, 2)
    assert gradcheck(run, inputs)
    h, decoder, bias = (x.detach().float().requires_grad_() for x in inputs)
    near, exact = run(h.bfloat16(), decoder, bias), run(*inputs)
    assert near.dtype == torch.float32
    slopes = [grad(x.sum(), some) for x, some in ((near, (h, decoder, bias)), (exact, inputs))]
    assert distance([near, *slopes[0]], [exact, *slopes[1]]) < .03


# LSTMs: the oracle is torch.nn.LSTM

def quarters(lstm_cell, order=(1, 0, 1, 3), halves=(0, 0, 1, 0)):
    """A cell's weights [nodes, H, 2H] as torch's [4H, H]: input, forget, candidate, output gate."""
    return torch.cat([lstm_cell[i].chunk(2, -1)[half].T for i, half in zip(order, halves)])


def test_the_lstm_of_four_nodes_is_torchs():
    """Outputs, both states, and the gradient of each weight."""
    cells, config = [CELLS["lstm_cell"]], Config(hidden=HIDDEN)
    weights = in_double(menas.standalone_weights(config, WORDS, cells, [1]))
    lstm = torch.nn.LSTM(HIDDEN, HIDDEN, bias=False).double()
    ours = [weights["inputs"], weights["nodes"]]
    theirs = [lstm.weight_ih_l0, lstm.weight_hh_l0]
    with torch.no_grad():
        for parameter, w in zip(theirs, ours):
            parameter.copy_(quarters(w[0]))
    batch = plain_batch(steps=9)._replace(state=doubles(1, (2, 1, STREAMS, HIDDEN))[0])
    out, state = unroll(weights, encode(cells), batch, F64)
    wanted, (h, c) = lstm(weights["embedding"][0][batch.inputs], tuple(batch.state.contiguous()))
    assert distance([out[0], state], [wanted, torch.stack([h, c])]) < 1e-12
    more = [weights["embedding"], batch.state]
    a = grad((out[0] * wanted.detach()).sum(), ours + more)
    b = grad((wanted * wanted.detach()).sum(), theirs + more)
    assert distance([*map(quarters, (a[0][0], a[1][0])), *a[2:]], b) < 1e-12


@pytest.mark.parametrize("units", [HIDDEN, 3])
def test_unroll_lstm_is_torchs(units):
    """K networks with masks, projected if of other units: losses, states, and all gradients."""
    config = Config(hidden=HIDDEN, **DROPOUT)
    weights = in_double(menas.lstm_weights(config, WORDS, units, [3, 4]))
    masks = menas.draw_masks(config, WORDS, STREAMS, [3, 4], 0)
    batch = plain_batch()._replace(state=doubles(1, (2, 2, STREAMS, units))[0], masks=masks)
    losses, state = network(weights, None, batch, F64)
    wanted, states = [], []
    for k in range(2):
        own = {name: w[k] for name, w in weights.items()}
        lstm = torch.nn.LSTM(HIDDEN, units).double()
        parameters = {name: own[name.removesuffix("_l0")] for name, _ in lstm.named_parameters()}
        x = own["embedding"][batch.inputs] * masks["word"][k][batch.inputs][..., None]
        inputs = x * masks["input"][k], tuple(batch.state[:, k:k + 1])
        out, last = torch.func.functional_call(lstm, parameters, inputs)
        out = out @ own["project"] if units != HIDDEN else out
        logits = (out * masks["output"][k]) @ own["embedding"].T + own["bias"]
        wanted.append(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
        states.append(torch.cat(last))
    assert distance([losses, state], [torch.stack(wanted), torch.stack(states, 1)]) < 1e-12
    assert distance(*(grad(sum(x), list(weights.values())) for x in (losses, wanted))) < 1e-12


# One among others

@pytest.mark.parametrize("kind", ["enas", "gated", "narrow"])
def test_each_of_a_batch_is_as_if_alone_and_padding_changes_nothing(kind):
    """Oracle: a batch of one, of fewer nodes; under shared and under inherited and own weights."""
    weights, cells, batch = setting(kind, True, 5)
    rows = encode(cells, NODES)
    together, _ = network(weights, rows, batch, F64)
    inherited, _ = network(menas.inherit(weights, rows), rows, batch, F64)
    assert distance([inherited], [together]) < 1e-12
    config, plain = Config(hidden=HIDDEN, nodes=NODES), plain_batch()
    own = in_double(menas.standalone_weights(config, WORDS, cells, range(5)))
    among, _ = network(own, encode(cells), plain, F64)
    for k, cell in enumerate(cells):
        one = batch._replace(state=batch.state[:, k:k + 1])
        assert distance([network(weights, encode([cell]), one, F64)[0][0]], [together[k]]) < 1e-12
        small = in_double(menas.standalone_weights(config, WORDS, [cell], [k]))
        assert distance([network(small, encode([cell]), plain, F64)[0][0]], [among[k]]) < 1e-12


@pytest.mark.parametrize("name, operations", [
    ("darts_v1", "highway"), ("darts_v1", EVERY_OPERATION), ("lstm_cell", EVERY_OPERATION)])
def test_a_width_is_the_network_of_that_size(name, operations):
    """Oracle: the top-left blocks of the weights, as the weights of a network with fewer units."""
    d = 3
    config = Config(hidden=HIDDEN, nodes=9, operations=operations, widths=f"{d},{HIDDEN}")
    weights = in_double(menas.shared_weights(config, WORDS))
    small = {key: torch.cat([half[..., :d, :d] for half in w.chunk(2, -1)], -1)
             for key, w in weights.items() if key not in ("embedding", "bias")}
    small |= {"embedding": weights["embedding"][:, :d], "bias": weights["bias"]}
    rows = encode([CELLS[name]._replace(width=d), CELLS[name]])
    narrow, _ = network(weights, rows, plain_batch(), F64)
    wanted, _ = network(small, encode([CELLS[name]]), plain_batch(d), F64)
    assert distance([narrow[0]], [wanted[0]]) < 1e-12


@pytest.mark.parametrize("kind", ["enas", "gated"])
def test_a_broken_network_leaves_the_others_alone(kind):
    """Oracle: the same batch without the nan."""
    weights, cells, batch = setting(kind, False, 3, seed=1, masked=False)
    losses, gradients = [], []
    for value in (1.0, math.nan):
        changed = {key: w.detach().clone().requires_grad_() for key, w in weights.items()}
        changed["nodes"].data[1] *= value
        losses.append(network(changed, encode(cells), batch, F64)[0])
        gradients.append(grad(losses[-1].sum(), changed["nodes"])[0])
    assert losses[1].isnan().tolist() == [False, True, False]
    assert all(torch.equal(a[::2], b[::2]) for a, b in (losses, gradients))


# Draws

def test_dropout_masks_are_functions_of_seed_name_and_step():
    """One a segment, 0 or 1 / (1 - rate); the same when drawn alone, none for a rate of 0."""
    rates = dict(word_dropout=.2, input_dropout=.5, hidden_dropout=.5, output_dropout=0.0)
    masks, later, second = (menas.draw_masks(Config(hidden=50, **rates), 400, 8, seeds, step)
                            for seeds, step in (([1, 2], 3), ([1, 2], 4), ([2], 3)))
    shapes = {"word": (2, 400), "input": (2, 8, 50), "hidden": (2, 8, 50)}
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes
    for name, mask in masks.items():
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - rates[f"{name}_dropout"])])
        assert mask.mean().item() == pytest.approx(1, abs=.2)
        assert torch.equal(second[name][0], mask[1])
        assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask, later[name])
    assert not torch.equal(masks["input"], masks["hidden"])


@pytest.mark.parametrize("width, units", [(0, 32), (4, 4)])
def test_initial_weights_keep_the_variance(width, units):
    """Uniform in +- sqrt(3 / units), so of variance 1 / units, for the units that a network has."""
    cell = Cell((Node(INPUT), Node(1)), width=width)
    drawn = menas.standalone_weights(Config(hidden=32), WORDS, [cell], [1])["nodes"]
    assert drawn.var().item() == pytest.approx(1 / units, rel=.1)
    assert drawn.abs().max() <= math.sqrt(3 / units)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["enas", "gated"])
@pytest.mark.parametrize("k", [1, 3])
def test_cuda_equals_the_cpu(kind, k):
    """Losses and all gradients in float64."""
    weights, cells, batch = setting(kind, True, k)
    masks = {name: mask.cuda() for name, mask in batch.masks.items()}
    there = Batch(batch.inputs.cuda(), batch.targets.cuda(), batch.state.cuda(), masks)
    moved = {name: w.cuda() for name, w in weights.items()}
    results = [network(moved, encode(cells).cuda(), there, F64)[0].cpu(),
               network(weights, encode(cells), batch, F64)[0]]
    assert distance(*([x, *derivatives(x, weights, batch)] for x in results)) < 1e-9
