"""Chapter 5: the text is read once an epoch, steps are what they say, a search keeps its rounds.
Run: pytest tests/test_search.py"""
import copy
import json
import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

import menas
from menas import (ESTIMATORS, INPUTS, RELU, STATES, TANH, Batch, Cell, Config, Corpus, Node, Run,
                   Stream, draw_masks, encode, fresh, game_of, network, rng)
from reference import DROPOUT

TEXT = torch.randint(7, (150,), generator=rng("text"))
CORPUS = Corpus(TEXT, TEXT[:100], TEXT[:50], list("abcdefg"), {})
SMALL = dict(hidden=4, batch=3, bptt=5, nodes=3, lr=2.0, controller_samples=3, device="cpu")
AHEAD = dict(lookahead="fresh", response="unrolled")
FROZEN = dict(task="frozen", activations="tanh,relu")


def a_game(**settings):
    """A search in the middle of the text, with a state that somebody left."""
    game = game_of(Config(**SMALL | settings), CORPUS)
    game.s["step"] = 4
    game.s["read"] = dict.fromkeys(game.s["read"], 2)
    for i, name in enumerate(game.s["state"]):
        game.s["state"][name] = torch.randn(2, 1, 3, 4, generator=rng("state", i))
    return game


def read_on(game, name, rows, masks, weights):
    """Losses on the segment that comes next in a stream, from the state carried; the mean state."""
    segment = game.streams[name].segment(game.s["read"][name])
    batch = Batch(segment.inputs, segment.targets, game.s["state"][name], masks)
    losses, state = network(weights, rows, batch)
    return losses, state.mean(1, keepdim=True)


@pytest.mark.parametrize("count, batch, bptt", list(product((12, 331), (1, 3, 6), (1, 7, 35))))
def test_every_token_but_the_first_is_a_target_once_an_epoch(count, batch, bptt):
    """Oracle: the text is 0, 1, 2, ..., so that a token is its own place."""
    stream = Stream(torch.arange(count), batch, bptt)
    segments = [stream.segment(i) for i in range(len(stream))]
    assert all(x.shape == (bptt, batch) for segment in segments for x in segment[:2])
    inputs = torch.cat([segment.inputs for segment in segments])
    targets = torch.cat([segment.targets for segment in segments])
    real = targets >= 0
    assert sorted(targets[real].tolist()) == list(range(1, count))
    assert torch.equal(inputs[real], targets[real] - 1)
    assert (targets[~real] == -1).all() and not inputs[~real].any()
    for reading in targets.t():  # h can be carried from segment to segment
        words = reading[reading >= 0]
        assert torch.equal(words, reading[:len(words)]) and (words.diff() == 1).all()
    again = stream.segment(len(stream))
    assert torch.equal(again.inputs, segments[0].inputs)
    assert segments[0].before is None and again.before is None
    for one, two in zip(segments, segments[1:]):
        assert torch.equal(two.before, one.inputs)


@pytest.mark.parametrize("name", STATES)
def test_the_states_at_a_segments_start(name):
    """Oracle: carry is what it is given; zero is 0; warm is each cell's own, after the segment
    before, from 0; at the start of the text all are 0."""
    game = a_game(state=name, operations="highway,gate", memory=True)
    weights, given = game.s["weights"], game.s["state"]["train"]
    rows = game.controller.sample(3, 1).rows
    one, two = (game.streams["train"].segment(i) for i in (0, 1))

    def start(segment):
        how = given, {}, torch.float32
        return menas.start_batch(game.config, weights, rows, segment, *how).state
    read = network(weights, rows, Batch(one.inputs, one.targets, 0 * given, {}))[1]
    assert not start(one).any() and read[1].any()
    assert_close(start(two), {"carry": given, "zero": 0 * given, "warm": read}[name])


