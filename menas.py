"""MENAS: efficient neural architecture search for recurrent cells, exact, batched, in one file.

    python menas.py search      a minute or two: finds, draws and trains a cell on a built-in
                                corpus: test perplexity 6.79; an LSTM 6.66; the best possible 5.83
    python menas.py             lists the commands; COMMAND --help tells its settings

The one idea: an architecture is a row of integers, a batch of architectures is a tensor. One
forward pass runs K of them on the same minibatch, under shared weights (ENAS) or each under its
own (many networks, trained as one).

    code          symbol        meaning
    weights       omega         of the shared network, the supernet, or of K standalone ones; a dict
    controller    theta         the policy's weights; F(theta): the reward once omega has answered
    rows          m             architectures [K, D], D = 5 + 4N numbers each; cells: rows, by name
    network()     L(omega; m)   mean loss per token [K], nats; perplexity is its exponential
    K, N          -             architectures in a batch, nodes of a cell
    T, B, H, V    -             words of a segment (bptt), streams (batch), hidden units, vocabulary
    slot          s             what a node can read: 0 the input pair (x_t, h_{t-1}), i + 1 node i
    state         h_t, mem_t    what a word hands on to the next [2, K, B, H]: the output, and the
                                memory, which is 0 in ENAS's space
    game          -             a Search: the two players omega and theta, between their steps

ENAS (Pham et al. 2018) alternates

    omega <- omega - lr d/domega E_m L_T(omega; m)              on training text, chapter 5
    theta <- theta + lr E_m [ R(omega; m) dlog pi(m)/dtheta ]   R from validation text, chapter 4

That omega will answer theta's move is left out; chapter 6 adds it. Where we differ from the paper,
a comment says so after the word 'paper:'. Six functions to read first: node_value, unroll,
policy_loss, Search.shared_step, Search.controller_step, extra_rewards.
"""
import argparse
import copy
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean, median

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


def choose(kind, name, choices):
    """The name, if it is one of the choices; or a UserError that names the nearest.

    kind is what the message calls it, such as 'cell' or '--preset'.
    """
    choices = list(choices)
    if name in choices:
        return name
    near = get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"unknown {kind} {name!r}{hint}; choose from {', '.join(map(str, choices))}")


@contextmanager
def refusing(what, advice=""):
    """Whatever goes wrong inside becomes a UserError, one line that names the file or setting.

    advice is appended: what the user can do.
    """
    try:
        yield
    except Exception as error:  # torch.load alone raises many kinds: all mean, not this file
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{what} is refused: {reason[:200]}{advice}") from None


def rng(*key):
    """A generator seeded by a key. All randomness is a function of (seed, purpose, step), so a
    resumed run draws what an undisturbed one would have."""
    hashed = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed, "little") >> 1)


def move(x, device):
    """A tensor on the device; the host does not wait for a GPU's copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def device_of(config):
    """The torch.device that --device names, or with auto CUDA where there is one."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"--device {name} with --dtype {config.dtype}", "; use --device cpu"):
        x = torch.ones(1, 1, device=name, dtype=DTYPES[config.dtype])
        x @ x  # not every device has every dtype
        return x.device


# 1. The cell --------------------------------------------------------------------------------------
# A cell is a few nodes that are computed in order, once for every word. A node reads an earlier
# slot p: slot 0 is the input pair (x_t, h_{t-1}), slot i + 1 the value of node i. Some operations
# read a second slot q as well. With [c, u] = s_p W, W the weights of the edge p -> i (on the input
# pair s_p is h_{t-1}, and x_t times weights of its own is added to the product):
#
#     highway   s_i = s_p + sigmoid(c) * (act(u) - s_p)     ENAS's only one (Zilly et al. 2017)
#     glu       s_i = sigmoid(c) * act(u)                   (Dauphin et al. 2017)
#     gate      s_i = sigmoid(c) * act(s_q)                 multiplies what another node computed
#     sum       s_i = s_p + s_q                             no weights: of the input pair h_{t-1}
#
# The new state h_t is the mean of the leaves, the nodes that nobody reads (Pham et al. 2018, 2.1).
# Outside ENAS's space one node's value may be carried on as a memory mem_t, which gate and sum can
# read. An LSTM is four such nodes: CELLS["lstm_cell"], held to torch.nn.LSTM by a test.

OPERATIONS = ("highway", "glu", "gate", "sum")
HIGHWAY, GLU, GATE, SUM = range(4)
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": torch.clone,
}
TANH, RELU, SIGMOID, IDENTITY = range(4)  # in the order of ENAS's corrected code, see arc()
LEAVES, ALL = range(2)       # h_t is the mean of the leaves, or of all nodes after node 0
# A 0 is: in read the input pair; in second the memory, of a highway nothing; in memory that nothing
# is carried. slots_read() calls the memory None.
INPUT = 0
MEMORY = 0

# A row of integers is a cell: five numbers of the whole, then four of each node. What a cell does
# not use is 0 (but --one_activation writes that everywhere), so ENAS's own cells have operation,
# second, memory, width and rate 0 throughout.
#     memory   the slot carried as mem_t, 0 for none     width   units of the cell, 0 for all
#     rate     log2 of the factor of the learning rate that it is trained with
# A highway node whose second is not 0 reads (s_p + s_q) / 2, through the edge p -> i.
WHOLE = ("nodes", "output", "memory", "width", "rate")
NODE = ("read", "operation", "second", "activation")
Cells = namedtuple("Cells", WHOLE + NODE)

# The same as people handle it: nodes is a tuple of Node.
Node = namedtuple("Node", NODE, defaults=(HIGHWAY, 0, 0))
Cell = namedtuple("Cell", "nodes output memory width rate", defaults=(LEAVES, 0, 0, 0))


def parse(rows):
    """The columns of rows [K, 5 + 4N] by name: those of WHOLE are [K], those of NODE [K, N].

    So cells.read[k, i] is the slot that node i of cell k reads.
    """
    whole = rows[:, :len(WHOLE)].unbind(1)
    nodes = rows[:, len(WHOLE):].unflatten(1, (-1, len(NODE))).unbind(2)
    return Cells(*whole, *nodes)


def column(i, name):
    """The column of a row in which a number of node i stands."""
    return len(WHOLE) + len(NODE) * i + NODE.index(name)


def encode(cells, nodes=0):
    """Cells as rows [K, 5 + 4N]; N is the largest cell's number of nodes, or more.

    Smaller cells are padded with zeros: nodes that read slot 0 and weigh nothing in h_t.
    """
    n = max([nodes] + [len(cell.nodes) for cell in cells])
    rows = torch.zeros(len(cells), len(WHOLE) + len(NODE) * n, dtype=torch.long)
    for row, cell in zip(rows, cells):
        numbers = [len(cell.nodes), cell.output, cell.memory, cell.width, cell.rate]
        for node in cell.nodes:
            numbers += node
        row[:len(numbers)] = torch.tensor(numbers)
    return rows


def decode(row):
    """The Cell of one row [5 + 4N]."""
    count, *whole = row[:len(WHOLE)].tolist()
    nodes = row[len(WHOLE):].view(-1, len(NODE))[:count].tolist()
    return Cell(tuple(Node(*node) for node in nodes), *whole)


def row_name(row):
    """'2-0-0-0-0-...', a row as it stands in records and as --cell takes it."""
    return "-".join(map(str, row.tolist()))


def name_of(cell):
    """The cell as records and --cell have it, its row."""
    return row_name(encode([cell])[0])


def row_of(name):
    """The row [5 + 4N] of such a name."""
    return torch.tensor([int(x) for x in re.findall(r"(?:^|-)(-?\d+)", name)])


def arc(text, output=ALL):
    """A cell of ENAS's space as its authors' corrected code prints it: predecessor and activation
    of nodes 1, 2, ...; node 0 is tanh on the input pair. (Their first code puts node 0's activation
    first, and swaps sigmoid and identity.)

    Raises ValueError for an odd count, or a word that is no number.
    """
    numbers = list(map(int, text.split()))
    if not numbers or len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers, not two for each node")
    nodes = [Node(read + 1, activation=act) for read, act in zip(numbers[::2], numbers[1::2])]
    return Cell((Node(INPUT), *nodes), output)


CELLS = {
    # Pham et al. 2018, figure 6
    "enas": arc("0 0 1 1 2 1 2 0 2 0 5 1 1 0 6 1 8 1 8 1 8 1", LEAVES),
    # Liu et al. 2019, first and second order
    "darts_v1": arc("0 1 1 1 2 0 3 1 4 1 1 3 5 1 1 1"),
    "darts_v2": arc("0 2 1 1 1 1 1 3 2 0 5 2 3 0 5 1"),
    # the corrected code of ENAS's authors
    "enas_lm": arc("0 2 1 0 2 1 2 2 4 0 5 0 3 2 6 2"),
    "chain": arc(" ".join(f"{i} 0" for i in range(11)), LEAVES),
    "tree": arc(" ".join(f"{i // 2} 0" for i in range(11)), LEAVES),
    # f * mem + i * tanh(g), carried on as mem; h = o * tanh(mem), node 3, the only leaf
    "lstm_cell": Cell((Node(INPUT, GATE, MEMORY, IDENTITY), Node(INPUT, GLU, 0, TANH),
                       Node(1, SUM, 2), Node(INPUT, GATE, 3, TANH)), memory=3),
}


def leaf_weights(cells, dtype=torch.float64):
    """[K, N]: each node's weight in h_t, 1 / leaves for a leaf, else 0.

    A leaf is a node that nobody reads (Pham et al. 2018, 2.1), or of a cell whose output is ALL
    every node but node 0 (Liu et al. 2019), if there is another.
    """
    n = cells.read.shape[1]
    node = torch.arange(n, device=cells.read.device)
    # columns past the cell's own nodes are padding
    exists = node < cells.nodes[:, None]
    # slots that somebody reads; slot 0 is no node
    is_read = (F.one_hot(cells.read, n + 1) | F.one_hot(cells.second, n + 1)).any(1)
    inner = exists & ((node > 0) | (cells.nodes[:, None] == 1))  # DARTS: all but node 0
    # carried on as memory is not read: such a node can still be a leaf
    leaf = torch.where(cells.output[:, None] == ALL, inner, exists & ~is_read[:, 1:]).to(dtype)
    return leaf / leaf.sum(1, keepdim=True)


def leaves(cell):
    """The nodes whose mean is h_t."""
    return leaf_weights(parse(encode([cell])))[0].nonzero().flatten().tolist()


def slots_read(node):
    """The slots that a node reads, None for the memory."""
    slots = [node.read]
    if node.operation in (GATE, SUM) or node.operation == HIGHWAY and node.second > 0:
        slots.append(None if node.second == MEMORY else node.second)
    return slots


def is_enas(cell):
    """Is it in ENAS's space: highway nodes of full width, of which only the first reads the input
    pair, and no memory?"""
    plain = all(node.operation == HIGHWAY and node.second == 0 for node in cell.nodes)
    inputs = [i for i, node in enumerate(cell.nodes) if node.read == INPUT]
    return plain and inputs == [0] and (cell.memory, cell.width) == (0, 0)


def recurrent_parameters(cell, hidden):
    """Weights that the recurrence uses; there are no biases. A gate needs no u, a sum nothing.

    It is the number by which an LSTM of as many weights is chosen.
    """
    units = cell.width or hidden
    counts = {HIGHWAY: 2, GLU: 2, GATE: 1, SUM: 0}  # of units x units, for c and u
    # the input pair has two sets of them, for h_{t-1} and for x_t
    inputs = sum(counts[node.operation] for node in cell.nodes if node.read == INPUT)
    return units * units * (inputs + sum(counts[node.operation] for node in cell.nodes))


def checked(cell):
    """A cell that somebody wrote; or a ValueError that names the node which cannot be."""
    # slots to i, an operation to SUM, an activation to IDENTITY
    for i, node in enumerate(cell.nodes):
        if not all(0 <= x <= most for x, most in zip(node, (i, SUM, i, IDENTITY))):
            raise ValueError(f"node {i} is {tuple(node)}: slots to {i}, the others to 3")
        if node.operation == GLU and node.second:
            raise ValueError(f"node {i}, a glu, reads a second slot")
        if None in slots_read(node) and not cell.memory:
            raise ValueError(f"node {i} reads the memory, but none is carried")
    known = cell.output in (LEAVES, ALL) and 0 <= cell.memory <= len(cell.nodes)
    known = known and cell.width >= 0 and abs(cell.rate) <= 9
    if not cell.nodes or not known:
        raise ValueError(f"{len(cell.nodes)} nodes, and of the whole {tuple(cell[1:])}")
    return cell


# 2. Search spaces ---------------------------------------------------------------------------------
# Something to decide: the columns of a row that it sets, the values that it may take, and when it
# matters: (column, values) that must all hold of columns decided before. With a single value there
# is nothing to decide; what does not matter is 0.
Decision = namedtuple("Decision", "columns choices when", defaults=((),))


def chain(i):
    """Node i reads the one before."""
    return [i]


