"""K architectures at once equal one naive network after the other, values and gradients, and
torch's own LSTM. Run: pytest tests/test_network.py"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import menas
from menas import (CELLS, INPUT, Batch, Cell, Config, Node, encode, fast_recurrence, network,
                   plain_recurrence)
from mutants import mutate
from reference import (DROPOUT, EVERY_OPERATION, F64, HIDDEN, NODES, STREAMS, WORDS, derivatives,
                       distance, doubles, in_double, naive_network, random_cell, setting)


def plain_batch(hidden=HIDDEN):
    """Some text, a state of 0, no masks."""
    tokens = torch.arange(10).view(5, STREAMS) ** 2 % WORDS
    return Batch(tokens, tokens.flip(0), torch.zeros(2, 1, STREAMS, hidden, dtype=F64), {})


# Against the naive network

def miss(kind, shared, k, recurrence=None, **how):
    """By how much losses, states and gradients differ from those of the naive network."""
    weights, cells, batch = setting(kind, shared, k, **how)
    losses, states = network(weights, encode(cells), batch, F64, recurrence)
    naive = [naive_network(weights, cell, batch, i) for i, cell in enumerate(cells)]
    wanted = torch.stack([loss for loss, _ in naive])
    wanted_states = torch.stack([state for _, state in naive], 1)
    slopes = derivatives(losses, weights, batch)
    wanted_slopes = derivatives(wanted, weights, batch)
    return distance([losses, states, *slopes], [wanted, wanted_states, *wanted_slopes])


@pytest.mark.parametrize("kind, recurrence", [
    ("enas", fast_recurrence), ("enas", plain_recurrence), ("gated", None), ("narrow", None)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("masked, size", [(True, 1.0), (False, 40.0)])
def test_the_network_is_the_naive_one(kind, recurrence, shared, k, masked, size):
    """Oracle: reference.py. Gradients of every weight and the state; large states are bounded."""
    for seed in range(2):
        assert miss(kind, shared, k, recurrence, seed=seed, masked=masked, size=size) < 1e-10


@pytest.mark.parametrize("k", [1, 5])
def test_it_is_the_naive_one_also_where_all_options_are_computed(k, monkeypatch):
    """As on a GPU, which does not wait to hear which of them are taken."""
    mutate(monkeypatch, "chosen", ("which.device.type == 'cpu'", "False"))
    for kind in ("enas", "gated", "narrow"):
        assert miss(kind, True, k, plain_recurrence, seed=1, masked=True) < 1e-10


@pytest.mark.parametrize("function, right, wrong", [
    ("local_derivatives", "y.sub_(p)", "y"),                         # no -p in the gate's
    ("local_derivatives", ".add_(offset)", ""),                    # no constant in act'
    ("local_derivatives", "torch.sub(1, gate, out=keep)", "keep.copy_(gate)"),
    ("bound_backward", "value=-1", "value=0"),                       # as in ENAS-pytorch
    ("FastRecurrence", "dp.mul_(mask)", "pass"),
    ("FastRecurrence", "read_by(i) * mask[:, None]", "read_by(i)"),  # no mask in dW
    ("FastRecurrence", "dh.copy_(values[0])", "pass"),               # not through time
])
def test_a_wrong_backward_is_found(monkeypatch, function, right, wrong):
    """Mutants of the hand-written one: the naive network's gradient refuses each."""
    mutate(monkeypatch, function, (right, wrong))
    assert miss("enas", True, 4, seed=1, size=40.0) > 1e-4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [0.0, 1.0, 20.0])
def test_the_plain_recurrence_is_differentiable_twice(gated, size):
    """Oracle: finite differences of its gradients, along a line; from a state of 0, too, and at its
    bound."""
    inputs = doubles(1, (3, 2, 3, 6), (2, 3, 3, 1, 6), (2, 1, 3))
    directions = doubles(2, *(x.shape for x in inputs))
    cells = menas.parse(encode([random_cell(seed, gated, 3) for seed in (6, 9)], 3))
    memory = torch.zeros(2, 1, 3, dtype=F64)

    def slope(far):
        """Of the states' squares, along the directions, so far along them."""
        w, xw, h = (x + far * d for x, d in zip(inputs, directions))
        states, _ = plain_recurrence(cells, w, xw, size * h, memory)
        first = grad(states.square().sum(), (w, xw, h), create_graph=True)
        return sum((g * d).sum() for g, d in zip(first, directions))
    at = torch.zeros((), dtype=F64, requires_grad=True)
    curvature, = grad(slope(at), at)
    assert ((slope(1e-6) - slope(-1e-6)) / 2e-6 - curvature).abs() < 1e-4


def test_two_passes_alive_at_once():
    """Oracle: each alone. Whatever stands in buffers that are used again does not matter."""
    settings = [setting("enas", True, 3, seed) for seed in (1, 2)]

    def loss(weights, cells, batch):
        return network(weights, encode(cells, NODES), batch, F64)[0]
    alone = [derivatives(loss(*one), one[0], one[2]) for one in settings]
    for buffer in menas.FREE:
        buffer.fill_(math.nan)
    losses = [loss(*one) for one in settings]
    with torch.no_grad():
        loss(*settings[0])
    for one, x, wanted in zip(settings, losses, alone):
        assert distance(derivatives(x, one[0], one[2]), wanted) == 0


