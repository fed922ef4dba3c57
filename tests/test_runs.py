"""A run killed at any instant ends as if undisturbed; one folder, one run.

Run: pytest tests/test_runs.py
"""
import gc
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

import menas
from menas import commit
from small import SMALL, quick, refused, rows_of, signals, words  # noqa: F401, some are fixtures

RUNS = {
    # with gradients remembered, and with trainings in folders of its own
    "search": "--nodes 2 --shared_steps 4 --controller_steps 2 --controller_samples 2 --epochs 2 "
              "--lookahead recent --derive_samples 3 --hidden_dropout .1 --retrain 1",
    # a network stops before the others, weights are averaged, learning rates fall
    "train": "--nodes 2 --cell random:1@2,random:2,random:1@5 --epochs 4 --average --patience 1 "
             "--lr 10 --schedule plateau --hidden_dropout .1",
    "capacity": "--nodes 2 --epochs 1 --derive_samples 1",
    "progress": "--nodes 2 --shared_steps 2 --controller_steps 2 --epochs 2 --derive_samples 2"}


def command(name, words, folder, *more):
    return [name, *RUNS[name].split(), *SMALL, "--data", str(words), "--out", str(folder), *more]


def outcome(folder):
    """What kills must not change: all rows of result.json, all bytes of metrics.jsonl."""
    found = {path: rows_of(path.parent) for path in folder.rglob("result.json")}
    found |= {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    return {path.relative_to(folder): content for path, content in found.items()}


def contents(folder):
    """All files but config.json, which knows where the folder is."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.json"]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, words):
    """name -> the folder of a run that nobody disturbed, made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def made(name):
        if not (folder / name).exists():
            assert menas.main(command(name, words, folder / name)) == 0
        return folder / name
    return made


def half_done(undisturbed, folder, name="search"):
    """A run as it was before it finished: every record and checkpoint, but no result."""
    shutil.copytree(undisturbed(name), folder / "run")
    (folder / "run" / "result.json").unlink()
    return folder / "run"


# killed: the oracle is the run that was not. Each command runs in a process that dies of SIGKILL as
# it writes its first file, then in one that dies at its fourth, and so on, until one lives on.

MORTAL = """
import json, os, signal, sys
import torch, menas
torch.optim.Adam([torch.zeros(1)])  # which is slow the first time, so not in each child
sys.path.insert(0, "tests")
from small import QUICK
vars(menas).update(QUICK)
runs = json.loads(sys.argv[1])
real = os.fsync
for name, arguments in runs.items():
    deaths, code = 0, None
    while code != 0:
        child = os.fork()
        if not child:
            left = [3 * deaths]
            def fsync(file):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            os.fsync = fsync
            os._exit(menas.main(arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        deaths += code != 0
    print(json.dumps({name: deaths}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, words):
    """The folder of all runs, each killed many times, and {run: times}."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {name: command(name, words, folder / name) for name in RUNS}
    done = subprocess.run([sys.executable, "-c", MORTAL, json.dumps(runs)], capture_output=True,
                          text=True, cwd=Path(menas.__file__).parent)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]  # and no other complaint
    return folder, {name: deaths for line in lines for name, deaths in line.items()}


@pytest.mark.parametrize("name", RUNS)
def test_kills_change_nothing(name, killed, undisturbed):
    folder, deaths = killed
    expected = outcome(undisturbed(name))
    assert deaths[name] >= 3 and outcome(folder / name) == expected
    assert len(expected) > 2 or name in ("train", "progress")  # those of trainings within
    for left in (folder / name).rglob(".menas-*"):  # what a kill cut short goes with the next run
        assert not (left.parent / "config.json").exists()


# stopped

def stopped(arguments):
    """The exit code of a command that is asked to stop, whose lock is gone with its last frame."""
    with pytest.raises(SystemExit) as left:
        menas.main(arguments)
    code = left.value.code
    del left
    gc.collect()
    menas.STOP.clear()
    return code


def at_step(monkeypatch, n, do):
    """Before the n-th step of SGD do() is called."""
    steps = count(1)

    def step(*arguments, right=menas.train_step):
        if next(steps) == n:
            do()
        return right(*arguments)
    monkeypatch.setattr(menas, "train_step", step)


def asked(monkeypatch, n, *numbers):
    """The process sends itself signals before the n-th step of SGD; no checkpoint is due."""
    monkeypatch.setattr(menas, "CHECKPOINT_SECONDS", 3600)
    at_step(monkeypatch, n, lambda: list(map(signal.raise_signal, numbers)))


