"""The studies of cells: what they change, measure and share out. Run: pytest tests/test_cell_studies.py"""
import json
import math
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import menas
from menas import (CELLS, INPUT, Batch, Controller, Search, cell_from_json, cell_to_json, configure, decode,
                   edge_index, encode, evaluate, load_cell, load_corpus, lstm_weights, main, network, perturbed,
                   run_study, search_space, shared_weights, uniform_rows)
from results import cells as cell_studies
from results.cells import (MEASURES, STUDIES, edited, inherit_numbered, late_gains, matched_units, name_of, states_of,
                           steered, train_all, variants, without)
from results.report import FIGURES, TABLES, summary

SMALL = dict(hidden=8, nodes=4, epochs=2, shared_steps=4, controller_steps=2, controller_samples=3, derive_samples=3,
             log_every=2, replicas=2, batch=8, settle=0, retrain_epochs=1, retrain_cells=1, threads=1)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """study -> its Config and record, run once."""
    folder = tmp_path_factory.mktemp("studies")

    @lru_cache(None)
    def run(study):
        config = settings(study, text, folder)
        return config, run_study(study, STUDIES[study], config)

    return run


def settings(study, text, tmp_path, **more):
    config = {**SMALL, "data": str(text), "out": str(tmp_path / study), **more}
    if study == "ablate":
        config["cell"] = "found,random:1"
    return configure(study, "smoke", **config)


# changes to a cell

def test_a_node_removed_leaves_its_readers_to_what_it_read():
    """Oracle: the published cell, by hand: its node 2 read node 1 and was read by 3, 4 and 5."""
    cell, numbers = without(CELLS["enas"], 2)
    assert numbers == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    names = [(numbers[node.read - 1] if node.read else "input", node.activation) for node in cell.nodes]
    before = [(node.read - 1 if node.read else "input", node.activation) for node in CELLS["enas"].nodes]
    expected = [(1 if read == 2 else read, act) for i, (read, act) in enumerate(before) if i != 2]
    assert names == expected and [read for read, _ in before].count(2) == 3


def test_variants_differ_in_one_thing():
    cell = CELLS["darts_v2"]
    found = variants(cell)
    assert {kind: len(several) for kind, several in found.items()} == {
        "a node removed": 8, "a connection added": 36 - 8, "an activation changed": 27, "all activations the same": 4}
    for changed, numbers in found["a connection added"]:
        assert sum(a != b for a, b in zip(changed.nodes, cell.nodes)) == 1 and numbers == list(range(9))
        assert cell_from_json(cell_to_json(changed)) == changed == load_cell(configure("train"), name_of(changed))
    for changed, _ in found["an activation changed"]:
        assert sum(a != b for a, b in zip(changed.nodes, cell.nodes)) == 1
    assert all(len({node.activation for node in x.nodes}) == 1 for x, _ in found["all activations the same"])
    alike = [x for x, _ in variants(CELLS["chain"])["all activations the same"]]
    assert len(alike) == 3 and CELLS["chain"] not in alike


@pytest.mark.parametrize("kind", ["a node removed", "a connection added", "an activation changed"])
def test_variants_take_the_shared_weights_of_their_own_nodes(kind):
    """Oracle: a bank made for the changed cell, in which every edge stands where the cell's new numbers look for it."""
    config = configure("search", "smoke", hidden=8, nodes=9)
    shared = {name: w.double() for name, w in shared_weights(config, 11).items()}
    tokens = torch.randint(11, (2, 6, 3), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[0], tokens[1], torch.zeros(1, 3, 8).double(), {})
    for cell, numbers in variants(CELLS["darts_v2"])[kind][:6]:
        bank, old = shared["edges"].clone(), lambda slot: numbers[slot - 1] + 1 if slot else INPUT
        for i in range(len(cell.nodes)):
            for slot in range(i + 1):
                bank[edge_index(slot, i)] = shared["edges"][edge_index(old(slot), numbers[i])]
        expected = network({**shared, "edges": bank}, encode([cell]), batch, torch.float64)[0]
        weights, rows = inherit_numbered(shared, [cell], [numbers])
        assert network(weights, rows, batch, torch.float64)[0].item() == pytest.approx(expected.item(), abs=1e-12)


