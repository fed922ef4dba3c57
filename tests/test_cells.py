"""A cell is its row, the published ones are as published, and a search space is what it says.
Run: pytest tests/test_cells.py"""
import pytest
import torch

import menas
from menas import (ALL, CELLS, GATE, INPUT, LEAVES, SUM, TANH, Cell, Config, Node, UserError,
                   encode, load_cell, search_space)
from reference import (EVERY_OPERATION, HIDDEN, doubles, every_row, in_double, naive_leaves,
                       random_cell, setting)

SOME = [*CELLS.values(), Cell((Node(INPUT),), ALL)]
SOME += [random_cell(i, i % 2 == 0, 12, (0, 3)) for i in range(100)]


@pytest.mark.parametrize("nodes", [0, 15])
def test_rows_give_the_cells_back(nodes):
    """Oracle: nothing changes, nor when a row is written and read; padded with 0, too."""
    cells = [cell._replace(rate=i % 5 - 2) for i, cell in enumerate(SOME)]
    rows = encode(cells, nodes)
    assert rows.shape == (len(cells), 5 + 4 * max(nodes, 12))
    for row, cell in zip(rows, cells, strict=True):
        assert menas.decode(row) == cell
        assert load_cell(Config(), menas.row_name(row)) == cell


# name -> predecessor and activation of the nodes after node 0, which is tanh on the input pair, and
# the leaves: as the papers draw and print them, Pham et al. 2018 (figure 6: six loose ends), Liu et
# al. 2019 (all nodes but the first), the corrected code of ENAS's authors.
PUBLISHED = {
    "enas": ("0 tanh 1 relu 2 relu 2 tanh 2 tanh 5 relu 1 tanh 6 relu 8 relu 8 relu 8 relu",
             [3, 4, 7, 9, 10, 11]),
    "darts_v1": ("0 relu 1 relu 2 tanh 3 relu 4 relu 1 identity 5 relu 1 relu", range(1, 9)),
    "darts_v2": ("0 sigmoid 1 relu 1 relu 1 identity 2 tanh 5 sigmoid 3 tanh 5 relu", range(1, 9)),
    "enas_lm": ("0 sigmoid 1 tanh 2 relu 2 sigmoid 4 tanh 5 tanh 3 sigmoid 6 sigmoid",
                range(1, 9)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_are_as_published(name):
    """Oracle: the tables and figures of the papers."""
    text, leaves = PUBLISHED[name]
    words = text.split()
    acts = [["tanh", "relu", "sigmoid", "identity"].index(word) for word in words[1::2]]
    nodes = [Node(int(word) + 1, activation=act) for word, act in zip(words[::2], acts)]
    assert CELLS[name].nodes == (Node(INPUT), *nodes)
    assert menas.leaves(CELLS[name]) == list(leaves)
    assert menas.is_enas(CELLS[name])


GENOTYPE = (
    "Genotype(recurrent=[('sigmoid', 0), ('relu', 1), ('relu', 1), ('identity', 1), "
    "('tanh', 2), ('sigmoid', 5), ('tanh', 3), ('relu', 5)], concat=range(1, 9))"
)


@pytest.mark.parametrize("text, name", [
    ("0 2 1 0 2 1 2 2 4 0 5 0 3 2 6 2", "enas_lm"),
    (GENOTYPE, "darts_v2"),
])
def test_cells_as_their_authors_code_prints_them(text, name):
    """Oracle: the fixed arc of ENAS's code, the Genotype of DARTS's."""
    assert load_cell(Config(), text) == CELLS[name]


NO_CELLS = {  # what is wrong: the cell, and what the refusal says
    "no nodes": ("0-0-0-0-0", "0 nodes"),
    "a part of a node": ("1-0-0-0-0-0-0-0", "invalid for input of size 3"),
    "a number too large": ("99999999999999999999-0-0-0-0-0-0-0-0", "Overflow"),
    "a slot to come": ("1-0-0-0-0-1-0-0-0", "node 0 is"),
    "an unknown operation": ("1-0-0-0-0-0-4-0-0", "node 0 is"),
    "an unknown activation": ("1-0-0-0-0-0-0-0-4", "node 0 is"),
    "an unknown output": ("1-2-0-0-0-0-0-0-0", "of the whole"),
    "a memory that is no node's": ("1-0-2-0-0-0-0-0-0", "of the whole"),
    "a gate on a memory that is not carried": ("1-0-0-0-0-0-2-0-0", "node 0 reads the memory"),
    "a glu's second slot": ("3-0-0-0-0-0-0-0-0-1-0-0-0-0-1-2-0", "node 2, a glu"),
    "fewer nodes than it says": ("3-0-0-0-0-0-0-0-0", "1 nodes, not 3"),
    "an arc without its last activation": ("0 2 1", "3 numbers"),
    "an arc to a slot to come": ("1 0", "node 1 is"),
    "an unknown word": ("Genotype(recurrent=[('reul', 0)])", "'reul' is not in list"),
    "a genotype without nodes": ("Genotype(recurrent=[])", "0 numbers"),
}


@pytest.mark.parametrize("what", NO_CELLS)
def test_what_cannot_be_a_cell_is_refused(what):
    """By hand: what each of them lacks is its key."""
    name, said = NO_CELLS[what]
    with pytest.raises(UserError, match=said):
        load_cell(Config(), name)


def test_h_is_the_mean_of_the_leaves():
    """Oracle: the naive definition, of padded rows, too."""
    weights = menas.leaf_weights(menas.parse(encode(SOME, 17)))
    for cell, weight in zip(SOME, weights, strict=True):
        wanted = naive_leaves(cell)
        assert menas.leaves(cell) == wanted
        share = [1 / len(wanted) if i in wanted else 0.0 for i in range(17)]
        assert weight.tolist() == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("width", [0, 3])
def test_parameters_are_the_weights_with_a_gradient(width):
    """Oracle: autograd. A relu that is off would hide weights, so every activation is tanh."""
    _, _, batch = setting("gated", True, 1, masked=False)
    batch = batch._replace(state=doubles(1, (2, 1, 2, HIDDEN))[0])
    for seed in range(30):
        cell = random_cell(seed, widths=(width,))._replace(output=LEAVES)
        cell = menas.with_activations(cell, [TANH] * len(cell.nodes))
        weights = menas.standalone_weights(Config(hidden=HIDDEN), 7, [cell], [seed])
        weights = in_double(weights)
        loss, _ = menas.network(weights, encode([cell]), batch, torch.float64)
        found = menas.gradients(loss.sum(), weights)
        of_recurrence = [g for name, g in found.items() if name not in ("embedding", "bias")]
        used = sum((g != 0).sum() for g in of_recurrence)
        assert menas.recurrent_parameters(cell, HIDDEN) == used


# Settings; the number of the space's cells, by hand; and what holds of each of them. A gated node 0
# with a memory has highway 2, glu 2, gate 2, sum 1 = 7 choices; node 1 reads one of two slots and
# has 2 + 2 + 2 * 2 + 2; and there are two memories.
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
    "widths, rates": (dict(nodes=2, hidden=8, widths="4,8", rates="0.5,1,4", **TWO), 6 * 2 ** 2,
                      lambda cell: cell.width in (4, 8) and cell.rate in (-1, 0, 2)),
    "gated": (dict(nodes=2, operations=EVERY_OPERATION, memory=True, **TWO), 2 * 7 * 2 * 10,
              lambda cell: cell.memory in (1, 2)),
    "gated, sizes": (dict(nodes=2, min_nodes=1, operations="highway,sum", memory=True, **TWO),
                     (2 + 1) + (2 + 1) * 2 * (2 + 2), lambda cell: cell.memory == 1),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_space_has_these_cells_and_each_once(name):
    """Oracle: enumeration, and the count by hand. What a cell does not use is 0."""
    settings, count, holds = SPACES[name]
    rows, _ = every_row(search_space(Config(**settings)))
    cells = [menas.checked(menas.decode(row)) for row in rows]
    assert len(set(cells)) == len(cells) == count
    assert all(holds(cell) for cell in cells)
    for node in (node for cell in cells for node in cell.nodes):
        assert node.second == 0 or node.operation in (GATE, SUM)
        assert node.activation == 0 or node.operation != SUM
    if name != "one activation":  # which nodes that are absent have, too
        assert torch.equal(encode(cells), rows)


@pytest.mark.parametrize("cell", [
    Cell((Node(INPUT), Node(INPUT))),
    Cell((Node(INPUT), Node(1)), memory=1),
    Cell((Node(INPUT), Node(1)), width=2),
    Cell((Node(INPUT), Node(1, menas.GLU))),
    Cell((Node(INPUT), Node(1), Node(1, second=2))),
])
def test_what_is_not_in_enas_space(cell):
    """By hand: a second node on the input pair, a memory, a width, a glu, a second slot."""
    assert not menas.is_enas(cell)
