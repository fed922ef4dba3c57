"""Every study measures what it says: in a small made-up world its answer is known, and wrong
versions of the study fail the very check that it passes. Run: pytest tests/test_studies.py
"""
import copy
import json
import math
import zlib
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from mutants import mutate

import menas
from menas import (CELLS, IDENTITY, RELU, SIGMOID, TANH, Cell, Node, decode, encode, evaluate,
                   load_corpus)

SMALL = dict(hidden=4, nodes=3, batch=4, bptt=10, controller_samples=4, seed=3)
DROPOUT = dict.fromkeys(("word_dropout", "input_dropout", "hidden_dropout", "output_dropout"), .3)
GUESSING = math.log(13)  # of twelve words and the end of a line
World = namedtuple("World", "patch folder search data")  # folders: to write to, of a search, a text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of a search and of its text, 12 words that are unevenly frequent."""
    folder = tmp_path_factory.mktemp("finished")
    words = torch.randint(12, (6, 100), generator=menas.rng("words")).sort(0).values
    for split, lines in (("train", words), ("valid", words[:2, :30]), ("test", words[3:5, :30])):
        text = "\n".join(" ".join(f"w{x}" for x in line) for line in lines.tolist())
        (folder / f"{split}.txt").write_text(text)
    out = folder / "search"
    given = SMALL | dict(data=str(folder), out=str(out), shared_steps=10, retrain=0)
    config = menas.configure("search", "smoke", **given, derive_samples=30)
    menas.run_command("search", menas.study_search, config)
    return out, folder


@pytest.fixture
def world(monkeypatch, tmp_path, finished):
    return World(monkeypatch, tmp_path, *finished)


def settings(world, study, **more):
    folders = dict(data=str(world.data), supernet=str(world.search), out=str(world.folder / study))
    return menas.configure(study, "smoke", **SMALL | folders | more)


def measure(world, study, **more):
    """The rows of a study; not by COMMANDS, which would not see a mutant."""
    config = settings(world, study, **more)
    run = menas.Run(study, config)
    run.folder.mkdir(exist_ok=True)
    return vars(menas)[f"study_{study}"](config, run)


def any_number(text):
    """From 0 to 1, of every text another."""
    return zlib.crc32(str(text).encode()) / 2 ** 32


def cell_of(row):
    return menas.load_cell(None, row["cell"])


def fake_trainings(world, loss=lambda name, seed, config: any_number((name, seed))):
    """Training takes no time and ends at a known loss; the configs that it will be asked for."""
    configs = []

    def run_command(command, work, config):
        configs.append(config)
        rows = []
        for entry in config.cell.split(","):
            name, seed = entry.split("@")
            losses = dict.fromkeys(menas.SPLITS, loss(name, int(seed), config))
            rows.append(dict(group="network", cell=name, seed=int(seed), **losses))
        return {"rows": rows + [dict(group="floor", test=0.0)]}

    world.patch.setattr(menas, "run_command", run_command)
    return configs


# Populations

def check_train_rows(world):
    """Oracle: the losses that were made up; every row has that of its own cell and seed."""
    configs, config = fake_trainings(world), settings(world, "compare")
    drawn = menas.uniform_rows(menas.search_space(config), 12, "cells")
    names = [menas.row_name(row) for row in drawn]
    names += ["lstm", "lstm:5", "lstm_cell", "lstm:enas"] * 2
    rows = [dict(group=f"group {i}", cell=name) for i, name in enumerate(names)]
    rows[3]["seed"] = rows[15]["seed"] = 77
    world.patch.setattr(menas, "AT_ONCE", 4)
    made = menas.train_rows(config, menas.Run("compare", config), copy.deepcopy(rows))
    for row, labels in zip(made, rows, strict=True):
        assert row.items() >= labels.items()
        assert row["test"] == any_number((row["cell"], row["seed"]))
        where, = [config for config in configs if Path(config.out).name == row["folder"]]
        assert f"{row['cell']}@{row['seed']}" in where.cell.split(",")
    assert len({row["seed"] for row in made}) == len(rows) - 1
    batches = [[entry.split("@")[0] for entry in config.cell.split(",")] for config in configs]
    trained = sum(batches, [])
    assert Counter(trained) == Counter(names)
    assert [name for name in trained if name in names[:12]] != names[:12]  # in another order
    for batch in batches:
        assert len(batch) <= 4
        assert len({menas.lstm_units(config, name) for name in batch}) == 1
    assert not any(config.supernet for config in configs)


