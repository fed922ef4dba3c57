"""A cell is its row, the published ones are as published, and a search space is what it says.
Run: pytest tests/test_cells.py"""
import math
from collections import Counter

import pytest
import torch

import menas
from menas import (ALL, CELLS, GATE, INPUT, LEAVES, MEMORY, SUM, TANH, Cell, Config, Node,
                   UserError, encode, load_cell, parse, recurrent_parameters, search_space)
from reference import (EVERY_OPERATION, HIDDEN, STREAMS, WORDS, naive_leaves, naive_slots,
                       random_cell)

# The published cells as FACTS.md writes them: predecessor and activation of the nodes after node 0,
# which is tanh on the input pair.
PUBLISHED = {
    "enas": "0 tanh 1 relu 2 relu 2 tanh 2 tanh 5 relu 1 tanh 6 relu 8 relu 8 relu 8 relu",
    "darts_v1": "0 relu 1 relu 2 tanh 3 relu 4 relu 1 identity 5 relu 1 relu",
    "darts_v2": "0 sigmoid 1 relu 1 relu 1 identity 2 tanh 5 sigmoid 3 tanh 5 relu",
    "enas_lm": "0 sigmoid 1 tanh 2 relu 2 sigmoid 4 tanh 5 tanh 3 sigmoid 6 sigmoid"}
ARC_ORDER = ["tanh", "relu", "sigmoid", "identity"]
SOME = [*CELLS.values(), Cell((Node(INPUT),), ALL),
        *(random_cell(i, i % 2 == 0, 12, (0, 3)) for i in range(100))]


@pytest.mark.parametrize("nodes", [0, 12, 15])
def test_rows_give_the_cells_back(nodes):
    """Oracle: nothing changes, nor when a row is written and read."""
    cells = [cell._replace(rate=i % 5 - 2) for i, cell in enumerate(SOME)]
    rows = encode(cells, nodes)
    assert rows.shape == (len(cells), 5 + 4 * max(nodes, 12))
    assert [menas.decode(row) for row in rows] == cells
    for row, cell in zip(rows, cells):
        assert load_cell(Config(), menas.row_name(row)) == cell


# The published cells: the oracles are their papers' tables and the formats of their authors' code

@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_are_as_published(name):
    words = PUBLISHED[name].split()
    wanted = [(int(read) + 1, ARC_ORDER.index(act)) for read, act in zip(words[::2], words[1::2])]
    assert [(node.read, node.activation) for node in CELLS[name].nodes] == [(INPUT, 0), *wanted]
    assert menas.is_enas(CELLS[name])


@pytest.mark.parametrize("name, leaves", [
    ("enas", [3, 4, 7, 9, 10, 11]), ("darts_v1", range(1, 9)), ("darts_v2", range(1, 9)),
    ("enas_lm", range(1, 9)), ("chain", [11]), ("tree", range(6, 12)), ("lstm_cell", [3])])
def test_their_output_is_the_mean_of_these_nodes(name, leaves):
    """Pham et al. draw six loose ends; DARTS's concat is range(1, 9); the rest by hand."""
    assert menas.leaves(CELLS[name]) == list(leaves)


GENOTYPE = ("Genotype(recurrent=[('sigmoid', 0), ('relu', 1), ('relu', 1), ('identity', 1), "
            "('tanh', 2), ('sigmoid', 5), ('tanh', 3), ('relu', 5)], concat=range(1, 9))")


@pytest.mark.parametrize("text, name", [("0 2 1 0 2 1 2 2 4 0 5 0 3 2 6 2", "enas_lm"),
                                        ("0 2 1 1 1 1 1 3 2 0 5 2 3 0 5 1", "darts_v2"),
                                        (GENOTYPE, "darts_v2")])
def test_cells_as_their_authors_code_prints_them(text, name):
    """enas_lm's fixed arc, DARTS_V2 in its format, and DARTS's own Genotype."""
    assert load_cell(Config(), text) == CELLS[name]


