"""Settings are flags, mistakes are one clear line, runs leave records.

Run: pytest tests/test_command_line.py
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

import menas
from menas import draw_cell
from small import SMALL, quick, refused, rows_of, signals, words  # noqa: F401, some are fixtures

SEARCH = [*"search --nodes 3 --epochs 1 --shared_steps 3 --controller_steps 1".split(),
          "--derive_samples", "3", *SMALL]
TRAIN = ["train", "--epochs", "1", *SMALL]
OTHER_TENSORS = menas.serialized({"another": torch.zeros(3)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words):
    """A folder with a finished search of 3 highway nodes, and a training of two cells."""
    folder = tmp_path_factory.mktemp("runs")
    search = [*SEARCH, "--retrain", "0", "--data", str(words)]
    assert menas.main([*search, "--out", str(folder / "search")]) == 0
    train = [*TRAIN, "--cell", "tree,darts_v1@3", "--data", str(words)]
    assert menas.main([*train, "--out", str(folder / "train")]) == 0
    return folder


# help and flags: the oracle is Config and the presets

@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands(arguments, capsys):
    assert menas.main(arguments) == 0
    shown = capsys.readouterr().out
    for name, (_, about) in menas.COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(about)}$", shown, re.M)


@pytest.mark.parametrize("command", menas.COMMANDS)
def test_help_shows_the_settings_used_with_the_presets_defaults(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken
    for preset in menas.PRESETS:
        with pytest.raises(SystemExit) as done:
            menas.main([command, "--preset", preset, "--help"])
        assert done.value.code == 0
        shown, config = capsys.readouterr().out, menas.configure(command, preset)
        assert re.findall(r"^ +--(\w+)", shown, re.M) == menas.settings_of(command)
        for f in fields(menas.Config):
            line = f"{f.metadata['help']} [{getattr(config, f.name)}]\n"
            assert (line in shown) == (f.name in menas.settings_of(command))


def test_every_setting_is_used_and_explained():
    used = [name for names in menas.SETTINGS.values() for name in names.split()]
    assert set(used) == {f.name for f in fields(menas.Config)}
    assert all(len(f.metadata["help"]) > 8 for f in fields(menas.Config))


@pytest.mark.parametrize("given, expected", [
    ("", False), ("--memory", True), ("--memory true", True), ("--memory FALSE", False),
    ("--memory=false", False)])
def test_a_yes_or_no_may_be_given_in_words(given, expected):
    assert menas.parse_command("search", ["--preset", "tiny", *given.split()]).memory is expected


@pytest.mark.parametrize("command", [name for name in menas.COMMANDS if name != "report"])
def test_flags_win_over_the_preset_and_the_command_over_all(command):
    for preset, parts in menas.PRESETS.items():
        of_cells = command in ("compare", "ablate", "factors", "state")
        expected = parts["all"] | parts.get("studies", {}) if of_cells else parts["all"]
        flag = "hidden" if "hidden" in menas.settings_of(command) else "derive_samples"
        config = menas.parse_command(command, ["--preset", preset, f"--{flag}", "123"])
        expected = expected | parts.get(command, {}) | {"preset": preset, flag: 123}
        assert config == replace(menas.Config(), **expected)
        menas.check(config)


# mistakes: each with what the line must name. ° stands for a space within an argument

MISTAKES = {
    "serch": "'serch', did you mean search?",
    "search more": "'more'",
    "search --hiden 5": "'--hiden', did you mean --hidden?",
    "search --hiden=5": "did you mean --hidden?",
    "search --hidden-dropout .1": "did you mean --hidden_dropout?",
    "search --hidd 5": "'--hidd', did you mean --hidden?",
    "search --cell enas": "'--cell'",
    "train --fold 2": "'--fold'",
    "bench --seed 3": "'--seed'",
    "report --oot x": "did you mean --out?",
    "report --lr 3": "'--lr'",
    "search --seed": "--seed",
    "search --hidden 4.5": "--hidden, '4.5'",
    "search --lr fast": "--lr, 'fast'",
    "search --memory maybe": "--memory, maybe",
    "search --activations tanh,rulu": "'rulu', did you mean relu?",
    "search --activations tanh,relu,tanh": "tanh,relu,tanh, twice",
    "search --operations highway,gat": "'gat', did you mean gate?",
    "search --operations gate": "--operations gate",
    "search --memory": "--memory, gate",
    "search --min_nodes 9 --nodes 4": "--min_nodes 9, --nodes 4",
    "search --widths 2,99 --hidden 4": "'99'",
    "search --rates 3": "'3'",
    "search --rates 1,2 --shared_samples 2": "--rates, --shared_samples 1",
    "search --rates 1,2 --lookahead recent": "--rates, --lookahead none",
    "search --schedule plateau": "--schedule plateau",
    "search --response unrolled": "--response unrolled, --lookahead fresh",
    "search --lookahead fresh --controller uniform": "--lookahead fresh, uniform",
    "search --anneal 5 --epochs 4": "--anneal 5",
    "search --nodes 1 --activations tanh": "single architecture",
    "search --device gpu": "gpu, --device cpu",
    "search --device meta": "meta",
    "search --out taken": "taken",
    "search --data pbt": "'pbt', did you mean ptb?",
    "search --data ~nobody1/x": "~nobody1",
    "search --data words --batch 5000": "batch 5000, train",
    "search --data words --batch 60": "batch 60, valid",
    "search --out words/train.txt": "words/train.txt",
    "train --cell enass": "'enass', did you mean enas?",
    "train --cell enas,tre": "'tre', did you mean tree?",
    "train --cell lstm,enas": "lstm",
    "train --cell lstm:lstm": "'lstm'",
    "train --cell lstm:tre": "did you mean tree?",
    "train --cell lstm:999999": "999999",
    "train --cell lstm:²": "²",
    "train --cell enas,": "''",
    "train --cell words": "'words'",
    "train --cell enas@x": "enas@x",
    "train --cell 3-0-0": "3-0-0",
    "train --cell 1-0-0-99-0-0-0-0-0": "99",
    f"train --cell {'x' * 9000}": "unknown cell 'xxx, random:SEED",
    f"train --cell enas,{'y' * 9000}@x": "enas,yyy, 'x'",
    "train --cell 0°0°5°1": "0 0 5 1",
    "train --cell Genotype(recurrent=[('selu',°0)])": "selu",
    "train --cell Genotype(recurrent=[('tanh',°7)])": "7",
    "train --cell Genotype(\n[('selu',°0)])": "selu",
    "train --cell random:": "'random:', random:SEED",
    "train --cell Genotype(recurrent=[('tanh',°0),('relu',°1)],°concat=[1])": "concat",
    "train --cell --": "'--'",
    "search --memory=--": "'--'",
    "search --lr --": "'--'",
    "search --out a\nb\0": "a\\nb\\x00",
    "search --unit chars": "'chars', did you mean char?",
    "draw --cell treee": "'treee', did you mean tree?",
    "draw --cell enas --connections tre": "did you mean tree?",
    "draw --cell enas --out words/train.txt": "words/train.txt",
    "cost --controller uniform": "'--controller'",
    "similarity --anneal 1": "'--anneal'",
    "train --supernet nowhere": "nowhere",
    "compare": "--supernet",
    "hidden --supernet nowhere": "nowhere",
    "bench --hidden 8": "--hidden 8"}


@pytest.fixture
def here(tmp_path, words, monkeypatch):
    """A folder to work in, with the text in its folder 'words', so that paths are short."""
    shutil.copytree(words, tmp_path / "words")
    (tmp_path / "taken" / "config.json").mkdir(parents=True)  # nothing can be written there
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(line, here, capsys):
    command, *given = [word.replace("°", " ") for word in line.split(" ")]
    used = menas.settings_of(command) if command in menas.COMMANDS else []
    first = {"preset": "smoke", "data": "words", "out": "run"}
    before = [f"--{name}={value}" for name, value in first.items() if name in used]
    said = refused(capsys, command, *(before if command != "report" else []), *given)
    for part in MISTAKES[line].split(", "):
        assert part in said


@pytest.mark.parametrize("name", menas.CHOICES)
def test_unknown_names_are_refused_with_the_nearest(name, capsys, here):
    for right in menas.CHOICES[name]:
        assert f"did you mean {right}?" in refused(capsys, "search", f"--{name}", f"{right}x")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("f", [f for f in fields(menas.Config) if f.type in (int, float)],
                         ids=lambda f: f.name)
def test_numbers_out_of_range_are_refused(f):
    least, most = f.metadata["range"]
    for value in (least - 1, most + 1, math.nan, math.inf, -math.inf):
        with pytest.raises(menas.UserError, match=re.escape(f"--{f.name} {value}")):
            menas.check(replace(menas.Config(), **{f.name: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(capsys, here):
    said = refused(capsys, "search", "--device", "cuda:0")
    assert "CUDA" in said and "--device cpu" in said


def test_a_device_that_lacks_the_dtype_is_refused(capsys, here, monkeypatch):
    """As an old GPU, or a Mac, of which torch says so once it computes."""
    def ones(*shape, device, dtype, right=torch.ones):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return right(*shape, device=device, dtype=dtype)
    monkeypatch.setattr(torch, "ones", ones)
    said = refused(capsys, *TRAIN, "--data", "words", "--out", "run", "--dtype", "bfloat16")
    assert "--dtype bfloat16" in said and "--device cpu" in said and "not supported" in said


@pytest.mark.parametrize("command, wrong, right", [
    ("train", "--cell chian", "--cell chain"), ("train", "--cell tree --batch 5000", "--cell tree"),
    ("capacity", "--batch 5000", "--batch 8"), ("search", "--min_nodes 9", "--min_nodes 2"),
    ("search", "--data nowhere", "--data words")])
def test_a_mistake_does_not_claim_the_folder(command, wrong, right, capsys, here):
    """The command without the mistake is not told that the folder holds another run."""
    more = {"train": TRAIN, "search": [*SEARCH, "--retrain", "0"],
            "capacity": ["capacity", "--derive_samples", "1", "--nodes", "2", *SMALL]}[command]
    line = [*more, "--data", "words", "--out", "run"]
    refused(capsys, *line, *wrong.split())
    assert menas.main([*line, *right.split()]) == 0


def test_a_report_without_records_is_one_line(capsys, here, runs):
    (here / "empty").mkdir()
    assert "results" in refused(capsys, "report")
    assert "empty" in refused(capsys, "report", "--out", "empty")
    refused(capsys, "report", "--out", runs / "train")  # a run's own folder is none of records
    assert not list((here / "empty").iterdir())


def test_a_failed_download_is_one_line(capsys, here, monkeypatch):
    def offline(*_, **__):
        raise menas.urllib.request.URLError("no route to host")

    def folder(right=menas.ptb_folder):
        return right(here / "cache")
    monkeypatch.setattr(menas.urllib.request, "urlopen", offline)
    monkeypatch.setattr(menas, "ptb_folder", folder)
    said = refused(capsys, "search", *SMALL, "--data", "ptb", "--out", "run")
    assert "train.txt" in said and "no route to host" in said and not (here / "cache").exists()


@pytest.mark.parametrize("arguments", [[], ["bench", "--help"]])
def test_a_closed_pipe_ends_it_without_a_traceback(arguments):
    """As `| head -1` closes it once it has its line."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, menas.__file__, *arguments], stdout=write,
                          stderr=subprocess.PIPE, env=buffered)
    os.close(write)
    assert done.stderr == b""


