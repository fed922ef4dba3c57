"""Settings are flags, mistakes one clear line, runs leave records. Run: pytest tests/test_command_line.py"""
import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

import menas

SMOKE = ["--preset", "smoke", "--threads", "1"]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line."""
    code = menas.main([str(word) for word in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    """The one line on stderr with which a command line is refused."""
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("menas: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a finished smoke search on the toy corpus."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    assert menas.main(["search", *SMOKE, "--out", str(folder)]) == 0
    return folder


# flags: the oracle is the Config

def other_value(f):
    """A value of a field's type that is not its default."""
    if f.name == "preset":
        return "smoke"
    return f"{f.default}x" if f.type is str else not f.default if f.type is bool else f.type(f.default + 1)


@pytest.mark.parametrize("f", fields(menas.Config), ids=lambda f: f.name)
def test_every_field_is_a_flag(f):
    study, config = menas.parse(["search", f"--{f.name}", str(other_value(f))])
    assert study == "search" and getattr(config, f.name) == other_value(f)
    assert type(getattr(config, f.name)) is f.type


def test_help_explains_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no word is broken at its hyphen
    with pytest.raises(SystemExit) as done:
        menas.main(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert done.value.code == 0
    for f in fields(menas.Config):
        assert f"--{f.name} " in shown
        assert len(f.metadata["help"]) > 8 and f.metadata["help"] in shown
    for study in menas.studies():
        assert study in shown


@pytest.mark.parametrize("words, expected", [([], False), (["--retrain"], True), (["--retrain", "true"], True),
                                             (["--retrain", "FALSE"], False), (["--retrain=false"], False)])
def test_a_yes_or_no_may_be_given_in_words(words, expected):
    assert menas.parse(["search", "--preset", "smoke", *words])[1].retrain is expected


def test_flags_win_over_the_preset_and_the_study_over_all():
    for preset, parts in menas.PRESETS.items():
        for study in menas.studies():
            config = menas.parse([study, "--preset", preset, "--seed", "7", "--hidden", "123"])[1]
            expected = {**parts["all"], **parts.get(study, {}), "preset": preset, "seed": 7, "hidden": 123}
            assert config == replace(menas.Config(), **expected)
            menas.check(config)


# mistakes: each with what the line must name

MISTAKES = [
    ("", "study"),
    ("serch", "'serch'|did you mean search?"),
    ("search more", "'more'"),
    ("search --hiden 5", "'--hiden'|did you mean --hidden?"),
    ("search --hiden=5", "'--hiden=5'|did you mean --hidden?"),
    ("search --hidden-dropout .1", "--hidden-dropout|did you mean --hidden_dropout?"),
    ("search --seed", "--seed"),
    ("search --hidden abc", "--hidden|'abc'"),
    ("search --lr fast", "--lr|'fast'"),
    ("search --retrain maybe", "--retrain|maybe"),
    ("search --preset smok", "'smok'|did you mean smoke?"),
    ("search --dtype float23", "'float23'|did you mean float32?"),
    ("search --schedule cosin", "'cosin'|did you mean cosine?"),
    ("search --state carried", "'carried'|did you mean carry?"),
    ("search --reward ppl", "'ppl'|perplexity"),
    ("search --baseline leave_on_out", "'leave_on_out'|did you mean leave_one_out?"),
    ("search --controller untraind", "'untraind'|did you mean untrained?"),
    ("search --activations tanh,rulu", "'rulu'|did you mean relu?"),
    ("search --activations tanh,relu,tanh", "tanh"),
    ("search --device gpu", "'gpu'|cpu"),
    ("search --device coda", "'coda'|did you mean cuda?"),
    ("search --device cpu:x", "'cpu:x'|did you mean cpu?"),
    ("search --hidden 0", "--hidden 0"),
    ("search --nodes -1", "--nodes -1"),
    ("search --hidden_dropout 1.5", "--hidden_dropout 1.5"),
    ("search --input_dropout -.1", "--input_dropout -0.1"),
    ("search --data pbt", "'pbt'|did you mean ptb?"),
    ("search --data no/such/folder", "'no/such/folder'"),
    ("search --data TEXT --batch 5000", "batch 5000"),
    ("train --data TEXT --cell enass", "'enass'|did you mean enas?"),
    ("train --data TEXT --cell enas,tre", "'tre'|did you mean tree?"),
    ("train --data TEXT --cell lstm,enas", "lstm"),
    ("train --data TEXT --cell missing.json", "missing.json"),
    ("train --data TEXT --cell enas,", "cell ''"),
    ("train --data TEXT --cell TEXT", "TEXT"),
    ("train --data TEXT --cell enas --weights nowhere", "nowhere"),
]


@pytest.mark.parametrize("line, names", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(line, names, capsys, tmp_path, text):
    arguments = line.replace("TEXT", str(text)).split()
    where = ["--out", tmp_path / "run"] if arguments and arguments[0] in menas.studies() else []
    preset = [] if "--preset" in arguments or not where else ["--preset", "smoke"]
    said = refused(capsys, *arguments, *preset, *where).replace(str(text), "TEXT")
    for name in names.split("|"):
        assert name in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(capsys, tmp_path):
    said = refused(capsys, "search", *SMOKE, "--device", "cuda:0", "--out", tmp_path / "run")
    assert "CUDA" in said and "--device cpu" in said


OUT_OF_RANGE = dict(nodes=0, hidden=-3, batch=0, bptt=0, epochs=0, shared_samples=0, controller_samples=0, replicas=0,
                    derive_samples=0, eval_batch=0, patience=0, log_every=0, controller_hidden=0, word_dropout=1.0,
                    output_dropout=-.5, hidden_dropout=math.nan, threads=-1, lstm_hidden=-1, shared_steps=-1,
                    warm_epochs=-1, controller_steps=-1, init=-.1, lr=-1.0, controller_lr=-1.0, clip=0.0, plateau=0.0,
                    weight_decay=-1.0, temperature=0.0, baseline_decay=1.5, activation_reg=-1.0, slowness_reg=-1.0)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_before_any_work(name):
    with pytest.raises(menas.UserError, match=f"--{name} "):
        menas.check(replace(menas.Config(), **{name: OUT_OF_RANGE[name]}))


@pytest.mark.parametrize("name", ["lr", "clip", "temperature"])
def test_a_value_that_is_not_a_number_is_refused(name):
    with pytest.raises(menas.UserError, match=f"--{name} nan"):
        menas.check(replace(menas.Config(), **{name: math.nan}))


def test_a_folder_that_cannot_be_made_is_named(capsys, text):
    inside_a_file = text / "train.txt" / "run"
    assert str(inside_a_file) in refused(capsys, "search", *SMOKE, "--out", inside_a_file)


def test_a_mistake_does_not_claim_the_folder(capsys, tmp_path, text):
    """The same command without the mistake must not be told that the folder holds another run."""
    command = ["train", *SMOKE, "--data", text, "--epochs", "1", "--out", tmp_path / "run", "--cell"]
    refused(capsys, *command, "chian")
    assert call(capsys, *command, "chain")[0] == 0


def test_a_report_without_records_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "results" in refused(capsys, "report")


def test_a_failed_download_is_one_line(capsys, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise menas.urllib.request.URLError("no route to host")
    monkeypatch.setattr(menas.urllib.request, "urlopen", offline)
    said = refused(capsys, "search", *SMOKE, "--data", "ptb", "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    assert "train.txt" in said and "no route to host" in said and "--data" in said
    assert not (tmp_path / "cache").exists()


def test_the_program_itself_exits_with_2(tmp_path):
    command = [sys.executable, menas.__file__, "search", "--preset", "smok"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "did you mean smoke?" in done.stderr
    assert not list(tmp_path.iterdir())


# runs from end to end

def record(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_search_leaves_its_records(searched):
    result = record(searched)
    assert {"study", "config", "seed", "commit", "versions", "device", "seconds", "metrics"} <= set(result)
    assert result["study"] == "search" and result["seed"] == 1
    assert menas.Config(**result["config"]) == menas.configure("search", "smoke", threads=1, out=str(searched))
    assert json.loads((searched / "config.json").read_text()) == {"study": "search", **result["config"]}
    steps = [json.loads(line)["step"] for line in (searched / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 2 * (20 + 5)
    assert (searched / "cell.png").read_bytes().startswith(b"\x89PNG")
    assert not [path.name for path in searched.iterdir() if path.name.startswith(".")]


def test_the_metrics_of_a_search_are_those_of_its_cell_and_weights(searched):
    """Oracle: evaluate() of weights.pt and cell.json, and the grammar's own floor."""
    metrics, corpus = record(searched)["metrics"], menas.load_corpus(menas.Config(data="toy"))
    assert json.loads((searched / "cell.json").read_text()) == metrics["best_cell"]
    weights = torch.load(searched / "weights.pt", weights_only=True)
    rows = menas.encode([menas.cell_from_json(metrics["best_cell"])])
    loss = menas.evaluate(weights, rows, corpus.valid, menas.Config().eval_batch)
    assert math.isclose(metrics["valid_perplexity"], math.exp(loss), rel_tol=1e-5)
    assert metrics["floor_perplexity"] == corpus.floor["valid"] < metrics["valid_perplexity"] < len(corpus.words)


def test_a_finished_run_is_not_done_again(searched, capsys, monkeypatch):
    monkeypatch.setattr(menas, "study_search", None)
    contents = lambda: {path.name: path.read_bytes() for path in searched.iterdir()}
    before = contents()
    code, out, err = call(capsys, "search", *SMOKE, "--out", searched)
    assert code == 0 and "already finished" in out and err == ""
    assert contents() == before


def test_a_folder_belongs_to_one_seed_and_one_study(searched, capsys):
    said = refused(capsys, "search", *SMOKE, "--seed", "2", "--out", searched)
    assert "seed = 1, not 2" in said and str(searched) in said
    assert "study = 'search', not 'train'" in refused(capsys, "train", *SMOKE, "--out", searched)


def test_a_searched_cell_trains_from_scratch_and_from_the_shared_weights(searched, capsys, tmp_path):
    """The shared weights are a head start of two rounds: after the same short training they are ahead."""
    command = ["train", *SMOKE, "--epochs", "1", "--batch", "64", "--bptt", "35", "--lr", "1", "--cell", searched]
    assert call(capsys, *command, "--out", tmp_path / "scratch")[0] == 0
    assert call(capsys, *command, "--weights", searched, "--out", tmp_path / "shared")[0] == 0
    scratch, shared = (record(tmp_path / name)["metrics"] for name in ("scratch", "shared"))
    assert {"train_perplexity", "valid_perplexity", "test_perplexity", "parameters", "floor_perplexity"} <= set(shared)
    assert shared["parameters"] == scratch["parameters"]
    assert shared["floor_perplexity"] < shared["valid_perplexity"] < scratch["valid_perplexity"]


@pytest.mark.parametrize("words, names", [("--cell tree --hidden 8", "weights.pt|8"), ("--cell lstm", "lstm|--weights"),
                                          ("--cell enas", "12 nodes|than 4")])
def test_shared_weights_that_do_not_fit_are_refused(words, names, searched, capsys, tmp_path):
    """They are those of 16 units and of cells of 4 nodes."""
    said = refused(capsys, "train", *SMOKE, "--weights", searched, "--out", tmp_path / "run", *words.split())
    for name in names.split("|"):
        assert name in said


@pytest.mark.parametrize("damage", ["not a file of torch", "", None])
def test_damaged_shared_weights_are_refused(damage, searched, capsys, tmp_path):
    path = tmp_path / "search" / "weights.pt"
    path.parent.mkdir()
    torch.save({"another": torch.zeros(3)}, path) if damage is None else path.write_text(damage)
    said = refused(capsys, "train", *SMOKE, "--weights", path.parent, "--cell", searched, "--out", tmp_path / "run")
    assert str(path) in said


def test_a_run_without_a_found_cell_is_named(capsys, tmp_path, text):
    command = ["train", *SMOKE, "--data", text, "--epochs", "1"]
    assert call(capsys, *command, "--cell", "chain", "--out", tmp_path / "trained")[0] == 0
    said = refused(capsys, *command, "--cell", tmp_path / "trained", "--out", tmp_path / "run")
    assert str(tmp_path / "trained") in said


def test_a_cell_file_written_by_hand_trains(capsys, tmp_path, text):
    cell = {"nodes": [{"from": 1, "activation": "relu"}, {"from": "input", "activation": "tanh"}]}
    (tmp_path / "mine.json").write_text(json.dumps(cell))
    command = ["train", *SMOKE, "--data", text, "--epochs", "1", "--cell", tmp_path / "mine.json"]
    assert call(capsys, *command, "--out", tmp_path / "run")[0] == 0
    words = len(menas.load_corpus(menas.Config(data=str(text))).words)
    assert record(tmp_path / "run")["metrics"]["parameters"] == 4 * 16 ** 2 + 2 * 16 ** 2 + 16 * words + words