# the controller's state

def controller_of(**more):
    config = configure("hidden", "smoke", nodes=5, **more)
    return Controller(search_space(config), config), search_space(config)


def test_the_final_state_has_seen_every_decision():
    """Oracle: the walk written out, an LSTM cell fed with one embedding after the other."""
    controller, decisions = controller_of()
    rows = uniform_rows(decisions, 6, 1, "states")
    with torch.no_grad():
        x, state = controller.start.expand(6, -1), None
        for f, i in enumerate(controller.free):
            state = controller.lstm(x, state)
            column, choices = decisions[i].columns[0], decisions[i].choices
            x = controller.embed[f][[choices.index(row[column]) for row in rows.tolist()]]
        expected = controller.lstm(x, state)[0]
    assert torch.allclose(states_of(controller, rows), expected, atol=1e-6)
    assert not controller.lstm._forward_hooks


@pytest.mark.parametrize("kind, columns", [("a connection", {6, 8, 10}), ("an activation", {3, 5, 7, 9, 11})])
def test_an_edit_changes_one_decision_within_the_space(kind, columns):
    _, decisions = controller_of()
    draw, seen = menas.rng(1), set()
    for row in uniform_rows(decisions, 100, 2, "edits"):
        other = edited(row, kind, draw)
        changed = (row != other).nonzero().flatten().tolist()
        assert len(changed) == 1 and cell_from_json(cell_to_json(decode(other))) == decode(other)
        seen |= {*changed}
    assert seen == columns


def test_a_push_moves_what_is_sampled():
    """Along a head's own direction a choice becomes more frequent; at strength 0 the samples are the plain ones."""
    controller, decisions = controller_of()
    f = next(f for f, i in enumerate(controller.free) if decisions[i].name == "activation of 3")
    controller.head.data *= 30
    direction = controller.head[f, :, 0] - controller.head[f, :, 1:4].mean(1)
    drawn = steered(controller, direction.detach(), (1, "push"))
    tanhs = [(rows[:, 3 + 2 * 3] == 0).float().mean().item() for rows in drawn.values()]
    assert torch.equal(drawn[0.0], controller.sample(200, 1, "push").rows)
    assert tanhs[0] < tanhs[2] < tanhs[4] and tanhs[4] - tanhs[0] > .3


def test_measures_of_a_cell():
    """Oracle: the chain and the tree, whose paths and depth are known."""
    chain, tree = CELLS["chain"], CELLS["tree"]
    assert [MEASURES[name](chain) for name in ("paths", "depth", "nodes with tanh")] == [1, 12, 12]
    assert MEASURES["paths"](tree) == 6 and MEASURES["nodes with relu"](tree) == 0


def test_an_lstm_of_as_many_weights():
    config = configure("compare", "tiny")
    units = matched_units(config, 12_000)
    count = lambda units: sum(w.numel() for name, w in lstm_weights(replace(config, lstm_hidden=units), 2, [1]).items()
                              if name not in ("embedding", "bias"))
    assert abs(count(units) - 12_000) <= min(abs(count(units + 1) - 12_000), abs(count(units - 1) - 12_000))


# perturbed input

