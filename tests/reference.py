"""What the tests of cells and networks share: the network of ONE architecture, written naively from
the equations of chapter 1, the oracle; random cells; settings to hold menas.py to it on; and all
rows of a search space."""
import random

import torch
import torch.nn.functional as F

import menas
from menas import ALL, GATE, GLU, HIGHWAY, INPUT, LEAVES, SUM, Batch, Cell, Config, Node

WORDS, HIDDEN, STREAMS, NODES = 7, 4, 2, 5
ACTIVATIONS = [torch.tanh, torch.relu, torch.sigmoid, lambda u: u]  # in the order of ENAS's arcs
DROPOUT = dict(
    word_dropout=.2,
    input_dropout=.3,
    hidden_dropout=.3,
    output_dropout=.3,
)
EVERY_OPERATION = "highway,glu,gate,sum"
F64 = torch.float64


# Cells and search spaces

def random_node(draw, i, memory):
    """Any node i of any space."""
    seconds = list(range(0 if memory else 1, i + 1))
    operation = draw.choice([HIGHWAY, GLU, GATE, SUM] if seconds else [HIGHWAY, GLU])
    node = Node(draw.randint(0, i), operation)
    if operation in (GATE, SUM) or operation == HIGHWAY and seconds and draw.random() < .5:
        node = node._replace(second=draw.choice(seconds))
    if operation != SUM:
        node = node._replace(activation=draw.randrange(4))
    return node


def random_cell(seed, gated=True, nodes=NODES, widths=(0,)):
    """A cell of up to so many nodes; gated ones use all that there is, others are ENAS's."""
    draw = random.Random(seed)
    count = draw.randint(1, nodes)
    output = draw.choice((LEAVES, ALL))
    if not gated:
        reads = [INPUT] + [draw.randint(1, i) for i in range(1, count)]
        return Cell(tuple(Node(read, activation=draw.randrange(4)) for read in reads), output)
    memory = draw.randint(0, count)
    made = tuple(random_node(draw, i, memory) for i in range(count))
    return Cell(made, output, memory, draw.choice(widths))


def every_row(decisions):
    """All rows of a space, one decision after the other; and of each its probability if every
    decision that matters is uniform over its choices."""
    paths = {(0,) * (1 + max(i for d in decisions for i in d.columns)): 1.0}
    for d in decisions:
        grown = {}
        for row, p in paths.items():
            matters = all(row[i] in values for i, values in d.when)
            choices = d.choices if matters else [0]
            for value in choices:
                new = tuple(value if i in d.columns else x for i, x in enumerate(row))
                grown[new] = p / len(choices)
        paths = grown
    return torch.tensor(list(paths)), torch.tensor(list(paths.values()))


# The network

def naive_leaves(cell):
    """The nodes that nobody reads; or, as in DARTS, all after node 0."""
    if cell.output == ALL:
        return list(range(1, len(cell.nodes))) or [0]
    slots = {slot for node in cell.nodes for slot in (node.read, node.second)}
    return [i for i in range(len(cell.nodes)) if i + 1 not in slots]


def naive_node(node, p, q, z):
    """One node [B, H] from what it reads, p and q, and z = [c, u]."""
    c, u = z.split(p.shape[1], 1)
    gate = torch.sigmoid(c)
    act = ACTIVATIONS[node.activation]
    if node.operation == SUM:
        return p + q
    if node.operation == GLU:
        return gate * act(u)
    if node.operation == GATE:
        return gate * act(q)
    return p + gate * (act(u) - p)


def bounded(state):
    """Each row of [B, H], no longer than 25."""
    return torch.stack([row * 25 / row.norm() if row.norm() > 25 else row for row in state])


