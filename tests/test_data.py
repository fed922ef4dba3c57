"""Text comes in right: downloads, bad input, every token once, the toy grammar. Run: pytest tests/test_data.py"""
import hashlib
import http.client
import itertools
import math
import random
import re
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import menas

CONTENT = b" a b \n c \n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def ptb_files():
    """The folder of the real PTB files, or the test is skipped."""
    beside, cache = Path(menas.__file__).resolve().parent.parent / "shared", Path("~/.cache/menas").expanduser()
    found = [folder / "ptb" for folder in (beside, cache) if (folder / "ptb" / "train.txt").exists()]
    return found[0] if found else pytest.skip("the PTB files are not here")


def complaint(function, *arguments):
    """The one line of the UserError that function raises."""
    with pytest.raises(menas.UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def corpus_of(folder, train, valid="a b\n", test="a b\n"):
    """load_corpus() of three texts, str or bytes."""
    for split, content in zip(menas.SPLITS, (train, valid, test)):
        (folder / f"{split}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return menas.load_corpus(menas.Config(data=str(folder)))


# Penn Treebank: counts as published with it, hashes as in PTB_SHA256

def test_ptb_has_the_published_counts():
    corpus = menas.load_corpus(menas.Config(data=str(ptb_files())))
    counts = [len(tokens) for tokens in (corpus.train, corpus.valid, corpus.test)]
    assert counts == [929_589, 73_760, 82_430]
    assert len(corpus.words) == 10_000 and "<unk>" in corpus.words
    assert corpus.floor == {}


def test_ptb_files_in_the_cache_are_taken_without_a_download(monkeypatch):
    folder = ptb_files()
    monkeypatch.setattr(menas.urllib.request, "urlopen", None)
    assert menas.ptb_folder(str(folder.parent)) == folder


def test_a_file_with_a_wrong_hash_in_the_cache_is_refused_and_kept(tmp_path):
    path = tmp_path / "ptb" / "train.txt"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert str(path) in complaint(menas.ptb_folder, str(tmp_path))
    assert path.read_bytes() == CONTENT


# downloads: the oracle is the file at the other end of a file:// address

def mirrors(folder, *contents):
    """An address for each content; None is a file that does not exist."""
    for i, content in enumerate(contents):
        if content is not None:
            (folder / f"mirror{i}-train.txt").write_bytes(content)
    return tuple(f"{folder.as_uri()}/mirror{i}-{{}}.txt" for i in range(len(contents)))


@pytest.fixture
def train_only(monkeypatch):
    """As if PTB were one file, of this content."""
    monkeypatch.setattr(menas, "PTB_SHA256", {"train": SHA256})


def fetch(folder, *contents):
    return menas.ptb_folder(folder / "cache", mirrors(folder, *contents))


@pytest.mark.parametrize("bad", [[None], [b"an error page"], [None, b"", CONTENT + b"x"]], ids=str)
def test_the_first_mirror_with_the_right_hash_wins(tmp_path, train_only, bad):
    assert fetch(tmp_path, *bad, CONTENT, b"never asked") == tmp_path / "cache" / "ptb"
    assert [path.name for path in (tmp_path / "cache" / "ptb").iterdir()] == ["train.txt"]
    assert (tmp_path / "cache" / "ptb" / "train.txt").read_bytes() == CONTENT


def test_a_failed_download_says_why_and_leaves_nothing(tmp_path):
    line = complaint(fetch, tmp_path, None, b"an error page")
    assert "train.txt" in line and "--data" in line
    assert "mirror0" in line and "mirror1-train.txt: wrong SHA-256" in line
    assert not list(tmp_path.glob("cache/**/*.txt*"))


def test_a_download_cut_off_in_the_middle_goes_on_to_the_next_mirror(tmp_path, monkeypatch, train_only):
    def cut():
        raise http.client.IncompleteRead(b"half")
    answers = iter([SimpleNamespace(read=cut), SimpleNamespace(read=lambda: CONTENT)])
    monkeypatch.setattr(menas.urllib.request, "urlopen", lambda *_, **__: nullcontext(next(answers)))
    folder = menas.ptb_folder(tmp_path, ("http://one/{}", "http://two/{}"))
    assert (folder / "train.txt").read_bytes() == CONTENT


def test_a_download_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, train_only):
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(menas.os, "fsync", full)
    assert "No space left" in complaint(fetch, tmp_path, CONTENT)
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file()]


# a folder of one's own