# No nodes, or half a number of them; a slot, an operation, an activation, an output, a memory that
# is not there; a gate on a memory that is not carried. Then what was cut or mistyped: fewer nodes
# than the row says; an arc without its last activation, or without nodes; a glu's second slot,
# which nobody reads, yet which would be no leaf.
@pytest.mark.parametrize("text", [
    "2-0-0-0-0", "0-0-0-0-0", "2", "1-0-0-0-0-0-0-0", "99999999999999999999-0-0-0-0-0-0-0-0",
    "1-0-0-0-0-1-0-0-0", "1-0-0-0-0-0-4-0-0", "1-0-0-0-0-0-0-0-4", "1-0-0-0-0-0-0-1-0",
    "1-2-0-0-0-0-0-0-0", "1-0-2-0-0-0-0-0-0", "1-0-0-0-0-0-2-0-0", "0 7", "1 0", "0 0 2 0",
    "Genotype(recurrent=[('reul', 0)])", "Genotype(recurrent=[('relu', 1)])", "3-0-0-0-0-0-0-0-0",
    "0 2 1", "Genotype(recurrent=[])", "3-0-0-0-0-0-0-0-0-1-0-0-0-0-1-2-0"])
def test_what_cannot_be_a_cell_is_refused(text):
    with pytest.raises(UserError):
        load_cell(Config(), text)


# What is derived from a cell: the oracles are the naive definitions of reference.py, and autograd

@pytest.mark.parametrize("padding", [0, 17])
def test_h_is_the_mean_of_the_leaves(padding):
    weights = menas.leaf_weights(parse(encode(SOME, padding)))
    for cell, weight in zip(SOME, weights):
        wanted = naive_leaves(cell)
        share = [1 / len(wanted) if i in wanted else 0.0 for i in range(len(weight))]
        assert weight.tolist() == pytest.approx(share, abs=1e-15)
        assert menas.leaves(cell) == wanted


def test_slots_that_are_read():
    for node in (node for cell in SOME for node in cell.nodes):
        slots = menas.slots_read(node)
        assert [slot or 0 for slot in slots] == naive_slots(node)
        assert (None in slots) == (node.operation in (GATE, SUM) and node.second == MEMORY)


def used_entries(cell, seed):
    """Entries of the recurrence's weights with a gradient, for text that reaches all of them."""
    draw = torch.Generator().manual_seed(seed)
    weights = menas.standalone_weights(Config(hidden=HIDDEN), WORDS, [cell], [seed])
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    tokens = torch.randint(WORDS, (4, STREAMS), generator=draw)
    state = torch.randn(2, 1, STREAMS, HIDDEN, generator=draw).double()
    batch = menas.Batch(tokens, tokens, state, {})
    losses, _ = menas.network(weights, encode([cell]), batch, torch.float64)
    found = menas.gradients(losses.sum(), weights)
    return sum((found[name] != 0).sum() for name in found if name not in ("embedding", "bias"))


@pytest.mark.parametrize("width", [0, 3])
def test_parameters_are_the_weights_with_a_gradient(width):
    """Oracle: autograd. A relu that is off would hide weights, so every activation is tanh."""
    for seed in range(30):
        cell = random_cell(seed, widths=(width,))._replace(output=LEAVES)
        cell = cell._replace(nodes=tuple(node._replace(activation=TANH) for node in cell.nodes))
        assert recurrent_parameters(cell, HIDDEN) == used_entries(cell, seed)


# Search spaces: settings, the number of their cells, and what holds of all. A gated node 0 with a
# memory has highway 2, glu 2, gate 2, sum 1 = 7 choices, node 1 reads one of two slots and has
# 2 + 2 + 2 * 2 + 2; and there are two memories.
TWO = dict(activations="tanh,relu")
SPACES = {
    "ENAS's": (dict(nodes=4, **TWO), 6 * 2 ** 4, menas.is_enas),
    "sizes": (dict(nodes=3, min_nodes=1, **TWO), 2 + 2 ** 2 + 2 * 2 ** 3, menas.is_enas),
    "chain": (dict(nodes=3, connections="chain"), 4 ** 3,
              lambda cell: [node.read for node in cell.nodes] == [0, 1, 2]),
    "tree": (dict(nodes=3, connections="tree", operations="glu,sum", **TWO), 2 * 3 * 4,
             lambda cell: [node.read for node in cell.nodes] == [0, 1, 1]),
    "one activation": (dict(nodes=3, min_nodes=2, one_activation=True), (1 + 2) * 4,
                       lambda cell: len({node.activation for node in cell.nodes}) == 1),
    "widths, rates": (dict(nodes=2, hidden=8, widths="4,8", rates="0.5,1,2", **TWO), 6 * 2 ** 2,
                      lambda cell: cell.width in (4, 8) and cell.rate in (-1, 0, 1)),
    "gated": (dict(nodes=2, operations=EVERY_OPERATION, memory=True, **TWO), 2 * 7 * 2 * 10,
              lambda cell: cell.memory in (1, 2)),
    "no memory": (dict(nodes=2, operations="highway,sum", **TWO), 2 * 2 * (2 + 1),
                  lambda cell: cell.memory == 0),
    "gated, sizes": (dict(nodes=2, min_nodes=1, operations="highway,sum", memory=True, **TWO),
                     (2 + 1) + (2 + 1) * 2 * (2 + 2), lambda cell: cell.memory == 1)}


