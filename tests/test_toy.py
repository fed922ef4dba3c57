"""The one-parameter ENAS passes its own checks, and fails where a function of menas.py is wrong. Run: pytest
tests/test_toy.py"""
import pytest

import menas
import toy_enas


def test_every_check_holds(tmp_path, capsys):
    assert toy_enas.main(tmp_path / "toy.png") == 0
    assert (tmp_path / "toy.png").stat().st_size > 10000
    assert "with the response it is the exact\ngradient" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [
    ("unrolled", lambda v, weights, g, step: {n: -x for n, x in menas.unrolled(v, weights, g, step).items()}),
    ("unrolled", lambda v, weights, g, step: menas.unrolled(v, weights, g, step._replace(clip=float("inf")))),
    ("unrolled", menas.no_response), ("neumann", lambda v, weights, g, step: v)])
def test_a_wrong_response_fails(monkeypatch, tmp_path, capsys, name, wrong):
    monkeypatch.setitem(menas.RESPONSE, name, wrong)
    assert toy_enas.main(tmp_path / "toy.png") == 1
    assert "FAILED" in capsys.readouterr().out