def tree(i):
    """Node i reads node (i - 1) // 2: a complete binary tree."""
    return [(i - 1) // 2 + 1]


def anything(i):
    """ENAS: node i reads any earlier node, and only node 0 the input pair."""
    return list(range(1, i + 1))


CONNECTIONS = {"any": anything, "chain": chain, "tree": tree}


def listed(config, name, known):
    """The numbers that a comma-separated setting names, as they stand in a row; [0] if empty.

    known: {word: its number}. Raises UserError for another word, or one that is there twice.
    """
    text = getattr(config, name)
    words = text.split(",") if text else []
    if len(set(words)) < len(words):
        raise UserError(f"--{name} {text} has one of them twice")
    return [known[choose(f"word in --{name}", word, known)] for word in words] or [0]


def node_decisions(config, i, operations, activations, least):
    """What is to be decided of node i; a node from the least number on may be absent."""
    # column 0, the number of nodes, is larger than i
    exists = ((0, tuple(range(i + 1, config.nodes + 1))),) if i >= least else ()
    gated = operations != [HIGHWAY]
    reads = CONNECTIONS[config.connections](i) if i > 0 else [INPUT]
    if gated and i > 0 and config.connections == "any":
        reads = [INPUT] + reads
    seconds = [MEMORY] * config.memory + list(range(1, i + 1))
    if not seconds:  # there is nothing to multiply or add yet
        operations = [x for x in operations if x not in (GATE, SUM)]

    def decide(name, choices, *when):
        return Decision((column(i, name),), choices, exists + when)

    operation = column(i, "operation")
    mine = [decide("read", reads)]
    if gated:
        mine.append(decide("operation", operations))
    if GATE in operations or SUM in operations:
        mine.append(decide("second", seconds, (operation, (GATE, SUM))))
    if not config.one_activation:
        activates = [(operation, (HIGHWAY, GLU, GATE))] if SUM in operations else []
        mine.append(decide("activation", activations, *activates))
    return mine


def search_space(config):
    """The list of Decisions. ENAS: each node but the first reads an earlier one, any activation.

    Beyond it what the settings ask for; the memory is one of the first --min_nodes, which every
    cell has. Raises UserError for settings that leave nothing to choose from.
    """
    n = config.nodes
    least = config.min_nodes or config.nodes
    if least > n:
        raise UserError(f"--min_nodes {least} is more than --nodes {n}")
    operations = listed(config, "operations", {name: i for i, name in enumerate(OPERATIONS)})
    activations = listed(config, "activations", {name: i for i, name in enumerate(ACTIVATIONS)})
    widths = listed(config, "widths", {str(x): x for x in range(1, config.hidden + 1)})
    rates = listed(config, "rates", {f"{2.0 ** x:.10g}": x for x in range(-9, 10)})
    if config.memory and not {GATE, SUM} & set(operations):
        raise UserError("--memory needs an operation that reads it: --operations with gate or sum")
    if not config.memory and not {HIGHWAY, GLU} & set(operations):
        raise UserError(f"--operations {config.operations}: none for node 0 without --memory")
    memories = list(range(1, least + 1)) if config.memory else [0]
    whole = {"nodes": list(range(least, n + 1)), "output": [LEAVES], "memory": memories,
             "width": widths, "rate": rates}
    decisions = [Decision((WHOLE.index(name),), whole[name]) for name in WHOLE]
    if config.one_activation:
        every = tuple(column(i, "activation") for i in range(n))
        decisions.append(Decision(every, activations))
    for i in range(n):
        decisions += node_decisions(config, i, operations, activations, least)
    return decisions


def matters(rows, decision):
    """Where [K] the decision matters, given what stands in rows [K, D] of those before it.

    The activation of a node that a cell does not have, for instance, does not.
    """
    found = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for i, values in decision.when:
        found &= torch.stack([rows[:, i] == value for value in values]).any(0)
    return found


# 3. The network -----------------------------------------------------------------------------------
# Weights are a dict of tensors. All have the tied embedding [V, H] and the decoder's bias [V].
#     shared       'edges' [E, H, 2H], one for each pair (slot read, node): the supernet
#     standalone   'nodes' [K, N, H, 2H] in their place; all of a network's tensors have a leading K
#     ENAS's space 'input' [1, H, 2H], the weights of x_t in node 0
#     any other    'inputs' [N, H, 2H], as any node may read the input pair
# An LSTM has torch.nn.LSTM's instead, with a leading K.

STATE_BOUND = 25.0  # largest norm of h_t and of mem_t
# ENAS-pytorch (Taehoon Kim's code) bounds only what it carries, the last node's value, and decodes
# the unbounded mean.


def edge_index(slot, node):
    """The row of 'edges' for slot -> node: node i can read slots 0 .. i."""
    return node * (node + 1) // 2 + slot


def edges_of(rows):
    """[K, N]: the rows of 'edges' that the nodes of K cells use."""
    read = parse(rows).read
    return edge_index(read, torch.arange(read.shape[1], device=rows.device))


def draw_weights(shapes, bound, seed):
    """A dict of tensors, uniform in +- bound, each a function of the seed and its name.

    So what one network draws does not depend on what else there is.
    """
    return {name: (torch.rand(shape, generator=rng(seed, "init", name)) * 2 - 1) * bound
            for name, shape in shapes.items()}


def init_bound(units):
    """Keeps the variance of what passes a matrix. paper: .04; the corrected code has .04 in its
    search, at 200 units, and .05 in its final training, at 800."""
    return math.sqrt(3 / units)


def shared_weights(config, words):
    """Weights of the supernet: the embedding, the edges, the input's, the bias."""
    h = config.hidden
    edges = edge_index(0, config.nodes)  # how many: a next node's would begin here
    shapes = {"embedding": (words, h), "edges": (edges, h, 2 * h)}
    # a width cuts the input too, so it needs the general path
    if config.operations in ("", "highway") and not config.widths:
        shapes["input"] = (1, h, 2 * h)
    else:
        shapes["inputs"] = (config.nodes, h, 2 * h)
    return draw_weights(shapes, init_bound(h), config.seed) | {"bias": torch.zeros(words)}


def standalone_weights(config, words, cells, seeds):
    """Weights of K networks, drawn node by node, so that padding a cell changes nothing."""
    h = config.hidden
    n = max(len(cell.nodes) for cell in cells)
    plain = all(is_enas(cell) for cell in cells)
    networks = []
    for cell, seed in zip(cells, seeds):
        # of ENAS's space only node 0 reads the input; the other draws are not kept
        shapes = {"embedding": (words, h)}
        shapes |= {f"{kind} {i}": (h, 2 * h) for kind in ("input", "node") for i in range(n)}
        drawn = draw_weights(shapes, init_bound(cell.width or h), seed)
        inputs = torch.stack([drawn[f"input {i}"] for i in range(1 if plain else n)])
        networks.append({"embedding": drawn["embedding"], "bias": torch.zeros(words),
                         "input" if plain else "inputs": inputs,
                         "nodes": torch.stack([drawn[f"node {i}"] for i in range(n)])})
    return {name: torch.stack([w[name] for w in networks]) for name in networks[0]}


def lstm_weights(config, words, units, seeds):
    """Weights of K LSTMs of so many units, drawn within init_bound(--hidden). If that is another
    number than --hidden, the tied embedding's size, h is projected to --hidden."""
    e = config.hidden
    h = units
    shapes = {"embedding": (words, e), "weight_ih": (4 * h, e), "weight_hh": (4 * h, h),
              "bias_ih": (4 * h,), "bias_hh": (4 * h,)}
    if h != e:
        shapes["project"] = (h, e)
    networks = [draw_weights(shapes, init_bound(e), seed) | {"bias": torch.zeros(words)}
                for seed in seeds]
    return {name: torch.stack([w[name] for w in networks]) for name in networks[0]}


def is_shared(weights):
    """Is it the supernet, or K networks each with its own?"""
    return "edges" in weights


def inherit(shared, rows):
    """Standalone weights that start from the shared ones: each network gets its own copy.

    So one forward pass with K copies is the supernet's, but its gradient is K separate ones.
    """
    copies = {name: w.expand(len(rows), *w.shape).clone() for name, w in shared.items()
              if name != "edges"}
    return copies | {"nodes": shared["edges"][edges_of(rows)]}


def chosen(which, count):
    """(taken, place) of K cells' choices, which [K], among the options 0 .. count - 1.

    taken: the options that some cell takes. Of their values, K of the first one, then K of the
    second, and so on, that of cell k stands at place[k]. To ask what is taken, the host would wait
    for a GPU, so there all options count as taken.
    """
    taken = torch.arange(count)
    if which.device.type == "cpu":
        taken, which = which.unique(return_inverse=True)
    cells = torch.arange(len(which), device=which.device)
    return taken.tolist(), which * len(which) + cells


def of_each(choice, value):
    """Each cell's value [K, ...] under the option that it takes; choice: from chosen().

    value(option) [K, ...] computes an option for all cells. What nobody takes is not computed, and
    a lone option is not copied.
    """
    taken, place = choice
    values = [value(option) for option in taken]
    return values[0] if len(values) == 1 else torch.cat(values).index_select(0, place)


# What K cells choose for a node, each from chosen(): the slot it reads, and whether that is the
# input pair; the second slot, and whether it reads the mean of both; the operation, and whether it
# is a gate, which multiplies act(s_q) in the place of act(u); the activation.
Choices = namedtuple("Choices", "read from_input second both operation gates activation")


def choices_of(cells):
    """A list, the Choices of each node; made once a segment, for every word."""
    both = (cells.operation == HIGHWAY) & (cells.second > 0)
    of_cells = Choices(cells.read, cells.read == INPUT, cells.second, both, cells.operation,
                       cells.operation == GATE, cells.activation)               # each [K, N]
    nodes = []
    for i, choices in enumerate(zip(*[x.unbind(1) for x in of_cells])):
        counts = (i + 1, 2, i + 1, 2, len(OPERATIONS), 2, len(ACTIVATIONS))
        nodes.append(Choices(*map(chosen, choices, counts)))
    return nodes


def node_value(p, q, z, node):
    """One node of K cells, s_i [K, B, H], by the equations of chapter 1.

    p, q [K, B, H]: the slots it reads; z [K, B, 2H]: c and u; node: its Choices.
    """
    c, u = z.chunk(2, dim=-1)
    gate = torch.sigmoid(c)
    activations = list(ACTIVATIONS.values())
    through = of_each(node.gates, lambda gates: q if gates else u)
    y = of_each(node.activation, lambda number: activations[number](through))

    def value(operation):
        if operation == HIGHWAY:
            return p + gate * (y - p)
        return p + q if operation == SUM else gate * y

    return of_each(node.operation, value)


def bounded(state):
    """The state [..., H], shrunk to norm STATE_BOUND where it is longer.

    Else a cell of relu and identity nodes grows without limit, and its loss is not a number.
    """
    square = state.square().sum(-1, keepdim=True)  # a norm has no second derivative at 0
    return state * (STATE_BOUND * square.clamp(min=STATE_BOUND ** 2).rsqrt())


def read_word(nodes, memory_slot, w, xw, h, memory, mask, live, leaf):
    """One word: the state h, memory [K, B, H] before it -> those after it.

    nodes: choices_of() the cells; memory_slot: the slots that become the memory, from chosen(); w:
    the nodes' weights, N of [K, H, 2H]; xw: x_t times input weights, 1 or N of [K or 1, B, 2H];
    mask [K, B or 1, H]: live, times dropout on what nodes read; live [K, 1, H]: units a cell has;
    leaf [K, N].
    """
    # what the next node can read: the input pair's h, then the nodes so far
    slots = [h]
    for i, node in enumerate(nodes):
        p = of_each(node.read, lambda slot: slots[slot])
        q = of_each(node.second, lambda slot: memory if slot == MEMORY else slots[slot])
        p = of_each(node.both, lambda both: (p + q) / 2 if both else p)
        z = (p * mask) @ w[i]                                                         # [K, B, 2H]
        if i < len(xw):
            z = of_each(node.from_input, lambda reads: z + xw[i] if reads else z)
        slots.append(live * node_value(p, q, z, node))
    # out of the cell: the mean of the leaves, and the node that is carried
    memory = of_each(memory_slot, lambda slot: slots[slot] if slot else torch.zeros_like(h))
    h = torch.einsum("kn,nkbh->kbh", leaf, torch.stack(slots[1:]))
    return bounded(h), bounded(memory)


def live_units(cells, hidden):
    """[K, 1, H], of bools: the units that a cell has, the top-left block of its weights."""
    width = torch.where(cells.width > 0, cells.width, hidden)
    return (torch.arange(hidden, device=width.device) < width[:, None])[:, None]


def plain_recurrence(cells, w, xw, h, memory, mask=None):
    """h of every step [K, T, B, H] and the last memory [K, B, H], for w [N, K, H, 2H], xw [K or 1,
    1 or N, T, B, 2H] and mask [K or 1, B, H].

    It serves every space and can be differentiated twice: it is the reference. fast_recurrence() is
    the same for ENAS's own space.
    """
    live = live_units(cells, h.shape[-1]).to(h.dtype)                                   # [K, 1, H]
    leaf = leaf_weights(cells, h.dtype)                                                    # [K, N]
    mask = live if mask is None else mask * live
    nodes = choices_of(cells)
    memory_slot = chosen(cells.memory, len(nodes) + 1)
    states = []
    # the gradient of a slice would be as large as what it is a slice of; unbind's is not
    w = w.unbind()
    for word in xw.unbind(2):
        h, memory = read_word(nodes, memory_slot, w, word.unbind(1), h, memory, mask, live, leaf)
        states.append(h)
    return torch.stack(states, 1), memory


# The fast path: highway nodes only, the backward pass through time by hand. Every activation is
# arithmetic with coefficients of each cell, so that K different ones are one operation. With
# z = slope * u:  y = act(u) = scale * sigmoid(z) + shift + max(linear * z, floor), and the
# derivative needs only y: dy/dz = (square * y + line) * y + offset + jump * [y > 0].
#                slope scale shift linear floor      square line offset jump
COEFFICIENTS = [(2.0,  2.0,  -1.0, 0.0,   0.0,       -0.5,  0.0, 0.5,     0.0),    # tanh
                (1.0,  0.0,  0.0,  1.0,   0.0,       0.0,   0.0, 0.0,     1.0),    # relu
                (1.0,  1.0,  0.0,  0.0,   0.0,       -1.0,  1.0, 0.0,     0.0),    # sigmoid
                (1.0,  0.0,  0.0,  1.0,   -math.inf, 0.0,   0.0, 1.0,     0.0)]    # identity


@lru_cache
def coefficient_table(dtype, device):
    """[activations, 9], made once: a copy from the host at every step would stop a GPU."""
    return torch.tensor(COEFFICIENTS, dtype=dtype, device=device)


FREE = []  # large buffers to use again: fresh memory costs a third of the time at K = 32


def take(like, *shape):
    """A buffer of that shape, with anything in it.

    Two passes that are alive at once never share one: a buffer is free only once it is given back.
    """
    for i, buffer in enumerate(FREE):
        if (buffer.shape, buffer.dtype, buffer.device) == (shape, like.dtype, like.device):
            return FREE.pop(i)
    return like.new_empty(shape)


def give(*buffers):
    """Back to the free ones, of which the last few are kept."""
    FREE.extend(buffers)
    del FREE[:-9]


def sources(read):
    """What selects the slot that each node reads; and is there one architecture only, on the CPU?

    If so, the slot's number: a view is faster than a copy. Else the indices slot * K + k [K] into
    the slots [slots * K]: all architectures' slot 0, then their slot 1, and so on.
    """
    k = read.shape[1]
    if k == 1 and read.device.type == "cpu":
        return read[:, 0].tolist(), True
    return (read * k + torch.arange(k, device=read.device)).unbind(), False


def local_derivatives(gates, p, coefficients, keep):
    """Of s = p + gate (y - p), all steps, in place: gates [K, T, B, 2, H], of gate = sigmoid(c) and
    y = act(u), becomes ds/dc and ds/dz, and keep [K, T, B, H] ds/dp = 1 - gate."""
    gate, y = gates.unbind(3)
    square, line, offset, jump = coefficients
    torch.sub(1, gate, out=keep)
    dz = y.mul(square).add_(line).mul_(y).add_(offset).addcmul_(jump, (y > 0).to(y.dtype))
    dz.mul_(gate)
    gate.mul_(y.sub_(p)).mul_(keep)
    y.copy_(dz)


def bound_backward(dy, y, shrink):
    """dL/dx from dL/dy, of y = x shrink: where the bound binds, without the part along y."""
    radial = (y * dy).sum(-1, keepdim=True).mul_(shrink < 1).div_(STATE_BOUND ** 2)
    return torch.addcmul(dy, radial, y, value=-1).mul_(shrink)


class FastRecurrence(torch.autograd.Function):
    """h [K, T, B, H] of K architectures of highway nodes.

    xw [K, T, B, 2H]       x_t times node 0's input weights, the u half times its slope
    h0 [K, B, H]           the state before the first word
    w [N, K, H, 2H]        each node's weights, the u half times its slope
    mask [K or 1, B, H]    dropout on every node's input, or None
    read [N, K], leaf [K, N], coefficients: eight [N, K, 1, 1], without the slope
    training               is a backward pass to come? forward() itself cannot tell
    """

    @staticmethod
    def forward(ctx, training, xw, h0, w, mask, read, leaf, *coefficients):
        nodes, k, hidden, _ = w.shape
        steps, batch = xw.shape[1:3]
        kept = steps if training else 1  # steps whose slots are stored
        slots = take(w, nodes + 1, k, kept, batch, hidden)                   # what a node can read
        gates = take(w, nodes, k, kept, batch, 2, hidden)                    # sigmoid(c), act(u)
        h = w.new_empty(k, steps, batch, hidden)
        shrink = w.new_empty(k, steps, batch, 1)                            # by which h was bounded
        p = w.new_empty(k, batch, hidden)
        masked = torch.empty_like(p)
        z = w.new_empty(k, batch, 2 * hidden)
        cu = z.view(k, batch, 2, hidden)
        u = cu[:, :, 1]
        source, alone = sources(read)
        # unbound once: an index in the loop costs as much as a small product
        scale, shift, linear, floor = [x.unbind() for x in coefficients[:4]]
        matrix = w.unbind()
        state = h0
        # without a backward pass to come, each step overwrites the last
        for t in range(steps):
            now = t if training else 0
            values = slots[:, :, now].unbind()                              # of each slot [K, B, H]
            flat = slots.view(-1, kept, batch, hidden)[:, now]               # [slots * K, B, H]
            gates_now = gates[:, :, now].unbind()
            values[0].copy_(state)
            for i in range(nodes):
                p = values[source[i]] if alone else torch.index_select(flat, 0, source[i], out=p)
                torch.bmm(p if mask is None else torch.mul(p, mask, out=masked), matrix[i], out=z)
                # only node 0 reads the word
                if i == 0:
                    z += xw[:, t]
                gate, y = torch.sigmoid(cu, out=gates_now[i]).unbind(2)
                # y = act(u) by its coefficients, then s_i = p + gate (y - p)
                torch.maximum(u.mul_(linear[i]), floor[i], out=u)
                torch.add(u.addcmul_(y, scale[i]), shift[i], out=y)
                torch.lerp(p, y, gate, out=values[i + 1])
            # h is the mean of the leaves, bounded in norm
            x = torch.bmm(leaf[:, None], slots[1:, :, now].reshape(nodes, k, -1).transpose(0, 1))
            x = x.view(k, batch, hidden)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            torch.div(STATE_BOUND, norm.clamp_(min=STATE_BOUND), out=shrink[:, t])
            state = torch.mul(x, shrink[:, t], out=h[:, t])
        if training:
            ctx.save_for_backward(w, mask, read, leaf, slots, gates, h, shrink, *coefficients[4:])
        else:
            give(slots, gates)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        w, mask, read, leaf, slots, gates, h, shrink, *coefficients = ctx.saved_tensors
        nodes, k, steps, batch, _, hidden = gates.shape
        source, alone = sources(read)
        flat = slots.flatten(0, 1)                                           # [slots * K, T, B, H]

        def read_by(i):
            """What node i reads, all steps [K, T, B, H]."""
            return slots[source[i]] if alone else flat.index_select(0, source[i])

        local = gates  # overwritten by the local derivatives
        keep = take(w, *slots[1:].shape)
        for i in range(nodes):
            local_derivatives(gates[i], read_by(i), [x[i, :, None] for x in coefficients], keep[i])
        weight = leaf.t()[:, :, None, None]                                  # [N, K, 1, 1]
        # a product with a view is slow in bfloat16
        back = w.transpose(2, 3).contiguous().unbind()
        ds = w.new_zeros(nodes + 1, k, batch, hidden)                        # of one step's slots
        flat_ds = ds.flatten(0, 1)
        values = ds.unbind()
        over_cu = ds[:, :, :, None].unbind()  # to broadcast over c and u
        dp = w.new_empty(k, batch, hidden)
        dh = torch.zeros_like(dp)
        for t in reversed(range(steps)):
            # from h to the leaves, then from node to node backwards
            dmean = bound_backward(grad[:, t] + dh, h[:, t], shrink[:, t])
            ds[0] = 0
            torch.mul(dmean, weight, out=ds[1:])
            dz = local[:, :, t].unbind()  # overwritten once more: kept for dw
            flat_dz = local[:, :, t].flatten(3).unbind()
            keep_now = keep[:, :, t].unbind()
            for i in reversed(range(nodes)):
                dz[i].mul_(over_cu[i + 1])
                torch.bmm(flat_dz[i], back[i], out=dp)
                if mask is not None:
                    dp.mul_(mask)
                dp.addcmul_(values[i + 1], keep_now[i])
                # what node i read gets dp, also from other nodes that read it
                if alone:
                    values[source[i]].add_(dp)
                else:
                    flat_ds.index_add_(0, source[i], dp)
            dh.copy_(values[0])
        dw = torch.empty_like(w)
        for i in range(nodes):  # one product over all T * B rows
            p = read_by(i) if mask is None else read_by(i) * mask[:, None]
            torch.bmm(p.flatten(1, 2).transpose(1, 2), local[i].flatten(3).flatten(1, 2), out=dw[i])
        dxw = local[0].flatten(3).clone()
        give(slots, gates, keep)
        return None, dxw, dh, dw, *[None] * 11  # no gradient for the other arguments


def fast_recurrence(cells, w, xw, h, memory, mask=None):
    """As plain_recurrence, for ENAS's space: highway nodes, of which only the first reads x_t."""
    coefficients = coefficient_table(w.dtype, w.device)[cells.activation.t()]            # [N, K, 9]
    # the slope goes into the weights of u, so that one sigmoid serves c and u
    slope, *coefficients = coefficients[..., None, None].unbind(2)
    halves = [torch.ones_like(slope), slope]
    slopes = torch.cat([half.expand(-1, -1, -1, h.shape[-1]) for half in halves], -1)
    xw = xw[:, 0] * slopes[0][:, None]
    leaf = leaf_weights(cells, w.dtype)
    training = torch.is_grad_enabled()
    read = cells.read.t()
    states = FastRecurrence.apply(training, xw, h, w * slopes, mask, read, leaf, *coefficients)
    return states, memory


# One step's input:
#     inputs, targets [T, B]     a target of -1: nothing to predict
#     state [2, K or 1, B, H]    h and memory before the first word
#     masks                      of dropout, see draw_masks(), or a perturbed input's, chapter 5
Batch = namedtuple("Batch", "inputs targets state masks")


def zero_state(weights, batch):
    """h and memory before the first word [2, 1, B, H]."""
    last = weights.get("weight_hh", weights["embedding"])
    return last.new_zeros(2, 1, batch, last.shape[-1])


def draw_masks(config, words, batch, seeds, step):
    """Variational dropout: a mask a segment, scaled by 1 / (1 - rate), for each of K seeds.

    word [K, V], input, hidden, output [K, B, H]; a rate of 0 has no mask. With one seed they are
    shared by all architectures.
    """
    units = (batch, config.hidden)
    masks = {}
    for name, shape in (("word", (words,)), ("input", units), ("hidden", units), ("output", units)):
        rate = getattr(config, f"{name}_dropout")
        if rate > 0:
            draws = [torch.rand(shape, generator=rng(seed, name, step)) for seed in seeds]
            masks[name] = (torch.stack(draws) >= rate) / (1 - rate)
    return masks


def embed(weights, batch):
    """The embedded, dropped input [K or 1, T, B, H]; 1 where all architectures share it.

    Of the masks: a word is dropped as a whole (Gal and Ghahramani 2016), a unit for all words of
    the segment; 'noise' is what a perturbed input adds.
    """
    embedding = weights["embedding"]
    masks = batch.masks
    stacked = embedding.view(-1, *embedding.shape[-2:])                             # [K or 1, V, H]
    # K standalone networks have K tables: one lookup in a long one, network k's from row k V on
    first = torch.arange(len(stacked), device=embedding.device)[:, None, None] * stacked.shape[1]
    x = F.embedding(batch.inputs + first, stacked.flatten(0, 1))
    if "noise" in masks:
        x = x + masks["noise"] * stacked.square().mean((1, 2)).sqrt()[:, None, None, None]
    if "word" in masks:
        x = x * masks["word"][:, batch.inputs][..., None]
    if "input" in masks:
        x = x * masks["input"][:, None]
    return x


def unroll(weights, rows, batch, dtype=torch.float32, recurrence=None):
    """h of K architectures over a segment [K, T, B, H], and the state to go on with [2, K, B, H].

    rows [K, D]; dtype: that of the recurrence, while weights and states stay float32 or better.
    The recurrence is the one given, or the fast one where there is one for these weights.
    """
    cells = parse(rows)
    general = "inputs" in weights
    x = embed(weights, batch).to(dtype)                                          # [K or 1, T, B, H]
    if is_shared(weights):
        edges = edges_of(rows).t()
        w = weights["edges"].index_select(0, edges.flatten())
        w = w.unflatten(0, edges.shape)                                              # [N, K, H, 2H]
    else:
        w = weights["nodes"].transpose(0, 1)                                         # [N, K, H, 2H]
    if general:
        x = x * live_units(cells, x.shape[-1])[:, None]
    w_x = weights["inputs" if general else "input"].to(dtype)
    # the products with x need no state: all T * B of them at once
    xw = (x.flatten(1, 2)[:, None] @ w_x).unflatten(2, x.shape[1:3])    # [K or 1, 1 or N, T, B, 2H]
    h, memory = batch.state.expand(-1, len(rows), -1, -1).to(dtype)                # [K, B, H] each
    mask = batch.masks.get("hidden")
    mask = None if mask is None else mask.to(dtype)
    recurrence = recurrence or (plain_recurrence if general else fast_recurrence)
    states, memory = recurrence(cells, w.to(dtype), xw, h, memory, mask)
    return states, torch.stack([states[:, -1], memory]).detach().to(batch.state.dtype)


def unroll_lstm(weights, batch):
    """torch.nn.LSTM in the place of unroll, for one network after the other: h [K, T, B, H], and
    its state (h, c) [2, K, B, units]."""
    outputs = []
    states = []
    # torch.lstm runs one network at a time: K of them are a loop
    for i, x in enumerate(embed(weights, batch)):
        start = [s[None].contiguous() for s in batch.state[:, i % batch.state.shape[1]]]      # h, c
        flat = [weights[name][i] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        # biases, layers, dropout, training, bidirectional, batch first
        how = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
        out, h, c = torch.lstm(x, start, flat, *how)
        outputs.append(out @ weights["project"][i] if "project" in weights else out)
        states.append(torch.cat([h, c]).detach())
    return torch.stack(outputs), torch.stack(states, 1)


class SoftmaxLoss(torch.autograd.Function):
    """Mean loss [K] of h [K, R, H] for targets [R], -1 for none, decoders [K, V, H], biases [K, V].

    By chunks of the R = T * B positions, so that all logits never exist at once. Log-probabilities
    are in h's dtype, their sum in float32 or better. The softmax is at hand in forward, so the
    gradient for dL = 1 is computed there, if one is wanted, and backward only scales it.
    """

    @staticmethod
    def forward(ctx, training, h, decoder, bias, targets, chunk=512):
        wide = torch.promote_types(h.dtype, torch.float32)
        real = (targets >= 0).to(wide)[:, None]
        share = real / real.sum().clamp(min=1)                        # of each position in the mean
        losses = torch.zeros(len(h), dtype=wide, device=h.device)
        if training:
            dh = torch.empty_like(h)
            dw = decoder.new_zeros(decoder.shape)
            db = bias.new_zeros(bias.shape)
        buffers = take(h, 2, min(chunk, h.shape[1]), decoder.shape[1])
        for k in range(len(h)):
            down = decoder[k].to(h.dtype)
            offset = bias[k].to(h.dtype)
            up = down.t().contiguous()  # a product with a view is slow in bfloat16
            for r in range(0, h.shape[1], chunk):
                x = h[k, r:r + chunk]
                y = targets[r:r + chunk, None].clamp(min=0)
                part = share[r:r + chunk]
                logits, logp = buffers[:, :len(x)]
                torch.log_softmax(torch.addmm(offset, x, up, out=logits), 1, out=logp)
                losses[k] -= (logp.gather(1, y) * part).sum()
                if training:  # dL/dlogits = (softmax - onehot) share
                    minus_one = torch.full_like(y, -1, dtype=h.dtype)
                    d = logp.exp_().scatter_add_(1, y, minus_one).mul_(part)
                    torch.mm(d, down, out=dh[k, r:r + chunk])
                    db[k] += d.sum(0)
                    if dw.dtype == h.dtype:
                        dw[k].addmm_(d.t(), x)  # in place, which is a quarter of the time
                    else:
                        dw[k] += d.t() @ x
        give(buffers)
        if training:
            ctx.save_for_backward(dh, dw, db)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dh, dw, db = ctx.saved_tensors
        grad = grad.to(dw.dtype)[:, None, None]
        return None, dh.mul_(grad.to(dh.dtype)), dw.mul_(grad), db.mul_(grad[:, 0]), None, None


def network(weights, rows, batch, dtype=torch.float32, recurrence=None):
    """L(omega; m): mean loss per token of K architectures [K], nats; and the state they leave.

    Shared weights or K networks' own: what differs is only where weights come from; LSTMs run one
    by one. A pure function: nothing is stored, and the caller decides what becomes of the state.
    """
    if "weight_hh" in weights:
        h, state = unroll_lstm(weights, batch)  # always in float32
    else:
        h, state = unroll(weights, rows, batch, dtype, recurrence)
    if "output" in batch.masks:
        h = h * batch.masks["output"].to(h.dtype)[:, None]
    decoder = weights["embedding"].expand(len(h), -1, -1)  # tied (Press and Wolf 2017)
    bias = weights["bias"].expand(len(h), -1)
    losses = SoftmaxLoss.apply(torch.is_grad_enabled(), h.flatten(1, 2), decoder, bias,
                               batch.targets.flatten())
    return losses, state


def gradients(loss, weights):
    """d loss / d weights, a dict; weights that play no part have zeros: edges that nobody read."""
    found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return dict(zip(weights, found))


@torch.no_grad()
def sgd_step(weights, grads, lr, clip, decay):
    """omega <- omega - lr (g min(1, clip / |g|) + decay omega), in place.

    lr [K]: for standalone networks each on its own; [1] for shared weights. A gradient that is not
    finite changes nothing.
    """
    flat = {name: g.reshape(len(lr), -1) for name, g in grads.items()}
    # the norm of all of a network's weights together [K]
    norm = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat.values()]).norm(dim=0)
    lr = torch.where(torch.isfinite(norm), lr, 0.0)[:, None]
    scale = lr * (clip / norm).clamp(max=1).nan_to_num(0.0)[:, None]
    for name, g in flat.items():
        g = g.nan_to_num(0.0, 0.0, 0.0)
        weights[name].view(len(lr), -1).mul_(1 - lr * decay).addcmul_(g, scale, value=-1)


