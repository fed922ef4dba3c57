"""The README shows what the committed records give. Run: pytest tests/test_report.py"""
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from menas import WHEREABOUTS, Config, UserError, cell_from_json, main, parse, studies
from results.plots import draw_intervals, table
from results.report import label, report, summary
from results.stats import t_test, welch

ROOT = Path(__file__).parent.parent


def test_the_readme_is_what_the_records_give(tmp_path):
    """Oracle: the report, made again from copies."""
    ignore = shutil.ignore_patterns("*.pt", "lock", "tensorboard")
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=ignore)
    shutil.copy(ROOT / "README.md", tmp_path)
    report(tmp_path / "results", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "results/curves.png").stat().st_size > 10_000


def test_every_table_of_the_readme_has_records():
    marks = re.findall(r"<!-- (\w+) (\w+) -->", (ROOT / "README.md").read_text())
    records = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*/result.json")]
    assert marks and set(marks) <= {(r["study"], label(r)) for r in records}


def test_records_say_where_they_come_from():
    for path in (ROOT / "results").glob("*/result.json"):
        record = json.loads(path.read_text())
        assert {"study", "config", "seed", "commit", "versions", "device", "seconds", "metrics"} <= set(record)
        assert record["commit"] and record["seconds"] > 0
        assert str(ROOT) not in path.read_text()


def test_the_readmes_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_found_cells_in_the_records_are_cells():
    for path in (ROOT / "results").glob("*/cell.json"):
        assert cell_from_json(json.loads(path.read_text())).nodes


def test_other_records_leave_the_readme_alone(tmp_path, monkeypatch):
    """The smoke pass reports its own folder, whose tables have the same names."""
    shutil.copytree(ROOT / "results/cost", tmp_path / "smoke/cost", ignore=shutil.ignore_patterns("lock"))
    (tmp_path / "README.md").write_text("<!-- cost toy -->\n<!-- end -->")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--out", "smoke"]) == 0
    assert (tmp_path / "README.md").read_text() == "<!-- cost toy -->\n<!-- end -->"


def test_table_is_markdown_and_aligned():
    made = table(("a", "long name"), [(1234, 1.5), ("x", "y")]).splitlines()
    assert made == ["| a     | long name |", "| ----- | --------- |", "| 1,234 | 1.50      |", "| x     | y         |"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_gain_is_also_compared_with_its_control(seeds):
    """By hand: of .3, .1 is the control's. The first arm has no difference, and of one seed nothing can be said."""
    losses = lambda gain: [2.0 - gain + .01 * i * (gain > 0) for i in range(seeds)]
    gains = {"no choice": 0, "rates, zero": .1, "rates, sampled": .3, "rates, unrolled": .1}
    arms = {arm: {"expected": losses(gain), "rate": [0.0] * seeds} for arm, gain in gains.items()}
    made = summary({"study": "optimizer", "config": {"task": "none"}, "metrics": {"arms": arms}})
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in made.splitlines()]
    shown = {row[1]: row[3].split(" ")[0] for row in rows if row[0] == "F"}
    assert shown == {"no choice": "", "rates, zero": "-0.090", "rates, sampled": "-0.290", "rates, unrolled": "-0.090",
                     "rates, sampled, minus rates, zero": "-0.200", "rates, unrolled, minus rates, zero": ""} or (
        seeds == 1 and {*shown.values()} == {""})
    assert "nan" not in made


def test_no_records_is_one_clear_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError):
        report(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_readmes_snippet_runs(tmp_path, monkeypatch):
    """A found cell in one's own code, after a small search under the folder's name in the README."""
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--preset", "smoke", "--hidden", "32", "--retrain", "--out", "runs/search-tiny-1"]) == 0
    names = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1], names)
    assert names["losses"].shape == (1,) and names["state"].shape == (1, 8, 32)


def test_the_quick_start_shows_its_record():
    """Oracle: what a finished `python menas.py search` prints, made again from the committed record of one."""
    record = json.loads((ROOT / "results/tiny-search/result.json").read_text())
    assert summary(record) in (ROOT / "README.md").read_text()


def commands(**environment):
    """The arguments of every command that experiments.sh would run."""
    shown = subprocess.run([ROOT / "experiments.sh"], env={**os.environ, "LAUNCH": "echo", **environment}, check=True,
                           capture_output=True, text=True).stdout
    return [shlex.split(line)[2:] for line in shown.splitlines() if line.startswith("python menas.py")]


def test_a_finished_study_of_experiments_is_skipped():
    """Oracle: the settings in the records; a line of experiments.sh that differs from its record would stop there."""
    found = 0
    for words in commands():
        if (path := ROOT / words[-1] / "config.json").exists():
            found += 1
            study, config = parse(words)
            theirs = {**asdict(Config()), **json.loads(path.read_text())}
            mine = {"study": study, **asdict(config)}
            assert {k: v for k, v in mine.items() if k not in WHEREABOUTS and theirs.get(k) != v} == {}, path
    assert found > 10


def test_experiments_runs_every_study_in_all_ways():
    """Each study has a line, in small, too; with PARTS a study's sub-runs are shared out before it, twice."""
    for environment in ({}, {"SMOKE": "1"}, {"PRESET": "paper"}):
        assert {words[0] for words in commands(**environment)} == {*studies(), "report"}
        for words in commands(**environment):
            assert words[0] == "report" or parse(words)
    parts = [words for words in commands(PARTS="3") if words[0] == "factors"]
    assert sorted(words[words.index("--part") + 1] for words in parts if "--part" in words) == [
        f"{i}/3" for i in (1, 2, 3) for _ in range(4)]  # two stages, two corpora
    assert sum("--part" not in words for words in parts) == 2


def test_a_row_of_a_figure_has_one_name(tmp_path, monkeypatch):
    """Panels whose names differ, as those of two corpora may: each value stands in the row of its own name."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    draw_intervals(tmp_path / "x.png", [("toy", "nats", {"first": [0.0, 0.1], "third": [3.0, 3.1]}),
                                        ("ptb", "nats", {"first": [0.0], "second": [2.0], "third": [3.0]})])
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["first", "second", "third"]
    for axes in drawn[0].axes:
        points = {(x, y) for line in axes.lines if line.get_marker() == "." for x, y in zip(*line.get_data())}
        assert all(labels[int(y)] == {0: "first", 2: "second", 3: "third"}[int(x)] for x, y in points)


def test_the_readme_on_three_seeds_of_the_cell_found():
    """Section 4's intervals and p, from the records that they are said to come from."""
    found, blind = ([n["test_perplexity"] for n in json.loads(
        (ROOT / "results" / name / "result.json").read_text())["metrics"]["networks"]]
        for name in ("ptb-found", "ptb-random-1"))
    mean, half, p, _ = welch(blind, found)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "found is at {:.1f} +- {:.1f} on the test split (three seeds)".format(*t_test(found)[:2]) in text
    assert "(`--cell random:1`) at {:.1f} +- {:.1f}, ".format(*t_test(blind)[:2]) in text
    assert f"better by {mean:.1f} +- {half:.1f} (Welch's t-test of three and three values" in text
    assert f"p = {p:.2f}".replace("0.", ".") in text and len(found) == len(blind) == 3
    assert f"seeds of a cell differ by up to {max(max(x) - min(x) for x in (found, blind)):.1f}" in text
