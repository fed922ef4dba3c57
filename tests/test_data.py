"""Text comes in right: downloads, bad input, every token once, the toy grammar.

Run: pytest tests/test_data.py
"""
import hashlib
import math
import random
import re
from collections import Counter
from itertools import chain, pairwise

import pytest

import menas

CONTENT = b" a b \n c \n"


def complaint(function, *arguments):
    """The one line of the UserError that function raises."""
    with pytest.raises(menas.UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Penn Treebank: the oracle is the file at the other end of a file:// address

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """PTB is one file, of this content; what is not a file:// address is not there."""
    def opened(address, right=menas.urllib.request.urlopen, **how):
        assert address.startswith("file://")
        return right(address, **how)
    monkeypatch.setattr(menas, "PTB_SHA256", {"train": hashlib.sha256(CONTENT).hexdigest()})
    monkeypatch.setattr(menas.urllib.request, "urlopen", opened)


def fetch(folder, content=None):
    """ptb_folder() from an address with this content; None is one that does not exist."""
    if content is not None:
        (folder / "source-train.txt").write_bytes(content)
    return menas.ptb_folder(folder / "cache", f"{folder.as_uri()}/source-{{}}.txt")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("cache/*")}


def test_what_is_absent_is_fetched_once(tmp_path):
    assert fetch(tmp_path, CONTENT) == tmp_path / "cache"
    assert files(tmp_path) == {"train.txt": CONTENT}
    (tmp_path / "source-train.txt").unlink()
    assert fetch(tmp_path) == tmp_path / "cache"


