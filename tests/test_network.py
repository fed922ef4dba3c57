"""The batched recurrence equals the plain reference, values and gradients. Run: pytest tests/test_network.py"""
import random

import pytest
import torch

from menas import (ACTIVATIONS, OUTPUTS, Batch, Cell, Config, CrossEntropy, Node, Recurrence, Workspace,
                   coefficient_table, draw_masks, encode, inherit, lstm_weights, network, reference_losses,
                   shared_weights, standalone_weights, structure)

WORDS, HIDDEN, STREAMS, NODES = 11, 6, 3, 5
DROPOUT = Config(hidden=HIDDEN, nodes=NODES, init=.6, word_dropout=.2, input_dropout=.3, hidden_dropout=.3,
                 output_dropout=.3)


def random_cells(k, seed, nodes=NODES):
    """Cells of mixed sizes, activations and outputs."""
    draw = random.Random(seed)
    node = lambda i: Node(draw.randint(1, i) if i else 0, draw.choice(list(ACTIVATIONS)))
    return [Cell(tuple(node(i) for i in range(draw.randint(1, nodes))), draw.choice(OUTPUTS)) for _ in range(k)]


def setting(k, shared, steps, seed=0, dropout=True, size=1.0):
    """Weights that require gradients, rows, and a batch, in float64."""
    draw = torch.Generator().manual_seed(seed)
    rows = encode(random_cells(k, seed), NODES)
    weights = shared_weights(DROPOUT, WORDS) if shared else standalone_weights(DROPOUT, WORDS, rows, range(k))
    weights["bias"] = torch.randn(weights["bias"].shape, generator=draw)
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    tokens = torch.randint(WORDS, (2, steps, STREAMS), generator=draw)
    tokens[1, -1, 0] = -1
    masks = draw_masks(DROPOUT, WORDS, STREAMS, [1] if shared else range(k), seed) if dropout else {}
    state = (size * torch.randn(k, STREAMS, HIDDEN, generator=draw).double()).requires_grad_()
    return weights, rows, Batch(tokens[0], tokens[1], state, {name: m.double() for name, m in masks.items()})


def derivatives(losses, weights, batch, coefficients_):
    inputs = [*weights.values(), batch.state]
    return torch.autograd.grad((losses * coefficients_).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("steps,dropout,size", [(1, True, 1.0), (5, True, 1.0), (9, False, 1.0), (4, True, 40.0)])
def test_batched_equals_reference(k, shared, steps, dropout, size):
    """Oracle: the plain loop, one architecture after the other; a large state reaches the bound on |h|."""
    for seed in range(3):
        weights, rows, batch = setting(k, shared, steps, seed, dropout, size)
        factors = torch.linspace(-1, 2, k, dtype=torch.float64)
        losses, state = network(weights, rows, batch, torch.float64)
        expected, states = zip(*(reference_losses(weights, rows[i], batch, i) for i in range(k)))
        assert (losses - torch.stack(expected)).abs().max() < 1e-10
        assert (state - torch.stack([s[-1] for s in states])).abs().max() < 1e-10
        fast = derivatives(losses, weights, batch, factors)
        plain = derivatives(torch.stack(expected), weights, batch, factors)
        for a, b in zip(fast, plain):
            assert (a - (torch.zeros_like(a) if b is None else b)).abs().max() < 1e-10


def test_gradcheck_of_the_recurrence():
    """Oracle: finite differences of every input of the hand-written backward, with the bound on |h| active."""
    weights, rows, batch = setting(3, True, 3, seed=4, size=20.0)
    cell = structure(rows)
    act = coefficient_table(torch.float64, rows.device)[cell.act][..., None, None].unbind(2)
    draw = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
    w, xw, mask = make(NODES, 3, HIDDEN, 2 * HIDDEN), make(1, 1, 3, STREAMS, 2 * HIDDEN), batch.masks["hidden"]
    run = lambda xw, h, w: Recurrence.apply(True, xw, h, h.detach(), w, mask, [0], cell, *act)[0]
    assert torch.autograd.gradcheck(run, (xw, batch.state.detach().requires_grad_(), w))


def test_gradcheck_of_the_cross_entropy():
    draw = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 3, -1, 2, 1, 1, 0])
    run = lambda h, decoder, bias: CrossEntropy.apply(True, h, decoder, bias, targets, 2, 4)
    assert torch.autograd.gradcheck(run, (make(2, 7, 4), make(2, 5, 4), make(2, 5)))


