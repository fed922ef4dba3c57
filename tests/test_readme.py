"""The README's numbers are those of the records, its code runs, its size stays readable.

    pytest -q tests/test_readme.py
"""
import json
import math
import re
from pathlib import Path
from statistics import mean, median

import pytest
import torch

import menas

ROOT = Path(menas.__file__).parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "results"
needs_records = pytest.mark.skipif(not RESULTS.exists(), reason="the records were deleted")


def between(mark):
    """The text between a mark and the next end."""
    return re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", README, re.S)[1]


def rows_of(text):
    """The cells of a Markdown table, without its two header lines."""
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()[2:]]


def values(study, name, arm=None):
    """Of a study's records: {group: [value of each row]}."""
    found = {}
    for record in menas.load_records(RESULTS)[study]:
        for row in record["rows"]:
            if row.get(name) is not None:
                found.setdefault(row["group"], []).append(row[name])
    return found[arm] if arm else found


ARMS = {"LSTM of as many": "lstm-as-many-weights", "a cell drawn": "random-cell-1", "best of 100": "best-of-uniform",
        "another random": "random-cell-2", "the cell that the search": "found", "DARTS": "darts_v2",
        "the cell of ENAS": "enas_lm", "the cell of random": "random-search", "ENAS's cell": "enas",
        "LSTM of 200": "lstm", "a chain": "chain"}


@needs_records
def test_the_first_table_is_that_of_the_records():
    rows = rows_of(between("table: train-ptb"))
    assert len(rows) == len(ARMS)
    for name, n, valid, test, *_ in rows:
        (arm,) = [arm for start, arm in ARMS.items() if name.startswith(start)]
        for shown, split in ((valid, "valid"), (test, "test")):
            perplexities = [math.exp(x) for x in values("train-ptb", split, arm)]
            numbers = [float(x) for x in re.findall(r"\d+\.\d", shown)]
            expected = [mean(perplexities)]
            if len(perplexities) > 1:
                expected += [min(perplexities), max(perplexities)]
            assert numbers == [round(x, 1) for x in expected]
            assert int(n) == len(perplexities)


@needs_records
def test_the_quick_start_shows_what_its_command_printed():
    """But for the names of the cells."""
    record = json.loads((ROOT / "results/quick/1/result.json").read_text())
    shown = [line.strip() for line in README.splitlines() if line.startswith("    | ")]
    made = [line.strip("|").split("|") for line in menas.summary(record).splitlines()]
    for line, cells in zip(shown, made, strict=True):
        ours = [cell.strip() for cell in line.strip("|").split("|")]
        assert [ours[0], *ours[2:]] == [cell.strip() for cell in (cells[0], *cells[2:])] or "---" in line


def shown(x, digits):
    """A number as the README has it: without the zero before the point."""
    return f"{x:.{digits}f}".replace("0.", ".") if abs(x) < 1 else f"{x:.{digits}f}"