def test_what_is_worse_than_guessing_counts_as_that(world):
    """Oracle: guessing, for a network that diverges."""
    row, = measure(world, "train", cell="random:1", lr=1e6, clip=1e6, epochs=1, supernet="")
    assert [row[split] for split in menas.SPLITS] == [GUESSING] * 3
    assert [menas.no_worse(loss, 2.0) for loss in (1.9, 2.1, math.nan)] == [1.9, 2.0, 2.0]
    world.patch.setattr(menas, "derive", lambda config, w, rows, corpus: (rows, torch.full((len(rows),), math.nan)))
    assert {row["valid"] for row in measure(world, "progress", epochs=1, derive_samples=2)} == {GUESSING}


def check_compare(world):
    """Oracle: the first activation, by which sources are told apart; evaluation."""
    mark = menas.column(0, "activation")
    searched, weights, found = menas.finished_search(settings(world, "compare"))

    class Marked(menas.Controller):
        load_state_dict = None  # it is untrained

        def forward(self, *given, **more):
            sample = super().forward(*given, **more)
            sample.rows[:, mark] = IDENTITY if self.bound > 0 else TANH
            return sample

    found["sampled"][:, mark] = RELU
    found["sampled"] = found["sampled"][[0, 1, 2, 3, 4, 0]]  # fewer than the others
    found["uniform"][:, mark] = SIGMOID
    world.patch.setattr(menas, "finished_search", lambda config: (searched, weights, found))
    world.patch.setattr(menas, "Controller", Marked)
    fake_trainings(world)
    rows = measure(world, "compare", derive_samples=20, seed=4)
    for group, act in (("trained", RELU), ("untrained", IDENTITY), ("uniform", SIGMOID)):
        some = [row for row in rows if row["group"] == group]
        cells = [cell_of(row) for row in some]
        assert {cell.nodes[0].activation for cell in cells} == {act}
        assert len(set(cells)) == len(cells) == min(20, some[0]["distinct"])
        losses = evaluate(weights, encode(cells), load_corpus(searched).valid)
        losses = losses.clamp(max=GUESSING).tolist()
        assert [row["shared"] for row in some] == pytest.approx(losses, abs=1e-5)
    assert rows[0]["distinct"] == len(found["sampled"].unique(dim=0)) < len(found["sampled"])
    fewest = min(Counter(row["group"] for row in rows[:-2]).values())
    for group in ("trained", "untrained", "uniform"):
        some = [row for row in rows if row["group"] == group][:fewest]
        assert [row["best"] for row in some if "best" in row] == [min(row["test"] for row in some)]
    assert [row["cell"] for row in rows[-2:]] == ["lstm", "lstm:" + rows[0]["cell"]]


def is_change(kind, cell, new):
    """Is it the cell with one change of that kind?"""
    if kind == "itself":
        return cell == new
    if kind == "a node removed":  # node i, whose readers read what it read
        return any(new == removed(cell, i) for i in range(1, len(cell.nodes)))
    if kind.startswith("only "):
        act = list(menas.ACTIVATIONS).index(kind.removeprefix("only "))
        return [node._replace(activation=act) for node in cell.nodes] == list(new.nodes)
    (i, a, b), = [(i, a, b) for i, (a, b) in enumerate(zip(cell.nodes, new.nodes)) if a != b]
    if kind == "a connection added":
        return b == a._replace(second=b.second) and b.second in {*range(1, i + 1)} - {a.read}
    return kind == "an activation changed" and b == a._replace(activation=b.activation)


def removed(cell, i):
    """By the numbers of the nodes, -1 the input pair: readers of i read what it read."""
    reads = {j: node.read - 1 for j, node in enumerate(cell.nodes)}
    left = {j: reads[i] if read == i else read for j, read in reads.items() if j != i}
    number = {-1: -1} | {j: new for new, j in enumerate(left)}
    nodes = [Node(number[read] + 1, activation=cell.nodes[j].activation)
             for j, read in left.items()]
    return cell._replace(nodes=tuple(nodes))


