"""Gated cells, a memory, mixed sizes and widths in one batch equal the plain loop and torch's LSTM; the wider space is
what it says. Run: pytest tests/test_gated.py"""
import json
import math
import random

import pytest
import torch

import menas
from menas import (ACTIVATIONS, CELLS, INPUT, MEMORY, OPERATIONS, OUTPUTS, Batch, Cell, Config, Controller, Node,
                   UserError, cell_from_json, cell_to_json, decode, draw_masks, encode, evaluate, network,
                   perturbed, recurrent_parameters, reference_losses, search_space, shared_weights,
                   standalone_weights, unroll,
                   uniform_rows, ways)
from results.studies import path_count

WORDS, HIDDEN, STREAMS, NODES = 11, 6, 3, 5
DROPOUT = Config(hidden=HIDDEN, nodes=NODES, operations="highway,glu,gate,sum", init=.6, word_dropout=.2,
                 input_dropout=.3, hidden_dropout=.3, output_dropout=.3)


def gated_cell(seed, nodes=NODES, widths=(0,)):
    draw = random.Random(seed)

    def node(i, memory):
        seconds = [*([MEMORY] if memory else []), *range(1, i + 1)]
        operation = draw.choice(OPERATIONS if seconds else OPERATIONS[:2])
        return Node(draw.randint(0, i), draw.choice(list(ACTIVATIONS)) if operation != "sum" else "tanh", operation,
                    draw.choice(seconds) if operation in ("gate", "sum") else MEMORY)

    n = draw.randint(1, nodes)
    memory = draw.randint(0, n)
    made = [node(i, memory) for i in range(n)]
    weighted = [i for i in range(1, n) if made[i].operation != "sum"]
    if weighted and draw.random() < .7:
        i = draw.choice(weighted)
        made[i] = made[i]._replace(also=draw.randint(1, i))
    made = tuple(made)
    return Cell(made, draw.choice(OUTPUTS), memory, draw.choice(widths))


def setting(k, shared, steps, seed=0, dropout=True, size=1.0, widths=(0,)):
    """Weights that require gradients, rows and a batch in float64; of the cells at least one is gated."""
    draw = torch.Generator().manual_seed(seed)
    cells = [gated_cell(100 * seed + i, widths=widths) for i in range(k)]
    rows = encode([*cells, CELLS["additive"]], NODES)[:k]
    weights = shared_weights(DROPOUT, WORDS) if shared else standalone_weights(DROPOUT, WORDS, rows, range(k))
    weights["bias"] = torch.randn(weights["bias"].shape, generator=draw)
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    tokens = torch.randint(WORDS, (2, steps, STREAMS), generator=draw)
    masks = {**draw_masks(DROPOUT, WORDS, STREAMS, [1] if shared else range(k), seed),
             **perturbed(Config(reward_noise=.5), weights)(tokens[0], seed)} if dropout else {}
    state = (size * torch.randn(k, STREAMS, 2 * HIDDEN, generator=draw).double()).requires_grad_()
    return weights, rows, Batch(tokens[0], tokens[1], state, {name: m.double() for name, m in masks.items()})


def derivatives(losses, weights, batch):
    inputs = [*weights.values(), batch.state]
    grads = torch.autograd.grad((losses * torch.linspace(-1, 2, len(losses))).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]


# the network

@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("steps,dropout,size,widths", [(1, True, 1.0, (0,)), (5, True, 1.0, (0,)),
                                                       (9, False, 1.0, (0, 2, 4)), (4, True, 40.0, (0, 3, 5))])
def test_mixed_operations_equal_the_reference(k, shared, steps, dropout, size, widths):
    """Oracle: the plain loop, one after the other; memories, sizes, widths are mixed, large states reach the bound."""
    for seed in range(6):
        weights, rows, batch = setting(k, shared, steps, seed, dropout, size, widths)
        for buffer in menas.Workspace.free:  # what is not computed must not matter
            buffer.fill_(math.nan)
        losses, state = network(weights, rows, batch, torch.float64)
        expected, states = zip(*(reference_losses(weights, rows[i], batch, i) for i in range(k)))
        assert (losses - torch.stack(expected)).abs().max() < 1e-10
        for mine, plain in zip(state, states):
            plain = plain[-1]
            assert (mine[..., :plain.shape[-1]] - plain).abs().max() < 1e-10
        for a, b in zip(derivatives(losses, weights, batch), derivatives(torch.stack(expected), weights, batch)):
            assert (a - b).abs().max() < 1e-10


