"""The studies of the extra gradient, their statistics, and the constructed task. Run: pytest tests/test_studies.py"""
import json
from dataclasses import replace

import pytest
import torch

import menas
from menas import Batch, Search, configure, load_corpus, main, run_study
from results import studies
from results.report import differences, followed, report, summary
from results.stats import t_test
from results.studies import STUDIES, arms_of, chosen, conditional, frozen, reward_error

TINY = dict(hidden=8, nodes=3, epochs=1, shared_steps=4, controller_steps=2, controller_samples=3, derive_samples=3,
            log_every=2, replicas=2, batch=8, settle=1)


def test_extra_pairs_seeds_and_is_made_again(tmp_path, text):
    """Arms of a seed share everything but the estimator; the plain one is the very search of that seed."""
    config = configure("extra", "smoke", **TINY, data=str(text), retrain=False, out=str(tmp_path))
    record = run_study("extra", STUDIES["extra"], config)
    arms = record["metrics"]["arms"]
    assert set(arms) == set(arms_of("extra", config)) and all(len(found["expected"]) == 2 for found in arms.values())
    alone = replace(config, seed=2, replicas=1, out=str(tmp_path / "alone"))
    run_study("search", menas.study_search, alone)
    perplexities = [row[-1] for row in json.loads((tmp_path / "alone/derived.json").read_text())["cells"]]
    guess = len(load_corpus(config).words)
    expected = torch.tensor(perplexities, dtype=torch.float64).clamp(max=guess).log().mean().item()
    assert arms["none, none"]["expected"][1] == pytest.approx(expected)
    assert "fresh, unrolled" in summary(record)
    assert differences(record, "expected")["none, none"] == [0.0, 0.0] and not differences(record, "scratch")
    steps = [json.loads(line)["step"] for line in (tmp_path / "none, none, 4x steps, 1/metrics.jsonl").open()]
    assert steps[-1] == 2 * 4 + 4 * 2  # shared steps of both rounds, controller steps of the first


def test_similarity_of_the_step_to_come(tmp_path):
    """The next gradient against itself is 1 on the same samples; the plain one has no predicted change."""
    config = configure("similarity", "smoke", **{**TINY, "shared_steps": 12}, out=str(tmp_path))
    for seed in run_study("similarity", STUDIES["similarity"], config)["metrics"]["seeds"]:
        assert seed["the next one itself"][0] == pytest.approx(1, abs=1e-4)
        assert seed["none, none"][2] == 0 and all(abs(x) <= 1.0001 for values in seed.values() for x in values)


def test_a_lookahead_that_takes_the_real_step_predicts_it():
    """Oracle: the shared step itself. Foreseen on the architectures, segment and masks that it then takes, the gradient
    at omega' is that at omega_(t+1)."""
    config = configure("similarity", "smoke", **TINY, shared_samples=2)
    game = Search(config, load_corpus(config))
    rewards, sample = game.rewards_on(game.streams["valid"].next()), game.controller.sample(3, 5)
    with torch.no_grad():
        cells = game.controller.sample(2, *game.key("shared")).rows
    step = game.foresee(0.0, cells)  # the first segments of both streams are the same text
    masks = game.masks(0)
    step = step._replace(losses=lambda w, c, segment: menas.network(
        w, c, Batch(segment.inputs, segment.targets, torch.zeros(1, 8, 8), masks))[0])
    ahead = menas.extra_rewards("fresh", "none", game.s["weights"], sample.rows, None, rewards, step)[0]
    game.shared_step(0.0)
    assert torch.allclose(ahead, rewards(game.s["weights"], sample.rows).detach(), atol=1e-4)


def test_frozen_cells_train_nothing():
    """Oracle: the weights, which a step on frozen cells leaves as they are but for the decay."""
    config = configure("search", "smoke", **TINY, task="frozen", weight_decay=0.0, shared_samples=4)
    game = Search(config, load_corpus(config))
    before = {name: w.clone() for name, w in game.s["weights"].items()}
    rows = game.controller.sample(4, 1).rows
    game.controller.sample = lambda k, *key: menas.Sample(rows, torch.zeros(4), torch.zeros(4))
    for act, moves in (("relu", False), ("tanh", True)):
        rows[:, -1] = list(menas.ACTIVATIONS).index(act)
        assert bool(frozen(rows)[0].any()) == moves
        game.shared_step(0.0)
        assert any(not torch.equal(w, before[name]) for name, w in game.s["weights"].items()) == moves