@needs_records
def test_the_findings_are_those_of_the_records():
    """Every number is computed again from the records, in the order in which it stands."""
    findings = [" ".join(row) for row in rows_of(between("findings"))]
    same = {group: mean(x) for group, x in values("similarity", "same samples").items()}
    other = {group: mean(x) for group, x in values("similarity", "other samples").items()}
    extra = {group: mean(x) for group, x in values("extra", "valid").items()}
    slow = {group: mean(x) for group, x in values("extra-slow", "valid").items()}
    frozen = {group: mean(x) for group, x in values("extra-frozen", "valid").items()}
    learns = {group: mean(x) for group, x in values("extra-frozen", "learns").items()}
    records = [json.loads(path.read_text()) for path in RESULTS.glob("extra-frozen/plain/*/result.json")]
    learns_uniform = mean(row["learns"] for record in records for row in record["rows"] if row["group"] == "uniform")
    test = {group: mean(x) for group, x in values("compare", "test").items()}
    factors = {kind: mean(x for group, several in values("factors", "test").items() if kind in group for x in several)
               for kind in ("searched connections", "random connections", "searched activations", "random activations")}
    capacity = {group: mean(x) for group, x in values("capacity", "train").items()}
    changes = menas.rows_of(menas.load_records(RESULTS)["ablate"])
    ablate = {group: mean(units.values()) for group, units in menas.by_unit(changes, "test").items()}
    speedup = {group.removeprefix("forward and backward, fast path, "): mean(x)
               for group, x in values("bench", "speedup").items()}
    rates = {group: mean(x) for group, x in values("optimizer", "valid").items()}
    kept = {group: mean(x) for group, x in values("kept", "valid").items()}
    bias = {group: mean(x) for group, x in values("state", "bias").items()}
    tau = min(map(mean, values("state", "tau").values()))
    start = {group: mean(x) for group, x in values("train-start", "test").items()}
    anneal = {group: mean(x) for group, x in values("anneal", "test").items()}
    robust = {group: mean(x) for group, x in values("robust", "test, words").items()}
    long = {group: math.exp(median(x)) for group, x in values("search-day", "valid").items()}
    spaces = {group: mean(x) for group, x in values("spaces", "valid").items()}
    errors = {group: mean(x) for group, x in values("conditional", "error").items()}
    blind = {group: mean(x) for group, x in values("conditional", "untrained").items()}
    ptb = {group: mean(map(math.exp, x)) for group, x in values("train-ptb", "test").items()}
    expected = [
        [shown(same["fresh, unrolled"], 2), shown(same["none, none"], 2)]
        + [shown(other[group], 3) for group in ("fresh, unrolled", "none, none")] + [shown(same["fresh, none"], 2)],
        [shown(extra["plain"], 3), shown(extra["fresh"] - extra["plain"], 3)]
        + [shown(extra[arm], 3) for arm in ("fresh-sampled", "fresh-unrolled", "plain-4x-steps")]
        + [shown(slow[arm] - slow["plain"], 3)
           for arm in ("fresh-unrolled", "fresh-sampled", "plain-4x-steps")],
        [shown(learns_uniform, 2)] + [shown(learns[arm], 2) for arm in ("plain", "fresh-sampled", "fresh-unrolled")]
        + [shown(frozen["plain"] - frozen[arm], 3) for arm in ("fresh-sampled", "fresh-unrolled")],
        [shown(test["uniform"] - test["trained"], 3), shown(test["trained"] - test["LSTM"], 3)],
        [shown(factors[f"random {kind}"] - factors[f"searched {kind}"], 3) for kind in ("connections", "activations")],
        [shown(ablate[kind] - ablate["itself"], 3) for kind in ("only relu", "only sigmoid")],
        [shown(capacity[kind], 3) for kind in ("as it is", "only tanh", "only sigmoid")],
        [shown(abs(spaces[arm] - spaces["ENAS"]), 3) for arm in ("tanh-only", "chain", "gated", "gated-memory")],
        [shown(rates["no-choice"] - rates[arm], 3) for arm in ("sampled", "control", "larger-rate")],
        [shown(kept["carry"], 3)] + [shown(kept[arm] - kept["carry"], 3) for arm in ("zero", "warm")],
        [shown(bias[policy], 3) for policy in ("carry", "zero", "warm")] + [shown(tau, 2)],
        [shown(start["scratch"] - start["shared"], 3)],
        [shown(anneal["annealed"] - anneal["best-of-sample"], 3)],
        [shown(robust["words"] - robust["plain"], 3)],
        [shown(x, 2) for x in (errors["parameters"], errors["paths"], blind["parameters"], blind["paths"],
                               errors["depth"])],
        [shown(mean(values("hidden", name, arm)), 2) for name, arm in (
            ("distance with decisions", "trained"), ("distance with decisions", "untrained"),
            ("distance with loss", "trained"), ("distance with loss", "untrained"),
            ("probe for loss", "trained"), ("probe for loss", "untrained"))],
        [], [shown(speedup[case], 2) for case in (
            "float32, 32 units, 32 at once", "float32, 200 units, 1 at once", "bfloat16, 200 units, 1 at once")],
        [shown(ptb[arm], 1) for arm in ("found", "random-cell-1")],
        [f"{long[f'{arm}: sampled']:.0f}" for arm in ("trained", "untrained")] + [shown(ptb["found-day"], 1)]]
    assert len(findings) == len(expected)
    for finding, numbers in zip(findings, expected):
        written = map(float, re.findall(r"[-+]?(?:\d*\.)?\d+", finding))
        for number in numbers:
            assert float(number) in written, (number, finding)