def test_gradcheck():
    """Oracle: finite differences along random directions of all weights and of the state, both halves."""
    weights, rows, batch = setting(6, True, 3, seed=4, size=15.0)
    names = list(weights)
    loss = lambda state, *w: network(dict(zip(names, w)), rows, batch._replace(state=state), torch.float64)[0]
    assert torch.autograd.gradcheck(loss, (batch.state, *weights.values()), fast_mode=True)


def test_the_lstm_of_four_nodes_is_torchs():
    """Oracle: torch.nn.LSTM(bias=False) with the same weights: outputs, both states, the gradient of each weight."""
    rows, h = encode([CELLS["lstm_cell"]]), HIDDEN
    weights = {name: w.double() for name, w in standalone_weights(DROPOUT, WORDS, rows, [1]).items()}
    lstm = torch.nn.LSTM(h, h, bias=False).double()
    forget, candidate, out = 0, 1, 3  # nodes; torch's order is input, forget, candidate, output
    pieces = lambda w: [w[0, candidate][:, :h], w[0, forget][:, :h], w[0, candidate][:, h:], w[0, out][:, :h]]
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.cat([p.t() for p in pieces(weights["input"])]))
        lstm.weight_hh_l0.copy_(torch.cat([p.t() for p in pieces(weights["edges"])]))
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    draw = torch.Generator().manual_seed(1)
    tokens, state = torch.randint(WORDS, (9, STREAMS), generator=draw), torch.randn(1, STREAMS, 2 * h, generator=draw)
    state = state.double().requires_grad_()
    mine, after = unroll(weights, rows, Batch(tokens, tokens, state, {}), torch.float64)
    theirs, (h_n, c_n) = lstm(weights["embedding"][0][tokens], [s.contiguous() for s in state.split(h, -1)])
    assert (mine[0] - theirs).abs().max() < 1e-10
    assert (after - torch.cat([h_n, c_n], -1)).abs().max() < 1e-10
    factors = torch.randn(theirs.shape, generator=draw).double()
    wanted = (state, weights["embedding"])
    ours = torch.autograd.grad((mine[0] * factors).sum(), (*wanted, weights["input"], weights["edges"]))
    other = torch.autograd.grad((theirs * factors).sum(), (*wanted, lstm.weight_ih_l0, lstm.weight_hh_l0))
    for a, b in zip((*ours[:2], *(torch.cat([p.t() for p in pieces(g)]) for g in ours[2:])), other):
        assert (a - b).abs().max() < 1e-10


def test_the_additive_network_is_the_papers():
    """Oracle: Lee et al. 2017, c_t = i * u + f * c_{t-1}, h_t = c_t, written out."""
    rows, h = encode([CELLS["additive"]]), HIDDEN
    weights = {name: w.double() for name, w in standalone_weights(DROPOUT, WORDS, rows, [1]).items()}
    tokens, c = torch.randint(WORDS, (7, STREAMS)), torch.zeros(STREAMS, h).double()
    mine, _ = unroll(weights, rows, Batch(tokens, tokens, torch.zeros(1, STREAMS, h).double(), {}), torch.float64)
    for t in range(7):
        x = weights["embedding"][0][tokens[t]]
        f, _ = (x @ weights["input"][0, 0] + c @ weights["edges"][0, 0]).chunk(2, -1)
        i, u = (x @ weights["input"][0, 1] + c @ weights["edges"][0, 1]).chunk(2, -1)
        c = torch.sigmoid(i) * u + torch.sigmoid(f) * c
        assert (mine[0, t] - c).abs().max() < 1e-12


