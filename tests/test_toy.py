"""The one-parameter ENAS passes its own checks, and fails where a function of menas.py is wrong.

Run: pytest tests/test_toy.py
"""
import pytest
import torch

import menas
import toy_enas

real = dict(vars(menas))  # before anything is patched


def test_every_check_holds(tmp_path, capsys):
    before = dict(menas.RESPONSE)
    assert toy_enas.main(["--out", str(tmp_path / "new" / "toy.png")]) == 0
    assert (tmp_path / "new" / "toy.png").stat().st_size > 10000
    out = capsys.readouterr().out
    assert "the direct term alone trains the wrong architecture" in out and "FAILED" not in out
    assert torch.get_default_dtype() == torch.float32 and menas.RESPONSE == before


@pytest.mark.parametrize("arguments, code", [
    (["--help"], 0), (["--nonsense"], 2), (["x.png"], 2), (["--out", "toy.xyz"], 2),
    (["--out", "/dev/null/toy.png"], 2)])
def test_the_command_line(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        toy_enas.main(arguments)
    assert exit_.value.code == code and not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "--out" in (printed.err if code else printed.out)


def unclipped(name):
    return lambda v, w, g, step, cells: real[name](v, w, g, step._replace(clip=1e9), cells)


def rateless(name):
    def wrong(*args):
        return real[name](*(x._replace(rates=menas.no_rates) if isinstance(x, menas.Step) else x
                            for x in args))
    return wrong


def no_projection(v, g, step):
    scale = step.lr * (menas.foreseen_clip(step) / menas.dot(g, g).sqrt()).clamp(max=1)
    return {name: scale * x for name, x in v.items()}


def no_longer(v, w, g, step, cells):
    """A larger rate does not lengthen a clipped step."""
    return -menas.directional(step, w, cells, menas.through_clip(v, g, step))


MODULE = vars(menas)
MUTANTS = {
    "wrong sign": (menas.RESPONSE, "unrolled", lambda *args: -real["unrolled"](*args)),
    "no response": (menas.RESPONSE, "unrolled", menas.no_response),
    "step not longer": (menas.RESPONSE, "unrolled", no_longer),
    "unrolled, unclipped": (menas.RESPONSE, "unrolled", unclipped("unrolled")),
    "sampled is unrolled": (menas.RESPONSE, "sampled", real["unrolled"]),
    "sampled, unclipped": (menas.RESPONSE, "sampled", unclipped("sampled")),
    "sum for mean": (menas.LOOKAHEAD, "momentum", lambda w, step: (step.past["sum"], None)),
    "fresh without rates": (menas.LOOKAHEAD, "fresh", rateless("fresh")),
    "/ 2 * eps": (MODULE, "directional", lambda *args: real["directional"](*args) * 1e-4),
    "directional without rates": (MODULE, "directional", rateless("directional")),
    "look_ahead without clip": (MODULE, "look_ahead", lambda w, g, step: (
        real["look_ahead"](w, g, step._replace(clip=1e9)))),
    "clip without rates": (MODULE, "foreseen_clip", lambda step: torch.tensor(step.clip)),
    "no projection": (MODULE, "through_clip", no_projection),
    "baseline of all": (MODULE, "leave_one_out", lambda r: r.mean().expand(len(r))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_estimator_is_exit_code_1(mutant, tmp_path, monkeypatch, capsys):
    namespace, name, wrong = MUTANTS[mutant]
    monkeypatch.setitem(namespace, name, wrong)
    assert toy_enas.main(["--out", str(tmp_path / "toy.png")], steps=1) == 1
    assert "FAILED: " in capsys.readouterr().out


def test_one_step_already_tells_the_architectures_apart(tmp_path):
    assert toy_enas.main(["--out", str(tmp_path / "toy.png")], steps=1) == 0