def test_rewards_on_perturbed_input(text):
    """Oracle: the network with the masks written out; without the settings nothing changes, with them the loss does."""
    config = configure("search", "smoke", **{**SMALL, "data": str(text)})
    corpus = load_corpus(config)
    rows = uniform_rows(search_space(config), 3, 1, "cells")
    for how in ({}, dict(reward_words=.3), dict(reward_noise=.5)):
        game = Search(replace(config, **how), corpus)
        segment, weights = game.streams["valid"].next(), game.s["weights"]
        rewards = game.rewards_on(segment)(weights, rows)
        masks = perturbed(replace(config, **how), weights)(segment.inputs, 0)
        assert set(masks) == {"reward_words": {"word"}, "reward_noise": {"noise"}}.get(next(iter(how), ""), set())
        losses = network(weights, rows, Batch(*segment[:2], torch.zeros(1, 8, 8), masks))[0]
        assert torch.allclose(rewards, 80 * torch.exp(-losses))
        plain = network(weights, rows, Batch(*segment[:2], torch.zeros(1, 8, 8), {}))[0]
        assert torch.equal(losses, plain) == (how == {})
    noise = perturbed(replace(config, reward_noise=.5), weights)(torch.zeros(400, 50, dtype=torch.long), 1)["noise"]
    assert noise.shape == (1, 400, 50, 8) and noise.std().item() == pytest.approx(.5, rel=.02)
    many = {"embedding": torch.zeros(9000, 8)}
    dropped = perturbed(replace(config, reward_words=.3), many)(segment.inputs, 1)["word"]
    assert (dropped == 0).float().mean().item() == pytest.approx(.3, abs=.02)


def test_the_whole_split_under_a_perturbation(text):
    """Of strength 0 it is the plain evaluation, bit for bit; a strong one is worse than a weak one."""
    config = configure("train", "smoke", **{**SMALL, "data": str(text)})
    corpus, rows = load_corpus(config), encode([CELLS["chain"]._replace(nodes=CELLS["chain"].nodes[:4])])
    run_study("train", menas.study_train, replace(config, cell=name_of(decode(rows[0])), epochs=3, replicas=1, lr=5.0,
                                                  out=str(text / "trained")))
    weights = torch.load(text / "trained/weights.pt", weights_only=True)
    masks = lambda how: perturbed(replace(config, **how), weights)
    under = lambda **how: evaluate(weights, rows, corpus.test, 8, masks=masks(how)).item()
    assert under() == evaluate(weights, rows, corpus.test, 8).item()
    assert under() < under(reward_words=.3) < under(reward_words=.9) and under() < under(reward_noise=3.0)


# the studies

@pytest.mark.parametrize("study", list(STUDIES))
def test_every_study_runs_and_is_reported(study, finished, tmp_path):
    """At a toy size: a table, a figure; the second time nothing is done again."""
    config, record = finished(study)
    assert run_study(study, lambda *_: 1 / 0, config) == json.loads((Path(config.out) / "result.json").read_text())
    assert len(TABLES[study]([record]).splitlines()) >= 4 and summary(record)
    FIGURES[study](tmp_path / "figure.png", record)
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert (tmp_path / "figure.gif").exists() == (study == "progress")


def test_parts_do_the_work_together(text, tmp_path, finished):
    """Two commands with --part, then the study itself: the same as without; nothing is trained twice."""
    alone = finished("factors")[1]
    config = settings("factors", text, tmp_path / "shared")
    for part in ("1/2", "2/2") * 2:  # the searches, then the networks
        with pytest.raises(SystemExit) as left:
            run_study("factors", STUDIES["factors"], replace(config, part=part))
        assert not left.value.code and not (tmp_path / "shared/factors/result.json").exists()
    names = {path.name for path in (tmp_path / "shared/factors").iterdir() if path.is_dir()}
    assert names == {"search 1", "search 2", "scratch 0", "scratch 1"}
    stamps = [(path, path.stat().st_mtime) for path in (tmp_path / "shared/factors").glob("s*/*.jsonl")]
    together = run_study("factors", STUDIES["factors"], config)
    assert together["metrics"] == alone["metrics"] and all(path.stat().st_mtime == at for path, at in stamps)


@pytest.mark.parametrize("study, part, words", [("search", "1/2", "search has no sub-runs"), ("compare", "3/2", "I/N"),
                                                ("compare", "0/2", "I/N"), ("progress", "1/2", "progress")])