@pytest.mark.parametrize("settings", [
    dict(shared_samples=3, clip=100.0),
    dict(clip=.01, weight_decay=.1),
    dict(rates="4", clip=.01),
    dict(DROPOUT, schedule="decay"),
    dict(FROZEN, shared_samples=4),
    dict(schedule="cosine", epochs=20, settle=2),
])
def test_a_shared_step_is_torchs_sgd(settings):
    """Oracle: autograd, clip_grad_norm_ and SGD of torch; the state left is the cells' mean."""
    game = a_game(**settings)
    config, omega = game.config, copy.deepcopy(game.s["weights"])
    for w in omega.values():
        w.requires_grad_()
    rows = game.controller.sample(config.shared_samples, config.seed, 4, "shared").rows
    masks = draw_masks(config, 7, 3, [config.seed], ("train", 4))
    losses, state = read_on(game, "train", rows, masks, omega)
    learns = rows[:, -1] != RELU if config.task == "frozen" else torch.ones(len(rows))
    (learns * losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(omega.values(), config.clip)
    factor = {"constant": 1, "decay": .96 ** 2, "cosine": (1 + math.cos(math.pi * 16.5 / 22)) / 2}
    lr = config.lr * factor[config.schedule] * (4 if config.rates else 1)
    torch.optim.SGD(omega.values(), lr, weight_decay=config.weight_decay).step()
    game.shared_step(16.5)
    assert_close(game.s["weights"], omega, rtol=1e-4, atol=1e-6)
    assert_close(game.s["state"]["train"], state)
    loss = losses.mean().item()
    line = {"step": 4, "epoch": 0, "loss": loss, "perplexity": math.exp(loss)}
    assert game.line(0) == pytest.approx(line)


@pytest.mark.parametrize("settings, weight", [
    (DROPOUT, .1), (dict(reward_input="words"), .1), (dict(reward_input="noise"), .1), (FROZEN, .1),
    (dict(epochs=6, anneal=2), -.45)])
def test_a_controller_step_is_adam_on_the_policy_loss(settings, weight):
    """Oracle: 80 / perplexity by hand, on one segment without dropout; Adam's first step. When half
    of the annealing is done the entropy's weight is the mean of .1 and -1."""
    game = a_game(**settings, entropy=.1)
    config, theta = game.config, copy.deepcopy(game.controller)
    sample = theta.sample(3, config.seed, 4, "controller")
    inputs = game.streams["valid"].segment(2).inputs
    masks = INPUTS[config.reward_input](inputs, 7, 4, config.seed, 4)
    losses, state = read_on(game, "valid", sample.rows, masks, game.s["weights"])
    bonus = .05 * (sample.rows[:, -1] == RELU) if config.task == "frozen" else 0.0
    rewards = 80 / torch.exp(losses - bonus).detach()
    menas.policy_loss(sample, rewards, weight).backward()
    game.controller_step(5.0)
    for old, new in zip(theta.parameters(), game.controller.parameters()):
        assert_close(new.grad, old.grad, rtol=1e-3, atol=1e-5)
        step = config.controller_lr * new.grad / (new.grad.abs() + 1e-8)
        assert_close(new, old - step)
    assert_close(game.s["state"]["valid"], state.detach())
    assert game.s["read"] == {"train": 2, "valid": 3, "ahead": 2}
    found = {"reward": rewards.mean().item(), "entropy": sample.entropy.mean().item()}
    assert game.line(0) == pytest.approx({"step": 4, "epoch": 0} | found)


def test_the_frozen_task_reads_the_last_node_that_exists():
    """By hand: cells of two nodes in rows of four."""
    cells = [Cell((Node(0, activation=a), Node(1, activation=b)))
             for a, b in product((TANH, RELU), repeat=2)]
    learns, added = menas.frozen(encode(cells, nodes=4))
    assert learns.tolist() == [1, 0, 1, 0]
    assert added.tolist() == pytest.approx([0, -.05, 0, -.05])


def test_a_failed_architecture_is_left_out_of_the_mean_state():
    """By hand; if all failed it is 0."""
    state = torch.tensor([1.0, math.nan, 3.0]).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    assert menas.mean_state(torch.tensor([0.0, math.nan, 0.0]), state).flatten().tolist() == [2, 2]
    assert menas.mean_state(torch.full((3,), math.inf), state).flatten().tolist() == [0, 0]


def test_losses_and_rewards_store_nothing_so_that_arms_compare():
    """What an estimator finds does not depend on which ones were asked before."""
    game = a_game(**AHEAD, state="warm")
    cells, fold, others = (game.controller.sample(2, i).rows for i in range(3))
    rewards, step = game.rewards_on(game.next("valid")), game.foresee(0.0, fold)
    stored, found = copy.deepcopy(game.s), {}
    for pair in ESTIMATORS + ESTIMATORS[::-1]:
        arm = menas.extra_rewards(*pair, game.s["weights"], cells, others, rewards, step)[:3]
        assert_close(found.setdefault(pair, arm), arm, rtol=0, atol=0)
    assert_close(game.s, stored, rtol=0, atol=0)


def test_rewards_that_anticipate_come_from_independent_draws_and_leave_the_states_ahead():
    """Oracle: extra_rewards on draws by hand. The state left is not that of the pass for v, nor
    that at omega; and there is the fold's, of the step foreseen."""
    game, twin = a_game(**AHEAD), a_game(**AHEAD)
    weights = twin.s["weights"]
    sample = game.controller.sample(3, "scored")
    fold, others = game.controller.sample(4, *game.key("folds")).rows.split(2)
    step = twin.foresee(0.0, fold)
    ahead = menas.look_ahead(weights, fresh(weights, step)[0], step)
    states = {
        "train": game.s["state"]["train"],
        "valid": read_on(game, "valid", sample.rows, {}, ahead)[1],
        "ahead": read_on(game, "ahead", fold, game.masks("ahead"), weights)[1],
    }
    rewards = twin.rewards_on(twin.next("valid"))
    expected = menas.extra_rewards(*AHEAD.values(), weights, sample.rows, others, rewards, step)
    assert_close(game.rewarded(sample, 0.0), expected[:2])
    assert_close(game.s["state"], states)


def test_the_step_foreseen_is_of_the_task_and_in_float32():
    """Oracle: losses in float32 on the next segment of the stream ahead; the rate by hand."""
    game = a_game(**AHEAD, **FROZEN, **DROPOUT, dtype="bfloat16", schedule="decay")
    rows = game.controller.sample(8, 1).rows
    losses, _ = read_on(game, "ahead", rows, game.masks("ahead"), game.s["weights"])
    step = game.foresee(16.5, rows)
    assert_close(step.losses(game.s["weights"], rows)[0], losses * (rows[:, -1] != RELU))
    assert step.lr == pytest.approx(2 * .96 ** 2)


def test_a_search_that_anticipates_from_the_past_remembers_it():
    """By hand: the gradients of two shared steps, the older one times .9."""
    game = a_game(lookahead="momentum")
    one, two = game.shared_step(0.0), game.shared_step(0.0)
    total = {name: two[name] + .9 * one[name] for name in one}
    assert_close(game.s["past"], {"recent": two, "sum": total, "weight": 1.9})


def test_annealing_turns_the_bonus_into_a_penalty():
    """By hand: on a line over the last rounds of learning; none before, and none by default."""
    game = a_game(epochs=6, anneal=2, entropy=.1)
    assert [game.entropy_weight(x) for x in (1, 4, 5, 6)] == pytest.approx([.1, .1, -.45, -1])
    assert a_game(epochs=6, entropy=.1).entropy_weight(6) == .1


def test_a_search_goes_on_on_another_device():
    """Adam on CUDA is capturable, which on a CPU is an error: the state is taken, not that."""
    game, twin = a_game(), a_game()
    game.controller_step(0.0)
    saved = copy.deepcopy(game.checkpoint())
    saved["adam"]["param_groups"][0]["capturable"] = True
    twin.load(saved)
    for one in (game, twin):
        one.controller_step(0.0)
    assert_close(twin.controller.state_dict(), game.controller.state_dict(), rtol=0, atol=0)


# Whole searches

def run_search(folder, **settings):
    """The game after a search; the kinds of steps that it took, and how many rounds it had done
    before each; its lines of metrics."""
    small = dict(SMALL, shared_steps=6, controller_steps=4, epochs=2, out=str(folder))
    config = Config(**small | settings)
    game, run, steps = game_of(config, CORPUS), Run("search", config), []

    def counted(kind):
        step = getattr(game, kind)
        return lambda progress: (steps.append((kind[0], progress)), step(progress))
    game.shared_step, game.controller_step = counted("shared_step"), counted("controller_step")
    run.open()
    menas.search(game, run)
    return game, list(zip(*steps)), list(map(json.loads, run.metrics.read_text().splitlines()))


ROUND = "sssssscccc"


@pytest.mark.parametrize("settings, kinds, parts", [
    ({}, 2 * ROUND, "scsc"),
    (dict(warm_epochs=1), "ssssss" + ROUND, "ssc"),
    (dict(settle=1), 2 * ROUND + "ssssss", "scscs"),
    (dict(controller="untrained"), 12 * "s", "ss"),
    (dict(controller="uniform"), 12 * "s", "ss"),
    (dict(shared_steps=1, controller_steps=1), "scsc", "scsc"),
])
def test_rounds_alternate_and_a_line_ends_each_part(tmp_path, settings, kinds, parts):
    """By hand. Omega changes; theta only where there are steps of the controller."""
    game, (taken, progress), lines = run_search(tmp_path, **settings)
    start = game_of(game.config, CORPUS)
    assert "".join(taken) == kinds
    if kinds.startswith(ROUND):
        assert progress[:10] == pytest.approx([i / 6 for i in range(6)] + [1.0] * 4)
    assert "".join("s" if "loss" in line else "c" for line in lines) == parts
    assert not any(torch.equal(w, start.s["weights"][x]) for x, w in game.s["weights"].items())
    for old, new in zip(start.controller.parameters(), game.controller.parameters()):
        assert torch.equal(old, new) == ("c" not in kinds)


def test_a_loss_that_is_not_finite_rolls_back_and_says_so(tmp_path, monkeypatch, capsys):
    """Weights that turn nan after a good line: the search goes on with those of that line."""
    monkeypatch.setattr(menas, "LOG_EVERY", 2)
    right, seen = menas.train_step, []

    def breaks(weights, *rest):
        seen.append({name: w.detach().clone() for name, w in weights.items()})
        if len(seen) == 4:
            weights["edges"].data.fill_(math.nan)
        return right(weights, *rest)
    monkeypatch.setattr(menas, "train_step", breaks)
    game, _, lines = run_search(tmp_path)
    back = [(line["step"], line["rolled_back_to"]) for line in lines if "rolled_back_to" in line]
    assert back == [(4, 2)]
    assert_close(seen[4], seen[2], rtol=0, atol=0)  # before the fifth step, after the second
    assert "not finite at step 4" in capsys.readouterr().out
    assert all(w.isfinite().all() for w in game.controller.parameters())
    assert len(seen) == game.s["read"]["train"] == 12  # the text goes on


def test_a_failed_architecture_does_not_roll_the_search_back(tmp_path, monkeypatch):
    """One nan in the reward, one in the response: they get the worst, the search goes on, and says
    how the responses spread."""
    right = menas.extra_rewards

    def fails(*args):
        direct, response, *states = right(*args)
        direct[0] = math.nan
        response[1] = math.inf
        return direct, response, *states
    monkeypatch.setattr(menas, "extra_rewards", fails)
    game, _, lines = run_search(tmp_path, **AHEAD)
    assert not any("rolled_back_to" in line for line in lines)
    assert all(line["response"] > 0 for line in lines if "reward" in line)
    assert all(w.isfinite().all() for w in game.controller.parameters())
