"""Cells survive JSON and encoding, are checked, counted, drawn, as published. Run: pytest tests/test_cells.py"""
import io
import itertools
import json
import math
import random

import matplotlib.pyplot as plt
import pytest
import torch

import menas
from results.report import draw_cell

# The published cells as their papers write them: 'node:(predecessor, activation)' after node 0, tanh on the input.
ENAS = "1:(0,tanh) 2:(1,relu) 3:(2,relu) 4:(2,tanh) 5:(2,tanh) 6:(5,relu) 7:(1,tanh) 8:(6,relu) 9:(8,relu) " \
       "10:(8,relu) 11:(8,relu)"
DARTS_V1 = "1:(0,relu) 2:(1,relu) 3:(2,tanh) 4:(3,relu) 5:(4,relu) 6:(1,identity) 7:(5,relu) 8:(1,relu)"
DARTS_V2 = "1:(0,sigmoid) 2:(1,relu) 3:(1,relu) 4:(1,identity) 5:(2,tanh) 6:(5,sigmoid) 7:(3,tanh) 8:(5,relu)"
ENAS_LM = "1:(0,sigmoid) 2:(1,tanh) 3:(2,relu) 4:(2,sigmoid) 5:(4,tanh) 6:(5,tanh) 7:(3,sigmoid) 8:(6,sigmoid)"
PUBLISHED = {"enas": ENAS, "darts_v1": DARTS_V1, "darts_v2": DARTS_V2, "enas_lm": ENAS_LM}


def random_cell(seed):
    draw = random.Random(seed)
    nodes = [menas.Node(draw.randint(1, i) if i else menas.INPUT, draw.choice(list(menas.ACTIVATIONS)))
             for i in range(draw.randint(1, 12))]
    return menas.Cell(tuple(nodes), draw.choice(menas.OUTPUTS))


CELLS = [cell for cell in (*menas.CELLS.values(), *map(random_cell, range(100))) if not menas.is_gated(cell)]


def unread(cell):
    """The nodes that no node reads, from the pairs of slot and activation (node i is slot i + 1)."""
    return [i for i in range(len(cell.nodes)) if all(i + 1 not in menas.slots_read(node) for node in cell.nodes)]


# JSON and integers: the oracle is that nothing changes

def test_json_gives_the_cell_back():
    for cell in CELLS:
        assert menas.cell_from_json(json.loads(json.dumps(menas.cell_to_json(cell)))) == cell


def test_json_reads_as_people_write_it():
    cell = {"output": "leaves", "nodes": [{"from": "input", "activation": "tanh"}, {"from": 0, "activation": "relu"}]}
    assert menas.cell_to_json(menas.Cell((menas.Node(0, "tanh"), menas.Node(1, "relu")))) == cell
    del cell["output"]  # leaves is understood
    assert menas.cell_from_json(cell) == menas.Cell((menas.Node(0, "tanh"), menas.Node(1, "relu")), "leaves")


@pytest.mark.parametrize("padding", [0, 12, 15])
def test_encoding_gives_the_cells_back(padding):
    rows = menas.encode(CELLS, padding)
    assert rows.shape == (len(CELLS), 2 + 2 * max(padding, 12))
    assert [menas.decode(row) for row in rows] == CELLS


def shape_of(nodes):
    """The tree without its numbering: (activation, sorted subtrees) of the node at the input."""
    subtree = lambda i: (nodes[i][1], sorted(subtree(j) for j, (read, _) in enumerate(nodes) if read == i))
    return subtree([read for read, _ in nodes].index("input"))


@pytest.mark.parametrize("seed", range(20))
def test_nodes_in_any_order_are_sorted(seed):
    """Oracle: the tree without its numbering is the same, and every node reads an earlier one."""
    nodes = menas.cell_to_json(random_cell(seed))["nodes"]
    new = random.Random(seed).sample(range(len(nodes)), len(nodes))  # node i becomes new[i]
    shuffled = [None] * len(nodes)
    for i, node in enumerate(nodes):
        shuffled[new[i]] = {**node, "from": node["from"] if node["from"] == "input" else new[node["from"]]}
    cell = menas.cell_from_json({"nodes": shuffled})
    assert all(node.read <= i for i, node in enumerate(cell.nodes))
    pairs = lambda nodes: [(node["from"], node["activation"]) for node in nodes]
    assert shape_of(pairs(menas.cell_to_json(cell)["nodes"])) == shape_of(pairs(nodes))