def test_parts_that_make_no_sense(study, part, words, tmp_path, capsys):
    assert main([study, "--preset", "smoke", "--part", part, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err


def trained(config):
    """{(row, seed): the test loss} of every network of a finished study, by its own record."""
    records = [json.loads(path.read_text()) for path in Path(config.out).glob("scratch */result.json")]
    return {(n["cell"], n["seed"]): math.log(n["test_perplexity"]) for r in records for n in r["metrics"]["networks"]}


def test_compare_keeps_every_record(finished):
    """As many cells of each source, each with its own losses: the shared one is that of the search's derived.json."""
    config, record = finished("compare")
    groups = record["metrics"]["groups"]
    assert {name: len(entries) for name, entries in groups.items()} == {
        "trained": 6, "untrained": 6, "uniform": 6, "LSTM": 2, "LSTM, as many weights": 2}
    derived = json.loads((Path(config.out) / "search 2/derived.json").read_text())["cells"]
    mine = sorted((e["row"], e["shared"]) for e in groups["trained"] if e["search"] == 2)
    guess = math.log(len(load_corpus(config).words))
    assert mine == sorted((row[:-1], pytest.approx(min(guess, math.log(row[-1])))) for row in derived)
    by_row = {}
    for (cell, _), loss in trained(config).items():
        by_row.setdefault(cell, []).append(loss)
    for entry in (e for name in ("trained", "untrained", "uniform") for e in groups[name]):
        losses = by_row["-".join(map(str, entry["row"]))]
        assert any(entry["test"] == pytest.approx(min(loss, guess)) for loss in losses)
        assert entry["failed"] == (entry["test"] >= guess)
    assert len({seed for _, seed in trained(config)}) == 18  # none is trained like another


def test_factors_and_ablations_are_of_their_own_cells(finished):
    """Oracle: the networks' own records, where a cell is known by its row."""
    config, record = finished("factors")
    found, networks = record["metrics"], trained(config)
    chain = "-".join(map(str, encode([CELLS["chain"]._replace(nodes=CELLS["chain"].nodes[:4])])[0].tolist()))
    i, j = found["connections"].index("chain"), found["activations"].index("tanh")
    of = lambda name: sorted(x for (cell, _), x in networks.items() if cell == name)
    assert sorted(found["losses"][i][j]) == pytest.approx(of(chain))
    config, record = finished("ablate")
    itself, networks = record["metrics"]["cells"]["random:1"]["itself"], trained(config)
    assert sorted(x for _, x in itself["scratch"]) == pytest.approx(of(name_of(load_cell(config, "random:1"))))
    assert len(itself["scratch"]) == 5 == len({x for _, x in itself["scratch"]})  # seeds that differ
    assert {x for x, _ in itself["scratch"]} == {*itself["shared"]}


def test_robust_without_a_perturbation_is_the_plain_test_loss(finished):
    """Oracle: the networks' own records."""
    config, record = finished("robust")
    for lines in record["metrics"]["losses"].values():
        mine = [x for name in ("plain", "words dropped", "noise") for x in lines[name][0]]
        assert sorted(mine) == pytest.approx(sorted(trained(config).values()), abs=1e-4)


def test_what_the_last_epochs_gained(tmp_path):
    """By hand: two networks of which the first stops early; the second has diverged, so it counts as guessing."""
    lines = [dict(step=1, loss=2.0)] + [dict(networks=[0, 1], valid_perplexity=[math.exp(3 - i), math.inf])
                                        for i in range(3)] + [dict(networks=[1], valid_perplexity=[math.e])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert late_gains(tmp_path / "metrics.jsonl", 5.0) == pytest.approx([2.0, 4.0])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]))
    assert late_gains(tmp_path / "metrics.jsonl", 5.0) == [None, None]