@pytest.mark.parametrize("kind, function", [("enas", menas.unroll), ("gated", network)])
def test_a_second_backward_is_refused(kind, function):
    """The first one uses its buffers up, in the fast path or in the loss: the second would be
    silently wrong."""
    weights, cells, batch = setting(kind, True, 2)
    found, _ = function(weights, encode(cells), batch, F64)
    found.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        found.sum().backward()


@pytest.mark.parametrize("kind, shared", [("enas", True), ("gated", False)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, .05)])
def test_low_precision_is_near(kind, shared, dtype, tolerance):
    """Oracle: float64; the losses, and the direction of each weight's gradient."""
    weights, cells, batch = setting(kind, shared, 4, steps=8, masked=False)
    exact, _ = network(weights, encode(cells), batch, F64)
    low = {name: w.detach().float().requires_grad_() for name, w in weights.items()}
    batch = batch._replace(state=batch.state.detach().float())
    losses, _ = network(low, encode(cells), batch, dtype)
    assert losses.dtype == torch.float32
    assert distance([losses], [exact]) < tolerance
    right = menas.gradients(exact.sum(), weights)
    for name, g in menas.gradients(losses.sum(), low).items():
        assert F.cosine_similarity(g.double().flatten(), right[name].flatten(), 0) > 1 - tolerance


# The loss

def softmax_miss(rows=11, chunk=4):
    """From F.cross_entropy: two losses and the gradients of their difference, with ignored rows."""
    h, decoder, bias = doubles(rows, (2, rows, 3), (2, 6, 3), (2, 6))
    targets = torch.arange(rows) % 6
    targets[::2] = -1
    factors = torch.tensor([2.0, -3.0], dtype=F64)
    mine = menas.SoftmaxLoss.apply(True, h, decoder, bias, targets, chunk)
    logits = h @ decoder.transpose(1, 2) + bias[:, None]
    wanted = torch.stack([F.cross_entropy(x, targets, ignore_index=-1) for x in logits])
    both = [[x, *grad(x @ factors, (h, decoder, bias))] for x in (mine, wanted)]
    return distance(*both)


@pytest.mark.parametrize("rows, chunk", [(11, 4), (12, 4), (1200, 512)])
def test_softmax_loss_is_torchs_cross_entropy(rows, chunk):
    """Values and gradients; the last chunk shorter, full, and of a real size."""
    assert softmax_miss(rows, chunk) < 1e-12


@pytest.mark.parametrize("right, wrong", [
    ("full_like(y, -1,", "full_like(y, 1,"),      # the target's sign
    (".mul_(part)", ""),                          # rows are not weighed
    ("dh.mul_(grad.to(dh.dtype))", "dh"),             # not scaled
    ("targets >= 0", "targets > -9"),             # a mean over ignored rows, too
])
def test_a_wrong_softmax_loss_is_found(monkeypatch, right, wrong):
    """Mutants: torch's gradient refuses each."""
    mutate(monkeypatch, "SoftmaxLoss", (right, wrong))
    assert softmax_miss() > 1e-3


# LSTMs: the oracle is torch.nn.LSTM

def torchs_lstm(units, parameters, x, state):
    """Outputs and the last state, given torch's parameters by name, without biases if there are
    none."""
    lstm = torch.nn.LSTM(x.shape[-1], units, bias="bias_ih_l0" in parameters).double()
    start = tuple(s[None].contiguous() for s in state)
    out, last = torch.func.functional_call(lstm, parameters, (x, start))
    return out, torch.cat(last)


def quarters(w):
    """A cell's weights [nodes, H, 2H] as torch's [4H, H]: input, forget, candidate, output gate."""
    halves = [w[1][:, :HIDDEN], w[0][:, :HIDDEN], w[1][:, HIDDEN:], w[3][:, :HIDDEN]]
    return torch.cat([half.T for half in halves])


def test_the_lstm_of_four_nodes_is_torchs():
    """Outputs, both states, and the gradient of each weight."""
    cells = [CELLS["lstm_cell"]]
    weights = in_double(menas.standalone_weights(Config(hidden=HIDDEN), WORDS, cells, [1]))
    batch = plain_batch()._replace(state=doubles(1, (2, 1, STREAMS, HIDDEN))[0])
    out, state = menas.unroll(weights, encode(cells), batch, F64)
    parameters = {
        "weight_ih_l0": quarters(weights["inputs"][0]),
        "weight_hh_l0": quarters(weights["nodes"][0]),
    }
    x = weights["embedding"][0][batch.inputs]
    wanted, last = torchs_lstm(HIDDEN, parameters, x, batch.state[:, 0])
    slopes, wanted_slopes = (derivatives(o, weights, batch) for o in (out, wanted[None]))
    assert distance([out[0], state[:, 0], *slopes], [wanted, last, *wanted_slopes]) < 1e-12