def test_enas_rows_and_the_same_rows_with_all_columns_agree():
    """The same cells through both paths of the recurrence, under the same weights."""
    cells = [CELLS["enas"], CELLS["chain"], CELLS["darts_v1"]]
    config = Config(hidden=HIDDEN, nodes=12, init=.5)
    weights, tokens = shared_weights(config, WORDS), torch.randint(WORDS, (5, STREAMS))
    batch = Batch(tokens, tokens, torch.zeros(1, STREAMS, HIDDEN), {})
    wide = encode([*cells, CELLS["additive"]])[:3]
    assert wide.shape[1] > encode(cells).shape[1]
    assert torch.allclose(network(weights, wide, batch)[0], network(weights, encode(cells), batch)[0], atol=1e-6)


def test_a_width_is_the_network_of_that_size():
    """Oracle: a network made with that hidden size from the top-left blocks: masked in a batch, cut when alone."""
    d, cells = 4, [CELLS["lstm_cell"]._replace(width=4), CELLS["enas"]._replace(width=4), CELLS["additive"]]
    config = Config(hidden=HIDDEN, nodes=12, operations="highway,glu,gate,sum", init=.5)
    weights = {name: w.double() for name, w in shared_weights(config, WORDS).items()}
    block = lambda w: torch.cat([w[..., :d, :d], w[..., :d, HIDDEN:HIDDEN + d]], -1)
    small = {"embedding": weights["embedding"][:, :d], "input": block(weights["input"]),
             "edges": block(weights["edges"]), "bias": weights["bias"]}
    tokens, rows = torch.randint(WORDS, (5, STREAMS)), encode(cells)
    run = lambda w, rows, h: network(w, rows, Batch(tokens, tokens, torch.zeros(1, STREAMS, h).double(), {}),
                                     torch.float64, .1, .1)[0]
    for i, cell in enumerate(cells[:2]):
        alone, masked = run(weights, rows[i:i + 1], HIDDEN)[0], run(weights, rows, HIDDEN)[i]
        assert abs(alone - masked) < 1e-12
        plain = network(small, encode([cell._replace(width=0), CELLS["additive"]])[:1], Batch(
            tokens, tokens, torch.zeros(1, STREAMS, d).double(), {}), torch.float64)[0][0]
        assert abs(network(weights, rows[i:i + 1], Batch(tokens, tokens, torch.zeros(1, STREAMS, HIDDEN).double(), {}),
                           torch.float64)[0][0] - plain) < 1e-12


def test_evaluating_and_training_take_gated_rows():
    weights, rows, _ = setting(3, True, 2)
    weights = {name: w.detach() for name, w in weights.items()}
    tokens = torch.randint(WORDS, (200,))
    assert torch.isfinite(evaluate(weights, rows, tokens, 4, 7, torch.float64)).all()


# cells

def test_json_and_integers_give_the_cell_back():
    for seed in range(200):
        cell = gated_cell(seed, widths=(0, 3))._replace(rate=seed % 5 - 2)
        if not cell.memory and any(node.second == MEMORY and node.operation in ("gate", "sum") for node in cell.nodes):
            continue
        assert decode(encode([cell, CELLS["additive"]], 7)[0]) == cell
        assert cell_from_json(json.loads(json.dumps(cell_to_json(cell)))) == cell


def test_an_lstm_as_people_write_it():
    gate = {"operation": "gate", "from": "input", "activation": "tanh"}
    nodes = [{**gate, "with": 2}, {"operation": "sum", "from": 3, "with": 1},  # in another order
             {**gate, "with": "memory", "activation": "identity"},
             {"operation": "glu", "from": "input", "activation": "tanh"}]
    nodes[0]["with"], nodes[1] = 1, {"operation": "sum", "from": 2, "with": 3}
    cell = cell_from_json({"memory": 1, "nodes": nodes})
    assert cell == CELLS["lstm_cell"]


GATE = {"from": "input", "activation": "tanh", "operation": "gate", "with": "memory"}


HIGHWAY = {"from": "input", "activation": "tanh"}