def test_a_cell_that_lacks_a_kind_of_change(text, tmp_path):
    """Of two nodes none can have a second connection; of one, none can be removed. Each cell counts once."""
    for nodes, kinds in ((2, {"a node removed"}), (1, set())):
        cell = "-".join(map(str, encode([CELLS["chain"]._replace(nodes=CELLS["chain"].nodes[:nodes])])[0].tolist()))
        config = settings("ablate", text, tmp_path / str(nodes), nodes=2)
        record = run_study("ablate", STUDIES["ablate"], replace(config, cell=f"{cell},{cell}"))
        assert {*record["metrics"]["cells"][cell]} == kinds | {"itself", "an activation changed",
                                                                "all activations the same"}
        assert len(record["metrics"]["cells"][cell]["itself"]["scratch"]) == 5 and summary(record)


def test_who_has_failed(text, tmp_path, monkeypatch):
    """By hand: one that diverged after good weights counts at these, one at guessing or without a number as guessing;
    judged by validation, the test loss of one that has learnt may be worse than that."""
    config = configure("factors", "smoke", data=str(text))
    guess = math.log(len(load_corpus(config).words))
    ends = [(2.0, True), (guess, False), (math.nan, True), (math.inf, True), (2.0, False)]
    networks = [dict(epochs=1, failed=diverged, train_perplexity=9.0, valid_perplexity=9.0 if i == 4 else math.exp(x),
                     test_perplexity=math.exp(x) if i < 4 else 1e9) for i, (x, diverged) in enumerate(ends)]
    record = {"metrics": {"networks": networks}, "config": {"epochs": 1}}
    monkeypatch.setattr(cell_studies, "sub_runs", lambda *_: {"scratch 0": record})
    monkeypatch.setattr(cell_studies, "late_gains", lambda *_: [None] * 5)
    run = type("Run", (), {"folder": tmp_path})
    found, _ = train_all(config, run, ["random:1"] * 5)
    assert [n["failed"] for n in found] == [False, True, True, True, True]
    assert [n["test"] for n in found] == pytest.approx([2.0] + [guess] * 4)
    found, _ = train_all(config, run, ["random:1"] * 5, judged="valid")
    assert not found[4]["failed"] and found[4]["test"] == pytest.approx(math.log(1e9))


def test_the_state_is_pushed_to_where_the_probe_finds_more(monkeypatch):
    """Oracle: values that are three times the states' third coordinate."""
    states, tried = torch.randn(300, 5, generator=menas.rng("states"), dtype=torch.float64), []
    row = encode([CELLS["chain"]])[0]
    monkeypatch.setattr(cell_studies, "steered", lambda controller, d, key: tried.append(d) or {0: [row]})
    found = cell_studies.pushed(None, states, 3 * states[:, 2], lambda cell: 7.0, "a key")
    assert [len(lines) for lines in found.values()] == [1, 5] and found["along the probe"] == [[7.0]]
    length = states.norm(dim=1).mean().item()
    assert tried[0].tolist() == pytest.approx([0, 0, length, 0, 0], abs=.05 * length)
    assert all(d.norm().item() == pytest.approx(length, rel=1e-5) for d in tried)