# 4. The controller --------------------------------------------------------------------------------
# K architectures, rows [K, D], and what the policy says of them: log_prob [K] of the whole row;
# entropy [K], the sum of the decisions' entropies along the row's path, whose mean estimates the
# policy's; hidden [K, units], the LSTM's state after the last decision.
Sample = namedtuple("Sample", "rows log_prob entropy hidden", defaults=(None,))

# The logits are TANH_CONSTANT * tanh(logits / TEMPERATURE) (Pham et al. 2018, appendix A)
TEMPERATURE = 5.0
TANH_CONSTANT = 2.5
CONTROLLER_UNITS = 100


class Controller(nn.Module):
    """pi_theta(m): an LSTM that takes one decision after the other, each with an embedding and a
    head of its own. Sampling and scoring are the same walk, so they cannot differ in
    temperature."""

    def __init__(self, decisions, seed, asked=False, bound=TANH_CONSTANT):
        super().__init__()
        self.bound = bound
        self.decisions = decisions
        self.free = [i for i, d in enumerate(decisions) if len(d.choices) > 1]
        widest = max(len(d.choices) for d in decisions)
        size = CONTROLLER_UNITS
        self.start = nn.Parameter(torch.empty(size))
        self.embed = nn.Parameter(torch.empty(len(self.free), widest, size))
        self.head = nn.Parameter(torch.empty(len(self.free), size, widest))
        self.lstm = nn.LSTMCell(size, size)
        self.aim = nn.Parameter(torch.empty(size)) if asked else None  # start + asked * aim
        # uniform in +- .1 (Pham et al. 2018, appendix A)
        for name, parameter in self.named_parameters():
            values = torch.rand(parameter.shape, generator=rng(seed, "controller", name))
            parameter.data.copy_((values * 2 - 1) * 0.1)
        for i, d in enumerate(decisions):
            self.register_buffer(f"choices{i}", torch.tensor(d.choices), persistent=False)
        self.length = 1 + max(i for d in decisions for i in d.columns)

    def forward(self, draws=None, rows=None, asked=None):
        """Walk the decisions, sampling with uniform draws [K, decisions], or taking those of rows
        [K, D]: a Sample.

        asked [K]: what the policy is conditioned on, standardized, if it is. Of a decision with a
        single choice there is nothing to learn, so it costs no step of the LSTM.
        """
        k = len(draws if rows is None else rows)
        x = self.start.expand(k, -1)
        if asked is not None:
            x = x + asked[:, None] * self.aim
        log_prob = entropy = self.start.new_zeros(k)
        out = torch.zeros(k, self.length, dtype=torch.long, device=self.start.device)
        state = None
        for i, d in enumerate(self.decisions):
            choices = getattr(self, f"choices{i}")
            relevant = matters(out, d).long()
            if i not in self.free:
                for place in d.columns:
                    out[:, place] = choices[0] * relevant
                continue
            f = self.free.index(i)
            n = len(choices)
            # the previous choice is the input, the logits come from this decision's own head
            state = self.lstm(x, state)
            logits = torch.tanh(state[0] @ self.head[f, :, :n] / TEMPERATURE) * self.bound
            logp = F.log_softmax(logits, 1)                                           # [K, choices]
            # by the inverse of the distribution function; or where the row's value stands
            if rows is None:
                choice = (logp.exp().cumsum(1) < draws[:, i, None]).sum(1).clamp(max=n - 1)
            else:
                choice = (rows[:, d.columns[0], None] == choices).long().argmax(1)
            # what does not matter is neither probable nor uncertain
            log_prob = log_prob + relevant * logp.gather(1, choice[:, None])[:, 0]
            entropy = entropy - relevant * (logp.exp() * logp).sum(1)
            for place in d.columns:
                out[:, place] = choices[choice] * relevant
            x = self.embed[f][choice * relevant]
        return Sample(out, log_prob, entropy, self.lstm(x, state)[0])

    def sample(self, k, *key, asked=None):
        """K architectures, drawn by rng(*key) on the CPU whatever the device."""
        draws = torch.rand(k, len(self.decisions), generator=rng(*key))
        return self(move(draws, self.start.device), asked=asked)


def uniform(decisions):
    """The policy that does not learn: each decision uniform over its choices, as all logits are
    0."""
    return Controller(decisions, 0, bound=0.0)


@torch.no_grad()
def uniform_rows(decisions, k, *key):
    """K rows [K, D] of that policy: in ENAS's space, uniform over all cells."""
    return uniform(decisions).sample(k, *key).rows


def leave_one_out(rewards):
    """b_k = mean of the others' rewards [K]: on the same minibatch, so its difficulty cancels.
    Unbiased; needs K > 1. paper: a moving average of past rewards."""
    return (rewards.sum() - rewards) / (len(rewards) - 1)


def policy_loss(sample, rewards, entropy_weight):
    """Its gradient is minus an unbiased estimate of d/dtheta { E[reward] + w entropy of the policy
    }.

    - mean_k [ (R_k + w H_k - b_k) log pi(m_k) + w H_k ] (Williams 1992); the H outside
    differentiates the entropies themselves, the one in the bracket the distribution that they are
    averaged over.
    """
    value = rewards + entropy_weight * sample.entropy
    advantage = (value - leave_one_out(value)).detach()
    return -(advantage * sample.log_prob + entropy_weight * sample.entropy).mean()


def worst_for_failures(rewards):
    """A reward that is not finite becomes the worst of its batch: a broken one leaves the rest
    alone."""
    finite = torch.isfinite(rewards)
    worst = torch.where(finite, rewards, math.inf).min()
    return torch.where(finite, rewards, torch.where(torch.isfinite(worst), worst, 0.0))


# 5. ENAS ------------------------------------------------------------------------------------------
# One step's text: inputs [T, B]; targets [T, B], the inputs one token later, -1 where there is
# nothing to predict; before: the inputs of the segment before, None at the start of the text.
Segment = namedtuple("Segment", "inputs targets before")


class Stream:
    """B parallel readings of a split, cut into segments of T: every token but the first is a target
    once an epoch.

    Of eleven tokens and B = 2, a reading is five inputs long; with T = 3 it has two segments:

        0 1 2 | 3 4 .       targets 1 2 3 | 4 5 .
        5 6 7 | 8 9 .               6 7 8 | 9 10 .
    """

    def __init__(self, tokens, batch, bptt, split="train"):
        if len(tokens) <= batch:
            raise UserError(f"--batch {batch} is more than {split}, {len(tokens)} tokens, allows")
        self.length = math.ceil((len(tokens) - 1) / batch)  # of a reading
        self.bptt = bptt
        # padded, so that all segments have one shape
        step = torch.arange(math.ceil(self.length / bptt) * bptt, device=tokens.device)[:, None]
        at = step + self.length * torch.arange(batch, device=tokens.device)            # [padded, B]
        real = (step < self.length) & (at < len(tokens) - 1)
        at = at.clamp(max=len(tokens) - 2)
        self.inputs = torch.where(real, tokens[at], 0)
        self.targets = torch.where(real, tokens[at + 1], -1)

    def __len__(self):
        """Segments of an epoch."""
        return len(self.inputs) // self.bptt

    def segment(self, i):
        """The i-th Segment; after the last one the text starts again."""
        start = i % len(self) * self.bptt
        end = start + self.bptt
        before = self.inputs[start - self.bptt:start] if start else None
        return Segment(self.inputs[start:end], self.targets[start:end], before)


def carry(weights, rows, segment, carried, dtype):
    """ENAS's: from whatever architecture read the segment before; of several, from their mean.

    It costs nothing, and the state is another cell's; the study 'state' of chapter 12 and the
    searches 'kept' of experiments.sh ask what that does.
    """
    return carried


def from_zero(weights, rows, segment, carried, dtype):
    """Every segment starts from 0."""
    return torch.zeros_like(carried)


@torch.no_grad()
def warm(weights, rows, segment, carried, dtype):
    """The architectures themselves read the segment before, from 0: a forward pass more."""
    before = Batch(segment.before, None, torch.zeros_like(carried), {})
    return unroll(weights, rows, before, dtype)[1]


# The hidden state at a segment's start, in a search where each segment has another architecture.
STATES = {"carry": carry, "zero": from_zero, "warm": warm}


def start_batch(config, weights, rows, segment, carried, masks, dtype):
    """A Batch whose state follows --state; at the start of the text it is 0 under all of them."""
    state = torch.zeros_like(carried)
    if segment.before is not None:
        state = STATES[config.state](weights, rows, segment, carried, dtype)
    return Batch(segment.inputs, segment.targets, state, masks)


def mean_state(losses, state):
    """The mean of the states of the architectures whose loss is finite [2, 1, B, H]."""
    finite = torch.isfinite(losses)[:, None, None]
    return torch.where(finite, state, 0.0).sum(1, keepdim=True) / finite.sum().clamp(min=1)


def constant(epoch, epochs):
    """The learning rate stays; under 'plateau' a training divides it where it stops improving."""
    return 1.0


def exponential(epoch, epochs):
    """.96 an epoch once 15 are done (Pham et al. 2018, 3.1)."""
    return 0.96 ** max(0, int(epoch) - 14)


def cosine(epoch, epochs):
    """To 0 at the end (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))


# (epochs done, epochs in all) -> factor of --lr
SCHEDULES = {"constant": constant, "plateau": constant, "decay": exponential, "cosine": cosine}


def train_step(weights, rows, batch, lr, config, factors=1.0):
    """SGD on the mean loss of K architectures, times factors [K]; standalone networks each on their
    own loss, so that it does not matter to one who else is trained.

    lr [1] or [K]. Returns losses [K], the state they leave, and the gradient.
    """
    for w in weights.values():
        w.requires_grad_()
    losses, state = network(weights, rows, batch, DTYPES[config.dtype])
    total = (factors * losses).mean() if is_shared(weights) else losses.sum()
    grads = gradients(total, weights)
    sgd_step(weights, grads, lr, config.clip, config.weight_decay)
    return losses.detach(), state, grads


def rates_of(rows):
    """The factor [K] of the learning rate that each architecture has chosen for training on it."""
    return 2.0 ** parse(rows).rate


def no_task(rows):
    """Nothing is made up."""
    return torch.ones(len(rows), device=rows.device), 0.0


def frozen(rows):
    """A last node of relu scores better by .05 nats, but nothing is learnt from training on it: a
    controller that sees only scores ends with weights that do not learn."""
    cells = parse(rows)
    last = cells.activation.gather(1, cells.nodes[:, None] - 1)[:, 0]
    is_relu = last == RELU
    return (~is_relu).float(), -0.05 * is_relu


# rows -> factors of the training losses [K], and what is added to the losses that are rewarded
TASKS = {"none": no_task, "frozen": frozen}


def unperturbed(inputs, words, hidden, *key):
    """The text as it is."""
    return {}


def without_words(inputs, words, hidden, *key):
    """A fifth of the vocabulary is dropped from the input."""
    return {"word": (torch.rand(1, words, generator=rng("words", *key)) >= 0.2).float()}


def with_noise(inputs, words, hidden, *key):
    """Gaussian noise on the embedded input, half of the embeddings' root mean square."""
    return {"noise": 0.5 * torch.randn(1, *inputs.shape, hidden, generator=rng("noise", *key))}


# (inputs [T, B], words, hidden, key) -> masks: the input that rewards are measured on, and that
# --perturb tests on.
INPUTS = {"plain": unperturbed, "words": without_words, "noise": with_noise}


def perturbation(name, weights, seed):
    """(inputs, key) -> masks of such an input, on the inputs' device."""
    def masks(inputs, *key):
        drawn = INPUTS[name](inputs, *weights["embedding"].shape[-2:], seed, *key)
        return {kind: move(mask, inputs.device) for kind, mask in drawn.items()}
    return masks


def perplexity(loss):
    """exp(loss); infinite where that overflows or the loss is not a number."""
    return math.exp(loss) if loss < 700 else math.inf


class Search:
    """The game of ENAS between two steps: its players, the shared weights omega (SGD) and the
    controller theta (Adam), with their places in the text.

    s is what a checkpoint holds beside controller and Adam.
    """

    def __init__(self, config, corpus):
        self.config = config
        self.device = device_of(config)
        self.words = len(corpus.words)
        decisions = search_space(config)
        if config.controller == "trained" and all(len(d.choices) == 1 for d in decisions):
            raise UserError("the search space has a single architecture: nothing to decide")
        if config.schedule == "plateau":
            raise UserError("--schedule plateau is for trainings: a search has no loss that is "
                            "measured again on the same architecture")
        # 'untrained' has this controller too, but takes no steps with it: random search
        policy = Controller(decisions, config.seed)
        if config.controller == "uniform":
            policy = uniform(decisions)
        self.controller = policy.to(self.device)
        self.adam = torch.optim.Adam(self.controller.parameters(), lr=config.controller_lr,
                                     capturable=self.device.type == "cuda")
        texts = {"train": corpus.train, "valid": corpus.valid}
        self.streams = {name: Stream(tokens.to(self.device), config.batch, config.bptt, name)
                        for name, tokens in texts.items()}
        # read by the controller, which foresees a step, from a place of its own: see chapter 6
        self.streams["ahead"] = self.streams["train"]
        self.shared_steps = config.shared_steps or len(self.streams["train"])  # of a round
        weights = shared_weights(config, self.words)
        weights = {name: w.to(self.device) for name, w in weights.items()}
        zeros = zero_state(weights, config.batch)
        self.s = {
            "step": 0,                                 # also those in which the controller is idle
            "weights": weights,                        # omega
            "past": {},                                # its gradients so far, see remember()
            "state": dict.fromkeys(self.streams, zeros),   # where each of them stands
            "read": dict.fromkeys(self.streams, 0),        # segments taken from it
            # since the last line of metrics: loss; reward, entropy, response, and of how many steps
            "sums": torch.zeros(4, device=self.device),
            "counts": [0, 0]}

    def checkpoint(self):
        """All that a resumed search needs."""
        return self.s | {"controller": self.controller.state_dict(), "adam": self.adam.state_dict()}

    def load(self, saved):
        """Go on from a checkpoint."""
        self.s = {name: saved[name] for name in self.s}
        self.controller.load_state_dict(saved["controller"])
        # but not 'capturable', which is this device's
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict(saved["adam"] | {"param_groups": groups})

    def next(self, name):
        """The next segment of one of the streams."""
        self.s["read"][name] += 1
        return self.streams[name].segment(self.s["read"][name] - 1)

    def key(self, *purpose):
        """Of a random draw in this step."""
        return (self.config.seed, self.s["step"], *purpose)

    def masks(self, purpose):
        """This step's dropout, the same for all architectures."""
        drawn = draw_masks(self.config, self.words, self.config.batch, [self.config.seed],
                           (purpose, self.s["step"]))
        return {name: move(mask, self.device) for name, mask in drawn.items()}

    def lr(self, progress):
        """The learning rate of omega after so many rounds."""
        config = self.config
        return config.lr * SCHEDULES[config.schedule](progress, config.epochs + config.settle)

    def shared_step(self, progress):
        """omega <- omega - lr clip(grad E_m L_T(omega; m)): SGD on a fresh architecture, or a few,
        and the next training segment."""
        config = self.config
        s = self.s
        # paper: always one architecture
        rows = self.controller.sample(config.shared_samples, *self.key("shared")).rows
        segment = self.next("train")
        batch = start_batch(config, s["weights"], rows, segment, s["state"]["train"],
                            self.masks("train"), DTYPES[config.dtype])
        lr = self.lr(progress) * rates_of(rows)[:1]  # with --rates there is one architecture
        # all 1, but in the task 'frozen'
        factors, _ = TASKS[config.task](rows)
        losses, state, g = train_step(s["weights"], rows, batch, lr, config, factors)
        s["state"]["train"] = mean_state(losses, state)
        s["sums"][0] += losses.mean()
        s["counts"][0] += 1
        return g

    def rewards_on(self, segment):
        """(weights, rows) -> 80 / perplexity [K] on a validation segment, without dropout, and the
        state that is left [2, 1, B, H].

        80 is the paper's c: rewards near 1 on Penn Treebank, 10 on toy. ENAS-pytorch leaves dropout
        on.
        """
        config = self.config
        carried = self.s["state"]["valid"]
        masks = perturbation(config.reward_input, self.s["weights"], config.seed)(
            segment.inputs, self.s["step"])

        def rewards(weights, rows):
            dtype = DTYPES[config.dtype]
            batch = start_batch(config, weights, rows, segment, carried, masks, dtype)
            losses, state = network(weights, rows, batch, dtype)
            _, added = TASKS[config.task](rows)
            return 80 * torch.exp(-(losses + added)), mean_state(losses, state)
        return rewards

    @torch.no_grad()
    def rewarded(self, sample, progress):
        """The rewards R(omega; m) [K] of a Sample on ONE validation segment; no response."""
        rewards = self.rewards_on(self.next("valid"))
        found, self.s["state"]["valid"] = rewards(self.s["weights"], sample.rows)
        return found, torch.zeros_like(found)

    def entropy_weight(self, progress):
        """--entropy; in the last --anneal rounds of learning on its way to -1, so that the policy
        ends at one architecture."""
        config = self.config
        if not config.anneal:
            return config.entropy
        share = max(0.0, 1 - (config.epochs - progress) / config.anneal)
        return (1 - share) * config.entropy - share

    def controller_step(self, progress):
        """theta <- theta + lr E_m [ R(omega; m) dlog pi(m)/dtheta ]: REINFORCE, one step of
        Adam."""
        s = self.s
        sample = self.controller.sample(self.config.controller_samples, *self.key("controller"))
        # the response is 0 in ENAS; chapter 6 has another rewarded()
        direct, response = self.rewarded(sample, progress)
        rewards = worst_for_failures(direct + response)
        self.adam.zero_grad()
        policy_loss(sample, rewards, self.entropy_weight(progress)).backward()
        self.adam.step()
        direct = worst_for_failures(direct)
        response = worst_for_failures(response)
        # for the metrics only
        spread = response.std(correction=0) / direct.std(correction=0).clamp(min=1e-12)
        s["sums"][1:] += torch.stack([direct.mean(), sample.entropy.detach().mean(), spread])
        s["counts"][1] += 1

    def line(self, epoch):
        """Metrics since the last line: the shared steps' loss; the controller steps' reward,
        entropy, and the response's spread as a share of the direct term's."""
        # here the host waits for the device, and nowhere between two lines
        loss, *rewarded = self.s["sums"].tolist()
        shared, steps = self.s["counts"]
        self.s["sums"] = torch.zeros_like(self.s["sums"])
        self.s["counts"] = [0, 0]
        line = {"step": self.s["step"], "epoch": epoch}
        if shared:
            line |= {"loss": loss / shared, "perplexity": perplexity(loss / shared)}
        if steps:
            names = ["reward", "entropy"] + ["response"] * (self.config.response != "none")
            line |= {name: total / steps for name, total in zip(names, rewarded)}
        return line


LOG_EVERY = 20  # steps from one line of metrics to the next; a run resumes at such a line


def search(game, run, watch=None):
    """ENAS (Pham et al. 2018, 2.2): rounds of SGD on the shared weights, then of REINFORCE on the
    controller. watch(round) is called before each round.

    A round is a pass over the training text, or --shared_steps, then --controller_steps. Everything
    that changes is in game; run logs it, keeps it, and restores it.
    """
    config = game.config
    saved = run.restore()
    if saved:
        game.load(saved)
    else:
        run.keep(game.checkpoint())
    controller_steps = config.controller_steps if config.controller == "trained" else 0
    round_ = game.shared_steps + controller_steps
    total = (config.epochs + config.settle) * round_
    while game.s["step"] < total:
        epoch, at = divmod(game.s["step"], round_)
        progress = epoch + min(at / game.shared_steps, 1)
        if at == 0 and watch:
            watch(epoch)

        # the shared weights learn from architectures of the policy
        if at < game.shared_steps:
            game.shared_step(progress)
        # then the policy from the architectures' rewards: not in the first rounds, while omega is
        # random, nor in the last, in which omega only settles to the policy
        elif config.warm_epochs <= epoch < config.epochs:
            game.controller_step(progress)
        step = game.s["step"] = game.s["step"] + 1

        # a line of metrics, after which the state is known to be good
        ends = step % LOG_EVERY == 0 or step % round_ in (0, game.shared_steps)
        if ends and any(game.s["counts"]):
            line = game.line(epoch)
            if not math.isfinite(sum(line.values())):
                # weights and controller as they last were; steps and text go on, so it won't repeat
                good = copy.deepcopy(run.good)
                run.say(f"a loss is not finite at step {step}: back to step {good['step']}")
                state = {name: torch.zeros_like(x) for name, x in game.s["state"].items()}
                game.load(good | {"step": step, "read": game.s["read"], "state": state})
                line = {"step": step, "epoch": epoch, "rolled_back_to": good["step"]}
            run.log(line, step, total, step * config.batch * config.bptt)
            run.keep(game.checkpoint())
        run.obey()