@pytest.mark.parametrize("cell, words", [
    ({"nodes": [{**GATE, "operation": "gait"}]}, "operation of node 0|did you mean gate?"),
    ({"nodes": [{"from": "input", "activation": "tanh", "operation": "gate"}]}, "node 0|'with'"),
    ({"nodes": [GATE]}, "memory|'memory'"),
    ({"nodes": [{**GATE, "with": 3}], "memory": 0}, "node 0|node 3"),
    ({"nodes": [{**GATE, "with": 0}], "memory": 0}, "0 reads 0"),
    ({"nodes": [GATE], "memory": 1}, "memory|from 0 to 0"), ({"nodes": [GATE], "memory": 0, "width": -1}, "width"),
    ({"nodes": [GATE], "memory": 0, "rate": True}, "rate"), ({"nodes": [GATE], "memory": 0, "rate": .5}, "rate"),
    ({"nodes": [HIGHWAY, {**HIGHWAY, "also": 1}]}, "1 reads 1"),
    ({"nodes": [HIGHWAY, {**HIGHWAY, "also": "input"}]}, "node 1|'input'"),
    ({"nodes": [HIGHWAY, *[{**HIGHWAY, "also": 0}] * 2]}, "several|'also'"),
    ({"nodes": [HIGHWAY, {"from": 0, "with": 0, "operation": "sum", "also": 0}]}, "entry of node 1|also"),
    ({"nodes": [GATE], "memory": True}, "memory"), ({"nodes": [GATE], "memmory": 0}, "memmory|did you mean memory"),
    ({"nodes": [{"from": "input", "activation": "tanh", "opperation": "gate"}]}, "node 0|did you mean operation")])
def test_mistakes_are_named(cell, words):
    with pytest.raises(UserError) as caught:
        cell_from_json(cell)
    assert all(word in str(caught.value) for word in words.split("|"))


def brute_force_paths(cell):
    """Every walk from h_t's leaves down, one at a time."""
    def walk(slot):
        if slot in (None, INPUT):
            return 1
        node = cell.nodes[slot - 1]
        below = [node.read] + ([node.second or None] if node.operation in ("gate", "sum") else []) + [node.also] * (
            node.also > 0)
        return sum(walk(s) for s in below)
    return sum(walk(i + 1) for i in menas.leaves(cell))


def test_paths_are_those_of_brute_force():
    for seed in range(300):
        cell = gated_cell(seed, nodes=9)
        assert path_count(cell) == brute_force_paths(cell)
    assert path_count(CELLS["lstm_cell"]) == 4 and path_count(CELLS["enas"]) == 6  # x; x, m and x by way of C