def test_tables_have_the_right_sign(tmp_path):
    """Hand-made records: trained cells that are better, a change that harms, a kind that learns less, searches that
    lose more when perturbed, a lone factor."""
    entry = lambda search, i, loss: dict(search=search, shared=loss, valid=-i, test=loss, capped=False, late=.01,
                                         failed=False)  # best on validation is a search's last
    groups = {name: [entry(s, i, 2 + worse + .01 * s + spread * i) for s in range(5) for i in range(4)]
              for name, worse, spread in (("trained", 0, .001), ("untrained", .5, .001), ("uniform", .2, -.02))}
    groups["LSTM"] = [dict(test=1.5 + .01 * i, capped=False, late=None, failed=True) for i in range(5)]
    made = TABLES["compare"]([{"metrics": {"groups": groups}}])
    assert re.search(r"untrained +\| \+0.500 \+- 0.000 .*\| 1.00 .*\| \+0.500 \+- 0.000", made)
    assert re.search(r"uniform .*\| \+0.137 \+- 0.000", made) and re.search(r"LSTM +\| -0.5", made)
    assert "5 of 5" in made and "1.000 +- 0.000" in made
    assert made.count("| none ") == 2  # of 5 pairs p is 1/16 at least, of 5 and 5 values 1/126
    FIGURES["compare"](tmp_path / "figure.png", {"metrics": {"groups": groups}})  # all LSTMs have failed
    for entry in groups["trained"][:4]:
        entry["shared"] = 2.0  # a search in which nothing can be ordered is not counted
    few = {name: entries[:8] if name != "LSTM" else entries[:2] for name, entries in groups.items()}
    made, few = (TABLES["compare"]([{"metrics": {"groups": x}}]) for x in (groups, few))
    assert re.search(r"trained +\| 20 +\| 1.000 \+- 0.000", made) and few.count("| none ") == 3
    two = lambda shared, scratch: {"shared": [shared], "scratch": [[shared, scratch + .01 * i] for i in range(5)]}
    cells = {"enas": {"itself": two(2.0, 2.0), "a node removed": two(2.3, 2.5)}}
    made = TABLES["ablate"]([{"metrics": {"cells": cells}}])
    assert re.search(r"a node removed +\| 1 +\| \+0.300 .*\| \+0.500", made) and "last epoch" not in made
    ends = [dict(capped=i < 2, late=(.5, .1, 9.0)[i], failed=i == 2) for i in range(3)]  # the gain is of the capped
    made = TABLES["ablate"]([{"metrics": {"cells": cells, "ends": ends}}])
    assert re.search(r"\| 3 +\| 2 of 3 +\| 0.3000 +\| 1 of 3", made)
    one = {"enas": {"itself": two(2.0, 2.0), "a node removed": {"shared": [2.3], "scratch": [[2.3, 2.5]]}}}
    made = TABLES["ablate"]([{"metrics": {"cells": one}}])  # one network: no interval, no p, nothing detectable
    assert "nan" not in made and "< .001" not in made and re.search(r"\| \+0.480 +\| +\| +\|", made)
    learns = lambda i, less: dict(train=1 + less + .01 * i, valid=2 + 3 * less, paths=i, depth=i, parameters=9 + i,
                                  capped=False, late=None, failed=False)
    kinds = {kind: [learns(i, less) for i in range(5)] for kind, less in (("mixed", 0), ("tanh", .5), ("narrow", 0))}
    made = TABLES["capacity"]([{"metrics": {"cells": kinds}}])
    assert re.search(r"\| tanh +\| \+0.500 .*\| \+1.000", made)  # learns less, and its gap is larger
    assert re.search(r"\| depth +\| 5 +\| 1.00 .*\| -1.00", made)
    lines = {name: [[2 + .01 * s for s in range(5)], [2 + worse + slope * s for s in range(5)]]
             for name, worse, slope in (("plain", .1, .01), ("words", .3, .011), ("LSTM", .4, .011))}
    made = TABLES["robust"]([{"metrics": {"losses": {"drop": lines}, "strengths": {"drop": [0, .5]}}}])
    assert "(lost +0.202 +- 0.002 more)" in made and "(lost +0.302" in made
    losses = [[[1.0, 1.2], [2.0, 2.2]], [[1.0, 1.2], [2.0, 2.2]]]  # activations are all
    factors = {"connections": ["any", "tree"], "activations": ["a", "b"], "losses": losses}
    made = TABLES["factors"]([{"metrics": factors}])
    assert re.search(r"any +\| 1.100 +\| 2.100", made) and re.search(r"activations +\| 0.9", made)


@pytest.mark.parametrize("study, settings, words", [
    ("ablate", dict(cell="enas"), "enas|up to --nodes 4"), ("ablate", dict(cell="lstm_cell"), "lstm_cell"),
    ("factors", dict(replicas=1), "at least 2"), ("compare", dict(replicas=1), "at least 2"),
    ("robust", dict(reward_noise=.1), "objectives"), ("factors", dict(min_nodes=2), "min_nodes"),
    ("robust", dict(operations="highway,glu"), "operations"), ("hidden", dict(nodes=2), "nodes"),
    ("hidden", dict(controller="untrained"), "--controller"), ("capacity", dict(hidden=3), "--hidden 3"),
    ("cost", dict(controller_steps=1), "two draws"), ("progress", dict(activations="tanh,relu"), "activations")])