def check_ablate(world):
    """Oracle: the definition of each change; those of darts_v2 counted by hand."""
    found = menas.variants(CELLS["darts_v2"])
    assert [len(several) for several in found.values()] == [8, 36 - 8, 27, 1, 1, 1, 1]
    for kind, several in found.items():
        assert len(set(several)) == len(several)
        assert all(is_change(kind, CELLS["darts_v2"], new) for new in several)
    fake_trainings(world)
    rows = measure(world, "ablate", derive_samples=3)
    itself = {row["source"]: cell_of(row) for row in rows if row["group"] == "itself"}
    best, *_ = json.loads((world.search / "result.json").read_text())["rows"]
    assert itself["searched"] == cell_of(best) and itself["darts_v2"] == CELLS["darts_v2"]
    assert len({row["cell"] for row in rows if row["source"] == "darts_v2"}) == 1 + 3 * 3 + 4
    assert all(is_change(row["group"], itself[row["source"]], cell_of(row)) for row in rows)


def check_factors(world):
    """Oracle: a loss that is a number of the connections, a chain if searched and a star if random,
    plus one of the activations, relu or sigmoid."""
    def rows_of(reads, act):
        return encode([Cell(tuple(Node(read, activation=act) for read in reads))] * 5)

    def loss(name, seed, config):
        nodes = menas.load_cell(None, name).nodes
        return any_number([n.read for n in nodes]) + any_number({n.activation for n in nodes})

    found = {"sampled": rows_of((0, 1, 2), RELU)}
    world.patch.setattr(menas, "finished_search", lambda config: (config, None, found))
    world.patch.setattr(menas, "uniform_rows", lambda *_: rows_of((0, 1, 1), SIGMOID))
    fake_trainings(world, loss)
    rows = measure(world, "factors", derive_samples=2)
    for row in rows:
        reads = {"searched": [0, 1, 2], "random": [0, 1, 1]}[row["connections"]]
        act = {"searched": RELU, "random": SIGMOID, "tanh": TANH}[row["activations"]]
        assert row["test"] == any_number(reads) + any_number({act})
    groups = Counter((row["group"], row["connections"], row["activations"]) for row in rows)
    assert len(groups) == len({group for group, *_ in groups}) == 6 and {*groups.values()} == {2}


def check_capacity(world):
    """Oracle: the best learning rate made up for each cell. The text that is learnt is judged, and
    nothing is dropped, decayed or averaged."""
    def best_rate(cell):
        return menas.CAPACITY_RATES[int(3 * any_number(cell._replace(rate=0)))]

    def loss(name, seed, config):
        cell = menas.load_cell(None, name)
        return float(abs(cell.rate - best_rate(cell)))

    configs = fake_trainings(world, loss)
    world.patch.setattr(menas, "CAPACITY_WORDS", 50)
    rows = measure(world, "capacity", lr=2.0, average=True, weight_decay=.1, patience=1,
                   schedule="plateau", **DROPOUT)
    corpus = load_corpus(settings(world, "capacity"))
    text = [corpus.words[i] for i in corpus.train[:50]]
    for config in configs:
        learnt = load_corpus(config)
        assert [learnt.words[i] for i in learnt.train[:50]] == text
        assert learnt.train.tolist() == learnt.valid.tolist() == learnt.test.tolist()
        assert not any(getattr(config, name) for name in (*DROPOUT, "weight_decay", "average"))
        assert config.patience > config.epochs  # all take as long
        assert (config.schedule, config.lr) == ("cosine", 2)
    plain = {row["source"]: cell_of(row) for row in rows if row["group"] == "as it is"}
    assert len(rows) == 6 * len(plain) == 12
    for row in rows:
        kind, cell, new = row["group"], plain[row["source"]], cell_of(row)
        assert (row["rate"], row["train"]) == (best_rate(new), 0.0) == (new.rate, 0.0)
        assert (row["paths"], row["depth"]) == (len(menas.leaves(cell)), menas.depth(cell))
        cell, new = cell._replace(rate=0), new._replace(rate=0)
        assert kind == "half the width" or is_change(kind.replace("as it is", "itself"), cell, new)
        assert new.nodes == cell.nodes and new.width == 2 or kind != "half the width"


@pytest.mark.parametrize("anneal", [0, 1])
def test_an_annealed_search_finds_the_cell_that_its_policy_draws_most(anneal, world):
    """By hand: of three samples one is best, the others are the same cell; its rows come first, and
    it is the one that is trained, beside a sample and an LSTM."""
    best, often = [Cell((Node(0, activation=act), Node(1))) for act in (TANH, RELU)]
    drawn = encode([best, often, often]), torch.tensor([1.0, 2.0, 2.0])
    world.patch.setattr(menas, "derive", lambda config, weights, rows, corpus: drawn)
    fake_trainings(world)
    rows = measure(world, "search", nodes=2, anneal=anneal, retrain=2, derive_samples=3)
    trained = ["found", "a sample", "LSTM"]
    assert [row["group"] for row in rows] == ["sampled"] * 3 + ["uniform"] * 3 + trained
    assert cell_of(rows[0]) == cell_of(rows[6]) == (often if anneal else best)
    assert cell_of(rows[7]) in (best, often) and rows[8]["cell"] == "lstm"