@pytest.mark.parametrize("name, step, where, number", [
    ("search", 7, ".", signal.SIGTERM), ("search", 10, "*cells 0", signal.SIGTERM),
    ("train", 4, ".", signal.SIGINT)])
def test_asked_to_stop_it_saves_and_leaves(name, step, where, number, undisturbed, words, tmp_path,
                                           monkeypatch):
    """Between two lines; no checkpoint is due, so the one there is was asked for."""
    arguments = command(name, words, tmp_path)
    with monkeypatch.context() as patch:
        asked(patch, step, number)
        assert stopped(arguments) == 128 + number
    checkpoint, = tmp_path.glob(f"{where}/checkpoint.pt")
    saved = io.BytesIO(checkpoint.read_bytes()[menas.SEAL:])
    assert torch.load(saved, weights_only=True)["state"]["step"] > 0
    assert not (tmp_path / "result.json").exists()
    with open(checkpoint.with_name("metrics.jsonl"), "a") as file:
        file.write('{"step": 1000, "torn')  # as a disk may leave it
    assert menas.main(arguments) == 0
    assert outcome(tmp_path) == outcome(undisturbed(name))


def test_asked_twice_it_leaves_at_once(words, tmp_path, monkeypatch):
    asked(monkeypatch, 2, signal.SIGTERM, signal.SIGTERM)
    assert stopped(command("search", words, tmp_path)) == 128 + signal.SIGTERM
    assert not (tmp_path / "checkpoint.pt").exists()


def test_asked_while_deriving_it_leaves_too(words, tmp_path, monkeypatch):
    """Not ignored because trainings come next."""
    def derive(*arguments, right=menas.derive):
        signal.raise_signal(signal.SIGTERM)
        return right(*arguments)
    monkeypatch.setattr(menas, "derive", derive)
    assert stopped(command("search", words, tmp_path)) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*/"))


# a checkpoint is whole, of these settings, and no older than the metrics

def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def with_shorter_metrics(path):
    os.truncate(path.with_name("metrics.jsonl"), 50)


def without_metrics(path):
    path.with_name("metrics.jsonl").unlink()


@pytest.mark.parametrize("damage", [
    truncated, flipped, with_shorter_metrics, without_metrics, "--seed 2", "--lr 4.0",
    "--data COPY"])
def test_a_bad_checkpoint_is_refused_and_nothing_lost(damage, undisturbed, words, tmp_path, capsys,
                                                      monkeypatch):
    """Also one of other settings. Deleted, as the refusal says, the run starts again."""
    monkeypatch.chdir(tmp_path)  # so that the line is short
    folder = half_done(undisturbed, Path())
    if isinstance(damage, str):
        shutil.copytree(words, "COPY")
        other = command("search", words, "other", *damage.split())
        assert menas.main(other) == 0
        shutil.copy("other/checkpoint.pt", folder)
    else:
        damage(folder / "checkpoint.pt")
    before, arguments = contents(folder), command("search", words, folder)
    err = refused(capsys, *arguments)
    assert f"{folder / 'checkpoint.pt'} is refused" in err and "delete it to start again" in err
    assert contents(folder) == before
    if damage is truncated:
        (folder / "checkpoint.pt").unlink()
        assert menas.main(arguments) == 0
        assert outcome(folder) == outcome(undisturbed("search"))


# the machine fails: no memory, no disk. The oracle is the run that nothing happened to

def beyond_memory():
    """As torch says it of the CPU."""
    torch.empty(2 ** 60)


def beyond_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def beyond_pythons_memory():
    raise MemoryError


@pytest.mark.parametrize("name, fail", [
    ("search", beyond_memory), ("train", beyond_gpu_memory), ("train", beyond_pythons_memory)])
def test_out_of_memory_is_one_line_and_does_not_claim_the_folder(name, fail, words, tmp_path,
                                                                 monkeypatch, capsys):
    monkeypatch.setattr(menas, "CHECKPOINT_SECONDS", 3600)
    with monkeypatch.context() as patch:
        at_step(patch, 1, fail)
        said = refused(capsys, *command(name, words, tmp_path), code=1)
    for setting in ("--hidden", "--batch", "--bptt", "--controller_samples", "--cell"):
        assert setting in said
    assert menas.main(command(name, words, tmp_path, "--hidden", "3")) == 0