def grown(row, decision):
    """A row with each value that the decision may take there."""
    for value in decision.choices if all(row[i] in some for i, some in decision.when) else [0]:
        yield [value if i in decision.columns else number for i, number in enumerate(row)]


def every_row(decisions):
    """All rows of a space, one decision after the other."""
    rows = [[0] * (1 + max(i for d in decisions for i in d.columns))]
    for decision in decisions:
        rows = [new for row in rows for new in grown(row, decision)]
    return rows


@pytest.mark.parametrize("name", SPACES)
def test_a_space_has_these_cells_and_each_once(name):
    """Oracle: enumeration, and the count by hand. What a cell does not use is 0."""
    settings, count, holds = SPACES[name]
    rows = every_row(search_space(Config(**settings)))
    cells = [menas.checked(menas.decode(torch.tensor(row))) for row in rows]
    assert len(set(cells)) == len(cells) == count
    assert all(holds(cell) for cell in cells)
    for row, cell in zip(rows, cells):  # as a record keeps it
        assert load_cell(Config(), menas.row_name(torch.tensor(row))) == cell
    for node in (node for cell in cells for node in cell.nodes):
        assert node.second == 0 or node.operation in (GATE, SUM)
        assert node.activation == 0 or node.operation != SUM
    if name != "one activation":
        assert encode(cells).tolist() == rows


@pytest.mark.parametrize("settings, words", [
    (dict(activations="tanh,rulu"), "rulu|did you mean relu"),
    (dict(activations="tanh,tanh"), "twice"), (dict(operations="gatte"), "did you mean gate"),
    (dict(operations="gate,sum"), "--memory"), (dict(memory=True), "--memory|--operations"),
    (dict(min_nodes=13), "--min_nodes 13"), (dict(widths="0,4"), "--widths"),
    (dict(widths="4,x"), "--widths"), (dict(widths="400"), "--widths"),
    (dict(rates="1,3"), "--rates|'3'"), (dict(rates="-1"), "--rates")])
def test_an_impossible_space_is_refused(settings, words):
    with pytest.raises(UserError) as caught:
        search_space(Config(**settings))
    assert all(word in str(caught.value) for word in words.split("|"))


def chi_square(drawn, weights):
    """Of drawn rows against probabilities, in standard deviations from its mean."""
    counts, unit = Counter(drawn), len(drawn) / sum(weights.values())
    statistic = sum((counts[row] - unit * w) ** 2 / (unit * w) for row, w in weights.items())
    freedom = len(weights) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def path_probability(row, decisions):
    """Of a row, if each decision that matters is uniform over its choices."""
    free = [d for d in decisions if all(row[i] in values for i, values in d.when)]
    return 1 / math.prod(len(d.choices) for d in free)


@pytest.mark.parametrize("name", ["ENAS's", "sizes", "gated"])
def test_uniform_rows_are_uniform_at_every_decision(name):
    """Oracle: chi square over the enumerated space, where in ENAS's all cells are alike. It refuses
    a policy under which half of the cells are half as likely."""
    decisions = search_space(Config(**SPACES[name][0]))
    rows = list(map(tuple, every_row(decisions)))
    wanted = {row: path_probability(row, decisions) for row in rows}
    assert sum(wanted.values()) == pytest.approx(1)
    assert (set(wanted.values()) == {1 / len(rows)}) == (name == "ENAS's")
    drawn = list(map(tuple, menas.uniform_rows(decisions, 4000, "a key").tolist()))
    assert set(drawn) <= set(rows)
    assert chi_square(drawn, wanted) < 5
    assert chi_square(drawn, {row: wanted[row] * (1 + i % 2) for i, row in enumerate(rows)}) > 5