def test_measures_of_a_cell():
    """Oracle: by hand, of a chain, a tree of twelve nodes with six leaves, and an LSTM's four."""
    cells = [CELLS[name] for name in ("chain", "tree", "lstm_cell")]
    assert [menas.path_count(cell) for cell in cells] == [1, 6, 4]
    assert [menas.depth(cell) for cell in cells] == [12, 4, 3]
    assert [menas.matrices(cell) for cell in cells] == [26, 26, 8]


def test_an_lstm_of_as_many_weights():
    """By hand: ENAS's cell has 26 * 200^2 = 1,040,000; 4 units (200 + units + 2) + 200 units are
    1,038,996 for 399 units and 1,043,200 for 400."""
    assert menas.lstm_units(menas.Config(hidden=200), "lstm:enas") == 399


def check_train(world):
    """Oracle: evaluation on each split. Of the perturbations one drops every word, as weights of 0
    for the input do, the other does nothing."""
    def mask(kind):
        return lambda inputs, words, hidden, *key: {"word": kind(1, words)}

    world.patch.setitem(menas.INPUTS, "words", mask(torch.zeros))
    world.patch.setitem(menas.INPUTS, "noise", mask(torch.ones))
    row, = measure(world, "train", cell="random:1", supernet="", perturb=True)
    config = settings(world, "train")
    weights = torch.load(world.folder / "train/weights.pt", weights_only=True)
    cells, corpus = encode([menas.load_cell(config, "random:1")]), load_corpus(config)
    losses = [evaluate(weights, cells, getattr(corpus, split)).item() for split in menas.SPLITS]
    assert [row[split] for split in menas.SPLITS] == pytest.approx(losses, abs=1e-5)
    assert row["test, noise"] == pytest.approx(row["test"], abs=1e-6)
    weights["input"] = torch.zeros_like(weights["input"])
    blind = evaluate(weights, cells, corpus.test).item()
    assert row["test, words"] == pytest.approx(blind, abs=1e-5) != row["test"]


# Measurements

def check_similarity(world):
    """Oracle: a look ahead that knows the very step to come has the next gradient, cosine 1 on the
    same samples; the plain one, one with a response, and those on other samples have not."""
    games, foresee = [], menas.Anticipation.foresee
    drawn, gradient = [], menas.policy_gradient

    def watched(game, *more):
        games.append(game)
        return foresee(game, *more)

    def noted(controller, sample, rewards):
        drawn.append(sample.rows.tolist())
        return gradient(controller, sample, rewards)

    def clairvoyant(weights, step):
        game, kept = games[-1], games[-1].s
        game.s = copy.deepcopy(kept)
        g = menas.Search.shared_step(game, 0.0)
        game.s = kept
        return g, torch.ones_like(kept["state"]["ahead"])

    world.patch.setattr(menas.Anticipation, "foresee", watched)
    world.patch.setattr(menas, "policy_gradient", noted)
    world.patch.setitem(menas.LOOKAHEAD, "fresh", clairvoyant)
    world.patch.setitem(menas.RESPONSE, "unrolled", lambda *given: 100.0 * torch.arange(4))
    rows = measure(world, "similarity", epochs=1, shared_steps=10, warm_epochs=1, lr=20.0, fold=2)
    same = {row["group"]: row["same samples"] for row in rows}
    assert same["fresh, none"] == pytest.approx(1, abs=1e-4) == same["the next one itself"]
    rest = [same[name] for name in ("none, none", "momentum, none", "fresh, unrolled")]
    assert max(rest + [row["other samples"] for row in rows]) < .999
    assert len(rows) == len(menas.ESTIMATORS) + 1 == len(same)
    assert drawn[-1] not in drawn[:-1]  # the other samples
    assert (games[-1].s["state"]["ahead"] == 1).all()  # the next segment is read from there


