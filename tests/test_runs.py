"""A run killed at any instant ends as if undisturbed; one folder, one run. Run: pytest tests/test_runs.py"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import menas

# Options that bring every kind of state into the checkpoint: masks, lengths, a baseline's memory, averages, seeds.
SEARCH = "search --preset smoke --epochs 5 --log_every 5 --random_bptt --hidden_dropout .1 " \
         "--baseline moving_average".split()
TRAIN = "train --preset smoke --epochs 8 --log_every 3 --cell random:1,random:2 --replicas 2 --hidden_dropout .1 " \
        "--average --schedule cosine --plateau 2 --patience 2".split()
PATIENCE = 120  # seconds after which a test gives up waiting


def command(study, text, folder, checkpoint_seconds=0):
    return [*study, "--device", "cpu", "--threads", "1", "--data", str(text), "--out", str(folder),
            "--checkpoint_seconds", str(checkpoint_seconds)]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line in this process."""
    return menas.main(list(arguments)), *capsys.readouterr()


def start(arguments):
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, menas.__file__, *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def outcome(folder):
    """What must not depend on kills: the metrics of the result and the bytes of metrics.jsonl."""
    return json.loads((folder / "result.json").read_text())["metrics"], (folder / "metrics.jsonl").read_bytes()


def wait_until(happens, process):
    """Until happens() or the process has ended."""
    deadline = time.time() + PATIENCE
    while process.poll() is None and not happens():
        assert time.time() < deadline
        time.sleep(.005)


def checkpoint_of(folder):
    """Changes with every checkpoint written."""
    try:
        found = (folder / "checkpoint.pt").stat()
    except FileNotFoundError:  # none yet
        return None
    return found.st_mtime_ns, found.st_ino


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    """Folders of a search and a training that nobody disturbed."""
    folders = {}
    for study in (SEARCH, TRAIN):
        folders[study[0]] = tmp_path_factory.mktemp("undisturbed") / study[0]
        assert menas.main(command(study, text, folders[study[0]])) == 0
    return folders


# killed: the oracle is the run that was not

@pytest.mark.parametrize("study", [SEARCH, TRAIN], ids=["search", "train"])
def test_three_kills_change_nothing(study, undisturbed, text, tmp_path, capsys):
    draw, arguments, killed = random.Random(study[0]), command(study, text, tmp_path / "run"), 0
    for _ in range(3):
        before = checkpoint_of(tmp_path / "run") if (tmp_path / "run").exists() else None
        process = start(arguments)
        wait_until(lambda: checkpoint_of(tmp_path / "run") not in (None, before), process)  # it is at work
        time.sleep(draw.uniform(0, .3))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed > 0
    code, _, err = call(capsys, *arguments)
    assert code == 0 and err == ""
    assert outcome(tmp_path / "run") == outcome(undisturbed[study[0]])


def test_sigterm_saves_and_leaves(undisturbed, text, tmp_path, capsys):
    """With no checkpoint due for an hour, the one that is there is the one SIGTERM asked for."""
    process = start(command(SEARCH, text, tmp_path / "run", 3600))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    assert process.poll() is None and checkpoint_of(tmp_path / "run") is None
    process.terminate()
    asked = time.time()
    assert process.communicate(timeout=PATIENCE)[1] == b"" and process.returncode == 128 + signal.SIGTERM
    assert time.time() - asked < 5
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    assert saved["step"] >= 5 and not (tmp_path / "run" / "result.json").exists()
    assert call(capsys, *command(SEARCH, text, tmp_path / "run"))[0] == 0
    assert outcome(tmp_path / "run") == outcome(undisturbed["search"])


def copy_of(folder, tmp_path):
    """A finished run as it was just before it finished: every record and checkpoint, but no result."""
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def test_sigterm_while_deriving_leaves_too(undisturbed, text, tmp_path, monkeypatch):
    """Not after hours of scoring, and not ignored because retraining comes next."""
    asked = []

    def derive(*arguments, original=menas.derive):
        if not asked:
            asked.append(signal.raise_signal(signal.SIGTERM))
        return original(*arguments)
    monkeypatch.setattr(menas, "derive", derive)
    folder = copy_of(undisturbed["search"], tmp_path)
    with pytest.raises(SystemExit) as left:
        menas.main(command(SEARCH, text, folder))
    assert left.value.code == 128 + signal.SIGTERM
    assert not (folder / "result.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handler is gone with the run


def test_sigterm_in_a_part_stops_the_whole(tmp_path):
    """Asked for when a study's sub-run has nothing more to obey: that one finishes, the study does not go on."""
    config = menas.configure("search", "smoke", out=str(tmp_path))

    def part(_, run):
        signal.raise_signal(signal.SIGTERM)
        return {"done": True}

    def whole(_, run):
        menas.run_study("train", part, menas.replace(config, out=str(tmp_path / "part")))
        run.obey()

    with pytest.raises(SystemExit) as left:
        menas.run_study("search", whole, config)
    assert left.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "part/result.json").exists() and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("moved", [False, True])
