"""What every test file needs: the menas.py of this folder, one thread, a small text."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# a sum's order of additions, and so its last bits, depends on the number of threads
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with a text of 6,000 words for --data: the toy corpus in short."""
    import menas
    folder = tmp_path_factory.mktemp("text")
    for split, words in menas.toy_corpus((6000, 600, 600))[0].items():
        lines = " ".join(words).replace(" <eos> ", "\n").replace(" <eos>", "\n")
        (folder / f"{split}.txt").write_text(lines)
    return folder