def full(_):
    """As os.fsync() on a full disk."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("content, reason", [
    (None, "No such file"), (b"an error page", "wrong SHA-256"), (CONTENT + b"x", "wrong SHA-256"),
    (CONTENT, "No space left")])
def test_a_failed_download_says_why_and_leaves_nothing(content, reason, tmp_path, monkeypatch):
    if content == CONTENT:
        monkeypatch.setattr(menas.os, "fsync", full)
    line = complaint(fetch, tmp_path, content)
    assert "source-train.txt" in line and "--data" in line and reason in line
    assert files(tmp_path) == {}


def test_a_file_with_a_wrong_hash_is_refused_and_kept(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "train.txt").write_bytes(b"mine")
    assert str(tmp_path / "cache" / "train.txt") in complaint(fetch, tmp_path, CONTENT)
    assert files(tmp_path) == {"train.txt": b"mine"}


# a folder of one's own

def corpus_of(folder, train, valid="a b\n", test="a b\n"):
    """load_corpus() of three texts, str or bytes."""
    for split, content in zip(menas.SPLITS, (train, valid, test)):
        content = content if isinstance(content, bytes) else content.encode()
        (folder / f"{split}.txt").write_bytes(content)
    return menas.load_corpus(menas.Config(data=str(folder)))


@pytest.mark.parametrize("content, words", [
    ("a b\nc\n", "a b <eos> c <eos>"), ("a b\nc", "a b <eos> c <eos>"),
    (b"\xef\xbb\xbfa b\n", "a b <eos>"), ("a\r\nb\r\n", "a <eos> b <eos>"),
    (" b  a\t\n\n \nc", "b a <eos> <eos> <eos> c <eos>"), ("a b\n\n", "a b <eos> <eos>"),
    ("\n\n\n", "<eos> <eos> <eos>"), ("a\x0cé\n", "a é <eos>")], ids=repr)
def test_words_are_split_at_spaces_and_every_line_ends_in_eos(tmp_path, content, words):
    corpus = corpus_of(tmp_path, content, content, content)
    assert corpus.words == sorted(set(words.split())) and corpus.floor == {}
    for tokens in (corpus.train, corpus.valid, corpus.test):
        assert " ".join(corpus.words[i] for i in tokens) == words


UNKNOWN = [
    # train, valid -> train and valid as they are read; and of each split how many are made <unk>
    ("a <unk> b\n", "a new b\n", ["a <unk> b <eos>", "a <unk> b <eos>"], "0, 1, 0"),
    # no <unk> to learn from: what train has once is one, also where valid has it
    ("a a b b c\n", "c new b\n", ["a a b b <unk> <eos>", "<unk> <unk> b <eos>"], "1, 2, 0"),
    # nothing is seen once
    ("a a b b\n", "a new\n", ["a a b b <eos>", "a <unk> <eos>"], "0, 1, 0"),
    # nobody needs one
    ("a b c\n", "a b\n", ["a b c <eos>", "a b <eos>"], None)]


@pytest.mark.parametrize("train, valid, read, counts", UNKNOWN)
def test_what_the_training_text_lacks_is_unk(train, valid, read, counts, tmp_path, capsys):
    corpus = corpus_of(tmp_path, train, valid, "a b\n")
    for tokens, words in zip(corpus, read):
        assert " ".join(corpus.words[i] for i in tokens) == words
    assert set(corpus.words) == set(" ".join(read).split())
    said = capsys.readouterr().out
    if counts is None:
        assert said == ""
        return
    sizes = [len(tokens) for tokens in corpus[:3]]
    expected = [f"{n} of {split} ({int(n) / size:.2%})"
                for n, split, size in zip(counts.split(", "), menas.SPLITS, sizes)]
    assert said.count("\n") == 1 and ", ".join(expected) in said


def test_a_character_is_a_token_also_a_space(tmp_path):
    """Oracle: written out by hand."""
    for split in menas.SPLITS:
        (tmp_path / f"{split}.txt").write_text("a  b\n\né字\n")
    corpus = menas.load_corpus(menas.Config(data=str(tmp_path), unit="char"))
    read = [corpus.words[i] for i in corpus.valid]
    assert read == ["a", " ", " ", "b", "<eos>", "<eos>", "é", "字", "<eos>"]
    assert "toy" in complaint(menas.load_corpus, menas.Config(data="toy", unit="char"))


def test_one_file_is_split_by_lines(tmp_path, capsys):
    """Oracle: of 40 lines 36, 2 and 2, in their order."""
    (tmp_path / "text").write_text("".join(f"a b {i // 38}\n" for i in range(40)))
    corpus = menas.load_corpus(menas.Config(data=str(tmp_path / "text")))
    sizes = [(tokens == corpus.words.index("<eos>")).sum().item() for tokens in corpus[:3]]
    assert sizes == [36, 2, 2] and "90 %" in capsys.readouterr().out
    assert [corpus.words[i] for i in corpus.test] == "a b <unk> <eos>".split() * 2


@pytest.mark.parametrize("train, says", [("", "train text has 1 token"), (b"ab\xff\n", "utf-8"),
                                         ("word\n", "train text has 2 tokens")])
def test_bad_files_are_named(tmp_path, train, says):
    line = complaint(corpus_of, tmp_path, train)
    assert str(tmp_path) in line and "train" in line and says in line


@pytest.mark.parametrize("name, says", [("nowhere", "nowhere"), ("pbt", "did you mean ptb?"),
                                        ("file", "file: the train text"), (".", "train.txt")])
def test_missing_folders_and_files_are_named(name, says, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert says in complaint(menas.load_corpus, menas.Config(data=name))


# the toy grammar

def test_probabilities_of_the_next_word_sum_to_one():
    """In 400 states of a random walk that takes every move alike, so that it also nests deep."""
    draw, state, states = random.Random(1), (0, (), "start"), set()
    while len(states) < 400:
        states.add(state)
        state = draw.choice(menas.toy_next(state))[2]
    assert {phase for _, _, phase in states} == {"start", "noun", "verb", "adverb"}
    assert max(len(due) for _, due, _ in states) == menas.TOY_DEPTH
    for moves in map(menas.toy_next, states):
        assert all(p > 0 for _, p, _ in moves) and math.isclose(sum(p for _, p, _ in moves), 1)
        assert len({word for word, _, _ in moves}) == len(moves)  # so the words tell the state


def zipf(letter):
    """The i-th word of a kind has a probability proportional to 1 / i."""
    return 1 / ("abcdef".index(letter) + 1) / sum(1 / i for i in range(1, 7))


def parse(words):
    """[(word, its probability given all before)], by a parser of the grammar's description."""
    topic, due, before, scored = "0", [], "<eos>", []
    for word in words:
        p, kind = 1.0, word if word in ("that", "<eos>") else re.match("n|v|adv", word)[0]
        if before not in ("<eos>", "that"):  # what may be left out here was, or was not
            nest = menas.TOY_NEST * (len(due) < menas.TOY_DEPTH)
            optional, chance = {"n": ("that", nest), "v": ("adv", menas.TOY_ADVERB),
                                "adv": ("adv", 0)}[before]
            p = chance if kind == optional else 1 - chance
        if kind == "n":
            assert before in ("<eos>", "that")
            other = (1 - menas.TOY_TOPIC) / (menas.TOY_CLASSES - 1)
            main = menas.TOY_TOPIC if word[1] == topic else other
            p *= zipf(word[2]) * (1 / menas.TOY_CLASSES if due else main)
            topic = topic if due else word[1]
            due.append(word[1:])
        elif kind == "v":
            noun = due.pop()
            assert noun[0] == word[1], "a verb has its noun's class"
            echo = menas.TOY_ECHO * (noun[1] == word[2])
            p *= echo + (1 - menas.TOY_ECHO) * zipf(word[2])
        elif kind == "adv":
            p *= zipf(word[3])
        else:
            assert kind == "that" or not due, "a sentence ends when all verbs are said"
        scored.append((word, p))
        before = kind
    return scored


