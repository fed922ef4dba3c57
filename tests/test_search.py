"""The search does what its settings say, and survives a loss that is not finite. Run: pytest tests/test_search.py"""
from dataclasses import replace
import json
import math

import pytest
import torch

import menas
from menas import (STATES, Batch, Controller, Run, Stream, configure, load_corpus, main, network, reference_losses,
                   search, search_space, shared_weights, start_batch, uniform_rows)

CORPUS = load_corpus(configure("search", "smoke"))


def smoke(folder, **settings):
    small = dict(hidden=8, batch=8, nodes=3, shared_steps=6, controller_steps=4, epochs=2, log_every=2,
                 controller_samples=3, out=str(folder))
    return configure("search", "smoke", **{**small, **settings})


def run_search(config):
    """The weights, the controller, and the lines of metrics."""
    with Run("search", config) as run:
        weights, controller = search(config, run, CORPUS)
    return weights, controller, [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def untrained(config):
    return Controller(search_space(config), config).state_dict()


def changed(controller, config):
    return any(not torch.equal(w, untrained(config)[name]) for name, w in controller.state_dict().items())


def test_phases_alternate_and_both_learn(tmp_path):
    config = smoke(tmp_path)
    weights, controller, lines = run_search(config)
    assert changed(controller, config)
    assert any(not torch.equal(w, shared_weights(config, len(CORPUS.words))[name]) for name, w in weights.items())
    kinds = ["loss" in line for line in lines]
    assert kinds == [True] * 3 + [False] * 2 + [True] * 3 + [False] * 2
    assert [line["step"] for line in lines] == list(range(2, 21, 2))


def test_down_to_one_and_one(tmp_path):
    _, _, lines = run_search(smoke(tmp_path, shared_steps=1, controller_steps=1, epochs=5, log_every=1))
    assert ["loss" in line for line in lines] == [True, False] * 5


def test_random_search_leaves_the_controller_untrained(tmp_path):
    config = smoke(tmp_path, controller="untrained")
    _, controller, lines = run_search(config)
    assert not changed(controller, config) and not any("reward" in line for line in lines)


def test_a_warm_start_delays_the_controller_only(tmp_path):
    config = smoke(tmp_path, warm_epochs=1)
    _, _, lines = run_search(config)
    assert [line["epoch"] for line in lines if "reward" in line] == [1, 1]
    assert [line["epoch"] for line in lines if "loss" in line] == [0] * 3 + [1] * 3


def test_a_loss_that_is_not_finite_rolls_back_and_says_so(tmp_path, monkeypatch, capsys):
    """Weights that turn NaN after a good line of metrics: the search ends with finite weights."""
    real, calls = menas.train_step, []
    def breaks(weights, *args):
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                weights["edges"].fill_(math.nan)
        return real(weights, *args)
    monkeypatch.setattr(menas, "train_step", breaks)
    weights, controller, lines = run_search(smoke(tmp_path))
    assert [(line["step"], line["rolled_back_to"]) for line in lines if "rolled_back_to" in line] == [(4, 2)]
    assert "not finite at step 4: back to the weights of step 2" in capsys.readouterr().out
    assert all(torch.isfinite(w).all() for w in (*weights.values(), *controller.parameters()))


def test_a_failed_architecture_does_not_roll_the_search_back(tmp_path, monkeypatch):
    """One NaN among the scored, in the reward and in the response: it gets the worst, the search goes on as it is."""
    real = menas.extra_rewards
    def fails(*args):
        direct, response = real(*args)
        return direct.index_fill(0, torch.tensor(0), math.nan), response.index_fill(0, torch.tensor(1), math.inf)
    monkeypatch.setattr(menas, "extra_rewards", fails)
    _, controller, lines = run_search(smoke(tmp_path, lookahead="fresh", response="unrolled"))
    assert any("response" in line for line in lines) and not any("rolled_back_to" in line for line in lines)
    assert all(torch.isfinite(w).all() for w in controller.parameters())


def test_the_states_at_a_segments_start():
    """Oracle: carry gives back what it is given; zero is 0; warm is the plain loop over the segment before, from 0."""
    config = smoke("unused", dtype="float32")
    weights, cells = shared_weights(config, len(CORPUS.words)), uniform_rows(search_space(config), 3, 1)
    stream = Stream(CORPUS.train, config.batch, config.bptt)
    first, second = stream.next(), stream.next()
    carried = torch.randn(1, config.batch, config.hidden)
    state = {}
    for name in STATES:
        policy = replace(config, state=name)
        assert not start_batch(policy, weights, cells, first, carried, {}).state.any()  # nothing comes before the text
        state[name] = start_batch(policy, weights, cells, second, carried, {}).state
    assert torch.equal(state["carry"], carried) and not state["zero"].any()
    before = Batch(first.inputs, first.targets, torch.zeros_like(carried), {})
    for k in range(3):
        assert torch.allclose(state["warm"][k], reference_losses(weights, cells[k], before)[1][-1], atol=1e-6)


def test_a_reward_does_not_depend_on_dropout(tmp_path):
    """Rewards are taken in eval mode: the same weights and segment score the same whatever the dropout rates."""
    config = smoke(tmp_path, input_dropout=.5, hidden_dropout=.5, output_dropout=.5)
    weights, cells = shared_weights(config, len(CORPUS.words)), uniform_rows(search_space(config), 3, 1)
    segment, zeros = Stream(CORPUS.valid, config.batch, config.bptt).next(), torch.zeros(1, config.batch, config.hidden)
    losses, _ = menas.score(config, weights, cells, segment, zeros)
    expected = network(weights, cells, Batch(segment.inputs, segment.targets, zeros, {}))[0]
    assert torch.allclose(losses, expected, atol=1e-6)


@pytest.mark.parametrize("settings", [["--state", "zero"], ["--state", "warm"], ["--baseline", "moving_average"],
                                      ["--reward", "loss"], ["--dtype", "bfloat16"], ["--random_bptt"],
                                      ["--shared_samples", "3"], ["--activations", "tanh"]])
def test_every_choice_runs(tmp_path, settings):
    base = ["search", "--preset", "smoke", "--hidden", "8", "--nodes", "3", "--shared_steps", "3", "--controller_steps",
            "2", "--derive_samples", "2", "--out", str(tmp_path)]
    assert main(base + settings) == 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["valid_perplexity"] < 1000
