"""What the tests of whole runs share: a small text, quick settings, refusals."""
import json
import re
import signal
from functools import partial
from unittest.mock import MagicMock

import pytest

import menas

SMALL = "--preset smoke --threads 1 --device cpu --hidden 4 --batch 8 --bptt 10".split()
QUICK = {"LOG_EVERY": 2, "CHECKPOINT_SECONDS": 0, "CAPACITY_WORDS": 40, "CAPACITY_RATES": (0,),
         "evaluate": partial(menas.evaluate, bptt=10, warm_up=10),
         "commit": lambda: "", "draw_cell": MagicMock()}  # they ask git, and draw


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Many lines of metrics and checkpoints, and little else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setattr(menas, name, value)
        yield


@pytest.fixture(autouse=True)
def signals():
    """No signal of one test is left to another."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    menas.STOP.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder with a text of 200 words."""
    folder = tmp_path_factory.mktemp("words")
    for split, text in menas.toy_corpus((200, 50, 50))[0].items():
        (folder / f"{split}.txt").write_text(" ".join(text).replace(" <eos>", "\n") + "<unk>\n")
    return folder


def refused(capsys, *arguments, code=2):
    """The one line on stderr with which a command line is refused, or ends a run (code 1)."""
    capsys.readouterr()
    ended = menas.main([str(word) for word in arguments])
    err = capsys.readouterr().err
    assert ended == code and re.fullmatch("menas: [^\n]{1,293}\n", err)
    return err


def rows_of(folder):
    return json.loads((folder / "result.json").read_text())["rows"]