def test_a_mistake_of_ours_is_no_lack_of_memory(words, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        menas.main(command("train", words, tmp_path))


def test_a_full_disk_is_one_line_and_nothing_is_lost(undisturbed, words, tmp_path, capsys):
    """A file may not grow to its last byte, first the smallest one, at last the largest."""
    sizes, arguments = [], command("search", words, tmp_path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sorted({len(content) for content in contents(undisturbed("search")).values()} - {0}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, most))
        try:
            said = refused(capsys, *arguments, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert str(tmp_path) in said and "File too large" in said and "the same command" in said
        sizes.append(sum(len(content) for content in contents(tmp_path).values()))
    assert sizes[0] == 0 < sizes[-1] and not list(tmp_path.rglob(".menas-*"))
    assert menas.main(arguments) == 0
    assert outcome(tmp_path) == outcome(undisturbed("search"))


def test_a_folder_that_vanishes_is_one_line(undisturbed, words, tmp_path, monkeypatch, capsys):
    arguments = command("train", words, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: shutil.rmtree(tmp_path / "run"))
        assert str(tmp_path / "run") in refused(capsys, *arguments, code=1)
    assert menas.main(arguments) == 0
    assert outcome(tmp_path / "run") == outcome(undisturbed("train"))


def test_on_a_read_only_disk_a_finished_run_is_shown(undisturbed, words, tmp_path, monkeypatch,
                                                     capsys):
    """One that is not is one line."""
    folder = half_done(undisturbed, tmp_path)

    def read_only(path, mode="r"):
        raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr(menas, "open", read_only, raising=False)
    assert menas.main(command("search", words, undisturbed("search"))) == 0
    assert "already finished" in capsys.readouterr().out
    assert "Read-only" in refused(capsys, *command("search", words, folder), code=1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"rows": 3}', '{"rows": [{}]}',
                                     '{"hidden": "x", "rows": [{"group": "sampled", "cell": 1}]}'])
@pytest.mark.parametrize("file", ["result.json", "config.json"])
def test_damaged_records_are_refused(file, content, undisturbed, words, tmp_path, capsys):
    """Of a run that is named, or found finished."""
    folder = shutil.copytree(undisturbed("search"), tmp_path / "run")
    (folder / file).write_text(content)
    said = [refused(capsys, *command("train", words, tmp_path / "new", "--supernet", folder)),
            refused(capsys, "compare", "--data", words, "--supernet", folder, "--out", tmp_path),
            refused(capsys, *command("search", words, folder))]
    assert all(str(folder) in line for line in said)
    if file == "result.json":
        refused(capsys, *command("train", words, tmp_path / "new", "--cell", folder))


def test_what_an_older_version_did_not_record_is_its_default(undisturbed, words, tmp_path, capsys):
    """Of a run that is found finished, or whose shared weights are taken."""
    search = shutil.copytree(undisturbed("search"), tmp_path / "search")
    settings = json.loads((search / "config.json").read_text())
    assert settings.pop("task") == "none"
    menas.write_json(search / "config.json", settings)
    assert menas.main(command("search", words, search)) == 0
    assert "already finished" in capsys.readouterr().out
    more = ["--cell", str(search), "--supernet", str(search)]
    assert menas.main(command("train", words, tmp_path / "run", *more)) == 0


# one folder, one run

@pytest.mark.parametrize("more", ["--seed 2", "--lr 4.0", "--bptt 11"])
@pytest.mark.parametrize("name, finished", [("search", True), ("search", False),
                                            ("capacity", True)])
def test_other_settings_are_refused_by_name(name, finished, more, undisturbed, words, tmp_path,
                                            capsys):
    """Also of a study, whose own folder has no metrics."""
    folder = undisturbed(name) if finished else half_done(undisturbed, tmp_path)
    err = refused(capsys, *command(name, words, folder, *more.split()))
    flag, value = more[2:].split()
    assert f"{flag} = " in err and value in err and "--out" in err


def test_a_folder_belongs_to_one_command(undisturbed, words, capsys):
    err = refused(capsys, *command("train", words, undisturbed("search")))
    assert "'search'" in err and "'train'" in err


@pytest.mark.parametrize("finished", [True, False])
def test_a_text_or_cell_that_changed_in_place_is_refused(finished, undisturbed, words, tmp_path,
                                                         capsys):
    """Neither finished nor interrupted is a training taken for that of what the files hold now."""
    text, search = shutil.copytree(words, tmp_path / "text"), tmp_path / "search"
    shutil.copytree(undisturbed("search"), search)
    train = command("train", text, tmp_path / "run", "--epochs", "1", "--cell", str(search))
    assert menas.main(train) == 0
    if not finished:
        (tmp_path / "run" / "result.json").unlink()
    result = json.loads((search / "result.json").read_text())
    menas.write_json(search / "result.json", result | {"rows": result["rows"][1:]})
    assert "inputs" in refused(capsys, *train)
    menas.write_json(search / "result.json", result)
    assert menas.main(train) == 0
    with open(text / "test.txt", "a") as file:
        file.write("<unk>\n")
    assert "inputs" in refused(capsys, *train)