# runs from end to end

def test_a_search_leaves_its_records(runs, words):
    """Oracle: evaluate() of weights.pt and of the cells, on the whole validation split."""
    folder, corpus = runs / "search", menas.load_corpus(menas.Config(data=str(words)))
    record = json.loads((folder / "result.json").read_text())
    assert {"commit", "versions", "machine", "seconds"} <= set(record)
    given = [*SEARCH[1:], "--data", str(words), "--retrain", "0"]
    expected = menas.parse_command("search", given)
    names = [name for name in menas.settings_of("search") if name != "out"]
    assert record["command"] == "search" and record["seed"] == 1
    assert record["config"] == {name: getattr(expected, name) for name in names}
    assert not list(folder.glob(".*"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]  # of 3 and 1
    assert torch.load(folder / "controller.pt", weights_only=True)
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert [row["group"] for row in record["rows"]] == ["sampled"] * 3 + ["uniform"] * 3
    for row in record["rows"]:
        cell = menas.load_cell(menas.Config(), row["cell"])
        loss = menas.evaluate(weights, menas.encode([cell]), corpus.valid).item()
        assert row["valid"] == pytest.approx(min(loss, math.log(len(corpus.words))), rel=1e-5)
        assert row["parameters"] == menas.recurrent_parameters(cell, 4)
    losses = [row["valid"] for row in record["rows"]]
    assert losses == sorted(losses[:3]) + sorted(losses[3:])


def test_a_training_leaves_its_records(runs, words):
    """Oracle: evaluate() of weights.pt on each whole split."""
    corpus, rows = menas.load_corpus(menas.Config(data=str(words))), rows_of(runs / "train")
    weights = torch.load(runs / "train" / "weights.pt", weights_only=True)
    cells = menas.encode([menas.CELLS["tree"], menas.CELLS["darts_v1"]])
    assert [(row["cell"], row["seed"]) for row in rows] == [("tree", 1), ("darts_v1", 3)]
    for split in menas.SPLITS:
        losses = menas.evaluate(weights, cells, getattr(corpus, split))
        losses = losses.clamp(max=math.log(len(corpus.words)))
        assert [row[split] for row in rows] == pytest.approx(losses.tolist(), rel=1e-5)


def test_a_network_may_have_a_seed_of_its_own(runs, words, tmp_path):
    """'darts_v1@3' is the network that --seed 3 trains, whatever is trained beside it."""
    more = "--cell darts_v1 --seed 3 --perturb".split()
    assert menas.main([*TRAIN, *more, "--data", str(words), "--out", str(tmp_path)]) == 0
    alone, = rows_of(tmp_path)
    assert alone["test"] == pytest.approx(rows_of(runs / "train")[1]["test"], rel=1e-5)
    assert {"test, words", "test, noise"} <= set(alone)


def test_a_searched_cell_trains_from_its_shared_weights(runs, words, tmp_path):
    """Oracle: with next to no learning rate they are the search's, so the loss is, too."""
    search = str(runs / "search")
    more = ["--lr", "1e-9", "--cell", search, "--supernet", search, "--data", str(words)]
    assert menas.main([*TRAIN, *more, "--out", str(tmp_path)]) == 0
    row, = rows_of(tmp_path)
    assert row["valid"] == pytest.approx(rows_of(runs / "search")[0]["valid"], rel=1e-4)


def test_a_training_goes_on_from_another(runs, words, tmp_path, capsys):
    """Oracle: with next to no learning rate its losses are those of the one before, which may have
    begun from a search's weights."""
    def line(out, before, cell, *more):
        folders = ["--supernet", before, "--out", tmp_path / out, "--data", words]
        return [str(word) for word in (*TRAIN, "--lr", "1e-9", *folders, "--cell", cell, *more)]
    search, cells = runs / "search", "tree,darts_v1@3"
    assert menas.main(line("inherited", search, search)) == 0
    for before, cell in ((runs / "train", cells), (tmp_path / "inherited", search)):
        on = f"from {before.name}"
        assert menas.main(line(on, before, cell)) == 0
        for row, old in zip(rows_of(tmp_path / on), rows_of(before), strict=True):
            assert [row[split] for split in menas.SPLITS] == pytest.approx(
                [old[split] for split in menas.SPLITS], rel=1e-4)
    for other in ("tree", "tree,lstm_cell", "lstm", f"{cells} --hidden 8"):
        refusal = refused(capsys, *line("refused", runs / "train", *other.split()))
        assert "--supernet" in refusal
    again = line("from train", runs / "train", cells, "--epochs", "2")
    assert "--supernet" in refused(capsys, *again)  # which says how to go on


@pytest.mark.parametrize("run", ["search", "train"])
def test_weights_have_their_words(run, runs, words, here, capsys):
    """Oracle: the corpus; another text with as many words is refused."""
    corpus = menas.load_corpus(menas.Config(data=str(words)))
    assert list(json.loads((runs / run / "words.json").read_text())) == corpus.words
    for path in (here / "words").iterdir():
        path.write_text(path.read_text().replace("that", "which"))
    assert len(menas.load_corpus(menas.Config(data="words")).words) == len(corpus.words)
    line = [*TRAIN, "--data", "words", "--cell", "tree,darts_v1@3", "--out", "run"]
    assert "another vocabulary" in refused(capsys, *line, "--supernet", runs / run)


def test_characters_are_also_scored_in_bits(here, capsys):
    """Oracle: the record's losses over the logarithm of 2."""
    line = [*TRAIN, "--data", "words/", "--unit", "char", "--cell", "tree", "--out", "run"]
    assert menas.main(line) == 0
    shown, (row,) = capsys.readouterr().out, rows_of(here / "run")
    header, _, values = [line.split("|") for line in shown.splitlines()[-3:]]
    table = {name.strip(): value.strip() for name, value in zip(header, values)}
    for split in menas.SPLITS:
        assert float(table[f"{split} perplexity"]) == pytest.approx(math.exp(row[split]), abs=.006)
        bits = float(table[f"{split} bits per character"])
        assert bits == pytest.approx(row[split] / math.log(2), abs=.0006)
    line[line.index("words/")] = "words"  # is the same
    assert menas.main(line) == 0 and "already finished" in capsys.readouterr().out


class Program:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("more", [
    "--cell tree --hidden 8", "--cell lstm", "--cell tree", "--cell lstm_cell", "--data toy",
    "--supernet RUNS/train", "--supernet damaged", "--supernet other", "--supernet program"])
def test_shared_weights_that_do_not_fit_are_refused(more, runs, here, capsys):
    """They are those of 4 units, of cells of 3 highway nodes, and of another vocabulary. A file may
    not run code."""
    files = {"damaged": b"no weights", "other": OTHER_TENSORS, "program": menas.serialized(Program())}
    for name, content in files.items():
        shutil.copytree(runs / "search", name)
        menas.write_atomically(here / name / "weights.pt", content)
    line = [*TRAIN, "--data", "words", "--out", "run", "--cell", runs / "search"]
    more = more.replace("RUNS", str(runs)).split()
    assert "--supernet" in refused(capsys, *line, "--supernet", runs / "search", *more)
    assert not (here / "made").exists()


def test_cells_of_runs_and_of_seeds(runs):
    """Oracle: the best cell of a search, the first of a training; a seed is always the same cell."""
    config, row = menas.Config(nodes=4), rows_of(runs / "search")[0]["cell"]
    cell = menas.decode(torch.tensor([int(x) for x in row.split("-")]))
    assert menas.load_cell(config, str(runs / "search")) == cell
    assert menas.load_cell(config, str(runs / "train")) == menas.CELLS["tree"]
    some = [menas.load_cell(config, f"random:{seed}") for seed in (3, 3, 4)]
    assert some[0] == some[1] != some[2]


@pytest.mark.parametrize("name", menas.CELLS)
def test_a_drawing_spells_the_cell_so_that_it_is_read_again(name, here, capsys, monkeypatch):
    """Oracle: the cell itself; ENAS's are also written as an arc and as a genotype."""
    drawn = []

    def draw(cell):
        drawn.append(cell)
        return draw_cell(cell)
    monkeypatch.setattr(menas, "draw_cell", draw)
    assert menas.main(["draw", "--cell", name, "--out", "drawn"]) == 0
    cell, (row, *others, _) = menas.CELLS[name], capsys.readouterr().out.splitlines()
    assert drawn == [cell] and (here / "drawn" / "cell.png").read_bytes()[1:4] == b"PNG"
    assert menas.load_cell(None, row.partition(": ")[2]) == cell
    assert len(others) == 2 * menas.is_enas(cell)
    if others:
        numbers, genotype = (line.partition(": ")[2] for line in others)
        assert menas.arc(numbers, cell.output) == menas.load_cell(None, genotype) == cell


def test_a_row_may_be_longer_than_a_files_name(here):
    """Oracle: the arc of the same 40 nodes."""
    arc = " ".join(f"{i} 0" for i in range(39))
    row = menas.row_name(menas.encode([menas.arc(arc)])[0])
    assert menas.main([*TRAIN, "--data", "words", "--cell", f"{row}@1,{arc}", "--out", "run"]) == 0
    one, other = rows_of(here / "run")
    assert one["test"] == other["test"] and one["parameters"] == other["parameters"]