def naive_step(mine, cell, x, h, m, live, mask):
    """h and m [B, H] after the word x [B, H]."""
    edges = [(slot, i) for i in range(len(cell.nodes)) for slot in range(i + 1)]
    slots = [h]
    for i, node in enumerate(cell.nodes):
        p = slots[node.read]
        q = slots[node.second] if node.second else m
        if node.operation == HIGHWAY and node.second:
            p = (p + q) / 2
        w = mine["edges"][edges.index((node.read, i))] if "edges" in mine else mine["nodes"][i]
        z = (live * mask * p) @ w
        if node.read == INPUT:
            z = z + x @ (mine["input"][i] if "input" in mine else mine["inputs"][i])
        slots.append(live * naive_node(node, p, q, z))
    output = [slots[i + 1] for i in naive_leaves(cell)]
    memory = slots[cell.memory] if cell.memory else torch.zeros_like(m)
    return bounded(sum(output) / len(output)), bounded(memory)


def naive_network(weights, cell, batch, k=0):
    """The k-th architecture's mean loss, and its h, m after the segment [2, B, H]."""
    mine = weights if "edges" in weights else {name: w[k] for name, w in weights.items()}
    masks = {name: mask[k % len(mask)] for name, mask in batch.masks.items()}
    table = mine["embedding"]
    live = (torch.arange(table.shape[1]) < (cell.width or table.shape[1])).double()
    h, m = batch.state[:, k % batch.state.shape[1]]
    losses = 0.0
    for t, words in enumerate(batch.inputs):
        x = table[words]
        if "noise" in masks:
            x = x + masks["noise"][t] * table.square().mean().sqrt()
        if "word" in masks:
            x = x * masks["word"][words][:, None]
        x = live * x * masks.get("input", 1.0)
        h, m = naive_step(mine, cell, x, h, m, live, masks.get("hidden", 1.0))
        logits = (h * masks.get("output", 1.0)) @ table.T + mine["bias"]
        targets = batch.targets[t]
        losses = losses + F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return losses / (batch.targets >= 0).sum(), torch.stack([h, m])


# Settings to compare two networks on

def doubles(seed, *shapes):
    """Random tensors in float64 with gradients."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=F64).requires_grad_() for shape in shapes]


def in_double(weights):
    return {name: w.double().requires_grad_() for name, w in weights.items()}


def setting(kind, shared, k, seed=0, steps=4, masked=True, size=1.0):
    """Weights, K cells and a batch in float64, weights and state with gradients. kind: enas, gated,
    or narrow, which is gated with widths; size: of the state, beyond its bound from 15 on."""
    draw = torch.Generator().manual_seed(seed)
    operations = "highway" if kind == "enas" else EVERY_OPERATION
    config = Config(hidden=HIDDEN, nodes=NODES, operations=operations, **DROPOUT)
    widths = (0, 2, 3) if kind == "narrow" else (0,)
    cells = [random_cell(100 * seed + i, kind != "enas", widths=widths) for i in range(k)]
    seeds = [1] if shared else list(range(k))
    weights = menas.shared_weights(config, WORDS)
    if not shared:
        weights = menas.standalone_weights(config, WORDS, cells, seeds)
    weights["bias"] = torch.randn(weights["bias"].shape, generator=draw)
    inputs, targets = torch.randint(WORDS, (2, steps, STREAMS), generator=draw)
    targets[-1, 0] = -1
    masks = {}
    if masked:
        masks = menas.draw_masks(config, WORDS, STREAMS, seeds, seed)
        masks["noise"] = torch.randn(1, steps, STREAMS, HIDDEN, generator=draw)
    masks = {name: mask.double() for name, mask in masks.items()}
    state = size * torch.randn(2, k, STREAMS, HIDDEN, generator=draw).double()
    for i, cell in enumerate(cells):
        state[1, i] *= cell.memory > 0
    return in_double(weights), cells, Batch(inputs, targets, state.requires_grad_(), masks)


def derivatives(values, weights, batch):
    """Of a sum of the values [K, ...] with unequal factors, by every weight and the state."""
    factors = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view(values.shape)
    inputs = [*weights.values(), batch.state]
    return torch.autograd.grad((values * factors).sum(), inputs, materialize_grads=True)


def distance(some, others):
    """The largest difference between two lists of tensors; nan if there is one in them."""
    differences = [(a - b).abs().max() for a, b in zip(some, others, strict=True)]
    return torch.stack(differences).max().item()