@pytest.mark.parametrize("words,rows", [(1500, 1200), (5000, 1200), (200, 6000), (10, 3)])
def test_chunks_and_blocks_of_the_cross_entropy(words, rows):
    """Oracle: torch's cross entropy; sizes at which chunks, blocks and the end of the rows do not coincide."""
    draw = torch.Generator().manual_seed(1)
    h, decoder, bias = (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
                        for shape in ((1, rows, 4), (1, words, 4), (1, words)))
    targets = torch.randint(words, (rows,), generator=draw)
    loss = torch.nn.functional.cross_entropy(h[0] @ decoder[0].t() + bias[0], targets)
    mine = CrossEntropy.apply(True, h, decoder, bias, targets)
    for a, b in zip(torch.autograd.grad(mine.sum(), (h, decoder, bias)), torch.autograd.grad(loss, (h, decoder, bias))):
        assert (a - b).abs().max() < 1e-12
    assert abs(mine.item() - loss.item()) < 1e-12


def test_two_forwards_before_either_backward():
    """Oracle: each alone. Buffers are reused, but never by two graphs that are alive at once."""
    settings = [setting(2, False, 4, seed) for seed in (0, 1)]
    alone = [derivatives(network(w, rows, b, torch.float64)[0], w, b, 1.0) for w, rows, b in settings]
    losses = [network(w, rows, b, torch.float64)[0] for w, rows, b in settings]
    with torch.no_grad():
        network(*settings[0], torch.float64)
    together = [derivatives(loss, w, b, 1.0) for loss, (w, rows, b) in zip(losses, settings)]
    assert all(torch.equal(a, b) for first, second in zip(alone, together) for a, b in zip(first, second))


def test_buffers_are_reused():
    Workspace.free.clear()
    weights, rows, batch = setting(2, False, 4)
    for _ in range(3):
        network(weights, rows, batch, torch.float64)[0].sum().backward()
    assert len(Workspace.free) == 3  # slots, gates, keep: not nine


def test_a_second_backward_is_the_first_again():
    """The first one used its buffers up; the second computes them anew."""
    weights, rows, batch = setting(2, True, 4)
    losses, _ = network(weights, rows, batch, torch.float64)
    first, second = (torch.autograd.grad(losses.sum(), weights["edges"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_scoring_without_a_graph_gives_the_same_losses():
    weights, rows, batch = setting(7, True, 6)
    with torch.no_grad():
        scored = network(weights, rows, batch, torch.float64)
    for a, b in zip(scored, network(weights, rows, batch, torch.float64)):
        assert (a - b).abs().max() < 1e-14


def test_inherited_weights_compute_what_the_shared_ones_do():
    weights, rows, batch = setting(7, True, 4)
    own = inherit({name: w.detach() for name, w in weights.items()}, rows)
    expected = network(weights, rows, batch, torch.float64)[0].detach()
    assert torch.equal(network(own, rows, batch, torch.float64)[0], expected)


def test_a_broken_network_leaves_the_others_alone():
    """Oracle: the same batch without the NaN."""
    weights, rows, batch = setting(3, False, 4, dropout=False)
    expected = network(weights, rows, batch, torch.float64)[0].detach()
    gradient = torch.autograd.grad(network(weights, rows, batch, torch.float64)[0].sum(), weights["edges"])[0]
    with torch.no_grad():
        weights["edges"][1] = float("nan")
    losses, _ = network(weights, rows, batch, torch.float64)
    assert losses.isnan().tolist() == [False, True, False]
    after = torch.autograd.grad(losses.sum(), weights["edges"])[0]
    for i in (0, 2):
        assert losses[i] == expected[i] and torch.equal(after[i], gradient[i])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_low_precision_is_near(dtype, tolerance):
    """Oracle: float64; losses and the direction of the gradient."""
    weights, rows, batch = setting(4, True, 8, dropout=False)
    exact = network(weights, rows, batch, torch.float64)[0]
    low = {name: w.detach().float().requires_grad_() for name, w in weights.items()}
    losses = network(low, rows, batch._replace(state=batch.state.detach().float()), dtype)[0]
    assert (losses - exact).abs().max() < tolerance
    gradient = lambda losses, weights: torch.autograd.grad(losses.sum(), weights["edges"])[0].double().flatten()
    a, b = gradient(losses, low), gradient(exact, weights)
    assert torch.cosine_similarity(a, b, 0) > 1 - tolerance


def test_lstm_is_torch_lstm():
    """Oracle: torch.nn.LSTM with the same weights, and the loss of torch's cross entropy."""
    config = Config(hidden=HIDDEN, lstm_hidden=8, init=.5)
    weights = lstm_weights(config, WORDS, [3, 4])
    tokens = torch.randint(WORDS, (5, STREAMS), generator=torch.Generator().manual_seed(0))
    losses, state = network(weights, None, Batch(tokens, tokens, torch.zeros(1, STREAMS, 16), {}))
    for i in range(2):
        lstm = torch.nn.LSTM(HIDDEN, 8)
        lstm.load_state_dict({name: w[i] for name, w in weights.items() if name.endswith("l0")})
        out, (h, c) = lstm(weights["embedding"][i][tokens])
        logits = out @ weights["project"][i] @ weights["embedding"][i].t()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        assert torch.allclose(losses[i], expected, atol=1e-6)
        assert torch.allclose(state[i], torch.cat([h[0], c[0]], -1), atol=1e-6)