@pytest.mark.parametrize("study", ["similarity", "cost"])
def test_the_commands_run(tmp_path, study, capsys):
    settings = [x for name, value in TINY.items() for x in (f"--{name}", str(value))]
    assert main([study, "--preset", "smoke", *settings, "--retrain", "false", "--out", str(tmp_path / "run")]) == 0
    assert "fresh, unrolled" in capsys.readouterr().out
    report(str(tmp_path), str(tmp_path / "none.md"))


def test_a_similarity_that_would_measure_nothing_is_refused(tmp_path, capsys):
    command = ["similarity", "--preset", "smoke", "--shared_steps", "2", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 2 and "nothing would be measured" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["spaces", "optimizer", "anneal"])
def test_arms_differ_in_what_they_say(study):
    """Every arm is a search that the settings allow; the first is the plain one."""
    for preset in ("smoke", "tiny"):
        config = configure(study, preset)
        arms = arms_of(study, config)
        assert len(arms) > 1 and next(iter(arms.values())) == {}
        for settings in arms.values():
            menas.check(replace(config, **settings))
            menas.search_space(replace(config, **settings))


def test_what_a_search_ends_with():
    """The best entry of derived.json, which is sorted; after annealing the most frequent."""
    derived = [[1, 0, 2.0], [1, 1, 3.0], [1, 1, 3.0]]
    assert chosen(configure("anneal"), derived) == [1, 0, 2.0]
    assert chosen(configure("anneal", anneal=1), derived) == [1, 1, 3.0]


def test_a_controller_that_is_asked_follows():
    """On targets between those that it was trained on; a correlation of 0 is what one that does not listen has."""
    config = configure("conditional", "tiny", nodes=4, min_nodes=2, entropy=.05)
    found = conditional(config, "parameters", 300)
    correlation, error, blind = followed(found)
    assert correlation > .5 and error < blind


def test_the_reward_under_a_policy_for_the_state(tmp_path, text, monkeypatch):
    """Oracle: with segments as long as the split and one stream, every policy's reward is the evaluation itself."""
    config = configure("state", "smoke", **{**TINY, "data": str(text)}, out=str(tmp_path / "run"))
    run_study("search", menas.study_search, config)
    corpus = load_corpus(config)
    whole = replace(config, batch=1, bptt=len(corpus.valid), eval_batch=1)
    for bias, tau in reward_error(whole, tmp_path / "run", corpus, k=5, at_least=1).values():
        assert abs(bias) < 1e-5 and tau == 1
    short = reward_error(config, tmp_path / "run", corpus, k=5, at_least=1)
    assert len({round(bias, 6) for bias, _ in short.values()}) == 3  # now they differ
    monkeypatch.setattr(studies, "evaluate", lambda *args, **more: menas.evaluate(*args, **more) - 1)
    for bias, _ in reward_error(whole, tmp_path / "run", corpus, k=5, at_least=1).values():
        assert bias == pytest.approx(1, abs=1e-5)  # what is seen is worse


@pytest.mark.parametrize("study", ["spaces", "optimizer", "anneal", "state", "conditional"])
def test_the_wider_spaces_studies_run(tmp_path, study, text):
    tiny = {**TINY, "nodes": 4, "replicas": 1, "derive_samples": 2, "retrain_epochs": 1, "retrain_cells": 1}
    tiny = {"controller_steps": 3} if study == "conditional" else tiny
    settings = [x for name, value in {**tiny, "data": text}.items() for x in (f"--{name}", str(value))]
    assert main([study, "--preset", "smoke", *settings, "--out", str(tmp_path / "run")]) == 0
    report(str(tmp_path), str(tmp_path / "none.md"))
    figure, = tmp_path.glob(f"{study}*.png")
    assert figure.stat().st_size > 5000


def test_a_study_of_gradients_wants_a_controller_that_has_one(tmp_path, capsys):
    assert main(["cost", "--preset", "smoke", "--controller", "uniform", "--out", str(tmp_path)]) == 2
    assert "does not learn" in capsys.readouterr().err


def test_differences_that_are_all_alike():
    assert t_test([480000.0] * 3, 8)[0] == 480000.0
