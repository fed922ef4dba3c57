"""The one-parameter ENAS passes its own checks, and fails where a function of menas.py is wrong. Run: pytest
tests/test_toy.py"""
import pytest
import torch

import menas
import toy_enas


def test_every_check_holds(tmp_path, capsys):
    assert toy_enas.main(tmp_path / "toy.png") == 0
    assert (tmp_path / "toy.png").stat().st_size > 10000
    assert "with the response it trains the\nright one" in capsys.readouterr().out


def test_a_failed_check_is_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(menas.RESPONSE, "unrolled", menas.no_response)
    assert toy_enas.main(tmp_path / "toy.png") == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [
    ("unrolled", lambda *args: -menas.unrolled(*args)),
    ("unrolled", lambda v, weights, g, step, cells: menas.unrolled(v, weights, g, step._replace(clip=1e9), cells)),
    ("unrolled", menas.no_response), ("sampled", menas.unrolled)])
def test_a_wrong_response_fails(monkeypatch, name, wrong):
    monkeypatch.setitem(menas.RESPONSE, name, wrong)
    torch.set_default_dtype(torch.float64)
    rows = list(toy_enas.check_terms())
    torch.set_default_dtype(torch.float32)
    assert any(error > tolerance for *_, error, tolerance in rows)
