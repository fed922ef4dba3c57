"""A step never waits for the host, as a GPU's speed needs. Run: pytest tests/test_device.py

Oracle: the meta device, whose tensors have no values, and watchers of every operation."""
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import menas
from menas import Batch, Config, Corpus, game_of, move, rng, zero_state
from reference import DROPOUT, EVERY_OPERATION

META = torch.device("meta")
TEXT = torch.randint(20, (90,), generator=rng("text"))
CORPUS = Corpus(TEXT, TEXT, TEXT, [str(i) for i in range(20)], {})
SMALL = dict(hidden=8, nodes=2, batch=3, bptt=2, controller_samples=2, lr=1.0, **DROPOUT)
WIDE = dict(operations=EVERY_OPERATION, memory=True, widths="4,8", min_nodes=1)
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NoHost(TorchDispatchMode):
    """Raises on a host read of what is on the device, on a shape that depends on its values, and
    where tensors of device and host meet; what the host draws, it may draw."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = any(name in str(function) for name in HOST_READS)

        def check(*values):
            devices = {x.device for x in tree_leaves(values) if isinstance(x, torch.Tensor)}
            waits = META in devices and (len(devices) > 1 or reads)
            assert not waits, f"{function} makes the host wait"
        check(args, kwargs)
        out = function(*args, **(kwargs or {}))
        check(args, kwargs, out)
        return out


class NoIndices(TorchFunctionMode):
    """Raises below what NoHost sees: where a list is an index or becomes a tensor, which the host
    copies to the device; and where a mask is an index, whose True the host counts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        indexes = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if indexes and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = [x for x in index if isinstance(x, (list, tuple))
                     or isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            assert not waits, f"{waits} makes the host wait"
        assert function is not torch.tensor or (kwargs or {}).get("device") != META
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mistake", [
    lambda x: x.sum().item(),
    lambda x: x[x > 0],
    lambda x: x + torch.ones(2),
    lambda x: x[[0, 1]],
    lambda x: x[(0, 1),],
    lambda x: 1 if x.sum() > 0 else 0,
    lambda x: torch.ones(2).to(META),
    lambda x: torch.tensor([1], device=META),
])
def test_the_watchers_see_mistakes(mistake):
    """By hand: what would make a host wait."""
    x = torch.zeros(2, device=META)
    with pytest.raises(AssertionError), NoHost(), NoIndices():
        mistake(x)


@pytest.fixture
def prepared(monkeypatch):
    """move() alone may bring something to the device, and what is made once is made."""
    def moved(x, device):
        return torch.empty(x.shape, dtype=x.dtype, device=device)
    monkeypatch.setattr(menas, "move", moved)
    for dtype in (torch.float32, torch.bfloat16):
        menas.coefficient_table(dtype, META)


def a_game(device, **settings):
    """In the middle of the text, where a segment has one before it."""
    game = game_of(Config(**SMALL | settings, device=device), CORPUS)
    game.s["read"] = dict.fromkeys(game.s["read"], 1)
    return game


@pytest.mark.parametrize("settings", [
    dict(state="zero", dtype="bfloat16"),
    dict(WIDE, state="warm", shared_samples=2),
    dict(lookahead="momentum", one_activation=True),
    dict(WIDE, lookahead="fresh", response="unrolled", dtype="bfloat16"),
    dict(lookahead="fresh", response="sampled", task="frozen", rates="1,4", reward_input="noise"),
])
def test_a_shared_and_a_controller_step(settings, prepared):
    """Oracle: the watchers, of a step of each kind under every path of the settings."""
    game = a_game("meta", **settings)
    game.s["past"] = menas.remember({}, game.s["weights"])
    with NoHost(), NoIndices():
        game.shared_step(0.0)
        game.controller_step(0.0)
    assert game.s["sums"].device == META and game.s["counts"] == [1, 1]


def test_a_training_step_of_the_lstm(prepared):
    config = Config(**SMALL)
    tokens = torch.zeros(2, 3, dtype=torch.long, device=META)
    weights = menas.lstm_weights(config, 20, 6, [1, 2])
    weights = {name: w.to(META) for name, w in weights.items()}
    batch = Batch(tokens, tokens, zero_state(weights, 3), {})
    rows, lr = torch.zeros(2, 9, device=META), torch.ones(2, device=META)
    with NoHost(), NoIndices():
        losses, *_ = menas.train_step(weights, rows, batch, lr, config)
    assert losses.shape == (2,)


class Told:
    """A tensor on the host that tells what was asked of it."""
    device, asked = torch.device("cpu"), ()

    def pin_memory(self):
        self.asked += ("pinned",)
        return self

    def to(self, device, non_blocking=False):
        return *self.asked, device.type, non_blocking


def test_what_is_moved_to_a_gpu_is_pinned_and_not_waited_for():
    assert move(Told(), torch.device("cuda")) == ("pinned", "cuda", True)
    assert move(torch.ones(2), torch.device("cpu")).tolist() == [1, 1]


@needs_cuda
@pytest.mark.parametrize("settings", [{}, WIDE, dict(lookahead="fresh", response="sampled")])
def test_a_gpu_step_never_synchronizes(settings):
    """Oracle: CUDA's own check, once the first steps have made what is made once."""
    game = a_game("cuda", **settings)
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            game.shared_step(0.0)
            game.controller_step(0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", .05)])
@pytest.mark.parametrize("space", [{}, WIDE])
def test_cuda_equals_cpu(dtype, tolerance, space):
    """Oracle: the CPU, the same weights, masks and text; the weights after a step of SGD."""
    games = [a_game(device, dtype=dtype, **space) for device in ("cpu", "cuda")]
    for game in games:
        game.shared_step(0.0)
    here, there = (game.s["weights"] for game in games)
    for name in here:
        assert (here[name] - there[name].cpu()).abs().max() < tolerance