# Each mistake, and what the one line about it must name.
NODE = {"from": "input", "activation": "tanh"}
MISTAKES = {
    "cycle": ([NODE, {"from": 2, "activation": "relu"}, {"from": 1, "activation": "relu"}], {}, "1 reads 2 reads 1"),
    "self": ([NODE, {"from": 1, "activation": "relu"}], {}, "cycle|1 reads 1"),
    "no input": ([{"from": 0, "activation": "tanh"}], {}, "cycle|0 reads 0"),
    "activation": ([NODE, {"from": 0, "activation": "reul"}], {}, "node 1|'reul'|did you mean relu?"),
    "activation's type": ([{"from": "input", "activation": ["tanh"]}], {}, "node 0|tanh"),
    "no activation": ([NODE, {"from": 0}], {}, "node 1|'activation'"),
    "no from": ([NODE, {"activation": "tanh"}], {}, "node 1|'from'"),
    "node's type": ([NODE, "tanh"], {}, "node 1"),
    "missing node": ([NODE, {"from": 7, "activation": "relu"}], {}, "node 1|node 7|missing|0 to 1"),
    "negative node": ([NODE, {"from": -1, "activation": "relu"}], {}, "node 1|node -1|missing"),
    "node in quotes": ([NODE, {"from": "0", "activation": "relu"}], {}, "node 1|'0'"),
    "node as 1.0": ([{"from": 1.0, "activation": "relu"}, NODE], {}, "node 0|1.0"),
    "no nodes": ([], {}, '"nodes"'),
    "nodes' type": ({"0": NODE}, {}, '"nodes"'),
    "output": ([NODE], {"output": "leafs"}, "'leafs'|did you mean leaves?"),
    "output's type": ([NODE], {"output": ["leaves"]}, "output"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_json_are_named(name):
    nodes, other, words = MISTAKES[name]
    with pytest.raises(menas.UserError) as caught:
        menas.cell_from_json({"nodes": nodes, **other})
    line = str(caught.value)
    assert "\n" not in line
    for word in words.split("|"):
        assert word in line


@pytest.mark.parametrize("thing", [None, [], "enas", {}, {"output": "leaves"}])
def test_what_is_not_a_cell_is_told_what_a_cell_is(thing):
    with pytest.raises(menas.UserError, match='a cell is {"output": "leaves", "nodes": '):
        menas.cell_from_json(thing)


# the published cells

def table_nodes(text):
    """(predecessor or 'input', activation) of each node of such a table."""
    pairs = [pair.split(":")[1].strip("()").split(",") for pair in text.split()]
    return [("input", "tanh")] + [(int(p), act) for p, act in pairs]


def weights_of_nodes(cell):
    """The weight of each node in h_t."""
    return menas.structure(menas.encode([cell]))[3][:, 0].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_are_as_published(name):
    written = [(node["from"], node["activation"]) for node in menas.cell_to_json(menas.CELLS[name])["nodes"]]
    assert written == table_nodes(PUBLISHED[name])


def test_the_enas_cell_has_twelve_nodes_and_six_leaves():
    assert len(menas.CELLS["enas"].nodes) == 12
    assert [i for i, w in enumerate(weights_of_nodes(menas.CELLS["enas"])) if w > 0] == [3, 4, 7, 9, 10, 11]


@pytest.mark.parametrize("name", ["darts_v1", "darts_v2", "enas_lm"])
def test_these_cells_output_the_mean_of_the_eight_nodes_after_node_0(name):
    """Oracle: DARTS's genotypes have concat = range(1, 9), ENAS's corrected code averages layers[1:]."""
    assert len(menas.CELLS[name].nodes) == 9
    assert weights_of_nodes(menas.CELLS[name]) == [0] + [1 / 8] * 8


def test_hand_written_cells_are_what_their_names_say():
    chain, tree = menas.CELLS["chain"], menas.CELLS["tree"]
    assert chain.nodes == tuple(menas.Node(i, "tanh") for i in range(12))
    assert [node.read - 1 for node in tree.nodes] == [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert unread(chain) == [11] and unread(tree) == [6, 7, 8, 9, 10, 11]


# structure and counts

def test_h_is_the_mean_of_the_nodes_nobody_reads():
    cells = [cell for cell in CELLS if cell.output == "leaves"]
    leaf = menas.structure(menas.encode(cells))[3]
    assert torch.allclose(leaf.sum(0), torch.ones(len(cells), dtype=leaf.dtype), atol=1e-15, rtol=0)
    for k, cell in enumerate(cells):
        expected = [1 / len(unread(cell)) if i in unread(cell) else 0 for i in range(len(leaf))]
        assert leaf[:, k].tolist() == expected


def test_padding_changes_nothing_and_weighs_nothing():
    rows, padded = menas.encode(CELLS), menas.encode(CELLS, 17)
    for row, cell in zip(padded, CELLS):
        row[2 + 2 * len(cell.nodes):] = 1  # whatever stands in unused entries
    for tight, wide in zip(menas.structure(rows)[:4], menas.structure(padded)[:4]):
        for k, cell in enumerate(CELLS):
            assert wide[:len(cell.nodes), k].equal(tight[:len(cell.nodes), k])
    leaf = menas.structure(padded)[3]
    for k, cell in enumerate(CELLS):
        assert not leaf[len(cell.nodes):, k].any()
        assert math.isclose(leaf[:, k].sum(), 1)


def test_every_edge_has_a_row_of_its_own_in_the_bank():
    edges = [menas.edge_index(slot, node) for node in range(12) for slot in range(node + 1)]
    assert edges == list(range(12 * 13 // 2))


@pytest.mark.parametrize("name, hidden, expected",
                         [("enas", 10, 2600), ("darts_v1", 10, 2000), ("chain", 200, 1_040_000)])
def test_recurrent_parameters_as_counted_by_hand(name, hidden, expected):
    """[x, h] -> 2H is 4 H^2 weights, each node after it 2 H^2: 400 + 11 x 200 = 2600 for the ENAS cell at H = 10."""
    assert menas.recurrent_parameters(menas.CELLS[name], hidden) == expected


def test_recurrent_parameters_are_the_weights_there_are():
    config = menas.Config(hidden=6)
    for cell in CELLS[:30]:
        weights = menas.standalone_weights(config, 5, menas.encode([cell]), [1])
        assert menas.recurrent_parameters(cell, 6) == weights["input"].numel() + weights["edges"].numel()


# the search space: the oracle is enumeration

def test_the_search_space_has_a_decision_for_each_column():
    decisions = menas.search_space(menas.Config(nodes=12))
    assert len(decisions) == menas.encode([menas.CELLS["enas"]]).shape[1] == 26
    assert math.prod(len(d.choices) for d in decisions) == math.factorial(11) * 4 ** 12
    assert [d.name for d in decisions[:2]] == ["nodes", "output"]
    assert [d.name for d in decisions[-2:]] == ["predecessor of 11", "activation of 11"]


def test_every_point_of_a_small_space_is_another_valid_cell():
    decisions = menas.search_space(menas.Config(nodes=4, activations="relu,sigmoid"))
    cells = [menas.decode(torch.tensor(row)) for row in itertools.product(*(d.choices for d in decisions))]
    assert len(set(cells)) == len(cells) == math.factorial(3) * 2 ** 4
    assert {node.activation for cell in cells for node in cell.nodes} == {"relu", "sigmoid"}
    for cell in cells:
        assert menas.cell_from_json(menas.cell_to_json(cell)) == cell


def test_a_cell_of_one_node_is_a_space_too():
    decisions = menas.search_space(menas.Config(nodes=1))
    assert [d.choices for d in decisions] == [(1,), (menas.LEAVES,), (menas.INPUT,), (0, 1, 2, 3)]


@pytest.mark.parametrize("settings, words", [(dict(activations="tanh,rulu"), "'rulu'|did you mean relu?"),
                                             (dict(activations=""), "activation ''"), (dict(nodes=0), "--nodes 0")])
def test_an_impossible_space_is_refused(settings, words):
    with pytest.raises(menas.UserError) as caught:
        menas.search_space(menas.Config(**settings))
    assert all(word in str(caught.value) for word in words.split("|"))


# pictures

@pytest.mark.parametrize("name", menas.CELLS)
def test_the_picture_shows_every_node_once(name):
    cell = menas.CELLS[name]
    axes = draw_cell(cell, name)
    shown = [text for text in axes.texts if text.get_text()]
    labels = [text.get_text() for text in shown]
    assert axes.get_title() == name
    for i, node in enumerate(cell.nodes):
        text = "+" if node.operation == "sum" else node.activation
        assert sum(text in label and str(i) == label.split(":")[0] for label in labels) == 1
    assert len(labels) == len(cell.nodes) + 2 + bool(cell.memory)  # beside the nodes: the input pair, h_t, the memory
    assert len({text.get_position() for text in shown}) == len(shown)
    axes.figure.savefig(io.BytesIO(), format="png", dpi=40)
    plt.close(axes.figure)


def test_a_picture_goes_on_the_axes_given():
    axes = plt.subplots()[1]
    assert draw_cell(menas.CELLS["chain"], axes=axes) is axes
    plt.close(axes.figure)
