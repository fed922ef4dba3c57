"""The report says what the records say: who is compared with whom, over what, and how surely.
Run: pytest tests/test_report.py
"""
import json
from statistics import mean, median

import pytest
import torch
from matplotlib.figure import Figure
from mutants import mutate

import menas
from menas import CELLS, draw_cell, load_records, report, slots_read


def save(out, place, rows, seed=None, metrics=(), **config):
    """A record in the folder OUT/PLACE, whose last part is its seed."""
    folder = out / place
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(command="search", seed=seed or int(folder.name), seconds=60.0,
                  machine="an abacus", config=config, rows=rows)
    (folder / "result.json").write_text(json.dumps(record))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))


def lines_of(made):
    """Of a table: {group: its other columns, by their headers}."""
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in made.splitlines()]
    assert len({len(line) for line in made.splitlines()}) == 1
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_records_are_found_where_they_belong(tmp_path):
    """Studies with and without arms; parts of other runs, and what a user has, are left out."""
    rows = [dict(group=group, valid=1.0) for group in ("sampled", "uniform", "floor")]
    for place in ("compare/1", "compare/2", "extra/plain/1", "extra/fresh/1", "extra-slow/plain/1"):
        save(tmp_path, place, rows)
    save(tmp_path, "ablate/1", [dict(group="itself", source=x, test=1.0)
                               for x in ("a", "b", "darts_v2")])
    for place in ("compare/1/cells 0", "extra/plain/1/cells 0", "capacity/1/lstm 4 0", "mine/1",
                  "mine/arm/1", "compare", "search/a/b/1", "."):
        save(tmp_path, place, rows, seed=1)
    found = load_records(tmp_path)
    assert {study: len(records) for study, records in found.items()} == {
        "ablate": 1, "compare": 2, "extra": 2, "extra-slow": 1}
    rows = {study: [(row["unit"], row["group"]) for record in records for row in record["rows"]]
            for study, records in found.items()}
    assert rows["compare"] == [(seed, group) for seed in "12" for group in ("sampled", "uniform")]
    # two cells, drawn apart, and one that is the same in every run
    assert rows["ablate"] == [("1 a", "itself"), ("1 b", "itself"), ("darts_v2", "itself")]
    assert rows["extra"] == [("1", "fresh"), ("1", "plain")]
    assert rows["extra-slow"] == [("1", "plain")]


def test_runs_in_their_default_folders_are_told_apart(tmp_path):
    """RUNS/COMMAND/PRESET-SEED, of which README says: report --out runs. Of one seed, but not of
    one text."""
    for preset in ("ptb", "tiny"):
        save(tmp_path, f"search/{preset}-3", [dict(group="sampled", valid=1.0)], seed=3)
    rows = [row for record in load_records(tmp_path)["search"] for row in record["rows"]]
    assert [(row["unit"], row["group"]) for row in rows] == [
        ("3", "ptb: sampled"), ("3", "tiny: sampled")]
    save(tmp_path, "search/tiny--4", [dict(group="sampled", valid=1.0)], seed=-4)
    records = load_records(tmp_path)["search"]
    assert sorted((record["label"], record["seed"]) for record in records) == [
        ("ptb", 3), ("tiny", -4), ("tiny", 3)]


def check_comparison(monkeypatch):
    """By hand: six seeds, of which each has two rows of 'a' and one of the others. A mean is that
    of the seeds' means; a difference is of pairs, except with 'c', which has other seeds; p is that
    of the flips or deals, times four."""
    def interval(a, b, paired):  # of six pairs; of deals it would be slow
        gaps = [y - x for x, y in zip(a, b)]
        return [min(gaps), max(gaps)] if paired else None

    monkeypatch.setattr(menas, "interval", interval)
    rows = []
    for seed in range(6):
        rows += [dict(group="a", unit=seed, x=seed ** 2 + y) for y in (0, 2)]
        rows += [dict(group="b", unit=5 - seed, x=5 + (5 - seed) ** 2 + (5 - seed) % 2)]
        rows += [dict(group="c", unit=seed + 9, x=99 + seed), dict(group="d", unit=seed, x=None)]
    rows += [dict(group="e", unit=seed, x=3.0 + 18 * seed) for seed in range(2)]
    rows += [dict(group="f", unit=0, x=3.0), dict(group="a", unit=0, x=7), dict(group="z", unit=1)]
    lines = lines_of(menas.table(menas.HEADERS, menas.comparison(rows, "x", first="a")))
    assert list(lines) == ["a", "b", "c", "e", "f"]
    values = [row["x"] for row in rows if row["group"] == "a"]
    average = mean([3, 2, 5, 10, 17, 26])
    assert [lines["a"][name] for name in ("draws", "rows", "difference")] == ["6", "13", ""]
    assert float(lines["a"]["mean"]) == pytest.approx(average, abs=1e-3)
    assert float(lines["a"]["median"]) == median(values)
    assert [lines["b"][name] for name in ("difference", "95 %", "p, corrected")] == [
        "+4.167", "+2.000 to +5.000", f"{4 * 2 / 64:.3f}"]
    assert float(lines["c"]["difference"]) == pytest.approx(101.5 - average, abs=1e-3)
    assert 0 < float(lines["c"]["p, corrected"]) < .03 and lines["c"]["95 %"] == "-"
    assert (lines["e"]["difference"], lines["e"]["p, corrected"]) == ("+1.500", "1.000")
    assert lines["f"]["difference"] == "" and float(lines["f"]["mean"]) == 3
    lines = lines_of(menas.table(menas.HEADERS, menas.comparison(rows, "x", first="b")))
    assert list(lines) == ["b", "a", "c", "e", "f"] and lines["a"]["difference"] == "-4.167"