@needs_records
def test_the_intervals_and_p_are_those_of_the_module():
    units = {group: x for group, x in values("compare", "test").items()}
    per_search = {group: [mean(x[i:i + 10]) for i in range(0, 100, 10)] for group, x in units.items() if len(x) == 100}
    low, high = menas.interval(per_search["trained"], per_search["uniform"], paired=True)
    p = menas.p_value(per_search["trained"], per_search["uniform"], paired=True)
    finding = between("findings")
    assert f"({shown(low, 3)} to {shown(high, 3)})" in finding
    assert f"p = {shown(4 * p, 3)}" in finding  # four groups beside the trained one


def code(mark):
    """A block of its code, ready to run."""
    return "\n".join(line[4:] for line in between(mark).splitlines())


def test_its_code_scores_a_trained_network_and_writes(tmp_path, text, capsys):
    """The loss is the record's, to the last bit; the words are of the vocabulary."""
    config = menas.configure("train", "smoke", data=str(text), epochs=1, out=str(tmp_path / "run"))
    run = menas.run_command("train", menas.study_train, config)
    program = code("code").replace("runs/train/enas/1", str(tmp_path / "run"))
    program = program.replace('"train", "ptb"', f'"train", "smoke", data={str(text)!r}')
    space = {}
    capsys.readouterr()
    exec(program, space)
    assert space["loss"].tolist() == [run["rows"][0]["valid"]]
    written = capsys.readouterr().out.split()
    words = json.loads((tmp_path / "run" / "words.json").read_text())
    assert len(written) == 20 and len(set(written)) > 2 and words.keys() >= set(written)


@pytest.mark.parametrize("name, scale", [("enas", 1), ("enas_lm", 1), ("tree", 1), ("enas", 30)])
def test_its_module_is_the_cell(name, scale):
    """Oracle: unroll(), in float64."""
    cell, space = menas.CELLS[name], {"torch": torch}
    exec(code("cell"), space)
    weights = menas.standalone_weights(menas.Config(hidden=5), 7, [cell], [1])
    weights = {key: scale * w.double() for key, w in weights.items()}
    words = torch.randint(7, (9, 3), generator=menas.rng("words"))
    batch = menas.Batch(words, None, menas.zero_state(weights, 3), {})
    h, _ = menas.unroll(weights, menas.encode([cell]), batch, torch.float64)
    module = space["Recurrence"](cell, 5, 5).double()
    module.input.data, module.nodes.data = weights["input"][0, 0], weights["nodes"][0]
    torch.testing.assert_close(module(weights["embedding"][0][words]), h[0])
    assert (h.norm(dim=-1).max() > 24.9) == (scale == 30)  # which meets the bound
    assert space["Recurrence"](cell, 4, 6)(torch.zeros(2, 3, 4)).shape == (2, 3, 6)


def test_it_is_short():
    assert len(README.splitlines()) <= 300
    assert len(README.split()) <= 3000


def test_every_command_and_study_is_in_the_script():
    """experiments.sh runs every command, and every folder that it writes has a place in the report."""
    script = (ROOT / "experiments.sh").read_text()
    for command in menas.COMMANDS:
        assert re.search(rf"\b{command} ", script), command
    studies = set(re.findall(r"\b(?:run|arm) ([a-z]+)[a-z$-]*/", script)) - {"quick"}
    assert len(studies) > 15 and studies <= set(menas.STUDIES)