def test_shared_weights_that_changed_are_refused(undisturbed, words, tmp_path, capsys):
    search = shutil.copytree(undisturbed("search"), tmp_path / "search")
    train = command("train", words, tmp_path / "run", "--cell", search, "--supernet", search)
    train = [str(word) for word in train]
    assert menas.main(train) == 0
    weights = torch.load(search / "weights.pt", weights_only=True)
    weights["bias"] += 1
    menas.save_tensors(search / "weights.pt", weights)
    assert "inputs" in refused(capsys, *train)


def test_two_runs_in_one_folder_are_refused(words, tmp_path, capsys):
    run = menas.Run("search", menas.configure("search", "smoke", out=str(tmp_path)))
    run.open()
    assert "another run" in refused(capsys, *command("capacity", words, tmp_path))
    del run  # which frees the folder
    assert menas.main(command("capacity", words, tmp_path)) == 0


@pytest.mark.parametrize("name", ["search", "capacity"])
def test_a_finished_run_is_found_wherever_it_is(name, undisturbed, words, tmp_path, capsys,
                                                monkeypatch):
    """Nothing is done again, and no record changes."""
    folder = shutil.copytree(undisturbed(name), tmp_path / "elsewhere")
    before = contents(folder)
    monkeypatch.setattr(menas, "network", None)
    assert menas.main(command(name, words, folder)) == 0
    assert "already finished" in capsys.readouterr().out and contents(folder) == before


def test_a_search_goes_on_with_its_trainings(undisturbed, words, tmp_path):
    """It stopped between the found cell's training and the LSTM's, and was moved since."""
    folder = half_done(undisturbed, tmp_path)
    lstm, = folder.glob("*lstm*")
    shutil.rmtree(lstm)
    cell, = folder.glob("*/result.json")
    done = cell.stat().st_mtime_ns
    assert menas.main(command("search", words, folder)) == 0
    assert outcome(folder) == outcome(undisturbed("search")) and cell.stat().st_mtime_ns == done


def test_the_seconds_of_a_run_are_those_of_all_its_parts(tmp_path):
    """By hand: a hundred of a run that was interrupted, by whoever asks next."""
    config = menas.configure("search", "smoke", out=str(tmp_path))
    before, after = menas.Run("search", config), menas.Run("search", config)
    before.restore()
    before.started -= 100
    before.keep({"step": 1})
    before.save()
    assert after.restore() == {"step": 1}
    assert 100 <= time.time() - after.started < 200


# records

def test_what_is_no_number_is_null(tmp_path):
    value = {"a": [math.nan, {"b": (math.inf, -math.inf, 1.5)}], "NaN": "-Infinity, NaN", "c": True}
    menas.write_json(tmp_path / "x.json", value)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == value | {"a": [None, {"b": [None, None, 1.5]}]}


def test_metrics_are_strict_json_also_where_all_networks_fail(words, tmp_path, monkeypatch,
                                                              capsys):
    """They count as guessing, and are marked."""
    def broken(*arguments, right=menas.standalone_weights):
        return {name: w * math.nan for name, w in right(*arguments).items()}
    monkeypatch.setattr(menas, "standalone_weights", broken)
    assert menas.main(command("train", words, tmp_path)) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()[-5:]
    at = [name.strip() for name in header.split("|")].index("failed")
    assert [line.split("|")[at].strip() for line in lines] == ["1"] * 3
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    guess = math.log(len(menas.load_corpus(menas.Config(data=str(words))).words))
    assert [(row["failed"], row["test"]) for row in rows_of(tmp_path)] == [(1, guess)] * 3


def test_a_search_marks_what_is_no_number(undisturbed, words, tmp_path, monkeypatch, capsys):
    """Not where all is well."""
    assert menas.main(command("search", words, undisturbed("search"))) == 0
    assert "failed" not in capsys.readouterr().out

    def score(weights, rows, *_, **__):
        return torch.full([len(rows)], math.nan)
    monkeypatch.setattr(menas, "score", score)
    assert menas.main(command("search", words, tmp_path / "run", "--retrain", "0")) == 0
    assert "failed" in capsys.readouterr().out
    assert all(row["failed"] for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize("content", ["text, not bytes", None, b"new"])
def test_what_cannot_be_written_leaves_the_old_file_alone(content, tmp_path, monkeypatch):
    """Neither a wrong content nor a full disk leaves a trace."""
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises((TypeError, OSError)):
        menas.write_atomically(tmp_path / "file", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_the_commit_is_empty_without_git_and_outside_a_repository(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(menas, "__file__", str(tmp_path / "menas.py"))
        assert commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""