def test_parameters_are_the_weights_with_a_gradient():
    """Oracle: autograd; a weight that is not used has a gradient of 0 exactly."""
    for seed in range(40):
        cell = gated_cell(seed, widths=(0, 4))._replace(output="leaves")
        rows = encode([cell, CELLS["additive"]], NODES)[:1]
        weights = standalone_weights(DROPOUT, WORDS, rows, [seed])
        weights = {name: w.double().requires_grad_() for name, w in weights.items()}
        tokens = torch.randint(WORDS, (6, 8), generator=torch.Generator().manual_seed(seed))
        state = torch.randn(1, 8, 2 * HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
        # relus that are off hide weights from the gradient, so all activations are tanh here
        smooth = cell._replace(nodes=tuple(node._replace(activation="tanh") for node in cell.nodes))
        rows = encode([smooth, CELLS["additive"]], NODES)[:1]
        network(weights, rows, Batch(tokens, tokens, state, {}), torch.float64)[0].sum().backward()
        used = sum(int((weights[name].grad != 0).sum()) for name in ("input", "edges"))
        assert used == recurrent_parameters(smooth, HIDDEN)


# the space: the oracle is enumeration

SPACES = {"enas": dict(nodes=3, activations="tanh,relu"),
          "sizes": dict(nodes=3, min_nodes=1, activations="tanh,relu"),
          "gated": dict(nodes=2, activations="tanh,relu", operations="highway,glu,gate,sum", memory=True),
          "gated, no memory": dict(nodes=2, activations="tanh,relu", operations="highway,sum"),
          "gated sizes": dict(nodes=2, min_nodes=1, activations="tanh,relu", operations="highway,sum", memory=True),
          "one activation": dict(nodes=3, min_nodes=2, activations="tanh,relu", activation_scope="cell"),
          "widths and rates": dict(nodes=2, activations="tanh,relu", widths="4,8", rates=".5,1,2", hidden=8),
          "chain": dict(nodes=3, connections="chain"), "tree": dict(nodes=3, connections="tree"),
          "as enas": dict(nodes=3, connections="enas", activations="tanh,relu")}


def everything(decisions):
    """The different rows of a space: every path through its decisions."""
    rows = [[0] * (1 + max(c for d in decisions for c in d.columns))]
    for d in decisions:
        grown = []
        for row in rows:
            for value in d.choices if all(row[c] in values for c, values in d.when) else (0,):
                row = list(row)
                for column in d.columns:
                    row[column] = value
                grown.append(row)
        rows = grown
    assert len(set(map(tuple, rows))) == len(rows)
    return torch.tensor(rows)


def controller_of(settings):
    config = Config(controller_hidden=5, **settings)
    controller = Controller(search_space(config), config).double()
    with torch.no_grad():
        for i, parameter in enumerate(controller.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return controller


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_what_it_says(name):
    """Its size, that its cells survive JSON, and that log-probabilities and entropies are those of different cells."""
    controller = controller_of(SPACES[name])
    rows = everything(controller.decisions)
    assert len(rows) == sum(n for *_, n in ways(controller.decisions)(0, ()))
    cells = [decode(row) for row in rows]
    assert len(set(cells)) == len(cells)
    for cell, row in zip(cells, rows):
        assert cell_from_json(cell_to_json(cell))._replace(nodes=()) == cell._replace(nodes=())
        assert network(shared_weights(Config(**{**SPACES[name], "hidden": 8}), WORDS), row[None], Batch(
            torch.zeros(2, 1).long(), torch.zeros(2, 1).long(), torch.zeros(1, 1, 8), {}))[0].isfinite().all()
    sample = controller(rows=rows)
    p = sample.log_prob.exp()
    assert torch.equal(sample.rows, rows)
    assert abs(p.sum() - 1) < 1e-12
    assert torch.allclose((p * sample.entropy).sum(), -(p * sample.log_prob).sum())


@pytest.mark.parametrize("name", SPACES)
def test_samples_follow_the_probabilities_and_uniform_ones_are_uniform(name):
    controller = controller_of(SPACES[name])
    rows, k = everything(controller.decisions), 20000
    for drawn, expected in ((controller.sample(k, 1).rows, controller(rows=rows).log_prob.exp()),
                            (uniform_rows(controller.decisions, k, 1), torch.full((len(rows),), 1 / len(rows)))):
        index = {tuple(row): i for i, row in enumerate(rows.tolist())}
        counts = torch.bincount(torch.tensor([index[tuple(row)] for row in drawn.tolist()]), minlength=len(rows))
        big = expected * k > 5
        chi = ((counts - expected * k) ** 2 / (expected * k))[big].sum().item()
        df = int(big.sum())
        assert chi < df + 5 * math.sqrt(2 * df)


def test_enas_space_draws_what_it_always_has():
    """Oracle: log-probabilities and the sum of the rows as they were before the space was widened."""
    config = Config(nodes=12, seed=3, controller_hidden=20)
    sample = Controller(search_space(config), config).sample(50, 3, "x")
    assert sample.log_prob.sum().item() == pytest.approx(-1706.712646484375, abs=1e-3)
    assert sample.entropy.sum().item() == pytest.approx(1706.8756103515625, abs=1e-3)


def test_the_number_of_nodes_learns():
    """Only the size is rewarded: the policy ends at the rewarded size."""
    config = Config(nodes=6, min_nodes=2, controller_hidden=16)
    controller = Controller(search_space(config), config)
    adam = torch.optim.Adam(controller.parameters(), lr=.02)
    before = (controller.sample(200, 0).rows[:, 0] == 3).float().mean()
    for step in range(150):
        sample = controller.sample(16, 1, step)
        rewards = (sample.rows[:, 0] == 3).float()
        loss = menas.policy_loss(sample, rewards, menas.leave_one_out(rewards, None, None)[0], 0.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
    after = (controller.sample(200, 0).rows[:, 0] == 3).float().mean()
    assert before < .5 and after > .8


@pytest.mark.parametrize("settings, words", [
    (dict(memory=True), "--memory|--operations"), (dict(operations="gate,sum"), "node 0"),
    (dict(operations="gatte"), "did you mean gate"), (dict(min_nodes=13), "--min_nodes 13"),
    (dict(widths="0,4"), "--widths"), (dict(widths="4,x"), "--widths 4,x"), (dict(widths="400"), "up to --hidden"),
    (dict(rates="1,3"), "--rates 1,3|powers of 2"), (dict(rates="-1"), "powers of 2"),
    (dict(connections="enas", nodes=13), "12 nodes"), (dict(connections="chian"), "did you mean chain")])
def test_an_impossible_space_is_refused(settings, words):
    with pytest.raises(UserError) as caught:
        search_space(Config(**settings))
    assert all(word in str(caught.value) for word in words.split("|"))


# policies

@pytest.mark.parametrize("name, family", [("uniform", None), ("enas,chain", ["enas", "chain"]), ("tree", ["tree"])])
def test_policies_that_do_not_learn(name, family, tmp_path):
    """The same interface; a family's cells are drawn alike, and log-probabilities are those of its size."""
    config = Config(nodes=12, controller=name)
    policy = menas.policy_of(config, search_space(config))
    sample = policy.sample(300, 1)
    if family is None:
        size = math.factorial(11) * 4 ** 12
        assert torch.equal(sample.rows, uniform_rows(search_space(config), 300, 1))
    else:
        size, counts = len(family), {cell: 0 for cell in family}
        for row in sample.rows:
            counts[next(name for name in family if decode(row) == CELLS[name])] += 1
        assert min(counts.values()) > 300 / size - 50
    assert sample.log_prob.shape == sample.entropy.shape == (300,)
    assert torch.allclose(-sample.log_prob, torch.tensor(math.log(size)).expand(300), rtol=1e-6)


def test_a_mistyped_policy_is_named():
    with pytest.raises(UserError, match="did you mean uniform"):
        menas.policy_of(Config(controller="unifrom"), search_space(Config()))


@pytest.mark.parametrize("settings", [dict(controller="uniform"), dict(controller="enas,chain", nodes=12), dict(
    operations="highway,glu,gate,sum", memory=True, state="warm"), dict(widths="4,8", min_nodes=2), dict(
    rates=".5,1,2", response="sampled", shared_samples=1), dict(anneal=1, activation_scope="cell")])
def test_every_space_searches(settings, text, tmp_path):
    """From the command line to a cell that trains from scratch."""
    base = dict(data=str(text), hidden=8, nodes=3, epochs=1, shared_steps=3, controller_steps=2, controller_samples=3,
                derive_samples=3, batch=8, bptt=10, out=str(tmp_path / "run"))
    flags = [x for name, value in {**base, **settings}.items() for x in (f"--{name}", str(value))]
    assert menas.main(["search", "--preset", "smoke", *flags]) == 0
    train = ["train", "--preset", "smoke", "--data", str(text), "--epochs", "1", "--hidden", "8"]
    assert menas.main([*train, "--cell", str(tmp_path / "run"), "--out", str(tmp_path / "train")]) == 0


def test_annealing_turns_the_bonus_into_a_penalty():
    """On a line over the last rounds of learning; none of it before, and none at all by default."""
    game = menas.Search.__new__(menas.Search)
    game.config = Config(epochs=6, anneal=2, entropy=.1, penalty=1.0)
    assert [round(game.entropy_weight(x), 6) for x in (1, 4, 5, 6)] == [.1, .1, -.45, -1.0]
    game.config = Config(epochs=6, entropy=.1)
    assert game.entropy_weight(6) == .1


def test_a_small_width_alone_is_faster():
    """Cut, not masked: an eighth of the units in far less than the time of all (medians; the margin is wide)."""
    import statistics
    import time
    config = Config(hidden=256, nodes=6)
    weights, tokens = shared_weights(config, 50), torch.randint(50, (20, 16))
    rows, seconds = encode([Cell((Node(0, "tanh"),) + (Node(1, "relu"),) * 5, width=w) for w in (32, 256)]), [[], []]
    for _ in range(7):
        for i in range(2):
            start = time.perf_counter()
            losses, _ = network(weights, rows[i:i + 1], Batch(tokens, tokens, torch.zeros(1, 16, 256), {}))
            seconds[i].append(time.perf_counter() - start)
    small, large = map(statistics.median, seconds)
    assert small < .6 * large


def test_shared_weights_refuse_what_they_do_not_hold(text, tmp_path, capsys):
    """One matrix on the input pair, too few nodes or units: nothing is computed with what is missing."""
    base = ["search", "--preset", "smoke", "--data", str(text), "--out", str(tmp_path / "run"), "--nodes", "4"]
    for more, words in ((["--controller", "lstm_cell"], "input pair"), (["--connections", "lstm_cell"], "input pair"),
                        (["--controller", "enas"], "12 nodes"),
                        (["--connections", "enas", "--nodes", "13"], "12 nodes")):
        assert menas.main([*base, *more]) == 2
        assert words in capsys.readouterr().err
    assert menas.main([*base, "--epochs", "1", "--shared_steps", "2", "--derive_samples", "2"]) == 0
    train = ["train", "--preset", "smoke", "--data", str(text), "--weights", str(tmp_path / "run"), "--out",
             str(tmp_path / "train")]
    for cell, words in (("lstm_cell", "input pair"), ("enas", "12 nodes")):
        capsys.readouterr()
        assert menas.main([*train, "--cell", cell]) == 2
        assert words in capsys.readouterr().err
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({"width": 100, "nodes": [{"from": "input", "activation": "tanh"}]}))
    assert menas.main(["train", "--preset", "smoke", "--cell", str(wide), "--out", str(tmp_path / "wide")]) == 2


def test_a_narrow_network_starts_as_one_made_so_small():
    """The same bound as a network of that hidden size; its parameters are those it uses."""
    cell = Cell((Node(0, "tanh"), Node(1, "relu")), width=4)
    weights = standalone_weights(Config(hidden=64), WORDS, encode([cell, cell._replace(width=0)]), [1, 1])
    assert weights["edges"][0].abs().max().item() == pytest.approx(math.sqrt(3 / 4), rel=1e-2)
    assert weights["edges"][1].abs().max().item() == pytest.approx(math.sqrt(3 / 64), rel=1e-2)


@pytest.mark.parametrize("row", ["4-0-0-0", "1-0-0-0-0", "99999999999999999999-0-0-0", "2-0-0-0", "0-0-0-0"])
def test_rows_that_are_none_are_refused(row):
    with pytest.raises(UserError, match="not a cell's row"):
        menas.load_cell(Config(), row)


def test_a_large_space_can_be_drawn_from():
    assert uniform_rows(search_space(Config(nodes=140)), 2, 1).shape == (2, 282)


def test_a_small_cell_that_reads_also_under_a_larger_bank():
    """Fewer nodes than the weights of a gated space have: the second edge's row is the last, not a node's."""
    cell = Cell((Node(INPUT, "tanh"), Node(1, "relu"), Node(2, "tanh", also=1)))
    rows, weights = encode([cell]), {name: w.double() for name, w in shared_weights(DROPOUT, WORDS).items()}
    tokens = torch.randint(WORDS, (2, 4, STREAMS), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[0], tokens[1], torch.zeros(1, STREAMS, 2 * HIDDEN).double(), {})
    expected = reference_losses(weights, rows[0], batch)[0].item()
    for w in (weights, menas.inherit(weights, rows)):
        assert network(w, rows, batch, torch.float64)[0].item() == pytest.approx(expected, abs=1e-12)