@pytest.mark.parametrize("split", menas.SPLITS)
def test_the_floor_is_the_loss_under_the_grammar(split):
    corpus = menas.load_corpus(menas.Config(data="toy"))
    logs = [math.log(p) for _, p in parse(menas.toy_corpus()[0][split])]
    assert math.isclose(corpus.floor[split], -sum(logs[1:]) / len(logs[1:]), rel_tol=1e-12)
    assert corpus.floor[split] < math.log(len(corpus.words))


def test_words_come_as_often_as_the_grammar_says():
    """Oracle: the marginals of its description."""
    words = menas.toy_corpus()[0]["train"]
    kinds = (r"n\d", r"v\d", "adv")
    nouns, verbs, adverbs = ([word for word in words if re.match(kind, word)] for kind in kinds)
    sentences = words.count("<eos>")
    assert len(nouns) == len(verbs) == words.count("that") + sentences
    assert len(adverbs) / len(verbs) == pytest.approx(menas.TOY_ADVERB, abs=.01)
    deep = sum(menas.TOY_NEST ** depth for depth in range(menas.TOY_DEPTH))
    assert len(nouns) / sentences == pytest.approx(deep, rel=.02)
    for some in (nouns, verbs, adverbs):
        shares = {letter: n / len(some) for letter, n in Counter(w[-1] for w in some).items()}
        assert shares == pytest.approx({letter: zipf(letter) for letter in "abcdef"}, abs=.015)
    topics = [noun[1] for before, noun in pairwise(words) if before == "<eos>"]
    kept = [a == b for a, b in pairwise(topics)]
    assert sum(kept) / len(kept) == pytest.approx(menas.TOY_TOPIC, abs=.01)


def test_the_toy_corpus_is_that_of_the_records():
    """Oracle: the hash of the text that all records were made with."""
    texts, _ = menas.toy_corpus()
    content = " ".join(chain(*texts.values())).encode()
    assert hashlib.sha256(content).hexdigest()[:12] == "fd0fec631b46"