def test_a_search_goes_on_with_its_retraining(moved, text, tmp_path, capsys):
    """Oracle: the same run, undisturbed. It stopped between the found cell's training and the LSTM's."""
    arguments = [*SEARCH[:3], "--epochs", "1", "--retrain"]
    assert call(capsys, *command(arguments, text, tmp_path / "run"))[0] == 0
    expected = outcome(tmp_path / "run"), outcome(tmp_path / "run" / "lstm")
    folder = shutil.move(tmp_path / "run", tmp_path / "moved") if moved else tmp_path / "run"
    for path in (folder / "result.json", folder / "lstm" / "result.json"):
        path.unlink()
    finished = (folder / "found" / "result.json").stat().st_mtime_ns
    assert call(capsys, *command(arguments, text, folder))[0] == 0
    assert (outcome(folder), outcome(folder / "lstm")) == expected
    assert (folder / "found" / "result.json").stat().st_mtime_ns == finished


# bad checkpoints

def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def text_file(path):
    path.write_text("these are not the weights you are looking for\n")


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def of_another_study(path):
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "format": saved["format"].replace("search", "train")}, path)


def of_another_format(path):
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "format": saved["format"].replace("2", "1")}, path)


DAMAGE = [truncated, empty, text_file, foreign, of_another_study, of_another_format]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_bad_checkpoint_is_refused_and_nothing_lost(damage, undisturbed, text, tmp_path, capsys):
    """Deleted, as the refusal says, the run starts again. Oracle: the run that nobody disturbed."""
    folder = copy_of(undisturbed["search"], tmp_path)
    damage(folder / "checkpoint.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, _, err = call(capsys, *command(SEARCH, text, folder))
    assert code == 2 and err.count("\n") == 1
    assert f"{folder / 'checkpoint.pt'} is refused" in err and "delete it to start again" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (folder / "checkpoint.pt").unlink()
    assert call(capsys, *command(SEARCH, text, folder))[0] == 0
    assert outcome(folder) == outcome(undisturbed["search"])


# one folder, one run

def config_in(folder):
    return menas.configure("search", "smoke", out=str(folder))


def test_two_runs_in_one_folder_are_refused(text, tmp_path, capsys):
    arguments = command(SEARCH[:3], text, tmp_path / "run")
    with menas.Run("search", config_in(tmp_path / "run")):
        code, _, err = call(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1
    assert "another run" in err and str(tmp_path / "run") in err


def test_a_killed_run_frees_its_folder(tmp_path):
    """Oracle: the operating system's lock, held by a forked process until SIGKILL."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with menas.Run("search", config_in(tmp_path)):
                os.write(write, b"!")
                time.sleep(PATIENCE)
        finally:
            os._exit(1)
    os.read(ready, 1)
    with pytest.raises(menas.UserError, match="another run"):
        menas.Run("search", config_in(tmp_path)).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with menas.Run("search", config_in(tmp_path)):
        pass


def test_a_config_that_is_not_one_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text("[]")
    code, _, err = call(capsys, *command(SEARCH[:3], text, tmp_path))
    assert code == 2 and err.count("\n") == 1 and str(tmp_path / "config.json") in err
    assert (tmp_path / "config.json").read_text() == "[]"


@pytest.mark.parametrize("done", [True, False])
def test_an_edited_cell_is_another_training(done, tmp_path, capsys, text, monkeypatch):
    """Neither a finished nor an interrupted training is taken for that of what the file holds now."""
    cell = menas.cell_to_json(menas.CELLS["tree"]._replace(nodes=menas.CELLS["tree"].nodes[:4]))
    menas.write_json(tmp_path / "mine.json", cell)
    train = command(["train", "--cell", f"{tmp_path / 'mine.json'}@3"], text, tmp_path / "run")
    with monkeypatch.context() as patch:
        if not done:
            patch.setattr(menas.Run, "obey", lambda self: sys.exit(143) if self.good else None)
            with pytest.raises(SystemExit):
                menas.main(train)
    assert call(capsys, *train)[0] == 0  # finishes it, or finds it finished
    if not done:
        (tmp_path / "run" / "result.json").unlink()
    cell["nodes"][1]["activation"] = "identity" if cell["nodes"][1]["activation"] != "identity" else "relu"
    menas.write_json(tmp_path / "mine.json", cell)
    code, _, err = call(capsys, *train)
    assert code == 2 and "cells' files" in err and "another --out" in err


# records

@pytest.mark.parametrize("content", ["text, not bytes", None])
def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(content, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(TypeError):
        menas.write_atomically(tmp_path / "file", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(menas.os, "fsync", full)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError):
        menas.write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_the_metrics_have_a_line_for_every_stretch_of_steps_and_no_times(undisturbed):
    """5 rounds of 20 shared and 5 controller steps, a line every 5: those of each phase are in its own lines."""
    lines = [json.loads(line) for line in (undisturbed["search"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 126, 5))
    for line in lines:
        assert ("reward" in line) == (line["step"] % 25 == 0) != ("loss" in line)
        assert not {"seconds", "time"} & set(line)


def test_the_commit_is_empty_without_git_and_outside_a_repository(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(menas, "__file__", str(tmp_path / "menas.py"))
        assert menas.commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert menas.commit() == ""