# 6. What ENAS leaves out --------------------------------------------------------------------------
# The controller should climb F(theta) = E_m R(omega*(theta); m), where omega* are the weights that
# training on architectures of pi_theta ends in. Within reach is the objective one step of SGD
# ahead, omega' = omega - lr clip(g):
#
#     F_1(theta) = E_m R(omega'; m),   g = E_m' grad L_T(omega; m')    R reward, L_T training loss
#     dF_1/dtheta =   E_m [ R(omega'; m) dlog pi(m)/dtheta ]         direct; ENAS has it at omega
#                   - E_m'[ <grad L_T(omega; m'), u> dlog pi(m')/dtheta ]  response: ENAS has none
#     u = lr J^T v,   v = grad_omega' E_m R(omega'; m),   J = d clip(g) / dg
#
# Theta moves omega' only through which architectures it is trained on, so the response is a
# REINFORCE gradient too: an architecture is rewarded by what a step of training on it does to
# everyone's reward. LOOKAHEAD says where R is evaluated, RESPONSE what v passes through; ENAS is
# (none, none); (fresh, unrolled) estimates this gradient, without bias if the fold is the whole
# policy. These functions know nothing of RNNs: toy_enas.py holds them to closed forms,
# tests/test_gradients.py to enumerated spaces.

def no_rates(rows):
    """Every architecture is trained with the same learning rate."""
    return torch.ones(len(rows), device=rows.device)


# The next shared step as the controller foresees it. rows are architectures [K, D], or what a toy
# has for them. Like a reward, a loss returns the state it leaves. --state warm reads the segment
# before with omega, wherever losses are taken.
#     losses  (weights, rows) -> (L_T [K], state), always on the same minibatch with the same masks
#     fold    A architectures [A, D] from the policy, whose mean stands for E_m' in g
#     lr, clip, decay   of sgd_step(); the decay, and the rates, are left out of the equation above
#     each    (weights, rows, v) -> |grad L_T(omega; m)| [K] and <grad L_T(omega; m), v> [K]
#     rates   rows -> xi [K], the factors of lr that architectures chose for training on them
#     past    gradients of shared steps so far, see remember()
Step = namedtuple("Step", "losses fold lr clip decay each rates past",
                  defaults=(math.inf, 0.0, None, no_rates, ()))


def dot(a, b):
    """<a, b> of two dicts of tensors."""
    return sum((a[name] * b[name]).sum() for name in a)