def check_cost(world):
    """Oracle: a clock and gradients of a size made up for every arm, but for an accident in the
    first draw, whose time a median forgets."""
    now, draws = [0.0], Counter()

    def rewarded(game, sample, progress):
        arm = f"{game.config.lookahead}, {game.config.response}, fold {game.config.fold}"
        draws[arm] += 1
        now[0] += any_number(arm) * (1 if sum(draws.values()) > 1 else 1000)
        return torch.tensor([any_number(arm), draws[arm]]), torch.zeros(2)

    def gradient(controller, sample, rewards):
        return rewards[0] * torch.randn(50, generator=menas.rng("draw", rewards[1].item()))

    world.patch.setattr(menas, "clock", lambda device: now[0])
    world.patch.setattr(menas.Anticipation, "rewarded", rewarded)
    world.patch.setattr(menas, "policy_gradient", gradient)
    rows = measure(world, "cost", shared_steps=1, controller_steps=5)
    assert {row["group"] for row in rows} == {*draws} and len(rows) == 3 + 3 * 3
    for row in rows:
        size = any_number(row["group"])
        times = size / any_number("none, none, fold 1")
        assert (row["ms"], row["cost"]) == pytest.approx((1e3 * size, times))
        assert row["noise"] == pytest.approx(times ** 2, rel=1e-4)


def check_bench(world):
    """Oracle: a network that takes 2 seconds as torch.nn.LSTM, 3 by the fast path, 12 by the plain
    loop, and three times that where gradients, and masks, are wanted."""
    now = [0.0]

    def network(weights, rows, batch, dtype=None, recurrence=None):
        assert bool(batch.masks) == torch.is_grad_enabled()
        kind = "lstm" if "weight_hh" in weights else recurrence
        seconds = {"lstm": 2, menas.plain_recurrence: 12, menas.fast_recurrence: 3}[kind]
        now[0] += seconds * (3 if torch.is_grad_enabled() else 1)
        return sum(w.sum() for w in weights.values())[None], None

    world.patch.setattr(menas, "clock", lambda device: now[0])
    world.patch.setattr(menas, "network", network)
    world.patch.setattr(menas, "BENCHES", [(4, 2, 9, 2, "float32"), (64, 2, 9, 1, "float32")])
    found = [(row["ms"], row["speedup"]) for row in measure(world, "bench")]
    expected = [(36e3, 1), (6e3, 6), (9e3, 4), (12e3, 1), (2e3, 6), (3e3, 4)]
    assert found == [pytest.approx(pair) for pair in expected]


def mean_context(tokens, streams, warm):
    """Words that a prediction has seen on average, in so many streams that have each read so many
    words of the one before."""
    length = math.ceil((tokens - 1) / streams)
    return mean(at % length + 1 + warm * (at >= length) for at in range(tokens - 1))


