"""A step never waits for the host: a GPU's speed and graph capture need that. Run: pytest tests/test_device.py"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from menas import REWARDS, BASELINES, Batch, Config, Controller, Segment, coefficient_table, draw_masks, \
    LOOKAHEAD, RESPONSE, Search, configure, extra_rewards, load_corpus, lstm_weights, policy_loss, remember, score, \
    search_space, shared_weights, train_step, worst_for_failures, zero_state

import results.studies  # which has the task 'frozen'

META = torch.device("meta")
CONFIG = Config(hidden=8, nodes=4, batch=3, bptt=5, activation_reg=1e-3, slowness_reg=1e-3, word_dropout=.1,
                input_dropout=.1, hidden_dropout=.1, output_dropout=.1)
WIDE = dict(operations="highway,glu,gate,sum", memory=True, widths="4,8", min_nodes=2)
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class NoHost(TorchDispatchMode):
    """Raises on a host read, on a shape that depends on data, and on an operand that lies on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in HOST_READS):
            raise AssertionError(f"{function} makes the host wait")
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device != META:
                raise AssertionError(f"{function} has an operand on the CPU")
        return out


def to_meta(tensors):
    return {name: tensor.to(META) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", ["carry", "zero", "warm"])
@pytest.mark.parametrize("space", [{}, WIDE])
def test_a_training_step_and_a_reward(dtype, state, space):
    config = Config(**{**vars(CONFIG), "dtype": dtype, "state": state, **space})
    weights = to_meta(shared_weights(config, 20))
    masks = to_meta(draw_masks(config, 20, config.batch, [1], 0))
    controller = Controller(search_space(config), config).to(META)
    tokens = torch.zeros(5, 3, dtype=torch.long, device=META)
    segment = Segment(tokens, tokens, tokens, False)
    draws, carried = torch.rand(2, len(controller.decisions), device=META), torch.zeros(1, 3, 8, device=META)
    lr = torch.full((1,), 1.0, device=META)
    coefficient_table(getattr(torch, dtype), META)  # made once, by the first step
    with NoHost():
        sample = controller(draws)
        losses, *_ = train_step(weights, sample.rows, Batch(tokens, tokens, carried, masks), lr, config)
        scored, _ = score(config, weights, sample.rows, segment, carried)
        rewards = worst_for_failures(REWARDS["perplexity"](scored))
        for baseline in BASELINES.values():
            value, _ = baseline(rewards, torch.zeros(2, device=META), 0.95)
            policy_loss(sample, rewards, value, 0.1).backward(retain_graph=True)
    assert losses.shape == scored.shape == (2,)


@pytest.mark.parametrize("look, respond", [(look, "unrolled") for look in LOOKAHEAD] + [("fresh", x) for x in RESPONSE])
def test_the_extra_gradient(look, respond, task="frozen"):
    config = configure("search", "smoke", hidden=8, batch=3, bptt=5, nodes=4, hidden_dropout=.1, state="warm",
                       task=task, dtype="bfloat16")
    game = Search(config, load_corpus(config))
    game.device = META
    game.s.update(weights=to_meta(game.s["weights"]), state=to_meta(game.s["state"]))
    game.s["past"] = remember({}, game.s["weights"])
    for stream in game.streams.values():
        stream.inputs, stream.targets = stream.inputs.to(META), stream.targets.to(META)
    cells = game.controller.sample(6, 1).rows.to(META)
    rewards, step = game.rewards_on(game.streams["valid"].next()), game.foresee(0.0, cells[4:])
    for dtype in (torch.float32, torch.bfloat16):
        coefficient_table(dtype, META)
    with NoHost():
        direct, response = extra_rewards(look, respond, game.s["weights"], cells[:3], cells[3:4], rewards, step)
    assert direct.shape == response.shape == (3,)


def test_a_training_step_of_the_lstm():
    weights, tokens = to_meta(lstm_weights(CONFIG, 20, [1])), torch.zeros(5, 3, dtype=torch.long, device=META)
    state = zero_state(weights, 3)
    batch, lr = Batch(tokens, tokens, state, {}), torch.full((1,), 1.0, device=META)
    with NoHost():
        losses, *_ = train_step(weights, None, batch, lr, CONFIG)
    assert losses.shape == (1,)


@pytest.mark.parametrize("mistake", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.ones(2),
                                     lambda x: 1 if x.sum() > 0 else 0])
def test_the_watcher_sees_mistakes(mistake):
    with pytest.raises(Exception), NoHost():
        mistake(torch.zeros(2, device=META))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("space", [{}, WIDE])
def test_cuda_equals_cpu(dtype, tolerance, space):
    """Oracle: the CPU, the same weights, masks and text; losses, and weights after a step of SGD."""
    config, found = Config(**{**vars(CONFIG), "dtype": dtype, **space}), []
    tokens = torch.randint(20, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    cells = Controller(search_space(config), config).sample(2, 1).rows
    for device in ("cpu", "cuda"):
        weights = {name: w.to(device) for name, w in shared_weights(config, 20).items()}
        masks = {name: m.to(device) for name, m in draw_masks(config, 20, config.batch, [1], 0).items()}
        batch = Batch(*tokens.to(device), torch.zeros(1, 3, 8, device=device), masks)
        losses, *_ = train_step(weights, cells.to(device), batch, torch.full((1,), 1.0, device=device), config)
        found.append({"losses": losses, **weights})
    for name in found[0]:
        assert (found[0][name] - found[1][name].cpu()).abs().max() < tolerance, name