def test_words_are_split_at_spaces_and_each_line_ends_in_eos(tmp_path):
    corpus = corpus_of(tmp_path, " b  a\t\n\n \nc", "a\nb", "c a\r\n")
    read = lambda tokens: " ".join(corpus.words[i] for i in tokens)
    assert corpus.words == ["<eos>", "a", "b", "c"]
    assert read(corpus.train) == "b a <eos> c <eos>"
    assert read(corpus.valid) == "a <eos> b <eos>"
    assert read(corpus.test) == "c a <eos>"


def test_an_unknown_word_is_unk_where_the_training_text_has_it(tmp_path):
    corpus = corpus_of(tmp_path, "a <unk> b\n", "a new b\n")
    assert [corpus.words[i] for i in corpus.valid] == ["a", "<unk>", "b", "<eos>"]


def test_an_unknown_word_without_unk_is_named(tmp_path):
    line = complaint(corpus_of, tmp_path, "a b\n", "a b\n", "a novel b\n")
    assert "'novel'" in line and "test.txt" in line


@pytest.mark.parametrize("train, says", [("", "train.txt is refused: 0 tokens"),
                                         ("\n \n", "train.txt is refused: 0 tokens"),
                                         ("word\n", "train.txt is refused: 2 tokens"),
                                         (b"ab\xff\n", "train.txt is refused: 'utf-8' codec can't")])
def test_bad_files_are_named(tmp_path, train, says):
    assert says in complaint(corpus_of, tmp_path, train)


def test_missing_folders_and_files_are_named(tmp_path):
    load = lambda data: menas.load_corpus(menas.Config(data=str(data)))
    assert str(tmp_path / "nowhere") in complaint(load, tmp_path / "nowhere")
    assert "'pbt'" in (line := complaint(load, "pbt")) and "did you mean ptb?" in line
    assert "train.txt" in complaint(load, tmp_path)


def test_a_batch_larger_than_the_corpus_is_refused():
    line = complaint(menas.Stream, torch.arange(60), 64, 35)
    assert "batch 64" in line and "60 tokens" in line


# streams: the text is 0, 1, 2, ..., so that a token is its own position

def epoch_of(stream):
    """The segments of one epoch."""
    segments = [stream.next()]
    while not segments[-1].ends:
        segments.append(stream.next())
    return segments


GRID = list(itertools.product((12, 50, 331), (1, 3, 6), (1, 7, 35), (False, True)))


@pytest.mark.parametrize("count, batch, bptt, vary", GRID)
def test_every_token_but_the_first_is_a_target_once_an_epoch(count, batch, bptt, vary):
    stream = menas.Stream(torch.arange(count), batch, bptt, ("test",), vary)
    for _ in range(2):
        segments = epoch_of(stream)
        inputs, targets = (torch.cat([s[i] for s in segments]) for i in (0, 1))          # [all steps, B]
        real = targets >= 0
        assert sorted(targets[real].tolist()) == list(range(1, count))
        assert (inputs[real] == targets[real] - 1).all()
        for column in range(batch):  # each stream reads on where it stopped, so that h can be carried
            read = targets[real[:, column], column]
            assert (read.diff() == 1).all()
            assert real[:len(read), column].all()


@pytest.mark.parametrize("vary", [False, True])
def test_a_segment_knows_the_one_before(vary):
    segments = epoch_of(menas.Stream(torch.arange(500), 3, 10, ("test",), vary))
    assert segments[0].before is None
    for one, two in itertools.pairwise(segments):
        assert two.before.equal(one.inputs)


def test_segments_of_fixed_length_have_one_shape():
    segments = epoch_of(menas.Stream(torch.arange(331), 3, 35))
    assert {s.inputs.shape for s in segments} == {s.targets.shape for s in segments} == {(35, 3)}


def test_random_lengths_are_those_of_the_corrected_enas():
    """Normal around 35 with sd 5, 5 % of the time around 17.5, at least 5 and at most 55: mean 34.1."""
    stream = menas.Stream(torch.arange(40_000), 1, 35, ("test",), True)
    lengths = torch.tensor([len(s.inputs) for s in epoch_of(stream)[:-1]], dtype=torch.float)
    again = [len(s.inputs) for s in epoch_of(stream)[:-1]]
    assert lengths.min() >= 5 and lengths.max() <= 55
    assert abs(lengths.mean() - 34.1) < 0.7 and 5 < lengths.std() < 8  # of 1,170 draws: 4 standard errors
    assert lengths.tolist()[:20] != again[:20]