def test_a_comparison_is_that_by_hand(monkeypatch):
    check_comparison(monkeypatch)


def test_an_answer_is_what_the_test_says():
    """By hand: p of .05 and less, corrected, differ; a group without a p is not spoken of."""
    lines = [["a", 9, 9, 1., 1., "", "", ""], ["b", 9, 9, 2., 2., "+1.000", "-", "0.050"],
             ["c", 9, 9, 2., 2., "+1.000", "-", "0.051"], ["d", 1, 1, 2., 2., "", "", ""]]
    expected = "From a differ: b (+1.000, p = 0.050). Not shown to differ: c."
    assert menas.answer(lines) == expected
    assert menas.answer([*lines, lines[2]]) == expected.replace("c.", "c; c.")
    assert menas.answer(lines[:1]) == "Too few seeds or groups for a test."


def test_what_is_crossed_is_also_compared_alone(tmp_path):
    """By hand: means over all values of the other column; p is that of six pairs, times the
    differences of a table. Another preset is another arm."""
    for seed in range(1, 7):
        for folder in (f"factors/{seed}", f"factors/tiny-{seed}"):
            rows = [dict(group=a + b, connections=a, activations=b, test=2.0 * (a == "r") + 3.0 * (b == "t"))
                    for a in "sr" for b in "srt"]
            save(tmp_path, folder, rows, seed=seed)
    study = menas.STUDIES["factors"]
    alone = [record for record in load_records(tmp_path)["factors"] if "tiny" not in str(record["folder"])]
    _, all_of_them, said, connections, _, activations = menas.tables(study, alone)
    assert len(lines_of(all_of_them)) == 6
    assert said == "**test, connections**. From s differ: r (+2.000, p = 0.031). Not shown to differ: none."
    assert [float(line["mean"]) for line in lines_of(connections).values()] == [1, 3]
    assert [line["p, corrected"] for line in lines_of(activations).values()] == ["", "1.000", "0.062"]
    both = menas.tables(study, load_records(tmp_path)["factors"])
    assert [*lines_of(both[3])] == ["s", "r", "tiny: s", "tiny: r"]


def test_a_label_says_what_it_stands_for(tmp_path):
    """The settings in which arms differ; not the seed, nor where it ran, nor what each run has of its
    own."""
    for arm, lr in (("plain", 1.0), ("fast", 2.0)):
        for seed in "12":
            own = f"runs/search/{seed}" if arm == "fast" else ""
            save(tmp_path, f"extra/{arm}/{seed}", [], lr=lr, clip=.25, seed_=seed, threads=seed, supernet=own)
    found = menas.flags(load_records(tmp_path)["extra"])
    assert found == {"plain": "--lr 1.0", "fast": "--lr 2.0"}


@pytest.mark.parametrize("name, old, new", [
    ("comparison", "(len(groups) - 1) * ", ""),
    ("comparison", "for unit in (base if paired else units)", "for unit in units"),
    ("comparison", "paired = units.keys() == base.keys()", "paired = False"),
    ("comparison", "mean(b) - mean(a)", "mean(a) - mean(b)"),
    ("comparison", "p_value(a, b", "p_value(each, [*base.values()]"),
    ("by_unit", "row['unit'], []", "len(found[row['group']]), []")])  # every row counts
def test_a_wrong_comparison_fails_the_same_check(name, old, new, monkeypatch):
    mutate(monkeypatch, name, (old, new))
    with pytest.raises(AssertionError):
        check_comparison(monkeypatch)


def results(out):
    """Of every kind that there may be: several seeds, a single one, some without metrics.jsonl,
    networks that have all failed."""
    for seed in "123":
        groups = ("trained", "untrained", "LSTM")
        rows = [dict(group=group, test=2 + .1 * i + .01 * int(seed), shared=3.0 if i < 2 else None)
                for i, group in enumerate(groups)]
        save(out, f"compare/{seed}", rows)
    metrics = [dict(step=1, loss=2.0), dict(step=2, reward=8.0, entropy=1.0)]
    save(out, "search/1", [dict(group="sampled", valid=2.0)], metrics=metrics)
    save(out, "robust/plain/1", [dict(group="sampled", valid=2.0)])  # nothing that it is about
    for seed, lost in (("1", None), ("2", 11.0)):
        metrics = [dict(step=1, valid_perplexity=[x], networks=[0]) for x in (9.0, lost)]
        row = dict(group="network", valid=2.5, test=2.5)
        save(out, f"train/enas/{seed}", [row], metrics=metrics)
    best = dict(group="best", round=0, valid=2.0, cell=menas.name_of(CELLS["lstm_cell"]))
    save(out, "progress/1", [best, best | dict(round=1)])