def test_what_a_study_is_not_for(study, settings, words, tmp_path, capsys):
    flags = [x for name, value in settings.items() for x in (f"--{name}", str(value))]
    assert main([study, "--preset", "smoke", *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words.split("|")) and error.count("\n") == 1


def test_capacity_learns_a_slice_by_heart(text, finished):
    """The text that is learnt is a 20th of the training text, and is what training stops by."""
    folder = Path(finished("capacity")[0].out) / "slice"
    words = {split: (folder / f"{split}.txt").read_text().split() for split in ("train", "valid", "test")}
    assert words["train"] == words["valid"] and {*words["test"]} <= {*words["train"]}
    assert words["train"] == (text / "train.txt").read_text().split()[:len(words["train"])]
    assert len(load_corpus(configure("train", data=str(folder))).train) == pytest.approx(6000 / 20, abs=5)


def test_capacity_looks_at_the_corpus_that_is_asked_for(text, tmp_path):
    """A slice that an earlier command left in the folder is not another corpus's."""
    config = settings("capacity", text, tmp_path, derive_samples=1)
    (folder := Path(config.out) / "slice").mkdir(parents=True)
    (folder / "train.txt").write_text("other words\n" * 500)
    run_study("capacity", STUDIES["capacity"], config)
    assert "other" not in (folder / "train.txt").read_text()


def test_what_is_learnt_by_heart_may_be_worse_than_guessing_elsewhere(tmp_path):
    """The gap would be cut off if the validation text's loss were; and the trainings are at the study's own rate."""
    for split, line in (("train", "a b c d e"), ("valid", "e d c b a"), ("test", "e d c b a")):
        (tmp_path / f"{split}.txt").write_text(f" {line} \n" * 2000)
    config = settings("capacity", tmp_path, tmp_path, retrain_epochs=4, derive_samples=2, lr=3.0, batch=4)
    cells = run_study("capacity", STUDIES["capacity"], config)["metrics"]["cells"]
    guess = math.log(len(load_corpus(config).words))
    learnt = [entry for entries in cells.values() for entry in entries if entry["train"] < guess / 2]
    assert learnt and all(entry["valid"] > guess and not entry["failed"] for entry in learnt)
    of_training = json.loads((tmp_path / "capacity/scratch 0/config.json").read_text())
    assert (of_training["lr"], of_training["batch"], of_training["word_dropout"]) == (3.0, 4, 0.0)


def test_hidden_knows_which_node_was_edited(finished):
    """A connection can be changed from node 2 on, an activation anywhere; every edit moves the state."""
    for found in (seed for seeds in finished("hidden")[1]["metrics"]["controllers"].values() for seed in seeds):
        assert {*found["edited"]["a connection"]} == {2, 3} and {*found["edited"]["an activation"]} == {0, 1, 2, 3}
        for kind, nodes in found["edited"].items():
            assert len(nodes) == len(found["distances"][kind]) and min(found["distances"][kind]) > 0


def test_progress_watches_every_round(finished, tmp_path):
    """From before the first round to the end; shares are probabilities; the search is the same as without a watch."""
    config, record = finished("progress")
    rounds = record["metrics"]["rounds"]
    assert len(rounds) == 2 + 1
    for r in rounds:
        assert all(sum(shares) == pytest.approx(1) for shares in r["shares"].values())
    plain = replace(config, out=str(tmp_path / "search"))
    run_study("search", menas.study_search, plain)
    lines = [(folder / "metrics.jsonl").read_text() for folder in (Path(config.out), tmp_path / "search")]
    assert lines[0] == lines[1]