@pytest.mark.parametrize("vary", [False, True])
def test_reading_goes_on_where_it_stopped(vary):
    make = lambda: menas.Stream(torch.arange(300), 4, 7, ("test",), vary)
    stream = make()
    for _ in range(15):  # into the second epoch
        stream.next()
    resumed = make()
    resumed.place = stream.place
    for _ in range(30):
        for mine, theirs in zip(resumed.next(), stream.next()):
            assert mine is theirs or torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


# the toy grammar

corpus = lru_cache(menas.toy_corpus)


def reachable_states(count):
    """States met on a random walk that takes every move with the same probability, so that it also nests deep."""
    random_, state, seen = random.Random(1), (0, (), "start"), set()
    while len(seen) < count:
        seen.add(state)
        state = random_.choice(menas.toy_next(state))[2]
    return seen


def test_probabilities_of_the_next_word_sum_to_one():
    states = reachable_states(400)
    assert {phase for _, _, phase in states} == {"start", "noun", "verb", "adverb"}
    assert max(len(due) for _, due, _ in states) == menas.TOY_DEPTH
    for state in states:
        moves = menas.toy_next(state)
        assert all(p > 0 for _, p, _ in moves)
        assert math.isclose(sum(p for _, p, _ in moves), 1)
        assert len({word for word, _, _ in moves}) == len(moves)  # so the words tell the state: no ambiguity


def zipf(letter):
    """The i-th word of a kind has a probability proportional to 1 / (i + 1)."""
    weights = [1 / (i + 1) for i in range(menas.TOY_WORDS)]
    return weights["abcdefghij".index(letter)] / sum(weights)


def parse(words):
    """[(word, its probability given all before)], by a pushdown parser written from the description of the grammar."""
    topic, due, before, scored = "0", [], "<eos>", []
    for word in words:
        p, kind = 1.0, word if word in ("that", "<eos>") else word[:-2] if word[0] in "nv" else word[:-1]
        if before not in ("<eos>", "that"):  # what may be left out here was, or was not
            optional, chance = {"n": ("that", menas.TOY_NEST * (len(due) < menas.TOY_DEPTH)),
                                "v": ("adv", menas.TOY_ADVERB), "adv": ("adv", 0)}[before]
            p = chance if kind == optional else 1 - chance
        if kind == "n":
            assert before in ("<eos>", "that")
            keeps = menas.TOY_TOPIC if word[1] == topic else (1 - menas.TOY_TOPIC) / (menas.TOY_CLASSES - 1)
            p *= zipf(word[2]) * (1 / menas.TOY_CLASSES if due else keeps)
            topic = topic if due else word[1]
            due.append(word[1:])
        elif kind == "v":
            noun = due.pop()
            assert noun[0] == word[1], "a verb has its noun's class"
            p *= menas.TOY_ECHO * (noun[1] == word[2]) + (1 - menas.TOY_ECHO) * zipf(word[2])
        elif kind == "adv":
            p *= zipf(word[3])
        else:
            assert kind == "that" or not due, "a sentence ends when all verbs are said"
        scored.append((word, p))
        before = kind
    return scored


@pytest.mark.parametrize("split", menas.SPLITS)
def test_the_floor_is_the_perplexity_under_the_grammar(split):
    texts, floor = corpus()
    logs = [math.log(p) for _, p in parse(texts[split])]
    assert math.isclose(floor[split], math.exp(-sum(logs[1:]) / len(logs[1:])), rel_tol=1e-12)


def test_every_verb_agrees_with_its_noun():
    """Oracle: deletion from the inside out. Without its 'noun verb' pairs that agree, nothing of a sentence is left."""
    for sentence in " ".join(corpus()[0]["valid"]).split(" <eos>"):
        sentence, pairs = re.sub(r"adv\w ", "", sentence.strip() + " ").replace("that ", ""), 1
        while pairs:
            sentence, pairs = re.subn(r"n(\d)\w v\1\w ", "", sentence)
        assert sentence.strip() == ""


def test_the_toy_corpus_is_the_same_every_time():
    assert menas.toy_corpus((500, 100, 100)) == menas.toy_corpus((500, 100, 100))


def test_valid_and_test_have_no_word_that_train_lacks():
    texts, _ = corpus()
    assert set(texts["valid"]) | set(texts["test"]) <= set(texts["train"])
    assert [text[-1] for text in texts.values()] == ["<eos>"] * 3  # whole sentences
    for split, size in zip(menas.SPLITS, (60_000, 6_000, 6_000)):
        assert size <= len(texts[split]) < size + 200


def test_the_corpus_carries_the_floor():
    loaded = menas.load_corpus(menas.Config(data="toy"))
    assert loaded.floor == corpus()[1]
    assert 1 < loaded.floor["valid"] < len(loaded.words)
