"""The one-parameter ENAS passes its own checks, and fails where a function of menas.py, or one of
its own, is wrong. Clips and past gradients are held in test_gradients.py.

Run: pytest tests/test_toy.py
"""
import pytest
import torch

import menas
import toy_enas

menas_, toy = dict(vars(menas)), dict(vars(toy_enas))  # before anything is patched


@pytest.fixture(autouse=True)
def a_table_of_its_own(monkeypatch):
    monkeypatch.setattr(menas, "RESPONSE", dict(menas.RESPONSE))


def test_every_check_holds(tmp_path, capsys):
    assert toy_enas.main(["--out", str(tmp_path / "new" / "toy.png")]) == 0
    assert (tmp_path / "new" / "toy.png").stat().st_size > 10000
    out = capsys.readouterr().out
    assert "Every check holds" in out and "FAILED" not in out
    ends = [line.split()[3][1:] for line in out.splitlines() if "after 250 steps" in line]
    assert len(ends) == 3 and all(f" {end}" in toy_enas.__doc__ for end in ends)


def test_the_best_p_is_what_the_docstring_says():
    """Oracle: the largest F on a grid."""
    theta = torch.linspace(-6, 6, 601, dtype=torch.float64)
    f = torch.stack([toy_enas.objective(toy_enas.optimum, x, x) for x in theta])
    assert f"best at p = {theta[f.argmax()].sigmoid():.2f}".replace("0.", ".") in toy_enas.__doc__


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


def rateless(name):
    def wrong(*args):
        return menas_[name](*(x._replace(rates=menas.no_rates) if isinstance(x, menas.Step) else x
                              for x in args))
    return wrong


MUTANTS = {
    "wrong sign": ("unrolled", lambda *args: -menas_["unrolled"](*args)),
    "no response": ("unrolled", menas.no_response),
    "sampled without rates": ("sampled", rateless("sampled")),
    "fresh without rates": ("fresh", rateless("fresh")),
    "directional without rates": ("directional", rateless("directional")),
    "/ 2 * eps": ("directional", lambda *args: menas_["directional"](*args) * 1e-4),
    "no step ahead": ("look_ahead", lambda w, g, step: w),
    "baseline of all": ("leave_one_out", lambda r: r.mean().expand(len(r))),
    "minus the loss": ("policy_loss", lambda *args: -menas_["policy_loss"](*args)),
    "a term more": ("neumann", lambda *args: toy["neumann"](*args) + menas_["unrolled"](*args)),
    "K-FAC without G": ("kfac", lambda v, *args: (
        toy["kfac"]({"omega": toy_enas.G @ v["omega"]}, *args))),
    "optimum of one": ("optimum", lambda theta: 0 * theta),
    "not a number": ("layer_optimum", lambda theta: toy["layer_optimum"](theta) * torch.nan),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_exit_code_1(mutant, tmp_path, monkeypatch, capsys):
    name, wrong = MUTANTS[mutant]
    for namespace in (menas.RESPONSE, menas.LOOKAHEAD, vars(menas), vars(toy_enas)):
        if name in namespace:
            monkeypatch.setitem(namespace, name, wrong)
    assert toy_enas.main(["--out", str(tmp_path / "toy.png")], steps=1) == 1
    assert "FAILED: " in capsys.readouterr().out


@pytest.mark.parametrize("way", [None, *toy_enas.WAYS])
def test_where_training_ends_is_a_check(way, tmp_path, monkeypatch, capsys):
    """One step already tells the architectures apart: all is well, and one way in place of another
    fails."""
    if way:
        other = toy_enas.WAYS["unrolled" if way == "ENAS" else "ENAS"]
        monkeypatch.setitem(toy_enas.WAYS, way, other)
    assert toy_enas.main(["--out", str(tmp_path / "toy.png")], steps=1) == bool(way)
    assert not way or f"FAILED: {way}\n" in capsys.readouterr().out