@pytest.mark.parametrize("units", [HIDDEN, 3])
def test_k_lstms_are_torchs(units):
    """With masks, projected if of other units: losses, states, the gradient of each weight, and the
    number of them that is recorded."""
    config = Config(hidden=HIDDEN, **DROPOUT)
    weights = in_double(menas.lstm_weights(config, WORDS, units, [3, 4]))
    sizes = {name: w[0].numel() for name, w in weights.items()}
    sizes_of_text = sizes["embedding"] + sizes["bias"]
    assert menas.lstm_parameters(config, units) == sum(sizes.values()) - sizes_of_text
    masks = menas.draw_masks(config, WORDS, STREAMS, [3, 4], 0)
    state = doubles(1, (2, 2, STREAMS, units))[0]
    batch = plain_batch()._replace(state=state, masks=masks)
    found = network(weights, None, batch, F64)
    wanted = []
    for k in range(2):
        own = {name: w[k] for name, w in weights.items()}
        parameters = {f"{name}_l0": w for name, w in own.items() if name[:4] in ("weig", "bias")}
        bias = parameters.pop("bias_l0")
        x = own["embedding"][batch.inputs] * masks["word"][k][batch.inputs][..., None]
        out, last = torchs_lstm(units, parameters, x * masks["input"][k], state[:, k])
        out = out @ own.get("project", torch.eye(units, dtype=F64)) * masks["output"][k]
        logits = out @ own["embedding"].T + bias
        wanted.append((F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), last))
    losses, last = (torch.stack(x) for x in zip(*wanted))
    assert distance(found, [losses, last.transpose(0, 1)]) < 1e-12
    slopes = [derivatives(x, weights, batch) for x in (found[0], losses)]
    assert distance(*slopes) < 1e-12


# One among others

@pytest.mark.parametrize("kind", ["enas", "gated"])
def test_inherited_weights_are_the_shared_ones(kind):
    """Oracle: the supernet itself."""
    weights, cells, batch = setting(kind, True, 5)
    rows = encode(cells, NODES)
    own = menas.inherit(weights, rows)
    assert distance(network(own, rows, batch, F64), network(weights, rows, batch, F64)) < 1e-12


@pytest.mark.parametrize("name, operations", [
    ("darts_v1", "highway"), ("darts_v1", EVERY_OPERATION), ("lstm_cell", EVERY_OPERATION)])
def test_a_width_is_the_network_of_that_size(name, operations):
    """Oracle: the top-left blocks of the weights, as the weights of a network with fewer units."""
    config = Config(hidden=HIDDEN, nodes=9, operations=operations, widths=f"3,{HIDDEN}")
    weights = in_double(menas.shared_weights(config, WORDS))
    small = {"embedding": weights["embedding"][:, :3], "bias": weights["bias"]}
    for key in weights.keys() - small.keys():
        halves = weights[key].chunk(2, -1)
        small[key] = torch.cat([half[..., :3, :3] for half in halves], -1)
    cells = [CELLS[name]._replace(width=3), CELLS[name]]
    narrow, _ = network(weights, encode(cells), plain_batch(), F64)
    wanted, _ = network(small, encode(cells[1:]), plain_batch(3), F64)
    assert distance([narrow[0]], [wanted[0]]) < 1e-12


# Draws

def test_dropout_masks_are_functions_of_seed_name_and_step():
    """One a segment, 0 or 1 / (1 - rate); the same when drawn alone, none for a rate of 0."""
    rates = dict(word_dropout=.2, input_dropout=.5, hidden_dropout=.5, output_dropout=0.0)
    config = Config(hidden=50, **rates)
    masks = menas.draw_masks(config, 400, 8, [1, 2], 3)
    later = menas.draw_masks(config, 400, 8, [1, 2], 4)
    second = menas.draw_masks(config, 400, 8, [2], 3)
    shapes = {"word": (2, 400), "input": (2, 8, 50), "hidden": (2, 8, 50)}
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes
    for name, mask in masks.items():
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - rates[f"{name}_dropout"])])
        assert mask.mean().item() == pytest.approx(1, abs=.2)
        assert torch.equal(second[name][0], mask[1])
        assert not torch.equal(mask[0], mask[1])
        assert not torch.equal(mask, later[name])
    assert not torch.equal(masks["input"], masks["hidden"])


@pytest.mark.parametrize("width, units", [(0, 32), (4, 4)])
def test_initial_weights_keep_the_variance(width, units):
    """Uniform in +- sqrt(3 / units), so of variance 1 / units, for the units that a network has."""
    cell = Cell((Node(INPUT), Node(1)), width=width)
    drawn = menas.standalone_weights(Config(hidden=32), WORDS, [cell], [1])["nodes"]
    assert drawn.var().item() == pytest.approx(1 / units, rel=.1)
    assert drawn.abs().max() <= math.sqrt(3 / units)