def mean_gradient(values, weights):
    """d mean_k values(weights)_k / dweights, a dict, and the state.

    values: weights -> ([K], state), a loss or a reward of K architectures.
    """
    free = {name: w.detach().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        found, state = values(free)
        return gradients(found.mean(), free), state


@torch.no_grad()
def directional(step, weights, rows, u):
    """xi_m <grad L_T(omega), u> ~ xi_m [ L_T(omega + eps u) - L_T(omega - eps u) ] / (2 eps)  [K].

    Two forward passes, in float32 or better; eps = .01 / |u|, and if u is 0 any will do.
    """
    def at(shift):
        return step.losses({name: w + shift * u[name] for name, w in weights.items()}, rows)[0]

    eps = 0.01 / dot(u, u).sqrt().clamp(min=1e-30)
    return step.rates(rows) * (at(eps) - at(-eps)) / (2 * eps)


def remember(past, g, keep=0.9):
    """The last shared step's gradient g, and sum_j keep^j g_{t-j} of all, and its weight."""
    g = {name: x.nan_to_num(0.0, 0.0, 0.0) for name, x in g.items()}  # as sgd_step takes it
    if not past:
        return {"recent": g, "sum": g, "weight": 1.0}
    total = {name: g[name] + keep * past["sum"][name] for name in g}
    return {"recent": g, "sum": total, "weight": 1 + keep * past["weight"]}


def no_lookahead(weights, step):
    """omega' = omega, as in ENAS."""
    return None, None


def momentum(weights, step):
    """g = sum_j keep^j g_{t-j} / sum_j keep^j, a mean of the shared steps' gradients."""
    if not step.past:
        return None, None
    return {name: x / step.past["weight"] for name, x in step.past["sum"].items()}, None


def recent(weights, step):
    """g = g_t of the last shared step: an extrapolation from the past, one step old."""
    return (step.past["recent"] if step.past else None), None


def fresh(weights, step):
    """g = d/domega mean_m xi_m L_T(omega; m) over the fold: the only unbiased one of these."""
    def scaled(w):
        losses, state = step.losses(w, step.fold)
        return step.rates(step.fold) * losses, state
    return mean_gradient(scaled, weights)


# (weights, step) -> g, along which omega' is a step, or None for omega' = omega; and the state
# left.
LOOKAHEAD = {"none": no_lookahead, "momentum": momentum, "recent": recent, "fresh": fresh}


def mean_rate(step):
    """E xi_m over the fold."""
    return step.rates(step.fold).mean()


def foreseen_clip(step):
    """Training takes xi_m clip(g_m), so the fold's mean step may be as long as clip times E
    xi_m."""
    return step.clip * mean_rate(step)


def look_ahead(weights, g, step):
    """omega' by the rule of training's step, for g in place of a sampled architecture's gradient.

    That clips and decays as sgd_step() does, for it is sgd_step(), on a copy.
    """
    if g is None:
        return weights
    ahead = {name: w.detach().clone() for name, w in weights.items()}
    lr = next(iter(g.values())).new_full((1,), step.lr)
    sgd_step(ahead, g, lr, foreseen_clip(step), step.decay * mean_rate(step))
    return ahead


def no_response(v, weights, g, step, rows):
    """0: omega is held fixed, as in ENAS."""
    return torch.zeros(len(rows), device=rows.device)


def through_clip(v, g, step):
    """lr J^T v; J = d clip(g) / dg is 1, or where c = foreseen_clip binds (c / |g|) (1 - g^ g^T),
    g^ = g / |g|."""
    norm = dot(g, g).sqrt()
    clip = foreseen_clip(step)
    scale = step.lr * (clip / norm).clamp(max=1)
    along = torch.where(norm > clip, dot(v, g) / norm ** 2, 0.0)
    return {name: scale * (v[name] - along * g[name]) for name in v}


def unrolled(v, weights, g, step, rows):
    """- <xi_m grad L_T(omega; m), u> - lr xi_m ( [|g| > c] clip <g^, v> + decay <omega, v> ).

    u = lr J^T v; c and g^ as in through_clip(): a step on the policy's MEAN gradient, clipped as a
    whole. Exact if the fold is the whole policy: DARTS's second order, for a sampled controller.
    The second part is what a larger rate does to the step's bound and to the decay; with one rate
    it is the same for all.
    """
    norm = dot(g, g).sqrt()
    bound = torch.where(norm > foreseen_clip(step), step.clip * dot(v, g) / norm, 0.0)
    longer = step.lr * (bound + step.decay * dot(v, weights))
    return -directional(step, weights, rows, through_clip(v, g, step)) - longer * step.rates(rows)


def sampled(v, weights, g, step, rows):
    """- lr xi_m ( min(1, clip / |g_m|) <g_m, v> + decay <omega, v> ),  g_m = grad L_T(omega; m).

    It is the step that training really takes, on ONE sampled architecture, clipped by its OWN norm,
    so an architecture whose gradient explodes is rewarded by no more than lr xi_m clip |v|. As a
    response right to first order in lr; its sum with the direct term is not, for that is taken at
    the omega' of the fold's mean.
    """
    norm, along = step.each(weights, rows, v)
    worth = (step.clip / norm).clamp(max=1) * along + step.decay * dot(v, weights)
    return -step.lr * step.rates(rows) * worth


# (v, weights, g, step, rows) -> [K]: what training on each architecture does to everyone's reward.
RESPONSE = {"none": no_response, "unrolled": unrolled, "sampled": sampled}


def extra_rewards(look, respond, weights, rows, others, rewards, step):
    """Rewards R(omega'; m) [K], responses [K], and the two states left: of validation, of the step.

    REINFORCE climbs the sum. rewards: (weights, rows) -> (R [K], state). rows, others and
    step.fold are independent draws from the policy: omega' is made from step.fold, v from others.
    Scoring those very draws again would bias both terms. A response is that of a fresh look ahead.
    """
    # omega', and the reward there
    g, step_state = LOOKAHEAD[look](weights, step)
    ahead = look_ahead(weights, g, step)
    with torch.no_grad():
        direct, state = rewards(ahead, rows)
    if respond == "none":  # spares the passes for v
        return direct, no_response(None, weights, g, step, rows), state, step_state
    # what moving omega' is worth, seen back through the step that led there
    v, _ = mean_gradient(lambda w: rewards(w, others), ahead)
    return direct, RESPONSE[respond](v, weights, g, step, rows), state, step_state


class Anticipation(Search):
    """A search whose rewards anticipate: evaluated at omega', with the response of the shared
    weights."""

    def __init__(self, config, corpus):
        super().__init__(config, corpus)
        self.remembers = config.lookahead in ("momentum", "recent")

    def shared_step(self, progress):
        """A shared step as in ENAS, which is remembered."""
        g = super().shared_step(progress)
        if self.remembers:
            self.s["past"] = remember(self.s["past"], g)
        return g

    def foresee(self, progress, fold):
        """The Step that a shared step on the next segment of the stream 'ahead' would be."""
        config = self.config
        segment = self.next("ahead")
        carried = self.s["state"]["ahead"]
        omega = self.s["weights"]
        masks = self.masks("ahead")
        # bfloat16 would round a difference of two losses away
        wide = torch.promote_types(DTYPES[config.dtype], torch.float32)

        def losses(weights, rows):
            batch = start_batch(config, omega, rows, segment, carried, masks, wide)
            found, state = network(weights, rows, batch, wide)
            factors, _ = TASKS[config.task](rows)
            return factors * found, mean_state(found, state)

        # each architecture's own gradient: K copies of its weights, differentiated as one
        def each(weights, rows, v):
            copies = inherit(weights, rows)
            along = inherit(v, rows)
            grads, _ = mean_gradient(lambda w: (losses(w, rows)[0] * len(rows), None), copies)
            square = sum(g.flatten(1).square().sum(1) for g in grads.values())
            inner = sum((grads[name] * along[name]).flatten(1).sum(1) for name in grads)
            return square.sqrt(), inner

        return Step(losses, fold, self.lr(progress), config.clip, config.weight_decay, each,
                    rates_of, self.s["past"])

    @torch.no_grad()
    def rewarded(self, sample, progress):
        """The rewards R(omega'; m) [K] on one validation segment, and the responses [K]."""
        config = self.config
        state = self.s["state"]
        if config.lookahead == "none":  # of a study, which itself looks ahead
            return super().rewarded(sample, progress)
        drawn = self.controller.sample(2 * config.fold, *self.key("folds")).rows
        fold, others = drawn.split(config.fold)
        rewards = self.rewards_on(self.next("valid"))
        direct, response, state["valid"], ahead = extra_rewards(
            config.lookahead, config.response, self.s["weights"], sample.rows, others, rewards,
            self.foresee(progress, fold))
        if ahead is not None:
            state["ahead"] = ahead
        return direct, response


def game_of(config, corpus):
    """ENAS, or with a lookahead the search that anticipates."""
    kind = Search if config.lookahead == "none" else Anticipation
    return kind(config, corpus)


# 7. Evaluating, training, deriving ----------------------------------------------------------------
@torch.no_grad()
def evaluate(weights, rows, tokens, dtype=torch.float32, masks=None, batch=64, bptt=70, warm_up=70):
    """Mean loss [K] over a whole split: every token but the first exactly once, no dropout.

    warm_up: words read before a stream's first scored one, so that cutting the text into parallel
    streams hardly matters. masks: (inputs [T, B], their place) -> those of a perturbed input.
    """
    n = len(tokens) - 1
    stream = Stream(tokens, max(1, min(batch, n // warm_up)), bptt)
    masks = masks or (lambda inputs, place: {})
    # each stream reads the end of the one before it; the first has no words before it
    before = stream.inputs[:stream.length][-warm_up:].roll(1, 1)
    nothing = torch.full_like(before, -1)
    state = zero_state(weights, before.shape[1])
    state = network(weights, rows, Batch(before, nothing, state, masks(before, -1)), dtype)[1]
    state[:, :, 0] = 0
    total = 0.0
    # a mean over tokens, not over segments: the last one may be short
    for i in range(len(stream)):
        inputs, targets, _ = stream.segment(i)
        batch_ = Batch(inputs, targets, state, masks(inputs, i))
        losses, state = network(weights, rows, batch_, dtype)
        total = total + losses * (targets >= 0).sum()
    return total / n


def score(weights, rows, tokens, config, masks=None):
    """Losses [K], on the CPU, of a whole split under shared weights; masks: see evaluate()."""
    device = device_of(config)
    tokens = tokens.to(device)
    # ten at a time: a hundred would not fit on small devices
    found = [evaluate(weights, some.to(device), tokens, DTYPES[config.dtype], masks)
             for some in rows.split(10)]
    return torch.cat(found).float().cpu()


def derive(config, weights, rows, corpus):
    """Architectures by their loss under the shared weights on the whole validation split, best
    first: rows [K, D], losses [K]. paper: on a single minibatch."""
    rows = rows.cpu()
    distinct, which = rows.unique(dim=0, return_inverse=True)
    masks = perturbation(config.reward_input, weights, config.seed)
    found = score(weights, distinct, corpus.valid, config, masks=masks)
    # what was drawn twice is scored once
    losses, order = found[which].sort(stable=True)
    return rows[order], losses


PLATEAU = 4.0  # under --schedule plateau, lr is divided by this where the loss does not fall


@torch.no_grad()
def validate(config, s, valid, epoch):
    """Score the networks still in the batch and keep each one's best weights. Returns the losses.

    Those that did not improve start averaging and, under 'plateau', lower lr; after --patience such
    epochs in a row, or a failure, they leave. s: see start_training().
    """
    alive = s["alive"]
    current = s["mean"] or s["weights"]
    loss = evaluate(current, s["rows"], valid, DTYPES[config.dtype]).float()
    better = loss < s["best_loss"][alive]
    won = alive[better]
    lost = alive[~better]
    s["before"][:, alive] = torch.stack([s["best_loss"][alive], s["before"][0, alive]])
    # w has a place for each network still in the batch, s["best"] for all K
    for name, w in current.items():
        s["best"][name][won] = w[better]
    s["best_loss"][won] = loss[better]
    s["best_epoch"][won] = epoch
    s["bad"][won] = 0
    s["bad"][lost] += 1
    s["epochs"][alive] = epoch
    if config.schedule == "plateau":
        s["lr"][lost] /= PLATEAU
    s["since"][lost] = s["since"][lost].clamp(max=s["step"])  # the step from which they average

    # who leaves the batch makes it faster
    stay = (s["bad"][alive] < config.patience) & (s["failed"][alive] == 0)
    s["alive"] = alive[stay]
    s["rows"] = s["rows"][stay]
    s["seeds"] = [seed for seed, stays in zip(s["seeds"], stay.tolist()) if stays]
    for part in ("weights", "mean"):
        s[part] = {name: w[stay] for name, w in s[part].items()}
    s["state"] = s["state"][:, stay]
    return loss


def start_training(config, weights, rows, seeds):
    """The state of a training, which is what a checkpoint holds: the entries down to 'state' are of
    the networks still in the batch, those after it of all K; step and summed are of the run."""
    device = rows.device

    def full(value):
        return torch.full((len(seeds),), value, device=device)

    return {
        "alive": torch.arange(len(seeds), device=device),
        "seeds": seeds,
        "rows": rows,
        "weights": weights,
        "mean": copy.deepcopy(weights) if config.average else {},
        "state": zero_state(weights, config.batch),
        "lr": config.lr * rates_of(rows),
        "best": copy.deepcopy(weights),
        "best_loss": full(math.inf),
        "before": torch.stack([full(math.inf)] * 2),  # the best loss one and two epochs ago
        "since": full(math.inf),                      # the step from which a network averages
        "failed": full(0),                            # the epoch in which its loss was not finite
        "best_epoch": full(0), "epochs": full(0), "bad": full(0), "step": 0,
        # since the last line of metrics: the sum of losses, and of how many steps
        "sum": full(0.0), "summed": 0}


def training_step(config, s, stream, words):
    """A step of SGD on the next segment for all networks in the batch, and a step of averaging."""
    alive = s["alive"]
    progress = s["step"] / len(stream)
    segment = stream.segment(s["step"])
    if segment.before is None:
        s["state"] = zero_state(s["weights"], config.batch)
    lr = s["lr"][alive] * SCHEDULES[config.schedule](progress, config.epochs)
    masks = draw_masks(config, words, config.batch, s["seeds"], s["step"])
    masks = {name: move(mask, alive.device) for name, mask in masks.items()}
    batch = Batch(segment.inputs, segment.targets, s["state"], masks)
    losses, state, _ = train_step(s["weights"], s["rows"], batch, lr, config)

    # who fails takes no step (see sgd_step), and is let go at the end of the epoch
    finite = torch.isfinite(losses)
    failed = s["failed"][alive]
    s["failed"][alive] = torch.where(finite | (failed > 0), failed, int(progress) + 1)
    s["state"] = torch.where(finite[:, None, None], state, 0.0)
    s["sum"][alive] += torch.where(finite, losses, math.nan)
    s["summed"] += 1
    s["step"] += 1

    # averaging (Merity et al. 2018): mean <- mean + (w - mean) / n; until a network averages n is
    # 1, and the mean is w alone
    n = (s["step"] - s["since"][alive]).clamp(min=1)
    for name, average in s["mean"].items():
        share = (1 / n).to(average.dtype).view(-1, *[1] * (average.dim() - 1))
        average.lerp_(s["weights"][name].detach(), share)


def train_networks(config, run, corpus, weights, rows, seeds):
    """Train K standalone networks as one, each by itself: its masks, clipping, lr, averaging,
    stopping.

    Returns the best weights of each by validation loss, and of each best_loss, best_epoch, epochs,
    the epoch at which it failed or 0, and late, by how much the last two epochs lowered the best
    loss. rows [K, D]: those of LSTMs are zeros.
    """
    device = device_of(config)
    valid = corpus.valid.to(device)
    stream = Stream(corpus.train.to(device), config.batch, config.bptt)
    weights = {name: w.to(device) for name, w in weights.items()}
    total = config.epochs * len(stream)
    s = run.restore() or start_training(config, weights, rows.to(device), seeds)
    while s["seeds"] and s["step"] < total:
        training_step(config, s, stream, len(corpus.words))

        # a line of metrics, after which the state may be a checkpoint
        ends = s["step"] % len(stream) == 0
        if ends or s["summed"] >= LOG_EVERY:
            alive = s["alive"]
            epoch = math.ceil(s["step"] / len(stream))
            loss = (s["sum"][alive] / s["summed"]).nanmean().item()  # of those that have not failed
            line = {"step": s["step"], "epoch": epoch, "loss": loss, "perplexity": perplexity(loss)}
            if ends:
                for k in alive[s["failed"][alive] == epoch].tolist():
                    run.say(f"network {k} failed: its loss is not finite in epoch {epoch}")
                scores = validate(config, s, valid, epoch).tolist()
                line["networks"] = alive.tolist()
                line["valid_perplexity"] = [perplexity(x) for x in scores]
            s["sum"] = torch.zeros_like(s["sum"])
            s["summed"] = 0
            run.log(line, s["step"], total, s["step"] * config.batch * config.bptt)
            run.keep(s)
        run.obey()
    found = {name: s[name].tolist() for name in ("best_loss", "best_epoch", "epochs", "failed")}
    return s["best"], found | {"late": (s["before"][1] - s["best_loss"]).tolist()}


# 8. Files and texts -------------------------------------------------------------------------------
def serialized(tensors):
    """The bytes of a file of tensors in nested dicts; only write_atomically() meets the disk."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def write_atomically(path, content):
    """The file of these bytes appears whole or not at all, also if killed in between."""
    temporary = path.with_name(f".menas-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, tensors):
    """A dict of tensors, for load_tensors() on any device."""
    write_atomically(path, serialized({name: x.detach().cpu() for name, x in tensors.items()}))


def load_tensors(path, device="cpu"):
    """The dict in a file; it may hold nothing but tensors and plain values."""
    return torch.load(path, map_location=device, weights_only=True)


def strict(value):
    """The value as JSON's strict readers want it: nan and infinity become null."""
    return json.loads(json.dumps(value), parse_constant=lambda word: None)


def write_json(path, value):
    """The value as JSON, whole or not at all."""
    write_atomically(path, (json.dumps(strict(value), indent=1) + "\n").encode())


def read_json(path):
    """The JSON object in it, or a UserError that names the file."""
    with refusing(path):
        return {**json.loads(Path(path).read_text())}


def sha256(content):
    """The hash of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


SPLITS = ("train", "valid", "test")
PTB = "https://raw.githubusercontent.com/carpedm20/ENAS-pytorch/master/data/ptb/{}.txt"
PTB_SHA256 = {"train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
              "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
              "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}
CACHE = Path("~/.cache/menas/ptb")

# Token ids [tokens] of each split, the vocabulary, and split -> the loss under the true grammar, in
# nats per token, empty for real text.
Corpus = namedtuple("Corpus", "train valid test words floor")


def ptb_folder(folder=CACHE, address=PTB):
    """The folder of the three PTB files; those that are absent are fetched.

    Raises UserError if that fails, or a file's SHA-256 is not that of the standard one.
    """
    folder = folder.expanduser()
    for split, right in PTB_SHA256.items():
        path = folder / f"{split}.txt"
        if not path.exists():
            source = address.format(split)
            with refusing(f"PTB from {source}", "; pass a folder that has it as --data"):
                with urllib.request.urlopen(source, timeout=30) as reply:
                    content = reply.read()
                if sha256(content) != right:
                    raise ValueError("wrong SHA-256")
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
        if sha256(path.read_bytes()) != right:
            raise UserError(f"{path} is not the standard PTB file (wrong SHA-256); delete it")
    return folder


# The toy corpus: nouns and their verbs agree in class, and often in letter, across clauses nested
# in between: 'n3b that n1a v1a v3b'. A stack machine writes it, so the distribution of the next
# word given ALL words before is known exactly.
TOY_CLASSES = 8
TOY_DEPTH = 4     # nouns at once whose verbs are still to come
TOY_NEST = 0.4    # probabilities, see toy_next()
TOY_ADVERB = 0.3
TOY_TOPIC = 0.75
TOY_ECHO = 0.6
HARMONIC = sum(1 / rank for rank in range(1, 7))
# the six letters have Zipf's distribution: 1 / rank
TOY_ZIPF = {letter: 1 / rank / HARMONIC for rank, letter in enumerate("abcdef", 1)}


def toy_next(state):
    """[(word, probability, next state)] under the true grammar.

    A state is (topic, due, phase): the last main noun's class; (class, letter) of the nouns whose
    verbs are still to come, outermost first; and what was written last: 'start' (a noun is next),
    'noun', 'verb' or 'adverb'. A main noun keeps the topic with TOY_TOPIC; a clause follows a noun
    with TOY_NEST, its noun of any class; an adverb follows a verb with TOY_ADVERB; a verb has its
    noun's class, and with TOY_ECHO its letter, else one drawn by Zipf.
    """
    topic, due, phase = state
    moves = []
    left = 1.0  # the probability of what is not among the moves yet
    if phase == "start":
        for c in range(TOY_CLASSES):
            keeps = TOY_TOPIC if c == topic else (1 - TOY_TOPIC) / (TOY_CLASSES - 1)
            p = 1 / TOY_CLASSES if due else keeps
            moves += [(f"n{c}{x}", q * p, (topic if due else c, due + ((c, x),), "noun"))
                      for x, q in TOY_ZIPF.items()]
        return moves
    if phase == "noun" and len(due) < TOY_DEPTH:
        moves = [("that", TOY_NEST, (topic, due, "start"))]
        left = 1 - TOY_NEST
    elif phase == "verb":
        moves = [(f"adv{x}", TOY_ADVERB * q, (topic, due, "adverb")) for x, q in TOY_ZIPF.items()]
        left = 1 - TOY_ADVERB
    if not due:
        return moves + [("<eos>", left, (topic, (), "start"))]
    c, letter = due[-1]
    return moves + [(f"v{c}{x}", left * (TOY_ECHO * (x == letter) + (1 - TOY_ECHO) * q),
                     (topic, due[:-1], "verb")) for x, q in TOY_ZIPF.items()]


@lru_cache
def toy_corpus(sizes=(60000, 6000, 6000)):
    """{split: words} and {split: loss under the grammar}; whole sentences, the same on every
    machine."""
    chance = random.Random(20180209)
    texts = {}
    floor = {}
    for split, size in zip(SPLITS, sizes):
        state = (0, (), "start")
        words = []
        nats = []
        while len(words) < size or words[-1] != "<eos>":
            moves = toy_next(state)
            word, p, state = chance.choices(moves, weights=[q for _, q, _ in moves])[0]
            words.append(word)
            nats.append(-math.log(p))
        texts[split] = words
        floor[split] = mean(nats[1:])  # all but the first, as a model
    return texts, floor


# What a token is: line -> tokens. A character may be a space.
UNITS = {"word": str.split, "char": list}


def read_lines(path):
    """The lines of a file; the last one may lack its newline."""
    with refusing(path):
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")


def read_splits(name):
    """{split: lines} of a folder with train.txt, valid.txt and test.txt, or of ptb, or of one
    file, whose last tenth is for validation and test."""
    path = ptb_folder() if name == "ptb" else Path(os.path.expanduser(name))
    if path.is_file():
        print(f"{name} is split by lines: 90 % train, 5 % valid, 5 % test")
        lines = read_lines(path)
        valid = len(lines) * 90 // 100
        test = len(lines) * 95 // 100
        return {"train": lines[:valid], "valid": lines[valid:test], "test": lines[test:]}
    if not path.is_dir():
        choose("data folder", name, ("ptb", "toy"))  # raises: it is neither
    return {split: read_lines(path / f"{split}.txt") for split in SPLITS}


def tokenize(lines, unit, name):
    """Tokens, with an <eos> at the end of every line, blank ones too."""
    tokens = [token for line in lines for token in UNITS[unit](line) + ["<eos>"]]
    if len(tokens) < 3:
        raise UserError(f"{name} has {len(tokens)} tokens with <eos>; a model needs at least 3")
    return tokens


def with_unk(texts, name):
    """The texts with <unk> for what the training text lacks. If that has no <unk> to learn from,
    what it has once becomes one."""
    counts = Counter(texts["train"])
    if counts.keys() >= set(texts["valid"] + texts["test"]):
        return texts
    # a word seen once stands for all those that were never seen
    least = 1 if "<unk>" in counts else 2
    known = {token for token, n in counts.items() if n >= least} | {"<eos>"}
    found = {}
    shares = []
    for split, text in texts.items():
        found[split] = [token if token in known else "<unk>" for token in text]
        new = sum(token not in known for token in text)
        shares.append(f"{new} of {split} ({new / len(text):.2%})")
    print(f"{name}: made <unk>, which perplexities count: {', '.join(shares)}")
    return found


def load_corpus(config):
    """The Corpus that --data names; with --supernet it must be of that run's vocabulary."""
    floor = {}
    if config.data == "toy":
        texts, floor = toy_corpus()
        if config.unit != "word":
            raise UserError(f"--unit {config.unit} is for a text of your own: toy is of words")
    else:
        texts = {split: tokenize(lines, config.unit, f"{config.data}: the {split} text")
                 for split, lines in read_splits(config.data).items()}
        texts = with_unk(texts, config.data)
    words = sorted(set().union(*texts.values()))
    index = {word: i for i, word in enumerate(words)}
    if config.supernet and read_json(Path(config.supernet, "words.json")) != index:
        raise UserError(f"--supernet {config.supernet} is of another vocabulary")
    ids = {split: torch.tensor([index[word] for word in text]) for split, text in texts.items()}
    return Corpus(**ids, words=words, floor=floor)


# 9. Settings --------------------------------------------------------------------------------------
def option(default, help, least=1, most=10**6):
    """A Config field with the sentence that --help prints, and the range of its values, if
    numbers."""
    return field(default=default, metadata={"help": help, "range": (least, most)})


@dataclass(frozen=True)
class Config:
    """Every setting; each field is a flag of the commands that use it.

    The defaults hold where a preset says nothing else; the authors' are in the preset 'paper'.
    """
    preset: str = option("tiny", "smoke, tiny, ptb, day or paper: sizes and schedules")
    data: str = option("toy", "toy, ptb, a folder with train.txt, valid.txt and test.txt, or a "
                       "file, of which 90 % train")
    unit: str = option("word", "what a token is: word, between spaces, or char, spaces too")
    out: str = option("", "the run's folder (default: runs/COMMAND/PRESET-SEED)")
    seed: int = option(1, "every random draw is a function of this number", -10**6)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: cuda where there is one")
    dtype: str = option("float32", "float32, bfloat16, float64; weights stay float32")
    threads: int = option(0, "CPU threads (0: torch decides)", 0, 256)
    # chapter 2: the search space
    nodes: int = option(12, "nodes of a cell", 1, 100)
    min_nodes: int = option(0, "the controller chooses their number from this on (0: --nodes)", 0)
    activations: str = option("tanh,relu,sigmoid,identity", "to choose from; '' is tanh alone")
    one_activation: bool = option(False, "one activation for the whole cell")
    connections: str = option("any", "any, chain or tree")
    operations: str = option("highway", "highway (ENAS, or ''), glu, gate, sum; see chapter 1")
    memory: bool = option(False, "a node's value is carried as a memory for gate and sum")
    widths: str = option("", "hidden sizes to choose from, up to --hidden, such as 50,100,200")
    rates: str = option("", "factors of --lr to choose from, powers of 2, such as 0.25,1,4")
    # chapter 3: the network
    hidden: int = option(200, "units of the embedding and of each node", 1, 10**4)
    word_dropout: float = option(0.0, "drop rate of whole words, per segment", 0, .99)
    input_dropout: float = option(0.0, "drop rate on the embedded input, per segment", 0, .99)
    hidden_dropout: float = option(0.0, "on every node's input; not in an LSTM", 0, .99)
    output_dropout: float = option(0.0, "on h before the softmax, per segment", 0, .99)
    # chapter 5: its training, and the search
    batch: int = option(64, "parallel streams of text")
    bptt: int = option(35, "words of a segment, the truncation length of backpropagation")
    lr: float = option(20.0, "of SGD on the network's weights", 1e-9)
    schedule: str = option("constant", "of lr: constant, plateau, decay (.96 after 15) or cosine")
    clip: float = option(0.25, "largest norm of the gradient", 1e-9, 1e9)
    weight_decay: float = option(1e-6, "times the weight, added to the clipped gradient", 0)
    epochs: int = option(10, "search: rounds of shared, then controller steps; else epochs")
    state: str = option("carry", "h at a segment's start, in a search: carry, zero or warm")
    shared_steps: int = option(0, "of a round (0: one pass over the training text)", 0)
    shared_samples: int = option(1, "architectures in one shared step", 1, 1000)
    warm_epochs: int = option(0, "rounds before the controller learns", 0)
    settle: int = option(0, "rounds at the end in which only the shared weights learn", 0)
    controller: str = option("trained", "trained; untrained, uniform: random search")
    controller_steps: int = option(50, "controller steps of a round", 0)
    controller_samples: int = option(10, "architectures in a controller step", 2, 1000)
    controller_lr: float = option(3.5e-3, "of Adam on the controller", 0)
    entropy: float = option(1e-4, "weight of the policy's entropy, added to the reward", 0)
    anneal: int = option(0, "last rounds of learning, in which --entropy goes to -1", 0)
    reward_input: str = option("plain", "what rewards are measured on: plain, words or noise")
    task: str = option("none", "none, or frozen: only the response knows what is good")
    derive_samples: int = option(100, "architectures sampled at the end; studies: cells of a kind")
    retrain: int = option(0, "cells to train from scratch, the found one first; and an LSTM", 0)
    # chapter 6: what ENAS leaves out
    lookahead: str = option("none", "where rewards are taken: none, momentum, recent, fresh")
    response: str = option("none", "the shared weights' answer: none, unrolled, sampled")
    fold: int = option(2, "architectures that omega' is made of, and as many for v", 1, 1000)
    # chapter 7: training
    cell: str = option("enas", "cells to train as one, comma-separated: a name, a row, an ENAS "
                       "arc, a DARTS genotype, a search's folder, random:SEED; or lstm, lstm:400, "
                       "lstm:CELL, with as many weights; NAME@3 has a seed of its own")
    supernet: str = option("", "a finished search: to start from, or that a study is about; a "
                           "finished training: to go on from")
    patience: int = option(5, "epochs without improvement before training stops")
    average: bool = option(False, "evaluate the mean of the weights since the loss stopped falling")
    perturb: bool = option(False, "measure the test loss also with words dropped, and with noise")


# Groups of settings, so that the table below stays short.
RUN = "preset data out seed device dtype threads"
SPACE = ("nodes min_nodes activations one_activation connections operations memory widths rates "
         "hidden")
NETWORK = ("word_dropout input_dropout hidden_dropout output_dropout batch bptt lr schedule clip "
           "weight_decay epochs")
GAME = (f"{RUN} unit {SPACE} {NETWORK} state shared_steps shared_samples controller_samples "
        "reward_input task")
SEARCH = (f"{GAME} warm_epochs settle controller controller_steps controller_lr entropy anneal "
          "lookahead response fold derive_samples")
TRAIN = f"{NETWORK} patience average perturb"
OF_CELLS = f"{RUN} unit hidden {TRAIN} supernet derive_samples"
# command -> the settings it uses
SETTINGS = {
    "search": f"{SEARCH} retrain perturb",
    "train": f"{RUN} unit {SPACE} {TRAIN} cell supernet",
    "compare": OF_CELLS,
    "ablate": OF_CELLS,
    "factors": OF_CELLS,
    "capacity": f"{RUN} {SPACE} batch bptt lr clip epochs derive_samples",
    "state": OF_CELLS,
    "hidden": f"{RUN} unit supernet derive_samples",
    "similarity": f"{GAME} warm_epochs controller_lr entropy fold",
    "cost": f"{GAME} controller_steps",
    "conditional": f"preset out seed threads {SPACE} controller_steps controller_samples "
                   "controller_lr entropy",
    "progress": SEARCH,
    "bench": "preset out device threads hidden bptt",
    "draw": f"preset out {SPACE} cell",
    "report": "out",
}


def settings_of(command):
    """The names of the settings that a command uses, in the order of Config."""
    used = SETTINGS[command].split()
    return [f.name for f in fields(Config) if f.name in used]


# parts of presets
PENN = dict(data="ptb", batch=20, weight_decay=1.2e-6, schedule="cosine")
PENN_SEARCH = dict(input_dropout=.2, output_dropout=.2, warm_epochs=1, fold=1, controller_steps=80)
LIGHT = dict(input_dropout=.35, hidden_dropout=.1, output_dropout=.35)  # at 200 units
PENN_STUDIES = LIGHT | dict(epochs=12, derive_samples=10)
CAPACITY = dict(batch=4, epochs=300, derive_samples=4)
GATED = "highway,glu,gate,sum"
# preset -> command -> settings; "all" holds for every command, "studies" for those that have the
# settings OF_CELLS
PRESETS = {
    "smoke": {
        "all": dict(hidden=16, bptt=20, nodes=4, epochs=2, lr=5.0, shared_steps=20,
                    controller_samples=8, controller_steps=5, derive_samples=4),
        "studies": dict(epochs=1, derive_samples=2),
        "capacity": dict(epochs=1, derive_samples=2),
        "search": dict(retrain=1),
        "conditional": dict(min_nodes=2, operations=GATED),
        "bench": dict(hidden=32),
    },
    "tiny": {
        "all": dict(hidden=32, batch=16, nodes=6, lr=10.0, shared_steps=60, controller_steps=20,
                    controller_samples=16, derive_samples=30),
        "search": dict(epochs=8, shared_samples=4, warm_epochs=2, retrain=1, derive_samples=100),
        "train": dict(epochs=8, schedule="cosine"),
        "studies": dict(epochs=75, patience=3, schedule="plateau", derive_samples=10),
        "ablate": dict(derive_samples=3),
        "factors": dict(derive_samples=2),
        "capacity": CAPACITY,
        "state": dict(derive_samples=30),
        "similarity": dict(epochs=8, warm_epochs=2),
        "cost": dict(shared_steps=200, controller_steps=40),
        "conditional": dict(nodes=12, min_nodes=4, operations=GATED, controller_steps=800,
                            controller_lr=.01, entropy=.01),
        "progress": dict(epochs=12, warm_epochs=1),
        "bench": dict(hidden=200),
    },
    "ptb": {
        "all": PENN,
        "search": PENN_SEARCH | dict(epochs=4),
        "train": LIGHT | dict(epochs=12),
        "studies": PENN_STUDIES,
        "capacity": CAPACITY,
    },
    # a search of 3,920 controller updates, and trainings twice as wide
    "day": {
        "all": PENN,
        "search": PENN_SEARCH | dict(epochs=50, shared_steps=100),
        "train": dict(hidden=400, epochs=40, input_dropout=.5, hidden_dropout=.2,
                      output_dropout=.5),
        "studies": PENN_STUDIES,
        "capacity": CAPACITY,
    },
    # The corrected code of ENAS's authors, search and final training. Its two masks on the input
    # are one here, of rate 1 - (1 - .2) (1 - .75) = .8. Its final training's L2 is a sum of
    # squares, so the decay is twice that; its search's, of fourth powers, is one of squares here.
    "paper": {
        "all": dict(data="ptb", dtype="bfloat16", weight_decay=1.6e-6, controller_lr=5e-5,
                    entropy=1e-5),
        "search": dict(nodes=10, epochs=600, batch=128, word_dropout=.1, input_dropout=.8,
                       hidden_dropout=.25, output_dropout=.75, clip=.1, controller_steps=25),
        "train": dict(hidden=800, epochs=3000, word_dropout=.125, input_dropout=.775,
                      hidden_dropout=.225, output_dropout=.75, average=True, patience=100),
        "studies": LIGHT | dict(epochs=300, patience=10, schedule="plateau", derive_samples=10),
        "capacity": CAPACITY,
    },
}


def configure(command, preset="tiny", **given):
    """The Config of a command under a preset, then the user's own settings."""
    parts = PRESETS[choose("preset", preset, PRESETS)]
    studies = parts.get("studies", {}) if SETTINGS[command] == OF_CELLS else {}
    # from the general to the particular, what comes later wins
    settings = parts["all"] | studies | parts.get(command, {})
    return Config(**settings | {"preset": preset} | given)


CHOICES = {"preset": PRESETS, "unit": UNITS, "dtype": DTYPES, "connections": CONNECTIONS,
           "schedule": SCHEDULES, "state": STATES, "task": TASKS,
           "controller": ("trained", "untrained", "uniform"), "reward_input": INPUTS,
           "lookahead": LOOKAHEAD, "response": RESPONSE}


def check(config):
    """Raise UserError for a wrong setting, by its name, before any work is done."""
    for name, choices in CHOICES.items():
        choose(f"--{name}", getattr(config, name), choices)
    # numbers, each in its range: one that is no sensible number would end in an error of torch's
    for f in fields(config):
        value = getattr(config, f.name)
        least, most = f.metadata["range"]
        if f.type in (int, float) and not least <= value <= most:  # nan neither
            about = f.metadata["help"]
            raise UserError(f"--{f.name} {value} must be from {least} to {most}: {about}")
    learning = config.epochs - config.warm_epochs  # rounds in which the controller learns
    look = config.lookahead
    # settings that do not go together
    if config.response != "none" and look != "fresh":
        raise UserError(f"--response {config.response} needs --lookahead fresh: only a fresh "
                        "gradient depends on the policy")
    if look != "none" and config.controller != "trained":
        raise UserError(f"--lookahead {look}: a controller that is {config.controller} has none")
    if config.anneal > max(0, learning):
        raise UserError(f"--anneal {config.anneal} is more than the {learning} rounds of learning")
    if config.rates and (look in ("momentum", "recent") or config.shared_samples > 1):
        raise UserError(f"--rates {config.rates} needs --shared_samples 1, and --lookahead none or "
                        "fresh: a step then has one architecture's rate, and past gradients none")
    search_space(config)  # refuses its settings itself, as does device_of
    if device_of(config).type == "meta":
        raise UserError(f"--device {config.device} has no memory")


# 10. Runs -----------------------------------------------------------------------------------------
@lru_cache
def tensorboard(folder):
    """add_scalar(name, value, step) of a TensorBoard writer, or of nobody where it does not
    work."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(folder / "tensorboard")).add_scalar
    except Exception:  # it is not installed, or broken
        return lambda name, value, step: None


def commit():
    """The commit that this file is at, '+' if it has changed since; '' outside a repository."""
    here = Path(__file__)
    ask = f"git rev-parse --short=12 HEAD && (git diff --quiet HEAD -- {here.name} || echo +)"
    said = subprocess.run(ask, shell=True, cwd=here.parent, capture_output=True, text=True)
    return said.stdout.replace("\n", "")


def machine(device):
    """The name of the GPU; or of the processor, its vector instructions and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, which knows more
    if cpuinfo.exists():
        name = re.search(r"model name\s*: (.*)|$", cpuinfo.read_text())[1] or name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def digest(config):
    """A hash of the files that a run reads, texts, cells and shared weights, so that it does not go
    on with others."""
    data = os.path.expanduser(config.data)
    paths = [data, *(f"{data}/{split}.txt" for split in SPLITS)]
    cells = [entry.partition("@")[0].removeprefix("lstm:") for entry in config.cell.split(",")]
    paths += [f"{cell}/result.json" for cell in cells]
    paths += [f"{config.supernet}/result.json", f"{config.supernet}/weights.pt"]
    content = b"".join(Path(path).read_bytes() for path in paths if os.path.isfile(path))
    return sha256(content)[:12] if content else ""


CHECKPOINT_SECONDS = 30.0  # least time between two
WHEREABOUTS = {"out", "device", "threads"}  # may differ when a run resumes
SEAL = 64  # bytes of a hash in hex
STOP = []  # the signal that asked to stop


class Halt(UserError):
    """The machine has failed, its memory or disk: printed as one line, exit code 1."""


class Run:
    """A folder with config.json, metrics.jsonl, checkpoint.pt, and at the end result.json.

    Killed at any instant, the same command goes on from the last checkpoint, which also knows how
    long metrics.jsonl was; as every random draw depends only on its key, the result is that of an
    undisturbed run.
    """

    def __init__(self, command, config):
        self.command = command
        self.config = config
        self.commit = commit()
        default = f"runs/{command}/{config.preset}-{config.seed}"
        self.folder = Path(os.path.expanduser(config.out or default))
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoint = self.folder / "checkpoint.pt"
        self.result = self.folder / "result.json"
        self.good = None       # the last good state
        self.good_bytes = 0    # the length of metrics.jsonl then
        self.safe = 0          # the step of the checkpoint
        self.started = time.time()
        self.saved_at = self.started
        self.spoke_at = 0.0
        settings = {name: getattr(config, name) for name in settings_of(command)}
        self.settings = {"command": command, **settings, "inputs": digest(config)}

    def open(self):
        """Make and lock the folder, unless the run is finished; refuse settings that differ from
        those it was begun with."""
        finished = self.result.exists()
        path = self.folder / "config.json"
        if not finished:
            self.take_folder()
        # a run that has done nothing refuses nothing
        worked = any(record.stat().st_size for record in self.folder.rglob("*.json*")
                     if record.name != "config.json")
        # a setting that an older version lacked counts as its default
        theirs = vars(Config()) | read_json(path) if path.exists() else self.settings
        for name, value in self.settings.items():
            if worked and name not in WHEREABOUTS and theirs.get(name) != value:
                raise UserError(f"{self.folder} holds a run with {name} = {theirs.get(name)!r}, "
                                f"not {value!r}; give this one another --out; a training goes on "
                                f"from a finished one with --supernet {self.folder}")
        if not finished:
            write_json(path, self.settings)

    def take_folder(self):
        """Make and lock it; remove what a killed run was writing."""
        with refusing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            import fcntl  # not on Windows
            # the system's own lock, so a killed run frees it
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work in {self.folder}: give this one another "
                            "--out") from None
        except (ImportError, OSError):
            self.say("this system has no file locks: run nothing else in this folder")
        for left in self.folder.glob(".menas-*"):
            left.unlink()

    def seal(self, content):
        """What a checkpoint begins with: a hash of the settings that a resumed run must share, and
        of all that follows."""
        key = str([(name, x) for name, x in self.settings.items() if name not in WHEREABOUTS])
        return sha256(key.encode() + content).encode()

    def restore(self):
        """The state to resume from, or None at the start; metrics.jsonl is cut back to what it
        was."""
        if self.checkpoint.exists():
            with refusing(self.checkpoint, "; delete it to start again"):
                content = self.checkpoint.read_bytes()
                seal, content = content[:SEAL], content[SEAL:]
                if seal != self.seal(content):
                    raise ValueError("it is damaged, or another run's")
                saved = load_tensors(io.BytesIO(content), device_of(self.config))
                self.good = saved["state"]
                self.good_bytes = saved["metrics_bytes"]
                if self.metrics.stat().st_size < self.good_bytes:
                    raise ValueError("metrics.jsonl is shorter than when it was written")
                self.started -= saved["seconds"]
                self.safe = self.good["step"]
        with open(self.metrics, "ab") as file:
            file.truncate(self.good_bytes)
        return copy.deepcopy(self.good)

    def keep(self, state):
        """Remember a state known to be good; write it if the last checkpoint is old."""
        self.good = copy.deepcopy(state)
        self.good_bytes = self.metrics.stat().st_size
        if time.time() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save()

    def save(self):
        """Write the last good state as a checkpoint."""
        if self.good is not None:
            content = serialized(dict(state=self.good, metrics_bytes=self.good_bytes,
                                      seconds=time.time() - self.started))
            write_atomically(self.checkpoint, self.seal(content) + content)
            self.safe = self.good["step"]
        self.saved_at = time.time()

    def obey(self):
        """Leave on SIGTERM or Ctrl-C, with the last good state on disk."""
        if STOP:
            self.save()
            self.say(f"stopped by {signal.Signals(STOP[0]).name} at step {self.safe}; the same "
                     "command goes on from here")
            raise SystemExit(128 + STOP[0])

    def say(self, text):
        """A line for who waits, with the run's folder."""
        print(f"[{self.folder}] {text}", flush=True)

    def log(self, line, done, total, words):
        """Append a line to metrics.jsonl, in which no times stand. For who waits the first, and
        then one every few seconds, is printed: with the share done, words a second, the time
        left."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(strict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before a checkpoint counts on it
        show = tensorboard(self.folder)
        for name, value in line.items():
            if not isinstance(value, list):
                show(name, value, line["step"])
            elif name != "networks":
                for k, x in zip(line["networks"], value):
                    show(f"{name} of network {k}", x, line["step"])
        now = time.time()
        if now - self.spoke_at >= 5 or done >= total:
            self.spoke_at = now
            spent = now - self.started
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if not isinstance(v, list))
            left = timedelta(seconds=int(spent * (total / done - 1)))
            self.say(f"{100 * done / total:3.0f} %  {shown}  {words / spent:,.0f} words/s  "
                     f"{left} left")

    def finish(self, rows):
        """Write result.json: the rows, and all that it takes to make them again."""
        names = settings_of(self.command)
        config = {name: self.settings[name] for name in names if name != "out"}
        device = device_of(self.config) if "device" in names else torch.device("cpu")
        record = {"command": self.command, "config": config, "seed": self.config.seed,
                  "commit": self.commit, "date": time.strftime("%Y-%m-%d"),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__},
                  "machine": machine(device),
                  "seconds": round(time.time() - self.started, 1), "rows": rows}
        write_json(self.result, record)
        return record

    @contextmanager
    def halting(self):
        """Where the machine fails, one line says what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            raise Halt(f"{self.folder}: {error}; what it has up to step {self.safe} is safe, and "
                       "the same command goes on from there") from None
        except (MemoryError, RuntimeError) as error:
            if not re.search("MemoryError|(allocate|enough|out of) memory", repr(error)):
                raise
            raise Halt(f"{self.folder}: out of memory; lower --hidden, --batch, --bptt, or the "
                       "architectures at once: --controller_samples, --shared_samples, --fold, "
                       "cells of --cell") from None


def table(headers, rows):
    """A Markdown table whose columns are also aligned as plain text; floats to three decimals.

    It is both what a command prints and what the report's page shows.
    """
    text = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, texts)) for texts in zip(headers, *text)]
    lines = [headers, ["-" * width for width in widths], *text]
    padded = [[x.ljust(width) for x, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# details of a row, for the record alone
LEFT_OUT = "seed folder capped late best_loss best_epoch rate learns".split()


def summary(record):
    """What a finished command prints: a table of its rows, of sampled and of uniform cells only the
    best. Losses of the splits stand as perplexities, of characters also as bits; other losses are
    in nats."""
    char = record["config"].get("unit") == "char"
    # of a hundred samples the first, for they are sorted; of all else every row
    shown = {}
    for i, row in enumerate(record["rows"]):
        key = row["group"] if row["group"] in ("sampled", "uniform") else i
        shown.setdefault(key, {name: x for name, x in row.items()
                               if name not in LEFT_OUT and (x or name != "failed")})
    rows = shown.values()
    columns = dict.fromkeys(name for row in rows for name in row if name not in SPLITS)
    for split, row in product(SPLITS, rows):
        if split in row:
            measures = {f"{split} perplexity": f"{math.exp(row[split]):.2f}"}
            if char:
                measures[f"{split} bits per character"] = row[split] / math.log(2)
            row |= measures
            columns |= measures
    return table(list(columns), [[row.get(name, "") for name in columns] for row in rows])


def run_command(command, work, config):
    """The record of a command, which is run, resumed, or found finished; then 'earlier' is in it.

    work: (config, run) -> rows.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(command, config)
    with run.halting():
        run.open()
        if run.result.exists():
            run.say("already finished")
            with refusing(run.result, "; delete it to make it again"):
                record = read_json(run.result)
                summary(record)  # can be shown, so it is whole
                return record | {"earlier": True}
        with run.lock:
            return run.finish(work(config, run))


# 11. Search and train -----------------------------------------------------------------------------
# Most commands are a function (config, run) -> rows, flat dicts, of ONE seed; experiments.sh runs
# it for several, and the report puts them together. A sweep needs no code: its arms are searches
# with other flags.

def guessing(corpus):
    """The loss of guessing, nats per token."""
    return math.log(len(corpus.words))


def no_worse(loss, guess):
    """The loss, or that of guessing if it is worse or no number."""
    return loss if loss < guess else guess


def finished_search(config):
    """A finished search: its Config, shared weights, and rows [K, D] 'sampled' and 'uniform', best
    first (after --anneal, the policy's own choice first).

    Raises UserError if --supernet is not given, not a search, or damaged.
    """
    if not config.supernet:
        raise UserError("this is about a finished search: name its folder as --supernet")
    folder = Path(config.supernet)
    with refusing(f"--supernet {folder}"):
        # a setting that an older version lacked counts as its default
        settings = vars(Config()) | read_json(folder / "config.json")
        searched = {name: settings[name] for name in settings_of(settings["command"])}
        searched = replace(Config(**searched), device=config.device, dtype=config.dtype)
        check(searched)
        weights = load_tensors(folder / "weights.pt", device_of(config))
        if not is_shared(weights):
            raise ValueError("weights.pt does not hold shared weights")
        found = {"sampled": [], "uniform": []}
        for row in read_json(folder / "result.json")["rows"]:
            if row["group"] in found:
                found[row["group"]].append(row_of(row["cell"]))
        return searched, weights, {group: torch.stack(rows) for group, rows in found.items()}


def from_genotype(text):
    """A cell as DARTS prints it: activation and predecessor of nodes 1, 2, ...; h_t is the mean of
    the nodes in concat."""
    recurrent, _, concat = text.partition("concat")
    pairs = re.findall(r"\('(\w+)', *(\d+)\)", recurrent)
    numbers = " ".join(f"{read} {list(ACTIVATIONS).index(act)}" for act, read in pairs)
    averaged = [int(x) for x in re.findall(r"\d+", concat)]
    if "range" in concat:
        averaged = list(range(*averaged))
    for output in (ALL, LEAVES):
        cell = checked(arc(numbers, output))
        if leaves(cell) == averaged:
            return cell
    raise ValueError("its concat is neither all nodes but node 0 nor the leaves")


def spellings(cell):
    """The cell as --cell takes it: its row; if it is ENAS's, with tanh in node 0, also an arc and a
    genotype. An arc does not say of which nodes h_t is the mean; --cell takes all but node 0."""
    said = f"row: {name_of(cell)}"
    pairs = [(node.read - 1, node.activation) for node in cell.nodes[1:]]
    numbers = " ".join(f"{read} {act}" for read, act in pairs)
    if pairs and is_enas(cell) and arc(numbers, cell.output) == cell:
        recurrent = [(list(ACTIVATIONS)[act], read) for read, act in pairs]
        averaged = "all nodes but node 0" if cell.output == ALL else "the leaves"
        said += f"\nENAS arc, h_t the mean of {averaged}: {numbers}"
        said += f"\nDARTS genotype: Genotype(recurrent={recurrent}, concat={leaves(cell)})"
    return said


def load_cell(config, name):
    """A cell by its name, 'random:SEED', its row, an ENAS arc, a DARTS genotype, or a run's
    folder."""
    if os.path.isfile(Path(name, "result.json")):
        with refusing(name):
            name = read_json(Path(name, "result.json"))["rows"][0]["cell"]  # a search's best
    if name in CELLS:
        return CELLS[name]
    with refusing(f"the cell {name!r}"):
        if re.fullmatch(r"random:\S+", name):
            return decode(uniform_rows(search_space(config), 1, "random cell", name)[0])
        if name.startswith("Genotype"):
            return from_genotype(name)
        if re.fullmatch(r"\d+( \d+)+", name):
            return checked(arc(name))
        if re.fullmatch(r"\d+(--?\d+)+", name):
            row = row_of(name)
            cell = checked(decode(row))
            if len(cell.nodes) != row[0]:
                raise ValueError(f"it has {len(cell.nodes)} nodes, not {row[0]}")
            return cell
    choose("cell", name, [*CELLS, "random:SEED"])  # raises: it is none of them


def slots_by(cell, source, combine):
    """{slot: combine(values of the slots it reads)}, source for the input pair and the memory.

    Numbers of paths are sums of such values, lengths of paths one more than their maximum.
    """
    values = {None: source, INPUT: source}
    for i, node in enumerate(cell.nodes):
        values[i + 1] = combine(values[slot] for slot in slots_read(node))
    return values


def depths(cell):
    """{slot: how many nodes the longest path to it has}."""
    return slots_by(cell, 0, lambda values: 1 + max(values))


def figure_of(columns, width=4.5, height=3.6):
    """A Figure and its axes, in a row; legible at half size."""
    matplotlib.rc("font", size=11)
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


COLOURS = dict(zip(ACTIVATIONS, ("#7fb3d5", "#f5b041", "#82e0aa", "#d5d8dc")))


def draw_cell(cell, axes=None, title=""):
    """The cell as a picture, input at the bottom, h_t at the top, second slots' arrows dashed: its
    axes."""
    # a slot stands as high as the longest path to it
    tiers = {}
    for slot, level in depths(cell).items():
        if slot is not None or cell.memory:
            tiers.setdefault(level, []).append(slot)
    top = max(tiers) + 1
    width = max(map(len, tiers.values()))
    # every tier is centred
    place = {slot: (x - (len(tier) - 1) / 2, y)
             for y, tier in tiers.items() for x, slot in enumerate(tier)}
    if axes is None:
        _, (axes,) = figure_of(1, max(4, 1.3 * width), 0.8 * top + 1)

    def box(where, text, colour="white"):
        frame = dict(boxstyle="round,pad=0.35", edgecolor="#333333", facecolor=colour)
        axes.text(*where, text, ha="center", va="center", fontsize=9, zorder=3, bbox=frame)

    def arrow(start, end, linestyle="-", color="#333333"):
        line = dict(arrowstyle="-|>", linestyle=linestyle, color=color)
        axes.annotate("", (end[0], end[1] - 0.22), (start[0], start[1] + 0.22), arrowprops=line)

    box(place[INPUT], "$x_t,\\ h_{t-1}$")
    if cell.memory:
        box(place[None], "memory")
    for i, node in enumerate(cell.nodes):
        for slot, style in zip(slots_read(node), ("-", "--")):
            arrow(place[slot], place[i + 1], style)
        act = list(ACTIVATIONS)[node.activation]
        text = (act, f"glu {act}", f"gate {act}", "+")[node.operation]
        colour = "white" if node.operation == SUM else COLOURS[act]
        carried = ", memory" if i + 1 == cell.memory else ""
        box(place[i + 1], f"{i}: {text}{carried}", colour)
    for i in leaves(cell):
        arrow(place[i + 1], (0, top), ":", "#aaaaaa")
    box((0, top), "$h_t$ = mean")
    axes.set(xlim=(-width / 2, width / 2), ylim=(-0.5, top + 0.5), title=title)
    axes.axis("off")
    return axes


def draw(config):
    """The picture of a cell, cell.png in the folder --out, and its spellings."""
    check(config)
    cell = load_cell(config, config.cell)
    folder = Path(os.path.expanduser(config.out or "runs/draw"))
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    draw_cell(cell).figure.savefig(folder / "cell.png", dpi=110)
    print(f"{spellings(cell)}\npicture: {folder}/cell.png")


def lstm_parameters(config, units):
    """Recurrent weights of an LSTM with its biases, and its projection if it has other units."""
    project = units * config.hidden if units != config.hidden else 0
    return 4 * units * (config.hidden + units + 2) + project


def lstm_units(config, name):
    """Units of 'lstm', 'lstm:400' or 'lstm:CELL', with as many weights as that; 0 if it is a
    cell."""
    kind, _, size = name.partition(":")
    if kind != "lstm":
        return 0
    if not size:
        return config.hidden
    if re.fullmatch("[1-9][0-9]{0,3}", size):
        return int(size)
    wanted = recurrent_parameters(load_cell(config, size), config.hidden)
    sizes = range(1, 9 * config.hidden)
    return min(sizes, key=lambda units: abs(lstm_parameters(config, units) - wanted))


def save_network(folder, weights, corpus):
    """The weights, and the words that the embedding's rows stand for: {word: id}."""
    save_tensors(folder / "weights.pt", weights)
    write_json(folder / "words.json", {word: i for i, word in enumerate(corpus.words)})


def from_training(config, new):
    """The weights of a finished training of the same cells, in the place of fresh ones."""
    folder = Path(config.supernet)
    with refusing(f"--supernet {folder}"):
        trained = read_json(folder / "config.json")["cell"]
        weights = load_tensors(folder / "weights.pt")
        theirs, ours = [{name: list(w.shape) for name, w in some.items()}
                        for some in (weights, new)]
        if trained != config.cell or theirs != ours:
            raise ValueError(f"it has trained {trained}, with weights of the sizes {theirs}")
        return weights


def from_supernet(config, cells):
    """Rows of cells, and standalone weights that start from a search's, which must fit."""
    searched, shared, _ = finished_search(config)
    fits = searched.hidden == config.hidden
    for cell in cells:
        fits &= len(cell.nodes) <= searched.nodes and ("inputs" in shared or is_enas(cell))
    if not fits:
        raise UserError(f"--supernet {config.supernet}, of {searched.nodes} nodes, --hidden "
                        f"{searched.hidden} and {searched.operations}, does not hold {config.cell} "
                        f"of --hidden {config.hidden}")
    rows = encode(cells, searched.nodes)
    return rows, inherit(shared, rows)


def named_networks(config, words):
    """What --cell names: names, seeds, rows [K, D], fresh weights and numbers of parameters, of K
    networks. The rows of LSTMs are zeros. Raises UserError for what cannot be trained together."""
    entries = config.cell.split(",")
    if config.cell.startswith("Genotype"):  # which has commas of its own
        entries = [config.cell]
    names = [entry.partition("@")[0] for entry in entries]
    with refusing(f"--cell {config.cell}"):
        seeds = [int(entry.partition("@")[2] or config.seed) for entry in entries]
    units = lstm_units(config, names[0])
    if any(lstm_units(config, name) != units for name in names):
        raise UserError(f"--cell {config.cell}: train an LSTM in a run of its own")
    if units:
        rows = torch.zeros(len(names), 9, dtype=torch.long)
        parameters = [lstm_parameters(config, units)] * len(names)
        return names, seeds, rows, lstm_weights(config, words, units, seeds), parameters
    cells = [load_cell(config, name) for name in names]
    if max(cell.width for cell in cells) > config.hidden:
        raise UserError(f"--cell {config.cell}: a cell is wider than --hidden {config.hidden}")
    parameters = [recurrent_parameters(cell, config.hidden) for cell in cells]
    return names, seeds, encode(cells), standalone_weights(config, words, cells, seeds), parameters


def inherited(config, rows, new):
    """Rows and weights that start from --supernet, a search or a finished training, or fresh."""
    if not config.supernet:
        return rows, new
    if read_json(Path(config.supernet, "config.json")).get("command") == "train":
        return rows, from_training(config, new)
    if "weight_hh" in new:
        raise UserError("--supernet has the weights of cells, none of an LSTM")
    return from_supernet(config, [decode(row) for row in rows])


def floor_row(corpus):
    """The best possible loss, where it is known."""
    return [{"group": "floor"} | corpus.floor] if corpus.floor else []


def study_train(config, run):
    """Train cells from scratch, or with --supernet from its weights, as one batch: a row for each,
    of the losses of its best weights on the whole of each split, in float32."""
    corpus = load_corpus(config)
    device = device_of(config)
    names, seeds, rows, weights, parameters = named_networks(config, len(corpus.words))
    rows, weights = inherited(config, rows, weights)
    best, ends = train_networks(config, run, corpus, weights, rows, seeds)
    save_network(run.folder, best, corpus)
    found = {"cell": names, "seed": seeds, "parameters": parameters, **ends}
    # stopped by --epochs, not by --patience
    found["capped"] = [epochs >= config.epochs for epochs in ends["epochs"]]
    judged = [(split, "plain", getattr(corpus, split)) for split in SPLITS]
    if config.perturb:
        judged += [(f"test, {kind}", kind, corpus.test) for kind in INPUTS if kind != "plain"]
    for name, kind, tokens in judged:
        masks = perturbation(kind, best, config.seed)
        losses = evaluate(best, rows.to(device), tokens.to(device), masks=masks)
        found[name] = [no_worse(loss, guessing(corpus)) for loss in losses.tolist()]
    made = [{"group": "network"} | dict(zip(found, values)) for values in zip(*found.values())]
    return made + floor_row(corpus)


def search_rows(config, group, rows, losses, guess):
    """What is recorded of architectures scored under the shared weights."""
    found = []
    learns, _ = TASKS[config.task](rows)
    for row, loss, factor in zip(rows, losses.tolist(), learns.tolist()):
        cell = decode(row)
        found.append(dict(group=group, cell=row_name(row), valid=no_worse(loss, guess),
                          parameters=recurrent_parameters(cell, config.hidden), rate=cell.rate,
                          learns=factor, failed=not math.isfinite(loss)))
    return found


AT_ONCE = 25  # networks trained as one


def kind_of_network(config, name):
    """What can be trained together: LSTMs of so many units, ENAS's cells, other cells."""
    units = lstm_units(config, name)
    if units:
        return f"lstm {units}"
    return "cells" if is_enas(load_cell(config, name)) else "other cells"


def train_rows(config, run, rows):
    """The rows, each with the losses of its 'cell' trained from scratch, and how that ended.

    Batches of AT_ONCE networks, each a run of its own in this one's folder; a row without a 'seed'
    gets one of its own. Rows are shuffled before they are cut, so that no group is a batch.
    """
    # networks of one kind can be trained together
    kinds = {}
    for i in torch.randperm(len(rows), generator=rng(config.seed, "order")).tolist():
        kinds.setdefault(kind_of_network(config, rows[i]["cell"]), []).append(i)
    for kind, members in kinds.items():
        for first in range(0, len(members), AT_ONCE):
            batch = members[first:first + AT_ONCE]
            seeds = [rows[i].get("seed", config.seed + i) for i in batch]
            cells = ",".join(f"{rows[i]['cell']}@{seed}" for i, seed in zip(batch, seeds))
            folder = run.folder / f"{kind} {first // AT_ONCE}"
            sub = replace(config, cell=cells, supernet="", out=str(folder))
            record = run_command("train", study_train, sub)
            if "earlier" in record:  # the time of that call counts
                run.started -= record["seconds"]
            for i, trained in zip(batch, record["rows"]):
                rows[i] = trained | {"folder": folder.name} | rows[i]
            run.obey()
    return rows


def train_config(config):
    """The Config of trainings beside a search: the preset's, on its data and at its size."""
    names = "data unit seed device dtype threads nodes hidden perturb".split()
    return configure("train", config.preset, **{name: getattr(config, name) for name in names})


def study_search(config, run):
    """Search, then derive: the controller's samples beside as many uniform ones, under the shared
    weights. With --retrain the best cell, --retrain - 1 of the samples and an LSTM are trained from
    scratch."""
    corpus = load_corpus(config)
    k = config.derive_samples
    game = game_of(config, corpus)
    search(game, run)
    weights = game.s["weights"]
    controller = game.controller

    # derive the best of the samples, and as many uniform ones beside them
    run.say(f"scoring {k} sampled and {k} uniform architectures on the whole validation split")
    drawn = {"sampled": controller.sample(k, config.seed, "derive").rows,
             "uniform": uniform_rows(controller.decisions, k, config.seed, "uniform")}
    found = []
    for group, rows in drawn.items():
        rows, losses = derive(config, weights, rows, corpus)
        found += search_rows(config, group, rows, losses, guessing(corpus))
        run.obey()
    save_network(run.folder, weights, corpus)
    save_tensors(run.folder / "controller.pt", controller.state_dict())

    # the cell found, and its picture
    names = [row["cell"] for row in found[:k]]
    best = names[0]
    if config.anneal:  # the policy's own choice
        best = max(names, key=names.count)
        found.sort(key=lambda row: (row["group"], row["cell"] != best))  # its rows first
    draw_cell(load_cell(config, best)).figure.savefig(run.folder / "cell.png", dpi=110)
    run.say(f"the cell found, of {len(set(names))} distinct ones in {k} samples: {best}")
    run.say(f"its picture is {run.folder}/cell.png, the numbers are in result.json beside it")

    # what it is worth from scratch, beside other samples and an LSTM
    if config.retrain:
        order = torch.randperm(k, generator=rng(config.seed, "retrain")).tolist()
        entries = [dict(group="found", cell=best, seed=config.seed),
                   *(dict(group="a sample", cell=names[i]) for i in order[:config.retrain - 1]),
                   dict(group="LSTM", cell="lstm", seed=config.seed)]
        found += train_rows(train_config(config), run, entries)
    return found + floor_row(corpus)


# 12. Populations and measurements -----------------------------------------------------------------
# A study's rows are a population, labelled cells that train_rows() trains, or a measurement.

def study_compare(config, run):
    """Is a trained controller better than chance? --derive_samples distinct cells of it, of an
    untrained one and of the uniform distribution, and LSTMs of as many units and of as many
    weights, trained from scratch; 'shared' is a cell's loss under the shared weights, 'best' the
    test loss of the best by validation, of as many cells of each."""
    corpus = load_corpus(config)
    k = config.derive_samples
    searched, weights, found = finished_search(config)
    untrained = Controller(search_space(searched), searched.seed)
    drawn = {"trained": found["sampled"],
             "untrained": untrained.sample(len(found["sampled"]), searched.seed, "untrained").rows,
             "uniform": found["uniform"]}
    rows = []
    for group, samples in drawn.items():
        distinct = samples.unique(dim=0)
        order = torch.randperm(len(distinct), generator=rng(config.seed, "compare"))
        some = distinct[order[:k]]
        losses = score(weights, some, corpus.valid, searched).tolist()
        for row, loss in zip(some, losses):
            rows.append(dict(group=group, cell=row_name(row), distinct=len(distinct),
                             shared=no_worse(loss, guessing(corpus))))
    rows.append(dict(group="LSTM", cell="lstm"))
    rows.append(dict(group="LSTM, as many weights", cell=f"lstm:{rows[0]['cell']}"))
    train_rows(config, run, rows)

    # of as many distinct cells of each source the best, chosen by validation
    several = {group: [row for row in rows if row["group"] == group] for group in drawn}
    fewest = min(map(len, several.values()))
    for some in several.values():
        best = min(some[:fewest], key=lambda row: row["valid"])
        best["best"] = best["test"]
    return rows


def changed(cell, i, **new):
    """The cell with other entries of node i, such as activation=RELU."""
    nodes = list(cell.nodes)
    nodes[i] = nodes[i]._replace(**new)
    return cell._replace(nodes=tuple(nodes))


def without(cell, i):
    """A cell of ENAS's space without node i > 0, whose readers read what it read."""
    def moved(slot):
        slot = cell.nodes[i].read if slot == i + 1 else slot
        return slot - (slot > i + 1)

    nodes = [node._replace(read=moved(node.read)) for j, node in enumerate(cell.nodes) if j != i]
    return cell._replace(nodes=tuple(nodes))


def with_activations(cell, activations):
    """The cell with the same connections and these activations, a number for each node."""
    nodes = [node._replace(activation=act) for node, act in zip(cell.nodes, activations)]
    return cell._replace(nodes=tuple(nodes))


def all_alike(cell):
    """{'only tanh': the cell with that activation alone, ...}."""
    n = len(cell.nodes)
    return {f"only {name}": with_activations(cell, [a] * n) for a, name in enumerate(ACTIVATIONS)}


def variants(cell):
    """{kind of change: all cells of ENAS's space that it makes of this one}.

    A connection that is added is a second one: the node reads the mean of both. Node 0, which alone
    reads the input pair, is never removed.
    """
    later = range(1, len(cell.nodes))
    added = [changed(cell, i, second=slot)
             for i in later for slot in range(1, i + 1) if slot != cell.nodes[i].read]
    acts = [changed(cell, i, activation=a) for i, node in enumerate(cell.nodes)
            for a in range(len(ACTIVATIONS)) if a != node.activation]
    kinds = {"a node removed": [without(cell, i) for i in later],
             "a connection added": added, "an activation changed": acts}
    return kinds | {kind: [alike] for kind, alike in all_alike(cell).items()}


def of_enas(config):
    """The search's Config and rows, for studies that change cells of ENAS's own space."""
    searched, _, found = finished_search(config)
    if searched.min_nodes or not all(is_enas(decode(row)) for row in found["sampled"]):
        raise UserError(f"--supernet {config.supernet} is not of ENAS's own space")
    return searched, found


def study_ablate(config, run):
    """What in a cell matters? The cell that a search found, a random one and darts_v2, each as it
    is and with --derive_samples changes of each kind, drawn at random; trained from scratch."""
    searched, found = of_enas(config)
    drawn = uniform_rows(search_space(searched), 1, config.seed, "ablate")
    cells = {"searched": decode(found["sampled"][0]), "random": decode(drawn[0]),
             "darts_v2": CELLS["darts_v2"]}
    rows = []
    for source, cell in cells.items():
        for kind, changes in ({"itself": [cell]} | variants(cell)).items():
            order = torch.randperm(len(changes), generator=rng(config.seed, source, kind)).tolist()
            rows += [dict(group=kind, source=source, cell=name_of(changes[i]))
                     for i in order[:config.derive_samples]]
    return train_rows(config, run, rows)


def study_factors(config, run):
    """Is it the connections or the activations? Searched or random ones of either, --derive_samples
    cells of each combination, and tanh alone; trained from scratch."""
    searched, found = of_enas(config)
    at_random = uniform_rows(search_space(searched), len(found["sampled"]), config.seed, "factors")
    drawn = {"searched": found["sampled"], "random": at_random}
    rows = []
    for i, a, b in product(range(config.derive_samples), drawn, (*drawn, "tanh")):
        draws = torch.randint(len(at_random), (2,), generator=rng(config.seed, "factors", i, a, b))
        cell = decode(drawn[a][draws[0]])
        # connections of one draw, activations of another
        activations = [TANH] * len(cell.nodes)
        if b in drawn:
            activations = [node.activation for node in decode(drawn[b][draws[1]]).nodes]
        rows.append(dict(group=f"{a} connections, {b} activations", connections=a, activations=b,
                         cell=name_of(with_activations(cell, activations))))
    return train_rows(config, run, rows)


def path_count(cell):
    """Paths from the input pair or the memory to h_t within a step."""
    paths = slots_by(cell, 1, sum)
    return sum(paths[i + 1] for i in leaves(cell))


def depth(cell):
    """How many nodes the longest path has."""
    return max(depths(cell).values())


def matrices(cell):
    """Matrices of the recurrence: its weights in units of H * H."""
    return recurrent_parameters(cell._replace(width=0), 1)


MEASURES = {"parameters": matrices, "paths": path_count, "depth": depth}
# Every network takes all epochs: one that stopped, or slowed down, where its loss rises once would
# learn far less.
BY_HEART = dict(word_dropout=0.0, input_dropout=0.0, hidden_dropout=0.0, output_dropout=0.0,
                weight_decay=0.0, average=False, schedule="cosine", patience=10**6)
CAPACITY_WORDS = 300  # of the training text, to be learnt by heart
CAPACITY_RATES = (-2, 0, 2)  # log2 of what --lr is multiplied by


def study_capacity(config, run):
    """How much of a short text does a cell learn by heart in --epochs? Random cells as they are, at
    half the width, and with each single activation, trained without dropout; the best of three
    learning rates counts."""
    corpus = load_corpus(config)
    folder = run.folder / "text"
    rows = []
    folder.mkdir(exist_ok=True)
    text = " ".join(corpus.words[i] for i in corpus.train[:CAPACITY_WORDS].tolist())
    for split in SPLITS:  # the text is also what 'validation' looks at
        write_atomically(folder / f"{split}.txt", text.replace(" <eos>", "\n").encode())
    drawn = uniform_rows(search_space(config), config.derive_samples, config.seed, "capacity")
    for i, row in enumerate(drawn):
        cell = decode(row)
        kinds = {"as it is": cell, "half the width": cell._replace(width=config.hidden // 2)}
        kinds |= all_alike(cell)
        # a cell that needs another learning rate is not one that remembers less
        for (kind, x), rate in product(kinds.items(), CAPACITY_RATES):
            rows.append(dict(group=kind, source=f"cell {i}", rate=rate, seed=config.seed + i,
                             cell=name_of(x._replace(rate=rate)), paths=path_count(x),
                             depth=depth(x)))
    train_rows(replace(config, data=str(folder), **BY_HEART), run, rows)
    best = {}
    for row in rows:
        of = (row["source"], row["group"])
        best[of] = min(best.get(of, row), row, key=lambda row: row["train"])
    return list(best.values())


def policy_gradient(controller, sample, rewards):
    """The flat leave-one-out estimate of dE[reward]/dtheta [parameters], without the entropy's
    part, so that estimators differ in their rewards alone."""
    loss = policy_loss(sample, worst_for_failures(rewards.detach()), 0.0)
    grads = torch.autograd.grad(-loss, list(controller.parameters()), retain_graph=True,
                                materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


# lookahead, response
ESTIMATORS = [("none", "none"), ("momentum", "none"), ("recent", "none"), ("fresh", "none"),
              ("fresh", "unrolled"), ("fresh", "sampled")]
SIMILARITY_EVERY = 10  # shared steps between two measurements


def anticipating(config):
    """A game whose controller steps are ENAS's; it remembers gradients, to measure all with."""
    game = Anticipation(config, load_corpus(config))
    game.remembers = True
    return game


def estimates(game, sample, rewards, step, others):
    """{estimator: its gradient} on one sample, validation segment and foreseen step.

    All estimators see the same draws, so that they differ in what they make of them.
    """
    found = {}
    for look, respond in ESTIMATORS:
        direct, response, _, state = extra_rewards(look, respond, game.s["weights"], sample.rows,
                                                   others, rewards, step)
        if state is not None:  # that of the text ahead, the same of all that read it
            game.s["state"]["ahead"] = state
        found[f"{look}, {respond}"] = policy_gradient(game.controller, sample, direct + response)
    return found


def cosines_to_the_next(game):
    """{estimator: cosines} between its gradient at omega_t and the plain one at omega_(t+1), after
    the real shared step, theta as it was: on the same and on other samples and text."""
    k = game.config.controller_samples
    fold = game.config.fold
    samples = [game.controller.sample(k, *game.key("similarity", i)) for i in range(2)]
    rewards = [game.rewards_on(game.next("valid")) for _ in samples]
    folds = game.controller.sample(2 * fold, *game.key("fold")).rows.split(fold)
    # all at omega_t, then the step, then the plain gradient at omega_(t+1)
    grads = estimates(game, samples[0], rewards[0], game.foresee(0.0, folds[0]), folds[1])
    game.shared_step(0.0)
    then = []
    for sample, reward in zip(samples, rewards):
        with torch.no_grad():
            values, _ = reward(game.s["weights"], sample.rows)
        then.append(policy_gradient(game.controller, sample, values))
    grads["the next one itself"] = then[0]
    return {name: [F.cosine_similarity(g, x, dim=0).item() for x in then]
            for name, g in grads.items()}


def study_similarity(config, run):
    """Is the gradient that looks ahead closer to the next one? Shared and controller steps
    alternate, and every tenth shared step is looked at.

    The controller climbs ENAS's own reward, whatever is measured beside it.
    """
    game = anticipating(config)
    rows = []
    steps = config.epochs * game.shared_steps
    if steps < SIMILARITY_EVERY:
        raise UserError(f"{steps} shared steps: at least {SIMILARITY_EVERY} to measure once")
    for step in range(steps):
        game.s["step"] = step
        if step % SIMILARITY_EVERY == SIMILARITY_EVERY - 1:
            for name, (same, other) in cosines_to_the_next(game).items():
                rows.append({"group": name, "step": step,
                             "same samples": same, "other samples": other})
        else:
            game.shared_step(0.0)
        if step >= config.warm_epochs * game.shared_steps:
            game.controller_step(0.0)
        run.obey()
    return rows


def clock(device):
    """Seconds, once the device has done what it was asked to: a GPU works on by itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def study_cost(config, run):
    """What the extra gradient costs and how noisy it is: milliseconds, and the median squared
    deviation of --controller_steps draws from their median, both divided by the plain one's."""
    if config.controller_steps < 2:
        raise UserError(f"--controller_steps {config.controller_steps}: a spread needs two draws")
    game = anticipating(config)
    for _ in range(game.shared_steps):  # to where the weights are no longer random
        game.shared_step(0.0)
        game.s["step"] += 1
    arms = [(look, respond, fold) for look, respond in ESTIMATORS
            for fold in ((1, 2, 4) if look == "fresh" else (1,))]
    seconds = {arm: [] for arm in arms}
    grads = {arm: [] for arm in arms}
    # the arms take turns, so that all see the same weights and a slow moment hits each
    for arm in arms * config.controller_steps:
        game.config = replace(config, lookahead=arm[0], response=arm[1], fold=arm[2])
        game.s["step"] += 1
        start = clock(game.device)
        sample = game.controller.sample(config.controller_samples, *game.key("cost"))
        rewards = sum(game.rewarded(sample, 0.0))
        grads[arm].append(policy_gradient(game.controller, sample, rewards))
        seconds[arm].append(clock(game.device) - start)
        run.obey()
    rows = []
    for arm in arms:
        g = torch.stack(grads[arm])                                            # [draws, parameters]
        deviation = (g - g.median(0).values).square().sum(1).median().item()
        rows.append(dict(group="{}, {}, fold {}".format(*arm), ms=1e3 * median(seconds[arm]),
                         deviation=deviation))
    for row in rows:
        row.update(cost=row["ms"] / rows[0]["ms"], noise=row["deviation"] / rows[0]["deviation"])
    return rows


# hidden, batch, vocabulary, architectures at once, dtype
BENCHES = [(32, 16, 200, 32, "float32"),
           (200, 64, 10000, 1, "float32"), (200, 64, 10000, 1, "bfloat16"),
           (850, 64, 10000, 1, "float32"), (850, 64, 10000, 1, "bfloat16")]


def bench_case(config, hidden, batch, words, k, dtype, repeats=5):
    """Rows of one size: milliseconds of the plain loop in float32, torch.nn.LSTM, and the fast
    path, all of them in turn, medians."""
    config = replace(config, hidden=hidden, batch=batch, nodes=12, hidden_dropout=0.25)
    device = device_of(config)
    # different cells, as in a search: of equal ones the plain loop computes one activation alone
    rows = uniform_rows(search_space(config), k, "bench").to(device)
    tokens = torch.randint(words, (config.bptt, batch), generator=rng("bench")).to(device)
    masks = draw_masks(config, words, batch, [1], 0)
    cell = {name: w.to(device) for name, w in shared_weights(config, words).items()}
    lstm = {name: w.to(device) for name, w in lstm_weights(config, words, hidden, [1] * k).items()}
    models = {"plain loop": (cell, "float32", plain_recurrence),
              "torch.nn.LSTM": (lstm, "float32", None),
              f"fast path, {dtype}": (cell, dtype, fast_recurrence)}
    dropped = {"forward and backward": {"hidden": masks["hidden"].to(device)}, "scoring": {}}
    found = []
    for work in dropped:
        seconds = {name: [] for name in models}
        for name in list(models) * (repeats + 1):
            weights, kind, recurrence = models[name]
            data = Batch(tokens, tokens, zero_state(weights, batch), dropped[work])
            start = clock(device)
            if work == "scoring":
                with torch.no_grad():
                    network(weights, rows, data, DTYPES[kind], recurrence)
            else:
                mean_gradient(lambda w: network(w, rows, data, DTYPES[kind], recurrence), weights)
            seconds[name].append(clock(device) - start)
        # the first is for warming up
        ms = {name: 1e3 * median(several[1:]) for name, several in seconds.items()}
        found += [dict(group=f"{work}, {name}, {hidden} units, {k} at once", ms=x,
                       speedup=ms["plain loop"] / x) for name, x in ms.items()]
    return found


def study_bench(config, run):
    """How fast is the hand-written backward pass? Beside the plain loop that it must equal, and the
    library's LSTM, which has one node where a cell has twelve."""
    cases = [case for case in BENCHES if case[0] <= config.hidden]
    if not cases:
        raise UserError(f"--hidden {config.hidden}: the smallest case has {BENCHES[0][0]} units")
    rows = []
    for case in cases:
        rows += bench_case(config, *case)
        run.obey()
    return rows


def kendall(x, y):
    """Kendall's tau-b: concordant minus discordant pairs, divided by the geometric mean of the
    numbers of pairs that differ in x and in y (Kendall 1945); nan if there are none."""
    both = torch.tensor([x, y], dtype=torch.float64)
    x, y = torch.sign(both[:, :, None] - both[:, None])
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def reward_error(game, rows, whole, at_least=30):
    """What a controller step sees of rows [K, D] where each segment is read by other architectures
    than the one before: the median, over cells, of the mean loss minus whole [K], that on the whole
    split; and the mean of Kendall's tau between the order on one segment and on the split."""
    config = game.config
    losses = []
    taus = []
    # as in a search: these cells are scored, then others read the segment and leave their state
    for i in range(max(at_least, len(game.streams["valid"]))):
        rewards = game.rewards_on(game.next("valid"))
        found, _ = rewards(game.s["weights"], rows)
        losses.append(-torch.log(found.cpu() / 80))
        taus.append(kendall(losses[-1].tolist(), whole.tolist()))
        others = uniform_rows(game.controller.decisions, config.controller_samples, config.seed,
                              "others", i)
        _, game.s["state"]["valid"] = rewards(game.s["weights"], move(others, game.device))
    return (torch.stack(losses).mean(0) - whole).median().item(), mean(taus)


CONTEXTS = (1, 2, 4, 8, 16, 32, 64)  # words


@torch.no_grad()
def study_state(config, run):
    """How should the hidden state be kept where each segment has another architecture? The reward's
    error under each of STATES; and the loss of a trained ENAS cell and an LSTM that see only so
    many words before the one they predict."""
    corpus = load_corpus(config)
    searched, weights, _ = finished_search(config)
    rows = uniform_rows(search_space(searched), config.derive_samples, config.seed, "scored")
    whole = score(weights, rows, corpus.valid, searched)
    found = []
    # the same weights, the state kept in another way
    for name in STATES:
        game = Search(replace(searched, state=name), corpus)
        game.s["weights"] = weights
        bias, tau = reward_error(game, move(rows, game.device), whole)
        found.append(dict(group=name, bias=bias, tau=tau))
    with torch.enable_grad():
        trained = train_rows(config, run, [dict(cell="enas"), dict(cell="lstm")])
    for row, words in product(trained, CONTEXTS):
        network_weights = load_tensors(run.folder / row["folder"] / "weights.pt")
        # streams of so many words, each begun as many words earlier
        streams = dict(batch=len(corpus.valid), warm_up=words, bptt=words)
        loss = evaluate(network_weights, encode([CELLS["enas"]]), corpus.valid, **streams)
        seen = f"{row['cell']}, about {words} to {2 * words} words"
        found.append(dict(group=seen, loss=loss.item()))
    return found


def probe(x, y, folds=5):
    """R^2 of a linear regression of y [n] on x [n, d] on the folds left out: what of y is linear in
    x, not what it fits. nan if y is constant."""
    x = F.pad(x, (0, 1), value=1.0)
    fold = torch.randperm(len(x), generator=rng("probe", len(x))) % folds
    guess = torch.empty_like(y)
    for i in range(folds):
        known = fold != i
        fit = torch.linalg.lstsq(x[known], y[known], rcond=1e-6, driver="gelsd").solution
        guess[~known] = x[~known] @ fit
    spread = (y - y.mean()).square().sum()
    return 1 - ((y - guess).square().sum() / spread).item() if spread > 0 else math.nan


@torch.no_grad()
def study_hidden(config, run):
    """Does the controller's final hidden state know the architecture? Of a search's controller and
    the untrained one it started from, on uniform cells and pairs of them: Kendall's tau of the
    states' distance with the decisions that differ and with the difference in loss under the shared
    weights; and the R^2 of linear probes."""
    corpus = load_corpus(config)
    searched, weights, _ = finished_search(config)
    rows = uniform_rows(search_space(searched), 10 * config.derive_samples, config.seed, "hidden")
    losses = score(weights, rows, corpus.valid[:20000], searched).double()
    losses = losses.nan_to_num(math.inf).clamp(max=guessing(corpus))
    values = {"loss": losses}
    for name, measure in MEASURES.items():
        values[name] = torch.tensor([measure(decode(row)) for row in rows]).double()
    untrained, trained = [Controller(search_space(searched), searched.seed) for _ in range(2)]
    with refusing(Path(config.supernet) / "controller.pt"):
        trained.load_state_dict(load_tensors(Path(config.supernet) / "controller.pt"))
    partner = torch.randperm(len(rows), generator=rng(config.seed, "pairs"))
    found = []
    for name, controller in (("untrained", untrained), ("trained", trained)):
        states = controller(rows=rows).hidden.double()
        far = (states[partner] - states).norm(dim=1).tolist()
        differ = (rows[partner] != rows).sum(1)
        row = {"group": name, "distance with decisions": kendall(far, differ.tolist()),
               "distance with loss": kendall(far, (losses[partner] - losses).abs().tolist())}
        found.append(row | {f"probe for {of}": probe(states, y) for of, y in values.items()})
    return found


def conditional(config, name, run):
    """A controller that is asked for a value of a property: trained on every other target of a
    grid, tested on those in between. Rows of target, the samples' mean, and their mean absolute
    error beside the untrained controller's, in standard deviations of the latter's values."""
    controller = Controller(search_space(config), config.seed, asked=True)

    def values(rows):
        return torch.tensor([float(MEASURES[name](decode(row))) for row in rows])

    # what the untrained controller does says what can be asked for, and in which units
    anywhere = values(controller.sample(500, config.seed, "targets").rows)
    spread = anywhere.std()
    targets = torch.quantile(anywhere, torch.linspace(0.02, 0.98, 9)).round().unique()
    if len(targets) < 3:
        raise UserError(f"the space has too few values of {name} to ask for; --min_nodes widens it")
    adam = torch.optim.Adam(controller.parameters(), lr=config.controller_lr)

    def asked_for(target, k, *key):
        asked = (target - anywhere.mean()) / spread
        return controller.sample(k, config.seed, *key, asked=asked.expand(k))

    training = targets[::2]
    for step in range(config.controller_steps):
        run.obey()
        i = torch.randint(len(training), (), generator=rng(config.seed, "target", step))
        sample = asked_for(training[i], config.controller_samples, "asked", step)
        rewards = -(values(sample.rows) - training[i]).abs() / spread
        adam.zero_grad()
        policy_loss(sample, rewards, config.entropy).backward()
        adam.step()
    found = []
    for target in targets[1:-1:2]:  # between two that it was trained on
        got = values(asked_for(target, 50, "test").rows)
        error, blind = [((x - target).abs().mean() / spread).item() for x in (got, anywhere)]
        found.append(dict(group=name, target=target.item(), mean=got.mean().item(), error=error,
                          untrained=blind))
    return found


def study_conditional(config, run):
    """Does a controller that is told what to aim for follow?"""
    return [row for name in MEASURES for row in conditional(config, name, run)]


def study_progress(config, run):
    """How does a policy change? A search; before each of its rounds and at its end, the best of
    --derive_samples cells of the controller on the whole validation split."""
    corpus = load_corpus(config)
    game = game_of(config, corpus)
    rounds = config.epochs + config.settle

    def watch(round_):
        drawn = game.controller.sample(config.derive_samples, config.seed, "watch", round_).rows
        rows, losses = derive(config, game.s["weights"], drawn, corpus)
        best = dict(group=f"before round {round_}", round=round_, cell=row_name(rows[0]),
                    valid=no_worse(losses[0].item(), guessing(corpus)),
                    distinct=len(drawn.unique(dim=0)))
        write_json(run.folder / f"round {round_}.json", best)

    search(game, run, watch)
    watch(rounds)
    return [read_json(run.folder / f"round {i}.json") for i in range(rounds + 1)]


# 13. The report -----------------------------------------------------------------------------------
# Statistics: one test everywhere. A value stands for what was drawn independently, mostly a search.
EXACT = 14  # up to so many pairs all sign flips are enumerated; draws are functions of the sizes


def flipped_means(values):
    """The means of a sample of differences with their signs flipped, all ways or 9999 drawn.

    If a and b do not differ, each pair's difference could as well have had the other sign.
    """
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) <= EXACT:
        signs = torch.cartesian_prod(*[torch.tensor((-1.0, 1.0))] * len(x)).view(-1, len(x))
    else:
        signs = torch.randint(2, (9999, len(x)), generator=rng("flips", len(x))) * 2.0 - 1
        signs[0] = 1  # the data count as a draw
    return signs.double() @ x / len(x)


def dealt_differences(a, b):
    """mean(b) - mean(a), the values dealt out anew, 9999 draws."""
    both = torch.tensor([*a, *b], dtype=torch.float64)
    order = torch.rand(9999, len(both), generator=rng("deal", len(a), len(b))).argsort(1)
    order[0] = torch.arange(len(both))
    dealt = both[order]
    return dealt[:, len(a):].mean(1) - dealt[:, :len(a)].mean(1)


def p_value(a, b, paired, shift=0.0):
    """Two-sided p of b being a shifted by so much: the share of sign flips of the pairs'
    differences, or of deals of the values, with a mean as far from 0 (Fisher 1935)."""
    b = [y - shift for y in b]
    seen = mean(b) - mean(a)
    gaps = flipped_means([y - x for x, y in zip(a, b)]) if paired else dealt_differences(a, b)
    return (gaps.abs() >= abs(seen) * (1 - 1e-9)).double().mean().item()


def interval(a, b, paired):
    """The 95 % interval of p_value's test: shifts not refused at .05; None if none is refused."""
    seen = mean(b) - mean(a)
    ends = []
    spread = max(*a, *b) - min(*a, *b) + 1e-9
    # by bisection, from the difference seen to one that is refused
    for side in (-1, 1):
        inside = seen
        outside = seen + 4 * side * spread
        if p_value(a, b, paired, outside) > .05:
            return None
        for _ in range(40):
            middle = (inside + outside) / 2
            if p_value(a, b, paired, middle) > .05:
                inside = middle
            else:
                outside = middle
        ends.append(inside)
    return ends


def by_unit(rows, value):
    """{group: {unit: its rows' mean}}, so that a unit, what was drawn independently, counts once.

    A unit is a run, for the cells of one search are not independent of each other; or, where rows
    have a source, a cell of a run with its changes; a known cell, such as darts_v2, is the same in
    every run and counts once.
    """
    found = {}
    for row in rows:
        if row.get(value) is not None:
            found.setdefault(row["group"], {}).setdefault(row["unit"], []).append(row[value])
    return {group: {unit: mean(several) for unit, several in units.items()}
            for group, units in found.items()}


HEADERS = ("", "draws", "rows", "mean", "median", "difference", "95 %", "p, corrected")


def comparison(rows, value, first=""):
    """A line under HEADERS for each group: its mean over units, its median over rows, and its
    difference to the first group, paired by unit where both have the same ones; p is corrected for
    the number of groups (Bonferroni), the interval is that of a single comparison.

    With fewer than two units there is neither.
    """
    groups = by_unit(rows, value)
    lines = []
    if first in groups:
        groups = {first: groups[first]} | groups
    base = next(iter(groups.values()))
    for group, units in groups.items():
        each = [row[value] for row in rows if row["group"] == group and row.get(value) is not None]
        line = [group, len(units), len(each), mean(units.values()), median(each), "", "", ""]
        paired = units.keys() == base.keys()
        a = list(base.values())
        b = [units[unit] for unit in (base if paired else units)]
        if units is not base and min(len(a), len(b)) > 1:
            ends = interval(a, b, paired)
            p = min(1.0, (len(groups) - 1) * p_value(a, b, paired))
            line[5:] = [f"{mean(b) - mean(a):+.3f}", "-", f"{p:.3f}"]
            if ends:
                line[6] = f"{ends[0]:+.3f} to {ends[1]:+.3f}"
        lines.append(line)
    return lines


def answer(lines):
    """In words, which groups of a comparison differ from the first one, at .05 after correction."""
    tested = [line for line in lines if line[7]]
    differ = [f"{line[0]} ({line[5]}, p = {line[7]})" for line in tested if float(line[7]) <= .05]
    rest = [line[0] for line in tested if float(line[7]) > .05]
    if not tested:
        return "Too few seeds or groups for a test."
    return (f"From {lines[0][0]} differ: {'; '.join(differ) or 'none'}. "
            f"Not shown to differ: {'; '.join(rest) or 'none'}.")


def rows_of(records):
    """All rows of several records."""
    return [row for record in records for row in record["rows"]]


# Panels of a figure are functions (axes, records, value).

def dots(axes, records, value):
    """Every unit a dot, every group's mean a larger one; far off ones as triangles at the edge, so
    that a single failure does not take the scale from all."""
    groups = by_unit(rows_of(records), value)
    everything = torch.tensor([x for units in groups.values() for x in units.values()]).double()
    low, high = everything.quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    edge = min(everything.max().item(), high + 5 * (high - low))
    # grey: a unit; blue: the mean of a group
    for y, units in enumerate(groups.values()):
        centre = mean(units.values())
        for x in units.values():
            axes.plot(min(x, edge), y, ">" if x > edge else ".", color="#999999")
        axes.plot(min(centre, edge), y, ">" if centre > edge else "o", color="C0")
    axes.set(yticks=range(len(groups)), yticklabels=groups, xlabel=value)
    axes.set(ylim=(len(groups) - 0.5, -0.5))  # the first on top


def densities(axes, records, value):
    """Gaussian kernel density estimates with Scott's bandwidth (Scott 1992), a colour for each
    group, the number of its rows beside its name."""
    groups = {}
    for row in rows_of(records):
        groups.setdefault(row["group"], []).append(row[value])
    everything = torch.tensor(sum(groups.values(), []))
    # a few networks that failed would leave the rest in one pixel
    at = torch.linspace(everything.min(), everything.quantile(0.98), 300)
    least = (at[-1] - at[0]) / 100 + 1e-9
    for group, values in groups.items():
        x = torch.tensor(values)
        width = (x.std(correction=0) * len(x) ** -0.2).clamp(min=least)
        kernels = torch.distributions.Normal(x, width).log_prob(at[:, None]).exp()
        axes.plot(at, kernels.mean(1), label=f"{group} ({len(x)})")
    axes.set(xlabel=value, ylabel="density")
    axes.legend(fontsize=8)


def metric(line, value):
    """A line's metric, or None; of several networks that of the first, until it stops or fails."""
    x = line.get(value)
    if isinstance(x, list):
        return x[0] if line.get("networks", [0])[0] == 0 else None
    return x


def curves(axes, records, value):
    """A metric of metrics.jsonl against the steps, a line for each arm's first run that has it."""
    ends = {}
    for record in records:
        path = record["folder"] / "metrics.jsonl"
        arm = record["label"]
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        points = [(line["step"], metric(line, value)) for line in lines]
        points = [point for point in points if point[1] is not None]
        if points and arm not in ends:
            steps, values = zip(*points)
            axes.plot(steps, values, ".-", linewidth=0.6, markersize=3, label=arm)
            ends[arm] = values[-1]
    if value == "valid_perplexity" and ends:  # of what failed only the start is seen
        axes.set(ylim=(0.9 * min(ends.values()), 1.5 * median(ends.values())))
    axes.set(xlabel="steps", ylabel=value.replace("_", " "))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves


def draw_progress(path, rows):
    """A GIF of the best cell before each round, a second each."""
    figure, (axes,) = figure_of(1, 5, 5)
    movie = PillowWriter(fps=1)
    with movie.saving(figure, str(path), dpi=70):
        for row in rows:
            axes.clear()
            title = f"{row['group']}: perplexity {math.exp(row['valid']):.2f}"
            draw_cell(decode(row_of(row["cell"])), axes, title)
            movie.grab_frame()


# A study's question; the values that are compared; the group of its rows that it is about, '' for
# each; the group that the others are compared with, '' for the first; panels beside the dots; and
# columns that are crossed, of which each is also compared alone, over all values of the others.
Study = namedtuple("Study", "question values about first panels crossed",
                   defaults=("", "", (), ()))

# A folder's name up to a '-' is the study: extra-slow is another 'extra', train-ptb a 'train'.
STUDIES = {
    "search": Study("What does a search find?", ("valid", "test"),
                    panels=((curves, "entropy"), (curves, "reward"))),
    "train": Study("What do cells reach under one budget?", ("valid", "test"), "network", "enas",
                   panels=((curves, "valid_perplexity"),)),
    "compare": Study("Is a trained controller better than chance?",
                     ("test", "best", "shared", "distinct"), panels=((densities, "test"),)),
    "factors": Study("Is it the connections or the activations?", ("test",),
                     crossed=("connections", "activations")),
    "ablate": Study("What in a cell matters?", ("test",)),
    "capacity": Study("How much does a cell learn by heart in the same time?", ("train",)),
    "hidden": Study("Does the controller's state know the architecture?",
                    ("distance with decisions", "distance with loss", "probe for loss",
                     "probe for depth")),
    "state": Study("What is wrong with a reward whose h another cell left?",
                   ("bias", "tau", "loss")),
    "similarity": Study("Is a gradient that looks ahead closer to the next one?",
                        ("same samples", "other samples")),
    "cost": Study("What does it cost, and how noisy is it?", ("cost", "noise")),
    "extra": Study("Does the term that ENAS leaves out find better cells?", ("valid", "learns"),
                   "sampled", "plain"),
    "spaces": Study("Do other spaces hold better cells?", ("valid", "parameters"), "sampled",
                    "ENAS"),
    "optimizer": Study("Can the learning rate be a decision?", ("valid", "rate"), "sampled",
                       "no-choice"),
    "anneal": Study("Is a policy driven to one cell better than the best of a sample?", ("test",),
                    "found", "best-of-sample"),
    "kept": Study("Does the way h is kept change what is found?", ("valid",), "sampled", "carry"),
    "robust": Study("Do perturbed rewards find robuster cells?",
                    ("test", "test, words", "test, noise"), "found", "plain"),
    "conditional": Study("Does a controller that is told what to aim for follow?",
                         ("error", "untrained")),
    "progress": Study("How does a policy change?", ("valid", "distinct")),
    "bench": Study("How fast is it?", ("speedup",)),
}


def study_of(folder):
    """The Study of such a folder, or None."""
    return STUDIES.get(folder.partition("-")[0])


def load_records(out):
    """{folder: [record]} of OUT/STUDY[/ARM]/SEED/result.json; of PRESET-SEED the preset is the arm.

    A row's unit is the seed, and its source if it has one; of a known cell the source alone. Its
    group is the arm; without arms its own; 'ARM: GROUP' where the study is about all groups. Rows
    that it is not about, and folders that are no study's, are left out.
    """
    found = {}
    for path in sorted(Path(out).glob("**/result.json")):
        folder, *arm = path.parent.relative_to(out).parts or ("",)
        record = read_json(path)
        study = study_of(folder)
        # a run's folder ends in its seed
        is_run = len(arm) in (1, 2) and f"-{arm[-1]}".endswith(f"-{record.get('seed')}")
        if not study or not is_run:
            continue  # another folder, or a part of another run
        *arm, name = arm
        seed = str(record["seed"])  # which may be negative
        preset = name.removesuffix(seed).removesuffix("-")
        arm += [preset] * bool(preset)
        rows = []
        for row in record["rows"]:
            if row["group"] == study.about or not study.about and row["group"] != "floor":
                names = arm
                if not study.about or not names:
                    names = names + [row["group"]]
                source = row.get("source", "")
                unit = source if source in CELLS else f"{seed} {source}".strip()
                rows.append(row | {"unit": unit, "arm": arm, "group": ": ".join(names)})
        label = ": ".join(arm) or folder
        found.setdefault(folder, []).append(
            record | {"rows": rows, "folder": path.parent, "label": label})
    return found


def measured(study, records):
    """The study's values that tell something: not those that are absent, or the same everywhere."""
    rows = rows_of(records)
    told = []
    for value in study.values:
        seen = {row[value] for row in rows if row.get(value) is not None}
        if len(seen) > 1 or seen and len(rows) == 1:
            told.append(value)
    return told


def tables(study, records):
    """Its comparisons, as text: of each value a table and what it says."""
    rows = rows_of(records)
    parts = []
    for value in measured(study, records):
        views = {value: rows}
        for crossed in study.crossed:
            views[f"{value}, {crossed}"] = [
                row | {"group": ": ".join([*row["arm"], row[crossed]])} for row in rows]
        for name, view in views.items():
            lines = comparison(view, value, study.first)
            parts += [f"**{name}**. {answer(lines)}", table(HEADERS, lines)]
    return parts


def flags(records):
    """{arm: the settings in which the arms differ}: what a label stands for. Those in which the
    runs of one arm differ, such as --supernet, are left out."""
    arms = {}
    for record in records:
        arms.setdefault(record["label"], []).append(record["config"])
    known = {f.name for f in fields(Config)} - WHEREABOUTS - {"seed"}
    # records of older versions may lack some
    known = known.intersection(*[record["config"] for record in records])
    differ = []
    for name in known:
        values = [{str(config.get(name)) for config in configs} for configs in arms.values()]
        if max(map(len, values)) == 1 and len(set.union(*values)) > 1:
            differ.append(name)
    return {arm: " ".join(f"--{name} {configs[0].get(name)}" for name in sorted(differ))
            for arm, configs in arms.items()}


def draw_study(path, study, records):
    """The study's figure."""
    # the values compared, then what only this study shows
    panels = [(dots, value) for value in measured(study, records)]
    curved = any((record["folder"] / "metrics.jsonl").exists() for record in records)
    panels += [panel for panel in study.panels if curved or panel[0] is not curves]
    longest = max((len(row["group"]) for row in rows_of(records)), default=0)
    figure, axes = figure_of(max(1, len(panels)), width=3.5 + .08 * longest)
    for each, (panel, value) in zip(axes, panels):
        panel(each, records, value)
    figure.savefig(path, dpi=100)


def report_study(folder, records, out):
    """Its section of the page: question, tables, figure, command, and what they were made with."""
    study = study_of(folder)
    rows = rows_of(records)
    pictures = [f"![{folder}]({folder}.png)"]
    draw_study(Path(out) / f"{folder}.png", study, records)
    if any("round" in row for row in rows):
        draw_progress(Path(out) / f"{folder}.gif", records[0]["rows"])
        pictures.append(f"![the best cell of each round]({folder}.gif)")
    machines = "; ".join(sorted({record["machine"] for record in records}))
    hours = sum(record["seconds"] for record in records) / 3600
    took = f", {hours:.1f} hours" if hours else ""  # converted records do not know
    notes = "".join(sorted({f" {record.get('converted', '')}" for record in records})).strip()
    made = (f"`python menas.py {records[0]['command']}`, see experiments.sh. {len(records)} runs, "
            f"{len(rows)} rows{took} on {machines}. {notes}".strip())
    arms = [f"- {arm}: `{given}`" for arm, given in flags(records).items() if given]
    return [f"## {folder}: {study.question}", *tables(study, records),
            *pictures, made, *(["\n".join(arms)] if arms else [])]


def report(out):
    """Every table and figure again from the records under a folder, on a page beside them; a user's
    beside the project's own."""
    records = load_records(out)
    if not records:
        raise UserError(f"no records in {out}/")
    page = ["# What the records say",
            "Made by `python menas.py report`. Losses are in nats per token. A draw is a run, or "
            "where cells are changed a cell of a run with its changes; darts_v2 counts once."]
    ours = load_records("results") if Path(out).resolve() != Path("results").resolve() else {}
    for folder, several in sorted(records.items()):
        page += report_study(folder, several, out)
        if folder in ours:
            page += ["The project's own:", *tables(study_of(folder), ours[folder])]
    text = "\n\n".join(page) + "\n"
    write_atomically(Path(out) / "README.md", text.encode())
    print(text)


# 14. Main -----------------------------------------------------------------------------------------
# command -> its function, which returns rows, and what it does
COMMANDS = {
    "search": (study_search, "find a cell"),
    "train": (study_train, "train cells from scratch"),
    "compare": (study_compare, "cells of a search beside others"),
    "ablate": (study_ablate, "nodes removed, connections added, activations changed"),
    "factors": (study_factors, "connections or activations?"),
    "capacity": (study_capacity, "how much cells learn by heart"),
    "state": (study_state, "ways to keep the hidden state"),
    "hidden": (study_hidden, "what the controller's state knows"),
    "similarity": (study_similarity, "which gradient is closest to the next?"),
    "cost": (study_cost, "what the extra gradient costs"),
    "conditional": (study_conditional, "a controller told what to aim for"),
    "progress": (study_progress, "a search, watched"),
    "bench": (study_bench, "speed beside the plain loop and torch.nn.LSTM"),
    "draw": (None, "a cell's picture, row, ENAS arc and DARTS genotype"),
    "report": (None, "tables and figures of the records under --out"),
}


def boolean(text):
    """--flag, --flag true or --flag false."""
    return ("false", "true").index(text.lower()) == 1


def usage():
    """All commands, a line each."""
    lines = [f"    {name:12s} {about}" for name, (_, about) in COMMANDS.items()]
    how = "usage: python menas.py COMMAND [--SETTING VALUE ...]; COMMAND --help lists settings"
    return "\n".join([how, "", *lines])


def parse_command(command, arguments):
    """The Config of a command line; --help shows the settings used, with the defaults of the
    preset."""
    def fail(message):
        raise UserError(message)

    # --help shows the defaults that would really hold, those of the preset asked for
    preset = re.search(r"--preset[ =](\w+)", " ".join(arguments))
    shown = configure(command, preset[1] if preset else "tiny")
    parser = argparse.ArgumentParser(prog=f"menas.py {command}", allow_abbrev=False,
                                     description=COMMANDS[command][1])
    parser.error = fail
    names = settings_of(command)
    for f in fields(Config):
        if f.name in names:
            how = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
            text = f"{f.metadata['help']} [{getattr(shown, f.name)}]".replace("%", "%%")
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text,
                                metavar=f.type.__name__.upper(), **how)
    if re.search("(^|[ =])--( |$)", " ".join(arguments)):  # argparse would make it a list
        fail("unknown argument '--'")
    # what was not given is absent (SUPPRESS), so that the preset decides
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        choose(f"setting of {command}", unknown[0].split("=")[0], [f"--{name}" for name in names])
        fail(f"unknown argument {unknown[0]!r}")
    # --data F/ is --data F
    given = {name: x.rstrip("/") if isinstance(x, str) else x for name, x in vars(given).items()}
    return configure(command, **given)


def on_signal(number, frame):
    """Ask the run to stop; asked twice, leave at once."""
    if STOP:
        raise SystemExit(128 + number)
    STOP.append(number)


def one_line(error):
    """An error as one printable line; of more than 290 characters the middle is left out."""
    text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in str(error))
    return text if len(text) <= 290 else f"{text[:140]} ... {text[-140:]}"


def main(arguments=None):
    """Run a command line; an error is one line on stderr, exit code 2 if the user can mend it, 1 if
    the machine is at fault."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0
        command = choose("command", arguments[0], COMMANDS)
        config = parse_command(command, arguments[1:])
        if command == "report":
            report(config.out or "results")
        elif command == "draw":
            draw(config)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, on_signal)
            work, _ = COMMANDS[command]
            print(f"\n{summary(run_command(command, work, config))}")
    except (UserError, OSError) as error:
        print(f"menas: {one_line(error)}", file=sys.stderr)
        return 2 if type(error) is UserError else 1
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # | head ends it
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