def check_state(world):
    """Oracle: a loss that falls by a thousandth with every word read, whoever reads it, so that the
    error under each policy is known; in segments that start with word 0 the order is turned."""
    def own(rows):
        return torch.tensor([any_number(menas.row_name(row)) for row in rows])

    def unroll(weights, rows, batch, dtype=None):
        return None, batch.state.expand(-1, len(rows), -1, -1) + len(batch.inputs)

    def network(weights, rows, batch, dtype=None):
        assert weights is mine or "edges" not in weights
        scored, losses = batch.targets >= 0, own(rows)
        read = batch.state[0, 0, :, 0] + torch.arange(1, len(scored) + 1)[:, None]
        if len(scored) == 10 and batch.inputs[0, 0] == 0:
            losses = 2 * losses.median() - losses
        losses = losses - (read * scored).sum() / scored.sum().clamp(min=1) / 1000
        return losses, unroll(weights, rows, batch)[1]

    def train_rows(config, run, rows):
        torch.save({"embedding": torch.zeros(5, 4)}, run.folder / "weights.pt")
        return [row | {"folder": "."} for row in rows]

    def load_corpus(config):
        texts = [torch.randint(5, (n,), generator=menas.rng("text", n)) for n in (901, 301, 201)]
        return menas.Corpus(*texts, [*"abcde"], {})

    searched, mine, _ = menas.finished_search(settings(world, "state"))
    searched = replace(searched, batch=1, bptt=10)
    cells = menas.uniform_rows(menas.search_space(searched), 9, "cells")
    for fake in (unroll, network, train_rows, load_corpus):
        world.patch.setattr(menas, fake.__name__, fake)
    world.patch.setattr(menas, "finished_search", lambda config: (searched, mine, None))
    world.patch.setattr(menas, "uniform_rows", lambda decisions, k, *key: cells[:k])
    rows = measure(world, "state", derive_samples=9)
    turned = mean((load_corpus(None).valid[:300:10] == 0).tolist())
    for row, context in zip(rows, (150.5, 5.5, 5.5 + 10 * 29 / 30)):  # carry, zero, warm
        bias = (mean_context(301, 4, 70) - context) / 1000
        assert (row["bias"], row["tau"]) == pytest.approx((bias, 1 - 2 * turned), abs=1e-5)
    for row, words in zip(rows[3:], menas.CONTEXTS * 2, strict=True):
        read = mean_context(301, 300 // words, words)
        loss = own(encode([CELLS["enas"]])).item() - read / 1000
        assert row["loss"] == pytest.approx(loss, abs=1e-5)


def check_hidden(world):
    """Oracle: states made by hand. The trained controller's are first all decisions, one-hot, then
    nothing but the loss; the untrained one's are noise."""
    saved = torch.load(world.search / "controller.pt", weights_only=True)
    valid = load_corpus(settings(world, "hidden")).valid
    sampling = menas.Controller.forward

    def score(weights, rows, tokens, config):
        assert torch.equal(tokens, valid)
        relus = [sum(node.activation == RELU for node in decode(row).nodes) for row in rows]
        return torch.tensor(relus) / 10

    def study(states):
        def forward(controller, draws=None, rows=None, asked=None):
            if rows is None:
                return sampling(controller, draws)
            mine = controller.state_dict()
            if all(torch.equal(x, saved[name]) for name, x in mine.items()):
                return menas.Sample(rows, None, None, states(rows))
            assert torch.equal(controller.start, menas.Controller(controller.decisions, 3).start)
            noise = torch.randn(len(rows), 5, generator=menas.rng("noise"))
            return menas.Sample(rows, None, None, noise)

        world.patch.setattr(menas.Controller, "forward", forward)
        return measure(world, "hidden", derive_samples=20, seed=4)

    world.patch.setattr(menas, "score", score)
    blind, knowing = study(lambda rows: torch.nn.functional.one_hot(rows, 4).flatten(1).float())
    assert (blind.pop("group"), knowing.pop("group")) == ("untrained", "trained")
    assert max(blind.values()) < .2 and blind["distance with loss"] > -.2
    assert knowing["distance with decisions"] == pytest.approx(1)
    assert min(x for name, x in knowing.items() if name.startswith("probe")) > .7
    knowing = study(lambda rows: score(None, rows, valid, None)[:, None])[1]
    assert knowing["distance with loss"] == pytest.approx(1) and knowing["probe for loss"] > .99
    assert knowing["probe for paths"] < .2


def test_the_final_state_has_seen_every_decision():
    """Oracle: the walk by hand, an LSTM cell fed with one embedding after the other."""
    decisions = menas.search_space(menas.configure("search", "smoke", nodes=4))
    controller, rows = menas.Controller(decisions, 2), menas.uniform_rows(decisions, 6, "states")
    x, state = controller.start.expand(6, -1), None
    for f, i in enumerate(controller.free):
        state = controller.lstm(x, state)
        values = rows[:, decisions[i].columns[0]].tolist()
        x = controller.embed[f][[decisions[i].choices.index(value) for value in values]]
    state = controller.lstm(x, state)
    assert torch.allclose(controller(rows=rows).hidden, state[0], atol=1e-6)


def check_conditional(world):
    """Oracle: what a controller was asked for and answered, seen from outside, where it learns an
    easy property. Who is told what to aim for is nearer to it, on targets never trained on."""
    asked_for, sample, steps = [], menas.Controller.sample, 60

    def watched(controller, k, *key, asked=None):
        found = sample(controller, k, *key, asked=asked)
        if asked is not None:
            asked_for.append((asked[0].item(), found.rows))
        return found

    world.patch.setattr(menas.Controller, "sample", watched)
    config = settings(world, "conditional", nodes=8, min_nodes=1, activations="tanh", seed=1,
                      connections="chain", operations="highway", controller_samples=16,
                      controller_steps=steps, controller_lr=.04, entropy=.02)
    rows = menas.conditional(config, "depth", SimpleNamespace(obey=lambda: None))
    tests, trained = asked_for[steps:], {asked for asked, _ in asked_for[:steps]}
    scale = (tests[-1][0] - tests[0][0]) / (rows[-1]["target"] - rows[0]["target"])
    for row, (asked, cells) in zip(rows, tests, strict=True):
        assert asked not in trained and min(trained) < asked < max(trained)
        assert asked - tests[0][0] == pytest.approx((row["target"] - rows[0]["target"]) * scale)
        depths = [len(decode(cell).nodes) for cell in cells]
        error = mean(abs(x - row["target"]) for x in depths) * scale
        assert (row["mean"], row["error"]) == pytest.approx((mean(depths), error), rel=1e-3)
    assert mean(row["error"] for row in rows) < .7 * mean(row["untrained"] for row in rows)


def check_progress(world):
    """Oracle: the evaluation of all four cells of a space; and the one cell that a search is sure
    of from its first round on."""
    games = []

    def search(game, run, watch):
        games.append(game)
        watch(0)
        game.controller.bound = 1e6
        watch(1)

    world.patch.setattr(menas, "search", search)
    given = dict(nodes=2, activations="tanh,relu", epochs=1, settle=1, derive_samples=60)
    rows, game = measure(world, "progress", **given), games[0]
    sure = decode(game.controller.sample(1, "any").rows[0])
    acts = [(a, b) for a in (TANH, RELU) for b in (TANH, RELU)]
    cells = [Cell((Node(0, activation=a), Node(1, activation=b))) for a, b in acts]
    valid = load_corpus(settings(world, "progress")).valid
    losses = evaluate(game.s["weights"], encode(cells), valid).tolist()
    for i in range(3):
        best, = [row for row in rows if row["round"] == i]
        expected = cells[losses.index(min(losses))] if i == 0 else sure
        assert cell_of(best) == expected
        assert best["valid"] == pytest.approx(losses[cells.index(expected)], abs=1e-5)
        assert best["distinct"] == (4 if i == 0 else 1)


# Of each check: the function that is wrong, what stands there, what stands there instead
MUTANTS = {
    check_train_rows: [
        ("train_rows", "zip(batch, record", "zip(sorted(batch), record"),
        ("train_rows", "config.seed + i)", "config.seed)"),
        ("train_rows", " | rows[i]", " | rows[i] | trained"),
        ("train_rows", "torch.randperm(len(rows), generator=rng(config.seed, 'order'))",
         "torch.arange(len(rows))"),
        ("train_rows", "supernet=''", "supernet=config.supernet"),
        ("kind_of_network", "f'lstm {units}'", "'lstm'")],
    check_compare: [
        ("study_compare", "Controller(search_space(searched), searched.seed)",
         "uniform(search_space(searched))"),
        ("study_compare", "score(weights", "score(shared_weights(searched, len(corpus.words))"),
        ("study_compare", "some[:fewest]", "some"),
        ("study_compare", "min(some", "max(some"),
        ("study_compare", "samples.unique(dim=0)", "samples")],
    check_ablate: [
        ("without", "if slot == i + 1", "if slot == i"),
        ("study_ablate", "found['sampled'][0]", "found['sampled'][-1]"),
        ("study_ablate", "variants(cell)", "variants(CELLS['darts_v2'])")],
    check_factors: [
        ("study_factors", "drawn[b][draws[1]]", "drawn[a][draws[1]]"),
        ("study_factors", "connections=a, activations=b", "connections=b, activations=a")],
    check_capacity: [
        ("study_capacity", ", **BY_HEART", ""),
        ("study_capacity", "corpus.train[:", "corpus.test[:"),
        ("study_capacity", "text.replace(", "(text + ' w0' * (split == 'valid')).replace("),
        ("study_capacity", "config.hidden // 2", "config.hidden")],
    check_train: [
        ("study_train", "getattr(corpus, split)", "corpus.train"),
        ("study_train", "perturbation(kind, best", "perturbation('noise', best")],
    check_similarity: [
        ("cosines_to_the_next", "game.shared_step(0.0)", "None"),  # the gradients at t
        ("cosines_to_the_next", "grads = estimates(",  # after the step
         "game.shared_step(0.0); game.shared_step = float; grads = estimates("),
        ("cosines_to_the_next", "samples[0], rewards[0]", "samples[1], rewards[0]"),
        ("study_similarity", "'same samples': same", "'same samples': other"),
        ("estimates", "if state is not None", "if False"),
        ("estimates", "direct + response", "direct")],
    check_cost: [
        ("study_cost", "row['ms'] / rows[0]['ms']", "rows[0]['ms'] / row['ms']"),
        ("study_cost", "median(seconds[arm])", "mean(seconds[arm])"),
        ("study_cost", "response=arm[1]", "response=config.response")],
    check_bench: [
        ("bench_case", "ms['plain loop'] / x", "x / ms['plain loop']"),
        ("bench_case", "dropped[work]", "dropped['scoring']")],
    check_state: [
        ("study_state", "state=name", "state=searched.state"),
        ("reward_error", ", game.s['state']['valid']", ", _"),
        ("reward_error", "game.next('valid')", "game.next('train')"),
        ("reward_error", "- whole)", "+ whole)")],
    check_hidden: [
        ("study_hidden", "('untrained', untrained)", "('untrained', trained)"),
        ("study_hidden", "searched.seed", "config.seed"),
        ("study_hidden", "corpus.valid[:20000]", "corpus.test"),
        ("study_hidden", "probe(states, y)", "probe(y[:, None], y)")],
    check_conditional: [
        ("conditional", "targets[1:-1:2]", "targets[::2]"),
        ("conditional", "in (got, anywhere)", "in (anywhere, got)"),
        ("conditional", "-(values(sample.rows)", "(values(sample.rows)")],
    check_progress: [
        ("study_progress", "valid=no_worse(losses[0]", "valid=no_worse(losses[-1]"),
        ("study_progress", "game.controller", "uniform(game.controller.decisions)")],
}


@pytest.mark.parametrize("check", MUTANTS, ids=lambda check: check.__name__)
def test_a_study_measures_what_it_says(check, world):
    """Oracle: the made-up world of each check."""
    check(world)


@pytest.mark.parametrize("check, name, old, new", [
    (check, *mutant) for check, several in MUTANTS.items() for mutant in several])
def test_a_wrong_study_fails_the_same_check(check, name, old, new, world):
    """Oracle: mutants of the study."""
    mutate(world.patch, name, (old, new))
    with pytest.raises(AssertionError):
        check(world)


# The real thing

@pytest.mark.parametrize("study", [*sorted({*menas.STUDIES} & {*menas.COMMANDS}), "robust"])
def test_every_study_runs_and_finds_what_is_reported(study, world):
    """Oracle: the values that the report compares. At a toy size, trainings too where few."""
    world.patch.setattr(menas, "BENCHES", [(4, 2, 9, 1, "float32")])
    world.patch.setattr(menas, "CONTEXTS", (1, 8))
    world.patch.setattr(menas.reward_error, "__defaults__", (2,))  # segments at least
    if study in ("compare", "ablate", "factors", "capacity"):
        fake_trainings(world)
    command = "search" if study == "robust" else study
    given = dict(epochs=1, shared_steps=10, controller_steps=2, derive_samples=2, retrain=1, bptt=4,
                 cell="random:1", reward_input="words", perturb=True,
                 out=f"{world.folder / study}/3", supernet=str(world.search) * (study != "train"))
    (world.folder / study).mkdir()
    rows = measure(world, command, **given)
    menas.Run(command, settings(world, command, **given)).finish(rows)
    record, = menas.load_records(world.folder)[study]
    for value in menas.STUDIES[study].values:
        assert menas.comparison(record["rows"], value)


@pytest.mark.parametrize("study, more, said", [
    ("compare", dict(supernet=""), "--supernet"),
    ("compare", dict(supernet="nowhere"), "nowhere"),
    ("bench", dict(hidden=3), "smallest case"),
    ("conditional", dict(nodes=2, operations="highway"), "too few values"),
    ("cost", dict(controller_steps=1, shared_steps=1), "two draws"),
    ("similarity", dict(epochs=1, shared_steps=5), "at least")])
def test_what_a_study_is_not_for(study, more, said, world):
    """Oracle: by hand, what there would be nothing to measure in."""
    with pytest.raises(menas.UserError, match=said):
        measure(world, study, **more)


@pytest.mark.parametrize("study", ["ablate", "factors"])
def test_cells_are_changed_in_enas_space_only(study, world):
    """By hand: of a search that chose the number of nodes they could not be."""
    searched, *rest = menas.finished_search(settings(world, study))
    other = replace(searched, min_nodes=1), *rest
    world.patch.setattr(menas, "finished_search", lambda config: other)
    with pytest.raises(menas.UserError, match="own space"):
        measure(world, study)