def test_the_page_is_made_again_byte_for_byte(tmp_path, capsys):
    """With its figures, beside the records; nothing else is written."""
    results(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    report(tmp_path)
    page = (tmp_path / "README.md").read_bytes()
    report(tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    assert after[tmp_path / "README.md"] == page and before.items() <= after.items()
    studies = {"compare", "progress", "robust", "search", "train"}
    made = {path.name for path in after.keys() - before.keys()}
    assert made == {f"{study}.png" for study in studies} | {
        "README.md", "progress.gif"}
    assert all(f"]({study}.png)" in page.decode() for study in studies)


def test_a_user_sees_the_projects_own_beside(tmp_path, monkeypatch, capsys):
    """Both are compared with the same group, though it is not the first of the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: None)
    for out, shift in (("runs", 0.0), ("results", 5.0)):
        for arm, valid in (("fresh", 1.0), ("plain", 1.5)):
            for seed in "12":
                rows = [dict(group="sampled", valid=valid + shift + .1 * int(seed))]
                save(tmp_path / out, f"extra/{arm}/{seed}", rows)
    report("runs")
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("| ")]
    mine, theirs = [lines_of(made) for made in tables]
    assert [line["mean"] for line in (*mine.values(), *theirs.values())] == [
        "1.650", "1.150", "6.650", "6.150"]
    assert mine["fresh"]["difference"] == theirs["fresh"]["difference"] == "-0.500"


def test_every_unit_is_drawn_in_its_groups_row():
    """Oracle: the values, from the axes; a density's area is 1."""
    rows = [dict(group=group, unit=unit, x=float(10 * i + unit))
            for i, group in enumerate("abc") for unit in range(3)]
    _, (axes, other) = menas.figure_of(2)
    menas.dots(axes, [dict(rows=rows)], "x")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    small = [line.get_data() for line in axes.lines if line.get_marker() == "."]
    drawn = {(x, y) for line in small for x, y in zip(*line)}
    assert drawn == {(row["x"], "abc".index(row["group"])) for row in rows}
    wide = [dict(group="a", x=x) for x in torch.randn(200, generator=menas.rng("x")).tolist()]
    wide += [dict(group="b", x=x) for x in (-9.0, 9.0, 9.0, 9.0, 9.0)]
    menas.densities(other, [dict(rows=wide)], "x")
    x, y = other.lines[0].get_data()
    assert torch.trapezoid(torch.tensor(y), torch.tensor(x)) == pytest.approx(1, abs=.02)


def test_curves_are_those_of_the_first_network_of_each_arms_first_run(tmp_path):
    """By hand. A network's curve ends where it leaves the batch; an arm may lack the metric."""
    lines = [dict(step=step, loss=1.0, valid_perplexity=[9.0 - step, 7.0], networks=networks)
             for step, networks in ((1, [0, 1]), (2, [0, 1]), (3, [1, 2]))]
    for arm, metrics in (("enas", lines), ("lstm", lines[:1]), ("none", [dict(step=1)])):
        for seed in "12":
            save(tmp_path, f"train/{arm}/{seed}", [], metrics=metrics[:int(seed)] + metrics[2:])
    _, (axes,) = menas.figure_of(1)
    menas.curves(axes, load_records(tmp_path)["train"], "valid_perplexity")
    drawn = {line.get_label(): [list(x) for x in line.get_data()] for line in axes.lines}
    assert drawn == {"enas": [[1], [8.0]], "lstm": [[1], [8.0]]}


@pytest.mark.parametrize("name", CELLS)
def test_a_picture_has_all_nodes_and_arrows(name, tmp_path):
    """Counted: a box a node, and one each for the input, the memory and h; an arrow a slot read,
    dashed where it is a second one, and from every leaf."""
    cell = CELLS[name]
    axes = draw_cell(cell)
    axes.figure.savefig(tmp_path / "cell.png")
    boxes = [text for text in axes.texts if text.get_bbox_patch()]
    styles = [text.arrow_patch.get_linestyle() for text in axes.texts if not text.get_bbox_patch()]
    slots = [slots_read(node) for node in cell.nodes]
    assert len(boxes) == len(cell.nodes) + 2 + (cell.memory > 0)
    assert [styles.count(style) for style in ("-", "--", ":")] == [
        len(slots), sum(len(some) - 1 for some in slots), len(menas.leaves(cell))]
    assert len({text.get_position() for text in boxes}) == len(boxes)
