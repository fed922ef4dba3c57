"""MENAS: efficient neural architecture search for recurrent cells, exact, batched, and in one file.

    python menas.py search                            # a minute on two CPU cores: finds, draws and trains a cell on
                                                      # a built-in corpus: 6.75; LSTM 6.65, the best possible 5.83
    python menas.py search --preset ptb               # on Penn Treebank, on a laptop; --retrain trains there, too
    python menas.py train --preset ptb --cell enas    # a published cell, a JSON file, or a search's folder
    python menas.py search --lookahead fresh --response sampled --out runs/2    # with the term that ENAS leaves out
    python menas.py search --operations highway,glu,gate,sum --memory --out runs/3    # in a space that holds the LSTM
    python menas.py STUDY | report | --help           # the studies are in results/studies.py, cells.py

The one idea: an architecture is a row of integers, a batch of architectures is a tensor. One forward pass runs K of
them on the same minibatch, under shared weights (ENAS) or each under its own (many networks, trained as one).

    code            symbol      meaning
    weights         omega       of the shared network (the supernet), or of K standalone ones; a dict of tensors
    controller      theta       the policy's weights; F(theta) is the expected reward once omega has been trained for it
    cells, rows     m           architectures [K, D], a column per decision
    network()       L(omega; m) mean loss per token [K], nats; perplexity is its exponential
    K, N, D         -           architectures in a batch, nodes of a cell, decisions
    T, B, H, V      -           steps of a segment (bptt), parallel streams (batch), hidden units, words
    slot            s           what a node can read: slot 0 is the input pair (x_t, h_{t-1}), slot i + 1 is node i
    state           h_t, m_t    what a step hands on [K, B, H]; outside ENAS's space [K, B, 2H], memory or 0 beside it

ENAS (Pham et al. 2018) alternates omega <- omega - lr d/domega E_m L_train(omega; m), an architecture or a few at a
time, and theta <- theta + lr E_m [ reward(m) dlog pi(m)/dtheta ], the reward from L_valid(omega; m). That omega will
answer theta's move is left out; chapter 6 adds it. Where we differ, a comment says so after the word 'paper:'."""
import argparse
import copy
import fcntl
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from bisect import bisect
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# 1. Config and presets -----------------------------------------------------------------------------------------------
# What a number must be, as a refusal says it -> whether a value is that; nan is none of them.
RANGES = {">= 0": lambda x: x >= 0, ">= 1": lambda x: x >= 1, "in [0, 1)": lambda x: 0 <= x < 1,
          "> 0": lambda x: x >= 1e-12}  # what is smaller overflows as a divisor

def option(default, help, must_be=None):
    """A Config field with the sentence that --help prints, and the RANGES entry of its values."""
    return field(default=default, metadata={"help": help, "must_be": must_be})

@dataclass(frozen=True)
class Config:
    """Every setting of every study; each field is a command-line flag of the same name."""
    preset: str = option("tiny", "smoke, tiny, ptb or paper: sizes and schedules of every study")
    data: str = option("toy", "ptb, toy, or a folder with train.txt, valid.txt and test.txt")
    cache: str = option("~/.cache/menas", "where downloads are kept")
    out: str = option("", "the run's folder (default: runs/STUDY-PRESET-SEED)")
    seed: int = option(1, "every random draw is a function of this number")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = option("float32", "of the computation: float32, bfloat16, float64; weights and the LSTM stay float32")
    threads: int = option(0, "CPU threads (0: torch decides)", ">= 0")
    # the search space
    nodes: int = option(12, "nodes of a cell", ">= 1")
    min_nodes: int = option(0, "the controller chooses the number of nodes, from this to --nodes (0: --nodes)", ">= 0")
    activations: str = option("tanh,relu,identity,sigmoid", "activations to choose from")
    activation_scope: str = option("node", "node, or cell: one activation for the whole cell")
    connections: str = option("any", "any, chain, tree, or a cell whose connections are taken")
    operations: str = option("highway", "to choose from: highway (ENAS), glu, gate, sum; the last two read two nodes")
    memory: bool = option(False, "a node's value is carried as a memory that gate and sum can read, as an LSTM's c is")
    widths: str = option("", "hidden sizes to choose from, up to --hidden, such as 50,100,200 (default: --hidden)")
    rates: str = option("", "factors of --lr to choose from, powers of 2: .25,1,4; with --response, --shared_samples 1")
    # the shared network
    hidden: int = option(200, "units of the embedding and of each node", ">= 1")
    lstm_hidden: int = option(0, "units of the LSTM baseline, projected to --hidden (0: as --hidden)", ">= 0")
    batch: int = option(64, "parallel streams of text", ">= 1")
    bptt: int = option(35, "tokens of a segment, the truncation length of backpropagation", ">= 1")
    random_bptt: bool = option(False, "segment lengths as in the corrected ENAS: normal, sd 5, 5 % halved, lr to match")
    init: float = option(0.0, "weights start uniform in +- this (0: sqrt(3 / hidden), to keep the variance)", ">= 0")
    word_dropout: float = option(0.0, "drop rate of whole words of the vocabulary, per segment", "in [0, 1)")
    input_dropout: float = option(0.0, "drop rate on the embedded input, one mask per segment", "in [0, 1)")
    hidden_dropout: float = option(0.0, "drop rate on every node's input, per segment; not in the LSTM", "in [0, 1)")
    output_dropout: float = option(0.0, "drop rate on h before the softmax, one mask per segment", "in [0, 1)")
    activation_reg: float = option(0.0, "weight of the mean square of the dropped output", ">= 0")
    slowness_reg: float = option(0.0, "weight of the mean square change of h from one step to the next", ">= 0")
    lr: float = option(20.0, "of SGD on the network's weights", "> 0")
    schedule: str = option("constant", "of lr: constant, cosine, or decay (.96 an epoch after 15)")
    plateau: float = option(1.0, "divide lr by this when the validation loss does not improve (train only)", "> 0")
    clip: float = option(0.25, "largest norm of the gradient", "> 0")
    weight_decay: float = option(1e-6, "added to the clipped gradient, times the weight", ">= 0")
    # search
    state: str = option("carry", "hidden state at a segment's start, in a search: carry, zero, or warm")
    epochs: int = option(10, "search: rounds of shared, then controller steps; train: passes over the text", ">= 1")
    shared_steps: int = option(0, "shared steps of a round (0: one pass over the training split)", ">= 0")
    shared_samples: int = option(1, "architectures in one shared step", ">= 1")
    warm_epochs: int = option(0, "rounds before the controller learns", ">= 0")
    controller: str = option("trained", "trained; untrained or uniform: random search with weight sharing; or cells")
    controller_steps: int = option(50, "controller steps of a round", ">= 0")
    controller_samples: int = option(10, "architectures in one controller step, on one validation minibatch", ">= 1")
    controller_hidden: int = option(100, "units of the controller's LSTM", ">= 1")
    controller_lr: float = option(3.5e-3, "of Adam on the controller", ">= 0")
    lookahead: str = option("none", "weights that rewards are taken at: none (omega), momentum, recent, fresh (omega')")
    response: str = option("none", "the shared weights' answer in the reward: none (ENAS), unrolled, neumann, sampled")
    fold: int = option(2, "architectures that omega' is made from, and as many others for the response's v", ">= 1")
    task: str = option("none", "none, or frozen: a constructed task in which only the response knows what is good")
    settle: int = option(0, "rounds at the end in which only the shared weights learn, to fit the policy", ">= 0")
    entropy: float = option(1e-4, "weight of the policy's entropy, added to the reward", ">= 0")
    anneal: int = option(0, "last rounds of learning, in which --entropy goes to minus --penalty", ">= 0")
    penalty: float = option(1.0, "of entropy where --anneal ends, so that the policy ends at one architecture", ">= 0")
    temperature: float = option(5.0, "divides the controller's logits", "> 0")
    tanh_constant: float = option(2.5, "bounds the logits: constant * tanh(logits / temperature)", "> 0")
    reward: str = option("perplexity", "perplexity (80 / perplexity) or loss (minus the loss)")
    reward_words: float = option(0.0, "drop rate of whole words in the input that rewards are measured on", "in [0, 1)")
    reward_noise: float = option(0.0, "noise on the embedded input of rewards, in units of the embeddings' rms", ">= 0")
    baseline: str = option("leave_one_out", "leave_one_out or moving_average")
    baseline_decay: float = option(0.95, "of --baseline moving_average", "in [0, 1)")
    derive_samples: int = option(100, "architectures scored on the whole validation split at the end", ">= 1")
    retrain: bool = option(False, "search: train the cell found and an LSTM from scratch; extra: a few sampled cells")
    retrain_epochs: int = option(0, "of the trainings of --retrain (0: as --epochs of train)", ">= 0")
    retrain_cells: int = option(4, "extra: how many sampled cells, per search; ablate: changes of a kind", ">= 1")
    # train
    cell: str = option("enas", "names, JSON files or search runs, comma-separated, trained in one batch, each with "
                       "--seed or as in enas@3 its own; or lstm")
    weights: str = option("", "a search run whose shared weights to start from (default: from scratch)")
    replicas: int = option(1, "networks of each cell, or searches of a study, seeded --seed, --seed + 1, ...", ">= 1")
    patience: int = option(5, "epochs without improvement before training stops", ">= 1")
    average: bool = option(False, "evaluate the mean of the weights since validation first stopped improving")
    eval_batch: int = option(64, "parallel streams of an evaluation", ">= 1")
    # records
    log_every: int = option(20, "steps from one line of metrics to the next; a run resumes at such a line", ">= 1")
    part: str = option("", "I/N: every N-th of a study's sub-runs, from the I-th; without it the study is completed")
    checkpoint_seconds: float = option(30.0, "least time between two checkpoints", ">= 0")

# preset -> study -> settings; "all" holds for every study and comes first. results/ adds those of its own studies.
PRESETS = {"smoke": {
    "all": dict(data="toy", hidden=16, batch=64, bptt=20, nodes=4, epochs=2, controller_samples=8, log_every=10,
                controller_steps=5, shared_steps=20, derive_samples=10, lr=5.0),
}, "tiny": {
    "all": dict(data="toy", hidden=32, batch=16, bptt=35, nodes=6, lr=10.0, eval_batch=16, controller_samples=16),
    "search": dict(epochs=8, shared_steps=60, shared_samples=4, controller_steps=20, warm_epochs=2, retrain=True),
    "train": dict(epochs=8, schedule="cosine"),
}, "ptb": {
    "all": dict(data="ptb", hidden=200, dtype="bfloat16", weight_decay=1.2e-6),
    "search": dict(epochs=4, batch=20, input_dropout=.2, output_dropout=.2, warm_epochs=1, schedule="cosine",
                   controller_steps=80, fold=1),
    "train": dict(epochs=12, batch=20, input_dropout=.35, hidden_dropout=.1, output_dropout=.35, schedule="cosine"),
}, "paper": {  # the corrected code of ENAS's authors, search and final training. Its two masks on the input are one
    # here, of rate 1 - (1 - .2) (1 - .75) = .8; its L2 is a sum of squares, so the gradient is twice the weight.
    "all": dict(data="ptb", dtype="bfloat16", init=.04, batch=64, random_bptt=True, clip=.25, controller_hidden=64,
                controller_lr=5e-5, entropy=1e-5, tanh_constant=2.25),
    "search": dict(nodes=10, hidden=200, epochs=600, batch=128, word_dropout=.1, input_dropout=.8, hidden_dropout=.25,
                   output_dropout=.75, clip=.1, weight_decay=1.6e-6, controller_steps=25, baseline_decay=.999),
    "train": dict(hidden=800, epochs=3000, word_dropout=.125, input_dropout=.775, hidden_dropout=.225,
                  output_dropout=.75, weight_decay=1.6e-6, average=True, patience=100),
}}

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

def nearest(word, choices):
    """' (did you mean X?)', or '' if nothing is near."""
    return "".join(f" (did you mean {near}?)" for near in get_close_matches(str(word), choices, n=1, cutoff=0.5))

def choose(kind, name, choices):
    """The name, if it is one of the choices; or a UserError that names the nearest."""
    if name not in list(choices):
        raise UserError(f"unknown {kind} '{name}'{nearest(name, choices)}; choose from {', '.join(choices)}")
    return name

def configure(study, preset="tiny", **overrides):
    """The Config of one study under a preset, then the user's own settings."""
    parts = PRESETS[choose("preset", preset, PRESETS)]
    return Config(**{"preset": preset, **parts["all"], **parts.get(study, {}), **overrides})

def rng(*key):
    """A generator seeded by a key: randomness is a function of (seed, purpose, step); a resumed run draws alike."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

# 2. Data -------------------------------------------------------------------------------------------------------------
PTB_MIRRORS = ("https://raw.githubusercontent.com/carpedm20/ENAS-pytorch/master/data/ptb/{}.txt",
               "https://raw.githubusercontent.com/timbmg/RNNLM/master/data/ptb.{}.txt",
               "https://raw.githubusercontent.com/kcyu2014/eval-nas/master/data/penn/{}.txt")
PTB_SHA256 = {"train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
              "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
              "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}
SPLITS = ("train", "valid", "test")

# Token ids [tokens] of each split, the vocabulary, and split -> perplexity under the true grammar, empty for real text.
Corpus = namedtuple("Corpus", "train valid test words floor")

@contextmanager
def refusing(path, advice=""):
    """Whatever goes wrong inside becomes a UserError, one line that names the file or setting."""
    try:
        yield
    except Exception as error:  # torch.load, for one, raises many kinds, all of which mean: not this file
        raise UserError(f"{path} is refused: {(str(error).splitlines() or [repr(error)])[0]}{advice}") from None

def write_atomically(path, content):
    """The file, bytes or a dict of tensors, appears whole or not at all, also when the process is killed in between."""
    temporary = path.with_name(f".menas-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file) if isinstance(content, dict) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, value):
    """Indented, atomic."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())

def read_json(path):
    """The JSON object in it, or a UserError that names the file."""
    with refusing(path):
        return {**json.loads(Path(path).read_text())}

def ptb_folder(cache, mirrors=PTB_MIRRORS):
    """The folder of the three PTB files; an absent one comes from the first mirror with the right hash."""
    folder = Path(cache).expanduser() / "ptb"
    for split, sha256 in PTB_SHA256.items():
        path, reasons = folder / f"{split}.txt", []
        for address in (mirror.format(split) for mirror in mirrors if not path.exists()):
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    content = answer.read()
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError("wrong SHA-256")
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
            except Exception as error:  # of the network, the server, the disk: whatever it is, the user reads it
                reasons.append(f"{address}: {error}")
        if not path.exists():
            raise UserError(f"cannot get PTB's {split}.txt: {'; '.join(reasons)}; pass a folder that has it as --data")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{path} is not the standard PTB file (wrong SHA-256); delete it to download it again")
    return folder

# The toy corpus: nouns and their verbs agree in class, and often in letter, across clauses nested in between: 'n3b that
# n1a v1a v3b'. A stack machine writes it, so the distribution of the next word given ALL words before is known exactly.
TOY_CLASSES, TOY_WORDS, TOY_DEPTH = 8, 6, 4
TOY_NEST, TOY_ADVERB, TOY_TOPIC, TOY_ECHO = 0.4, 0.3, 0.75, 0.6  # probabilities, see toy_next
TOY_ZIPF = {"abcdef"[i]: 1 / (i + 1) / sum(1 / (j + 1) for j in range(TOY_WORDS)) for i in range(TOY_WORDS)}

def toy_next(state):
    """[(word, probability, next state)] under the true grammar. A state is (topic, due, phase): the last main noun's
    class, (class, letter) of the nouns whose verbs are still to come, outermost first, and what was written last:
    'start' (a noun is next), 'noun', 'verb' or 'adverb'. A main noun keeps the topic with TOY_TOPIC; a clause follows a
    noun with TOY_NEST, an adverb a verb with TOY_ADVERB; a verb has its noun's class, and its letter with TOY_ECHO."""
    topic, due, phase = state
    if phase == "start":
        keeps = lambda c: TOY_TOPIC if c == topic else (1 - TOY_TOPIC) / (TOY_CLASSES - 1)
        return [(f"n{c}{x}", q * (1 / TOY_CLASSES if due else keeps(c)), (topic if due else c, due + ((c, x),), "noun"))
                for c in range(TOY_CLASSES) for x, q in TOY_ZIPF.items()]
    moves, left = [], 1.0
    if phase == "noun" and len(due) < TOY_DEPTH:
        moves, left = [("that", TOY_NEST, (topic, due, "start"))], 1 - TOY_NEST
    elif phase == "verb":
        moves, left = [(f"adv{x}", TOY_ADVERB * q, (topic, due, "adverb")) for x, q in TOY_ZIPF.items()], 1 - TOY_ADVERB
    if not due:
        return moves + [("<eos>", left, (topic, (), "start"))]
    c, letter = due[-1]
    return moves + [(f"v{c}{x}", left * (TOY_ECHO * (x == letter) + (1 - TOY_ECHO) * q), (topic, due[:-1], "verb"))
                    for x, q in TOY_ZIPF.items()]

@lru_cache
def toy_corpus(sizes=(60000, 6000, 6000)):
    """{split: words} and {split: perplexity under the grammar}; whole sentences, the same on every machine."""
    random_, texts, floor = random.Random(20180209), {}, {}
    for split, size in zip(SPLITS, sizes):
        state, words, nats = (0, (), "start"), [], []
        while len(words) < size or words[-1] != "<eos>":
            moves = toy_next(state)
            word, p, state = random_.choices(moves, weights=[m[1] for m in moves])[0]
            words.append(word)
            nats.append(-math.log(p))
        texts[split], floor[split] = words, math.exp(sum(nats[1:]) / len(nats[1:]))  # all but the first, as a model
    return texts, floor

def load_corpus(config):
    """The Corpus that --data names; a text's words stand between spaces, and each line that has any ends in <eos>."""
    if config.data == "toy":
        texts, floor = toy_corpus()
    else:
        folder = ptb_folder(config.cache) if config.data == "ptb" else Path(config.data).expanduser()
        if not folder.is_dir():
            raise UserError(f"no data folder '{config.data}'{nearest(config.data, ('ptb', 'toy'))}")
        texts, floor = {}, {}
        for split in SPLITS:
            with refusing(path := folder / f"{split}.txt"):
                lines = path.read_text(encoding="utf-8").split("\n")
                texts[split] = [word for line in lines if line.strip() for word in line.split() + ["<eos>"]]
                if len(texts[split]) < 3:
                    raise ValueError(f"{len(texts[split])} tokens with <eos>; a language model needs at least 3")
    words = sorted(set(texts["train"]))
    index, ids = {word: i for i, word in enumerate(words)}, {}
    for split, text in texts.items():
        if (new := set(text) - set(words)) and "<unk>" not in index:
            raise UserError(f"{split}.txt has the word '{min(new)}', which train.txt lacks, and train.txt has no <unk>")
        ids[split] = torch.tensor([index.get(word, index.get("<unk>")) for word in text])
    return Corpus(**ids, words=words, floor=floor)

# One step's text: inputs [T, B]; targets [T, B], the inputs one token later, -1 where there is nothing to predict;
# before: the inputs [T', B] of the segment before, None at the start of the text; ends: is it the text's last.
Segment = namedtuple("Segment", "inputs targets before ends")

class Stream:
    """B parallel readings of a split, cut into segments: every token but the first is a target once per epoch."""
    def __init__(self, tokens, batch, bptt, key=(), vary=False):
        if len(tokens) <= batch:
            raise UserError(f"--batch {batch} is larger than the corpus allows: a split has {len(tokens)} tokens")
        length, device = math.ceil((len(tokens) - 1) / batch), tokens.device
        step = torch.arange(math.ceil(length / bptt) * bptt, device=device)[:, None]  # padded: all have one shape
        at = step + length * torch.arange(batch, device=device)                          # [padded, B]
        real, at = (step < length) & (at < len(tokens) - 1), at.clamp(max=len(tokens) - 2)
        self.inputs, self.targets = torch.where(real, tokens[at], 0), torch.where(real, tokens[at + 1], -1)
        self.length, self.bptt, self.key, self.vary = length, bptt, key, vary
        self.place = 0, 0, 0  # epoch; the next segment's start; the length of the one before; a checkpoint has it

    def next(self):
        """The next Segment; after the last one the text starts again.
        paper: the corrected ENAS draws its length from a normal around bptt, 5 % of the time around half of it."""
        (epoch, start, last), size = self.place, self.bptt
        if self.vary:
            draw = rng(*self.key, "bptt", epoch, start)
            mean = size if torch.rand((), generator=draw).item() < 0.95 else size / 2
            size = min(max(5, round(mean + 5 * torch.randn((), generator=draw).item())), size + 20)
        end, before = start + size, self.inputs[start - last:start] if start else None
        ends = end >= self.length
        self.place = (epoch + 1, 0, 0) if ends else (epoch, end, size)
        return Segment(self.inputs[start:end], self.targets[start:end], before, ends)

    def progress(self):
        """Epochs read so far, with the fraction of the one at hand."""
        return self.place[0] + self.place[1] / self.length

# 3. Cells and search spaces ------------------------------------------------------------------------------------------
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda u: u, "sigmoid": torch.sigmoid}
# With [c, u] = s_p W, q a second predecessor, and s_p = h_{t-1} on the input pair, whose product is [x_t, h_{t-1}] W:
OPERATIONS = ("highway",  # s = s_p + sigmoid(c) * (act(u) - s_p)      ENAS's only one (Zilly et al. 2017)
              "glu",      # s = sigmoid(c) * act(u)                    (Dauphin et al. 2017)
              "gate",     # s = sigmoid(c) * act(s_q)
              "sum")      # s = s_p + s_q                              no weights, no activation
HIGHWAY, GLU, GATE, SUM = range(4)
OUTPUTS = ("leaves", "all")  # h_t is the mean of the leaves (nodes nobody reads), or of all nodes after node 0
LEAVES, ALL = range(2)
INPUT = MEMORY = 0  # slot 0 is the input pair, but as a second predecessor the memory; node i's value is slot i + 1

# A node: the slot it reads, its activation's name; in gated cells an operation and a second slot; and for ablations a
# slot read also (0: none), by one node at most: [c, u] and s_p are means over both, each through its own edge.
Node = namedtuple("Node", "read activation operation second also", defaults=("highway", MEMORY, 0))

# A recurrent cell as people write it: Nodes, one of OUTPUTS, the slot of the node whose value is carried to the next
# step as the memory m_t (0: none), its units (0: as many as there are), and log2 of its factor of the learning rate.
Cell = namedtuple("Cell", "nodes output memory width rate", defaults=("leaves", 0, 0, 0))

def named(pairs, output):
    """A published cell from 'activation<-predecessor' of nodes 1, 2, ...; node 0 is tanh on the input pair."""
    nodes = [pair.split("<-") for pair in pairs.split()]
    return Cell((Node(INPUT, "tanh"),) + tuple(Node(int(p) + 1, act) for act, p in nodes), output)

CELLS = {
    "enas": named("tanh<-0 relu<-1 relu<-2 tanh<-2 tanh<-2 relu<-5 tanh<-1 relu<-6 relu<-8 relu<-8 relu<-8", "leaves"),
    "darts_v1": named("relu<-0 relu<-1 tanh<-2 relu<-3 relu<-4 identity<-1 relu<-5 relu<-1", "all"),
    "darts_v2": named("sigmoid<-0 relu<-1 relu<-1 identity<-1 tanh<-2 sigmoid<-5 tanh<-3 relu<-5", "all"),
    "enas_lm": named("sigmoid<-0 tanh<-1 relu<-2 sigmoid<-2 tanh<-4 tanh<-5 sigmoid<-3 sigmoid<-6", "all"),
    "chain": named(" ".join(f"tanh<-{i}" for i in range(11)), "leaves"),
    "tree": named(" ".join(f"tanh<-{i // 2}" for i in range(11)), "leaves"),
    # An LSTM without biases: f * c + i * tanh(g), carried as c; h = o * tanh(c). Equal to torch.nn.LSTM, see the tests.
    "lstm_cell": Cell((Node(INPUT, "identity", "gate", MEMORY), Node(INPUT, "tanh", "glu"), Node(1, "tanh", "sum", 2),
                       Node(INPUT, "tanh", "gate", 3)), memory=3),
    # A recurrent additive network (Lee et al. 2017): f * c + i * u, which is both c and h; here u reads h as well.
    "additive": Cell((Node(INPUT, "identity", "gate", MEMORY), Node(INPUT, "identity", "glu"),
                      Node(1, "tanh", "sum", 2)), memory=3)}

NEEDS = {"highway": ("from", "activation"), "glu": ("from", "activation"), "gate": ("from", "with", "activation"),
         "sum": ("from", "with")}  # of a node's JSON, by its operation

def cell_to_json(cell):
    """The cell as a dict that json.dumps prints and a person can edit; what is as in ENAS's space is left out."""
    name_of = lambda slot, other: slot - 1 if slot else other
    nodes = []
    for read, act, operation, second, also in cell.nodes:
        node = {"from": name_of(read, "input"), "activation": act, "with": name_of(second, "memory")}
        nodes.append({name: node[name] for name in NEEDS[operation]})
        nodes[-1].update({} if operation == "highway" else {"operation": operation})
        nodes[-1].update({"also": also - 1} if also else {})
    more = {"memory": cell.memory - 1, "width": cell.width, "rate": cell.rate}
    return {"output": cell.output, **{name: x for name, x in more.items() if getattr(cell, name)}, "nodes": nodes}

def check_node(i, node, n):
    """What node i of n, as JSON, reads: numbers of nodes, 'input', 'memory', last that of 'also'; or a UserError."""
    operation = node.get("operation", "highway") if isinstance(node, dict) else "highway"
    needs = NEEDS[choose(f"operation of node {i}", operation, OPERATIONS)]
    if not isinstance(node, dict) or any(name not in node for name in needs):
        raise UserError(f"node {i} needs {' and '.join(map(repr, needs))}")
    for name in node:
        choose(f"entry of node {i}, a {operation},", name, ("operation", *needs, *["also"] * ("activation" in needs)))
    choose(f"activation of node {i}", node.get("activation", "tanh"), ACTIVATIONS)  # a sum has none
    reads = [node[name] for name in (*needs, "also") if name != "activation" and name in node]
    for source, other in zip(reads, ("input", *["memory"] * ("with" in needs), None)):
        if source != other and (type(source) is not int or source not in range(n)):
            raise UserError(f"node {i} reads node {source!r}, which is missing: nodes are 0 to {n - 1}")
    return reads

def cell_from_json(cell):
    """The Cell of such a dict. Nodes may stand in any order; they are sorted so that each reads earlier ones."""
    if not isinstance(cell, dict) or not isinstance(cell.get("nodes"), list) or not cell["nodes"]:
        raise UserError('a cell is {"output": "leaves", "nodes": [{"from": "input", "activation": "tanh"}, ...]}')
    nodes, n = cell["nodes"], len(cell["nodes"])
    reads = [check_node(i, node, n) for i, node in enumerate(nodes)]
    graph, order = {i: [j for j in reads[i] if type(j) is int] for i in range(n)}, []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise UserError(f"the cell has a cycle: {' reads '.join(map(str, error.args[1][::-1]))}") from None
    while len(order) < n:  # the first of those that read only placed ones
        order.append(next(i for i in graph if i not in order and {*graph[i]} <= {*order}))
    if sum("also" in node for node in nodes) > 1:
        raise UserError("several nodes have 'also'; one may")
    whole = dict(memory=range(n), width=range(10 ** 6), rate=range(-20, 21))
    for name in cell:
        choose("entry of a cell", name, ("output", "nodes", *whole))
        if name in whole and (type(cell[name]) is not int or cell[name] not in whole[name]):
            raise UserError(f"the cell's {name} is {cell[name]!r}: not from {whole[name][0]} to {whole[name][-1]}")
    if "memory" not in cell and any("memory" in sources for sources in reads):
        raise UserError("a node reads the memory, but the cell has no 'memory': the node that is carried")
    slot = {"input": INPUT, "memory": MEMORY, **{i: place + 1 for place, i in enumerate(order)}}
    made = [Node(slot[reads[i][0]], nodes[i].get("activation", "tanh"), nodes[i].get("operation", "highway"),
                 slot[nodes[i].get("with", "memory")], slot.get(nodes[i].get("also"), 0)) for i in order]
    return Cell(tuple(made), choose("output", cell.get("output", "leaves"), OUTPUTS),
                slot[cell["memory"]] if "memory" in cell else 0, cell.get("width", 0), cell.get("rate", 0))

# A row of integers [D] is a cell. In ENAS's space, D = 2 + 2N: its number of nodes, its output, then for each node the
# slot read and the activation. Any other cell has 3 + 2N columns more, so an odd D: memory, width, rate, then for each
# node the operation and the second slot; with a slot read also another two, who reads it (the node's own slot) and it.
# What is missing is 0. So D says which of them there are: D % 4 is 1 without and 3 with the last two.
Columns = namedtuple("Columns", "count output memory width rate read act operation second who also")

def columns(rows):
    """The columns of rows [K, D] by name: of [K], and read, act, operation, second [K, N]."""
    if rows.shape[1] % 2 == 0:
        rows = F.pad(rows, (0, rows.shape[1] + 1))
    if rows.shape[1] % 4 == 1:
        rows = F.pad(rows, (0, 2))
    n = (rows.shape[1] - 7) // 4
    enas, rest, last = rows[:, 2:2 + 2 * n], rows[:, 2 + 2 * n:-2], rows[:, -2:]
    return Columns(*rows[:, :2].unbind(1), *rest[:, :3].unbind(1), enas[:, ::2], enas[:, 1::2], rest[:, 3::2],
                   rest[:, 4::2], *last.unbind(1))

def is_gated(cell):
    """Is it outside ENAS's space: a cell with more than one predecessor, activation and highway a node?"""
    enas = [Node(node.read, node.activation) for node in cell.nodes]
    return cell != Cell(tuple(enas), cell.output) or [node.read == INPUT for node in enas].count(True) > 1

def rates_of(rows):
    """The factor [K] of the learning rate that each architecture has chosen for training on it."""
    return 2.0 ** columns(rows).rate

def encode(cells, nodes=0):
    """Cells as rows [K, D]; N is the largest cell's, or more. Nodes a cell does not have are unused entries."""
    n = max([nodes, *(len(cell.nodes) for cell in cells)])
    rows = torch.zeros(len(cells), 7 + 4 * n, dtype=torch.long)
    for row, cell in zip(rows, cells):
        first = [x for node in cell.nodes for x in (node.read, list(ACTIVATIONS).index(node.activation))]
        rest = [x for node in cell.nodes for x in (OPERATIONS.index(node.operation), node.second)]
        row[:2 + len(first)] = torch.tensor([len(cell.nodes), OUTPUTS.index(cell.output)] + first)
        row[2 + 2 * n:][:3 + len(rest)] = torch.tensor([cell.memory, cell.width, cell.rate] + rest)
        for i, node in enumerate(cell.nodes):
            if node.also:
                row[-2:] = torch.tensor([i + 1, node.also])
    return rows if rows[:, -1].any() else rows[:, :-2] if any(map(is_gated, cells)) else rows[:, :2 + 2 * n]

def decode(row):
    """The Cell of one row [D]."""
    count, output, memory, width, rate, *nodes, who, also = [x.tolist()[0] for x in columns(row[None])]
    made = [Node(read, list(ACTIVATIONS)[act], OPERATIONS[operation], second, also if who == i + 1 else 0)
            for i, (read, act, operation, second) in enumerate(list(zip(*nodes))[:count])]
    return Cell(tuple(made), OUTPUTS[output], memory, width, rate)

# Something to decide: the columns of a row that it sets, the values it may take, and when it matters: (column, values)
# that must all hold of columns before. With a single value there is nothing to decide; what does not matter is 0.
Decision = namedtuple("Decision", "name columns choices when", defaults=((),))

def listed(config, flag, choices):
    """The indices of the words of a comma-separated setting."""
    words = getattr(config, flag).split(",")
    if len(set(words)) < len(words):
        raise UserError(f"--{flag} {getattr(config, flag)} has one of them twice")
    return tuple(list(choices).index(choose(flag.removesuffix("s"), word, choices)) for word in words)

def numbers(config, flag, known):
    """What stands in a row for the numbers of a comma-separated setting; known has all allowed ones. Of "" it is 0."""
    text = getattr(config, flag)
    with refusing(f"--{flag} {text}", f"; {Config.__dataclass_fields__[flag].metadata['help']}"):
        return tuple(sorted({known[float(x)] for x in text.split(",")})) if text else (0,)

# --connections: the slots that node i may read; or those of any cell. In ENAS's space only node 0 reads the input pair.
FAMILIES = {"any": lambda i, gated: tuple(range(0 if gated or i == 0 else 1, i + 1)), "chain": lambda i, gated: (i,),
            "tree": lambda i, gated: ((i - 1) // 2 + 1,)}

def reads_of(config, gated):
    """For each node the slots that it may read."""
    if config.connections in FAMILIES:
        return [FAMILIES[config.connections](i, gated) for i in range(config.nodes)]
    cell = load_cell(replace(config, connections="any"), config.connections, FAMILIES)
    reads = [(node.read,) for node in cell.nodes]
    if len(reads) < config.nodes or not gated and (INPUT,) in reads[1:]:
        raise UserError(f"--connections {config.connections} has {len(reads)} nodes, not --nodes {config.nodes}, "
                        "or several read the input pair, which needs --operations with glu, gate or sum")
    return reads

def search_space(config):
    """The list of Decisions. ENAS: every node but the first reads an earlier one, any activation. Beyond it what Config
    asks for: with other operations any node may read the input pair; the memory is one of the first --min_nodes."""
    n, least = config.nodes, config.min_nodes or config.nodes
    if not 1 <= least <= n:
        raise UserError(f"--nodes {n} must be at least 1, and --min_nodes {least} from 1 to that")
    activations, operations = listed(config, "activations", ACTIVATIONS), listed(config, "operations", OPERATIONS)
    widths = numbers(config, "widths", {width: width for width in range(1, config.hidden + 1)})
    rates = numbers(config, "rates", {2.0 ** power: power for power in range(-20, 21)})
    gated, rest = operations != (HIGHWAY,), 2 + 2 * n
    if config.memory and not {GATE, SUM} & {*operations}:
        raise UserError("--memory needs an operation that can read it: --operations with gate or sum")
    if not config.memory and {GATE, SUM} >= {*operations}:
        raise UserError(f"--operations {config.operations}: without --memory there is none for node 0")
    reads, whole_cell = reads_of(config, gated), config.activation_scope == "cell"
    beyond = gated or (widths, rates) != ((0,), (0,))  # ENAS's columns
    decisions = [Decision("nodes", (0,), tuple(range(least, n + 1))), Decision("output", (1,), (LEAVES,))]
    if beyond:
        carried = tuple(range(1, least + 1)) if config.memory else (0,)
        extra = zip(("memory", "width", "rate"), (carried, widths, rates))
        decisions += [Decision(name, (rest + i,), choices) for i, (name, choices) in enumerate(extra)]
    if whole_cell:
        decisions.append(Decision("activation", tuple(range(3, rest, 2)), activations))
    for i in range(n):
        at, there = rest + 3 + 2 * i, (((0, tuple(range(i + 1, n + 1))),) if i >= least else ())
        seconds = tuple(range(0 if config.memory else 1, i + 1))
        mine = tuple(o for o in operations if seconds or o not in (GATE, SUM))
        decisions.append(Decision(f"predecessor of {i}", (2 + 2 * i,), reads[i], there))
        if gated:
            decisions += [Decision(f"operation of {i}", (at,), mine, there),
                          Decision(f"second of {i}", (at + 1,), seconds or (0,), (*there, (at, (GATE, SUM))))]
        if not whole_cell:
            acts = there if SUM not in mine else (*there, (at, (HIGHWAY, GLU, GATE)))
            decisions.append(Decision(f"activation of {i}", (3 + 2 * i,), activations, acts))
    if beyond and not gated:  # a row has all columns
        decisions.append(Decision("no gates", tuple(range(rest + 3, rest + 3 + 2 * n)), (0,)))
    return decisions

def ways(decisions):
    """A function (i, known) -> [(value, what is known then, number of different cells from there)] of decision i; known
    are the (column, value) that a later `when` asks about. From (0, ()) the numbers add up to the space's size."""
    last_use = {column: i for i, d in enumerate(decisions) for column, _ in d.when}

    @lru_cache(maxsize=None)
    def options(i, known):
        d, found = decisions[i], []
        for value in d.choices if all(dict(known)[column] in values for column, values in d.when) else (0,):
            now = (*known, *((column, value) for column in d.columns))
            then = tuple((column, x) for column, x in now if last_use.get(column, -1) > i)
            found.append((value, then, sum(n for *_, n in options(i + 1, then)) if i + 1 < len(decisions) else 1))
        return found

    return options

def uniform_rows(decisions, k, *key):
    """K rows drawn uniformly from the different cells of the space, which an untrained controller only nearly does, and
    with --min_nodes not at all: most cells have the most nodes, so nearly all of these rows have."""
    options, width = ways(decisions), 1 + max(column for d in decisions for column in d.columns)
    rows = torch.zeros(k, width, dtype=torch.long)
    for row, draws in zip(rows, torch.rand(k, len(decisions), generator=rng(*key)).tolist()):
        known = ()
        for i, (d, u) in enumerate(zip(decisions, draws)):
            found = options(i, known)
            sums = list(accumulate(n for *_, n in found))  # a value's chance is its share of the cells
            row[list(d.columns)], known, _ = found[bisect(sums, int(u * 2 ** 53) * sums[-1] >> 53)]
    return rows

def recurrent_parameters(cell, hidden):
    """Weights that the recurrence uses: a matrix for each of c and u, from [x, h] on the input pair; no biases."""
    h, uses = cell.width or hidden, {"highway": 2, "glu": 2, "gate": 1, "sum": 0}
    return sum(uses[node.operation] * h * h * (1 + (node.read == INPUT) + (node.also > 0)) for node in cell.nodes)

def slots_read(node):
    """The slots that a node reads, None for the memory."""
    seconds = (node.second or None,) if node.operation in ("gate", "sum") else ()
    return (node.read, *seconds, *[node.also] * (node.also > 0))

def leaves(cell):
    """The nodes whose mean is h_t."""
    n, read = len(cell.nodes), {slot for node in cell.nodes for slot in slots_read(node)}
    return [i for i in range(n) if (i > 0 or n == 1 if cell.output == "all" else i + 1 not in read)]

ROW = r"\d+(--?\d+)+"  # a cell's integers, as they stand in derived.json

def load_cell(config, name, others=("lstm",)):
    """A cell by name, 'random:SEED', its row '1-0-0-1', a JSON file or a search's folder; refusals name others, too."""
    if name in CELLS:
        return CELLS[name]
    if re.fullmatch(ROW, name):
        with refusing(f"'{name}', which is not a cell's row,"):
            row = torch.tensor([[int(x) for x in re.findall(r"(?:^|-)(-?\d+)", name)]])
            n, cell = columns(row).read.shape[1], decode(row[0])
            if row.shape[1] not in (2 + 2 * n, 5 + 4 * n, 7 + 4 * n) or not 1 <= row[0, 0] <= n:
                raise ValueError(f"{row.shape[1]} integers for {row[0, 0]} nodes")
        return cell_from_json(cell_to_json(cell))  # which checks it
    if name.startswith("random:"):
        return decode(uniform_rows(search_space(config), 1, "random cell", name)[0])
    path = Path(name)
    if name and path.is_dir() or path.suffix == ".json":
        return cell_from_json(read_json(path / "cell.json" if path.is_dir() else path))
    raise UserError(f"unknown cell '{name}'{nearest(name, [*CELLS, *others])}; choose from "
                    f"{', '.join((*CELLS, *others))}, random:SEED, a JSON file, or a search's folder")

# 4. The shared network -----------------------------------------------------------------------------------------------
# Weights are a dict of tensors. Shared by all architectures: 'edges' is the bank [edges, H, 2H], a row for each pair
# (slot read, node). Standalone, a network per architecture: every tensor has a leading K, 'edges' is [K, N, H, 2H], and
# if a node reads a slot also [K, N + 1, H, 2H], the last its second edge.
# In gated spaces any node may read the input pair, so 'input', else [H, 2H], is [N, H, 2H], a matrix for each.

STATE_BOUND = 25.0  # largest norm of h_t, as in ENAS-pytorch, and of m_t

def edge_index(slot, node):
    """The bank's row of the edge slot -> node: node i can read slots 0 .. i."""
    return node * (node + 1) // 2 + slot

def initial(config, shapes, seeds):
    """K networks' weights, [K, *shape], uniform, each from its own seed, on the CPU; the decoder's bias is 0.
    paper: +-.04, at 800 units; at 200 the ENAS cell learns slowly from there."""
    bound, words = config.init or math.sqrt(3 / config.hidden), shapes["embedding"][0]
    draw = lambda name: torch.stack([torch.rand(shapes[name], generator=rng(seed, "init", name)) for seed in seeds])
    return {**{name: (draw(name) * 2 - 1) * bound for name in shapes}, "bias": torch.zeros(len(seeds), words)}

def shared_weights(config, words):
    """Weights of the supernet: tied embedding [V, H], x_t -> node 0 [H, 2H], and the bank [edges, H, 2H]."""
    h, inputs = config.hidden, () if config.operations == "highway" else (config.nodes,)
    shapes = {"embedding": (words, h), "input": (*inputs, h, 2 * h), "edges": (edge_index(0, config.nodes), h, 2 * h)}
    return {name: w[0] for name, w in initial(config, shapes, [config.seed]).items()}

def standalone_weights(config, words, cells, seeds):
    """Weights of K networks, each with only its own edges; drawn node by node, so padding a cell changes nothing."""
    h, n = config.hidden, columns(cells).read.shape[1]
    inputs = () if cells.shape[1] % 2 == 0 else (n,)
    nodes = dict.fromkeys((*(f"node {i}" for i in range(n)), *["also"] * (cells.shape[1] % 4 == 3)), (h, 2 * h))
    weights = initial(config, {"embedding": (words, h), "input": (*inputs, h, 2 * h), **nodes}, seeds)
    for k, width in enumerate(columns(cells).width.tolist()):
        for w in weights.values():
            w[k] *= math.sqrt(h / (width or h)) if config.init == 0 else 1  # as if made with that many units
    return {"edges": torch.stack([weights.pop(node) for node in nodes], 1), **weights}

def check_fit(cells, nodes, hidden, gated):
    """A UserError if weights of so many nodes and units, of a gated space or not, do not hold one of the cells."""
    for cell in cells:
        if len(cell.nodes) > nodes or cell.width > hidden:
            raise UserError(f"{len(cell.nodes)} nodes, width {cell.width}: a cell larger than {nodes} and {hidden}")
        if not gated and [node.read for node in cell.nodes].count(INPUT) > 1:
            raise UserError("several nodes read the input pair, which shared weights allow with --operations glu, ...")

def is_shared(weights):
    """Is it the supernet, or K networks each with its own?"""
    return weights["embedding"].dim() == 2

# What the recurrence needs of rows [K, D]. [N, K]: slot read, its edge's row in the bank, activation, the node's weight
# in h_t, does it take x_t? more is None in ENAS's space, else Gates:
Structure = namedtuple("Structure", "read edge act leaf takes more")
# are nodes highway, gate, sum [N, K, 1, 1]; the second slot [N, K], N + 1 for the memory; the slot carried as memory
# [K]; which units there are, live [K, 1, H], and in which of them is a memory, has; if rows have such columns, the slot
# read also [K], else None, and the node that reads it, here [N, K, 1, 1]; then edge is [N + 1, K].
Gates = namedtuple("Gates", "highway gate sum second memory live has also here")

def structure(cells, hidden=0):
    """The Structure of rows [K, D]; hidden is needed for its live units only."""
    c = columns(cells)
    read, act, operation, second = (x.t() for x in (c.read, c.act, c.operation, c.second))               # [N, K]
    node = torch.arange(len(read), device=cells.device)[:, None]
    exists = node < c.count
    reads_second = exists & ((operation == GATE) | (operation == SUM))
    reads_it = lambda slot, reads: ((slot[None] == node[:, None] + 1) & reads[None]).any(1)              # [N, K]
    is_read = reads_it(read, exists) | reads_it(second, reads_second) | (c.also == node + 1)
    leaf = exists & torch.where(c.output == ALL, (node > 0) | (c.count == 1), ~is_read)  # paper: DARTS omits node 0
    units = torch.arange(hidden, device=cells.device)
    live = ((units < c.width[:, None]) | (c.width[:, None] == 0))[:, None]               # [K, 1, H]
    kinds = ((operation == kind)[..., None, None] for kind in (HIGHWAY, GATE, SUM))
    slots, has = torch.where(second == MEMORY, len(read) + 1, second), live & (c.memory > 0)[:, None, None]
    edge, second_edge = edge_index(read, node), (None, None)
    if cells.shape[1] % 4 == 3:
        edge = torch.cat([edge, edge_index(c.also, (c.who - 1).clamp(min=0))[None]])
        second_edge = c.also, (c.who == node + 1)[..., None, None]
    more = Gates(*kinds, slots, c.memory, live, has, *second_edge) if cells.shape[1] % 2 else None
    return Structure(read, edge, act, leaf.double() / leaf.sum(0), exists & (read == INPUT), more)

def inherit(shared, cells):
    """Standalone weights that start from the shared ones: each network gets its own copy."""
    copies = {name: w.expand(len(cells), *w.shape).clone() for name, w in shared.items() if name != "edges"}
    return {**copies, "edges": shared["edges"][structure(cells).edge].transpose(0, 1).contiguous()}

# One step's input: inputs [T, B]; targets [T, B], -1 where there is nothing to predict; state [K or 1, B, H or 2H], h
# before the first token, outside ENAS's space memory or 0 beside it; masks, a dict, see draw_masks, {} to evaluate.
Batch = namedtuple("Batch", "inputs targets state masks")

def draw_masks(config, words, batch, seeds, step):
    """Variational dropout: a mask per segment, scaled by 1 / (1 - rate), for each of K seeds; one seed, shared masks.
    word [K, V], input, hidden, output [K, B, H]; a rate of 0 has no mask."""
    shapes = {"word": (words,), **dict.fromkeys(("input", "hidden", "output"), (batch, config.hidden))}
    rates = {name: getattr(config, f"{name}_dropout") for name in shapes}
    return {name: torch.stack([torch.rand(shapes[name], generator=rng(seed, name, step)) >= rate for seed in seeds])
            / (1 - rate) for name, rate in rates.items() if rate > 0}

def reference_losses(weights, row, batch, k=0):
    """The network as it is usually written, for ONE architecture: the mean loss, and the states [T, B, H or 2H].
    Highway node (Pham et al. 2018): [c, u] = s_p W;  s_i = s_p + sigmoid(c) * (act(u) - s_p). Others: OPERATIONS."""
    mine = weights if is_shared(weights) else {name: w[k] for name, w in weights.items()}
    mask = {name: x[k % len(x)] for name, x in batch.masks.items()}
    cell, states, hidden = decode(row), [], mine["embedding"].shape[-1]
    live = (torch.arange(hidden) < (cell.width or hidden)).to(mine["embedding"])         # the top-left block of weights
    h, *m = batch.state[k % len(batch.state)].split(hidden, -1)
    m, times = m[0] if m else torch.zeros_like(h), lambda x, name: x * mask[name] if name in mask else x
    halves = lambda w: (w[:, :hidden].contiguous(), w[:, hidden:].contiguous())          # gate, candidate
    rows = [edge_index(node.read, i) if is_shared(weights) else i for i, node in enumerate(cell.nodes)]
    rows += [edge_index(node.also, i) if is_shared(weights) else -1 for i, node in enumerate(cell.nodes) if node.also]
    wxs, ws = ([halves(w) for w in x] for x in (mine["input"].view(-1, hidden, 2 * hidden), mine["edges"][rows]))
    for t, tokens in enumerate(batch.inputs):
        x = F.embedding(tokens, mine["embedding"])                                       # [B, H]
        x = x + mask["noise"][t] * mine["embedding"].square().mean().sqrt() if "noise" in mask else x
        x = live * times(x * mask["word"][tokens][:, None] if "word" in mask else x, "input")
        slots = [h]
        for i, (node, (w_c, w_u)) in enumerate(zip(cell.nodes, ws)):
            p, q = slots[node.read], m if node.second == MEMORY else slots[node.second]
            s = live * times(p, "hidden")
            c, u = s @ w_c, s @ w_u
            if node.read == INPUT:
                c, u = c + x @ wxs[i][0], u + x @ wxs[i][1]
            if node.also:
                r = live * times(slots[node.also], "hidden")
                p, c, u = (p + slots[node.also]) / 2, (c + r @ ws[-1][0]) / 2, (u + r @ ws[-1][1]) / 2
            act, gate = ACTIVATIONS[node.activation], torch.sigmoid(c)
            slots.append({"highway": lambda: p + gate * (act(u) - p), "glu": lambda: gate * act(u),
                          "gate": lambda: gate * act(q), "sum": lambda: p + q}[node.operation]())
        bounded = lambda s: s * (STATE_BOUND / s.norm(dim=-1, keepdim=True).clamp(min=STATE_BOUND))
        h = bounded(live * sum(slots[i + 1] for i in leaves(cell)) / len(leaves(cell)))
        m = bounded(live * slots[cell.memory]) if cell.memory else torch.zeros_like(h)
        states.append(torch.cat([h, m], -1))
    states = torch.stack(states)
    logits = times(states[..., :hidden], "output") @ mine["embedding"].t() + mine["bias"]                # [T, B, V]
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    return loss, states if is_gated(cell) else states[..., :hidden]

class Workspace:
    """Large buffers to use again, since fresh memory is slow: a forward pass takes them, its backward gives them back,
    so two passes that are alive at once never share one. The last few shapes are kept."""
    free = []

    @classmethod
    def take(cls, like, *shape):
        for i, buffer in enumerate(cls.free):
            if (buffer.shape, buffer.dtype, buffer.device) == (shape, like.dtype, like.device):
                return cls.free.pop(i)
        return like.new_empty(shape)

    @classmethod
    def give(cls, *buffers):
        cls.free = (cls.free + list(buffers))[-10:]

# Every activation as arithmetic with coefficients per architecture, so that K different ones are one operation. With
# z = slope * u:  y = act(u) = scale * sigmoid(z) + shift + max(linear * z, floor), and the derivative needs only y:
# dy/dz = (square * y + line) * y + constant + step * [y > 0]. In bfloat16 tanh is exact to 1/128 so, not relatively.
#                           slope scale shift linear floor       square line constant step
COEFFICIENTS = {"tanh":     (2.0, 2.0, -1.0, 0.0, 0.0,           -0.5, 0.0, 0.5, 0.0),
                "relu":     (1.0, 0.0, 0.0, 1.0, 0.0,            0.0, 0.0, 0.0, 1.0),
                "identity": (1.0, 0.0, 0.0, 1.0, -math.inf,      0.0, 0.0, 1.0, 0.0),
                "sigmoid":  (1.0, 1.0, 0.0, 0.0, 0.0,            -1.0, 1.0, 0.0, 0.0)}

@lru_cache
def coefficient_table(dtype, device):
    """Built once per device: a copy from the host inside a step would stop a GPU, and a CUDA graph's capture."""
    return torch.tensor([COEFFICIENTS[name] for name in ACTIVATIONS], dtype=dtype, device=device)

def bound_norm(x):
    """x min(1, bound / |x|), and that factor."""
    shrink = (STATE_BOUND / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).clamp(max=1)
    return x * shrink, shrink

def bound_norm_backward(dy, y, shrink):
    """dL/dx from dL/dy: where the bound holds, without the part along y."""
    radial = (y * dy).sum(-1, keepdim=True).mul_(shrink < 1).div_(STATE_BOUND ** 2)
    return torch.addcmul(dy, radial, y, value=-1).mul_(shrink)

def activate(z, out, alone, scale, shift, linear, floor):
    """sigmoid(c) and y = act(u) [K, B, H] of z [K, B, 2, H], which holds c and slope * u; both are views of out."""
    c, y = torch.sigmoid(z, out=out).unbind(2)
    z_u = z[:, :, 1]
    if not alone:
        torch.add(torch.maximum(z_u.mul_(linear), floor).addcmul_(y, scale), shift, out=y)
    elif linear:
        torch.clamp(z_u, min=floor, out=y)
    elif scale != 1:
        y.mul_(scale).add_(shift)
    return c, y

def local_derivatives(node, p, keep, act, kinds, passed):
    """Of one node's s = p + c (y - p), all steps at once, in place: node [K, T, B, 2, H], c = sigmoid(c~), y = act(u),
    becomes ds/dc~ and ds/dz, and keep [K, T, B, H] ds/dp. In gated cells kinds are its highway, gate, sum [K, 1, 1, 1],
    and passed becomes ds/dq; where the activation is q's (gate), z has no derivative. act: nine coefficients."""
    slope, square, line, constant, step = act[0], *act[5:]
    c, y = node.unbind(3)
    torch.sub(1, c, out=keep)
    dz = y.mul(square).add_(line).mul_(y).add_(constant).addcmul_(step, (y > 0).to(y.dtype)).mul_(c)
    if kinds is None:
        c.copy_(y.sub_(p).mul_(c).mul_(keep))  # ds/dc~ = (y - p) c (1 - c)
        y.copy_(dz)
        return
    highway, gate, sum_ = kinds
    torch.where(gate, dz * slope, sum_.to(y.dtype), out=passed)
    c.copy_(torch.where(sum_, 0, y.sub_(p * highway).mul_(c).mul_(keep)))
    y.copy_(torch.where(gate | sum_, 0, dz))
    keep.mul_(highway).add_(sum_)

def read_also(z, p, r, here, mask, w):
    """z = [c, u] and the returned s_p: means over p and the slot read also, r, where it is here. Else r may be NaN."""
    z_r = torch.bmm(r if mask is None else r * mask, w)
    z.copy_(torch.where(here, (z + z_r) / 2, z))
    return torch.where(here, (p + r) / 2, p)

def edge_gradients(dz, reads, mask, out):
    """dL/dw of edges, each ONE product over all T * B rows, to out [N, K, H, 2H]: dz [N, K, T, B, 2, H], and reads(i)
    what node i reads [K, T, B, H]."""
    flat = lambda x: x.reshape(dz.shape[1], -1, x.shape[-1])
    for i, dw in enumerate(out):
        read = reads(i) if mask is None else reads(i) * mask[:, None]
        torch.bmm(flat(read).transpose(1, 2), flat(dz[i].flatten(3)), out=dw)

# What both passes of the recurrence gather by: rows slot * K + k of all slots. reads, N of [K]; in gated cells second
# [N, K] and memory [K]; also [K], or None; half [N, K, 1, 1], 1/2 where a node reads also. On the CPU an architecture
# is alone if it is the only one: the host knows what is read, so reads are N numbers, and nothing is gathered by them.
Plan = namedtuple("Plan", "alone reads leaf takes gated second memory also half")

def plan_of(cell, w):
    """The Plan of a Structure, whose leaf, here [K, 1, N], and takes [N, K, 1, 1] get the dtype of the weights w."""
    k, more = cell.read.shape[1], cell.more
    alone, flat = k == 1 and w.device.type == "cpu", lambda slot: slot * k + torch.arange(k, device=w.device)
    reads = cell.read.flatten().tolist() if alone else flat(cell.read).unbind()
    leaf, takes = cell.leaf.t()[:, None].to(w.dtype).contiguous(), cell.takes[..., None, None].to(w.dtype)
    if more is None:
        return Plan(alone, reads, leaf, takes, False, None, None, None, None)
    also = (None, None) if more.also is None else (flat(more.also), more.here.to(w.dtype) / 2)
    return Plan(alone, reads, leaf, takes, True, flat(more.second), flat(more.memory), *also)

def back_through_time(grad, w, mask, cell, plan, gates, keep, passed, h, shrink, m, m_shrink):
    """dL/dh0 and dL/dm0, or None, from grad, dL/dh [K, T, B, H]; gates, each node's local derivatives, become dL/dz.
    ds [slots, K, B, H] collects the gradient of every slot of one step."""
    (n, k), (t_, b, hidden), more = cell.read.shape, h.shape[1:], cell.more
    ds, dz, dp = (w.new_zeros(n + 1 + plan.gated, k, b, hidden), *(w.new_empty(k, b, x * hidden) for x in (2, 1)))
    leaf = plan.leaf.permute(2, 0, 1)[..., None]                                         # [N, K, 1, 1]
    back = w.transpose(2, 3).contiguous()  # a view is slow in bfloat16
    per_node = list(zip(ds[1:].unbind(), plan.reads, back.unbind(), gates.unbind(), keep.unbind()))
    ds_flat, dz_pair, dh = ds.flatten(0, 1), dz.view(k, b, 2, hidden), None
    for t in reversed(range(t_)):
        dh = grad[:, t] if dh is None else grad[:, t] + dh
        dmean = bound_norm_backward(dh, h[:, t], shrink[:, t])
        if plan.gated:
            dmean, dm = dmean * more.live, bound_norm_backward(ds[-1], m[:, t], m_shrink[:, t]) * more.has
            ds[-1] = 0
        ds[0] = 0
        torch.mul(dmean, leaf, out=ds[1:n + 1])
        if plan.gated:
            ds_flat.index_add_(0, plan.memory, dm)
        for i, (d, where, w_t, local, stay) in reversed(list(enumerate(per_node))):
            now = local[:, t]                                                            # [K, B, 2, H]
            torch.mul(now, d[:, :, None], out=dz_pair)
            now.copy_(dz_pair)
            torch.bmm(dz, w_t, out=dp)
            if mask is not None:
                dp.mul_(mask)
            dp.addcmul_(d, stay[:, t])
            if plan.also is not None:
                dr = torch.bmm(dz, w[n].transpose(1, 2))
                dr = (dr if mask is None else dr * mask).addcmul_(d, stay[:, t])
                ds_flat.index_add_(0, plan.also, plan.half[i] * dr)
                dp.mul_(1 - plan.half[i])
            ds[where].add_(dp) if plan.alone else ds_flat.index_add_(0, where, dp)
            if plan.gated:
                ds_flat.index_add_(0, plan.second[i], d * passed[i][:, t])
        dh = ds[0]
    return dh, ds[-1] if plan.gated else None

class Recurrence(torch.autograd.Function):
    """All nodes, steps and architectures of the recurrence, with a backward pass through time written by hand.
    xw [I, K or 1, T, B, 2H] is x_t times the input weights of the I nodes on_input; h0, m0 [K, B, H]; w [N, K, H, 2H]
    each node's weights, then the second edge's if there is one, the candidate half scaled by slope; mask [K or 1, B or
    1, H] or None; a Structure, act the coefficients. Returns h [K, T, B, H] and the last memory [K, B, H] or None.
    Buffers are filled in place, without a graph. For second derivatives: reference_losses."""

    @staticmethod
    def forward(ctx, training, xw, h0, m0, w, mask, on_input, cell, *act):
        ctx.inputs = training, xw, h0, m0, w, mask, on_input, cell, *act
        (n, k), hidden, (t_, b), more, plan = cell.read.shape, w.shape[2], xw.shape[2:4], cell.more, plan_of(cell, w)
        kept, count = t_ if training else 1, n + 1 + plan.gated  # steps, for the backward pass; slots
        slots = Workspace.take(w, count, k, kept, b, hidden)  # the input pair, the nodes, the memory
        gates = Workspace.take(w, n if training else 1, k, kept, b, 2, hidden)
        h, shrink = w.new_empty(k, t_, b, hidden), w.new_empty(k, t_, b, 1)
        m, m_shrink = (torch.empty_like(h), torch.empty_like(shrink)) if plan.gated else (None, None)
        p, pm, z = (w.new_empty(k, b, width) for width in (hidden, hidden, 2 * hidden))
        z_pair = z.view(k, b, 2, hidden)
        z_c, z_u = z_pair.unbind(2)  # c, and slope * u, of the product that bmm writes to z
        slope, spread = act[0], lambda x: x.flatten().tolist() if plan.alone else x.unbind()
        per_node = list(zip(w, plan.reads, *map(spread, act[1:5])))
        for t in range(t_):
            now = t if training else 0
            rows = slots.view(count * k, kept, b, hidden)[:, now]                        # [slots * K, B, H]
            values = slots[:, :, now].unbind()                                           # of each slot [K, B, H]
            values[0].copy_(h0 if t == 0 else h[:, t - 1])
            if plan.gated:
                values[-1].copy_(m0 if t == 0 else m[:, t - 1])
            for i, (w_i, where, scale, shift, linear, floor) in enumerate(per_node):
                p = values[where] if plan.alone else torch.index_select(rows, 0, where, out=p)
                torch.bmm(p if mask is None else torch.mul(p, mask, out=pm), w_i, out=z)
                if i in on_input:
                    x = xw[on_input.index(i), :, t]
                    z_c.addcmul_(x[..., :hidden], plan.takes[i])
                    z_u.addcmul_(x[..., hidden:], plan.takes[i] * slope[i])
                if plan.also is not None:
                    p = read_also(z, p, rows.index_select(0, plan.also), more.here[i], mask, w[n])
                if plan.gated:  # a gate's activation is of the second slot
                    q = rows.index_select(0, plan.second[i])
                    z_u.copy_(torch.where(more.gate[i], q * slope[i], z_u))
                c, y = activate(z_pair, gates[i if training else 0, :, now], plan.alone, scale, shift, linear, floor)
                torch.lerp(p * more.highway[i] if plan.gated else p, y, c, out=values[i + 1])  # only a highway carries
                if plan.gated:
                    values[i + 1].copy_(torch.where(more.sum[i], p + q, values[i + 1]))
            mean = torch.bmm(plan.leaf, slots[1:n + 1, :, now].view(n, k, -1).transpose(0, 1)).view(k, b, hidden)
            h[:, t], shrink[:, t] = bound_norm(mean * more.live if plan.gated else mean)
            if plan.gated:
                m[:, t], m_shrink[:, t] = bound_norm(rows.index_select(0, plan.memory) * more.has)
        if training:
            ctx.buffers = plan, slots, gates, h.detach(), shrink, m, m_shrink  # else h would refer to itself
        else:
            Workspace.give(slots, gates)
        if plan.gated:
            ctx.mark_non_differentiable(last := m[:, -1].clone())
        return h, last if plan.gated else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        training, xw, _, _, w, mask, on_input, cell, *act = ctx.inputs
        if ctx.buffers is None:  # a second backward: the first one has used them up
            Recurrence.forward(ctx, *ctx.inputs)
        (plan, slots, gates, *bounded), ctx.buffers = ctx.buffers, None
        n, two = len(gates), plan.also is not None  # does a node read also? Its edges have half of the gradient each
        flat = slots.flatten(0, 1)                                                       # [slots * K, T, B, H]
        values = lambda where: slots[where] if plan.alone else flat.index_select(0, where)  # [K, T, B, H]
        r = flat.index_select(0, plan.also) if two else None
        keep, passed = (Workspace.take(w, *slots[:n].shape) if x else None for x in (True, plan.gated))
        for i, where in enumerate(plan.reads):  # gates become ds/dc~ and ds/dz, keep ds/dp, passed ds/dq
            carried = torch.lerp(values(where), r, plan.half[i][:, None]) if two else values(where)
            kinds = [x[i][:, None] for x in cell.more[:3]] if plan.gated else None
            local_derivatives(gates[i], carried, keep[i], [x[i][:, None] for x in act], kinds,
                              passed[i] if plan.gated else None)
        dh, dm = back_through_time(grad, w, mask, cell, plan, gates, keep, passed, *bounded)
        dw = torch.empty_like(w)
        if two:
            half = plan.half[..., None, None]
            edge_gradients((gates * half).sum(0, keepdim=True), lambda i: r, mask, dw[n:])
            gates.mul_(1 - half)  # what is left to the first edges
        edge_gradients(gates, lambda i: values(plan.reads[i]), mask, dw[:n])
        dxw = gates[on_input] * plan.takes[on_input][..., None, None]                    # [I, K, T, B, 2, H]
        dxw[..., 1, :] *= act[0][on_input][:, :, None]  # slope
        dxw = dxw.flatten(4)
        Workspace.give(slots, gates, keep, *[passed] * plan.gated)
        return None, dxw if xw.shape[1] == len(dh) else dxw.sum(1, keepdim=True), dh, dm, dw, *[None] * (3 + len(act))

class CrossEntropy(torch.autograd.Function):
    """Mean loss [K] of h [K, R, H] for targets [R], -1 for none, under decoders [K, V, H] and biases [K, V].
    Log-probabilities are in h's dtype, their sum in float32 or better, the gradients of decoder and bias in theirs. The
    softmax goes by chunks that stay in the cache, the products by blocks of chunks: all logits never exist at once. If
    a gradient is wanted, forward computes it for dL = 1, since the softmax is at hand; backward only scales it."""

    @staticmethod
    def forward(ctx, training, h, decoder, bias, targets, chunk=0, block=1024):
        (k, rows, _), chunk = h.shape, chunk or max(128, h.shape[2] // 2, 2 ** 20 // decoder.shape[1])
        block = chunk * max(1, block // chunk)                                            # whole chunks
        wide = torch.promote_types(h.dtype, torch.float32)
        share = F.normalize((targets >= 0).to(wide), p=1, dim=0)                         # [R] weights of the rows
        losses, low, offset = torch.zeros(k, dtype=wide, device=h.device), decoder.to(h.dtype), bias.to(h.dtype)
        buffers = h.new_empty(2, min(chunk, rows), decoder.shape[1])                     # a chunk's logits, log softmax
        if training:
            d = h.new_empty(min(block, rows), decoder.shape[1])                          # dL/dlogits of a block
            dh, dw, db = torch.empty_like(h), decoder.new_zeros(decoder.shape), bias.new_zeros(bias.shape)
        for i, r in ((i, r) for i in range(k) for r in range(0, rows, chunk)):
            if r == 0:
                up = low[i].t().contiguous()  # [H, V]; a view is slow in bfloat16
            x, y, part = h[i, r:r + chunk], targets[r:r + chunk].clamp(min=0)[:, None], share[r:r + chunk, None]
            logits, logp = buffers[:, :len(x)]
            torch.log_softmax(torch.addmm(offset[i], x, up, out=logits), 1, out=logp)
            losses[i] -= (logp.gather(1, y) * part).sum()
            if training:  # dL/dlogits = (softmax - onehot) / count
                p = logp.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=h.dtype)).mul_(part)
                db[i] += p.sum(0)
                at, end = r % block, min(r + chunk, rows)
                d[at:at + len(p)] = p
                if end == rows or end % block == 0:
                    torch.mm(d[:at + len(p)], low[i], out=dh[i, r - at:end])
                    dw[i] += d[:at + len(p)].t() @ h[i, r - at:end]
        if training:
            ctx.save_for_backward(dh, dw, db)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dh, dw, db = ctx.saved_tensors
        grad = grad.to(dw.dtype)[:, None]
        return None, dh * grad[..., None].to(dh.dtype), dw * grad[..., None], db * grad, *[None] * 3

def embed(weights, batch):
    """The embedded, dropped input [K or 1, T, B, H]."""
    table, tokens, masks = weights["embedding"], batch.inputs, batch.masks
    copies = 1 if is_shared(weights) else len(table)
    offset = torch.arange(copies, device=tokens.device)[:, None, None] * table.shape[-2]
    x = F.embedding(tokens + offset, table.view(-1, table.shape[-1]))                    # K tables, one after the other
    if "noise" in masks:
        x = x + masks["noise"] * table.square().mean((-2, -1)).sqrt().view(-1, 1, 1, 1)
    if "word" in masks:
        x = x * masks["word"][:, tokens][..., None]
    return x * masks["input"][:, None] if "input" in masks else x

def unroll(weights, cells, batch, dtype=torch.float32):
    """h of K architectures over a segment: [K, T, B, H] in dtype, and the state to go on with [K, B, H or 2H]. On the
    CPU a lone architecture is cut to its width, h [1, T, B, width]; else the units beyond the widths are masked."""
    hidden, bank, host = weights["embedding"].shape[-1], weights["edges"], cells.device.type == "cpu"
    cell, mask, x = structure(cells, hidden), batch.masks.get("hidden"), embed(weights, batch)  # [K or 1, T, B, H]
    w = bank.index_select(0, cell.edge.flatten()).unflatten(0, cell.edge.shape) if is_shared(weights) else \
        bank.transpose(0, 1)                                                             # [N, K, H, 2H]
    w_x = weights["input"].reshape(len(x), -1, hidden, 2 * hidden)                       # [K or 1, N or 1, H, 2H]
    state = F.pad(batch.state, (0, 2 * hidden - batch.state.shape[-1]))  # a memory that it lacks is 0
    h0, m0 = state.expand(len(cells), -1, -1).chunk(2, -1)
    d, on_input = hidden, [0]  # units computed with; nodes that read the input pair
    if cell.more is not None:
        on_input = [i for i in range(min(len(cell.takes), w_x.shape[1])) if not host or cell.takes[i].any()]
        live = cell.more.live
        if host and len(cells) == 1:
            d = int(live.sum())
        elif not host or not live.all():
            mask, x = live.to(x.dtype) if mask is None else mask * live, x * live[:, None]
    if d < hidden:
        block = lambda w: torch.cat([w[..., :d, :d], w[..., :d, hidden:hidden + d]], -1)
        w, w_x, x, h0, m0 = block(w), block(w_x), x[..., :d], h0[..., :d], m0[..., :d]
        mask = None if mask is None else mask[..., :d]
        cell = cell._replace(more=cell.more._replace(live=live[..., :d], has=cell.more.has[..., :d]))
    cast, act = lambda x: x.to(dtype), coefficient_table(dtype, cells.device)[cell.act][..., None, None].unbind(2)
    xw = (cast(x).flatten(1, 2)[:, None] @ cast(w_x[:, on_input])).unflatten(2, x.shape[1:3])            # over all rows
    slope = act[0]
    if len(w) > len(slope):  # that of the node which reads a slot also
        slope = torch.cat([slope, (cell.more.here * slope).sum(0, keepdim=True)])
    w = torch.cat([cast(w[..., :d]), cast(w[..., d:]) * slope], -1)                      # u times slope
    h, m = Recurrence.apply(torch.is_grad_enabled(), xw.transpose(0, 1), cast(h0), cast(m0), w,
                            None if mask is None else cast(mask), on_input, cell, *act)
    state = [F.pad(s.detach(), (0, hidden - d)).to(batch.state.dtype) for s in (h[:, -1], m) if s is not None]
    return h, torch.cat(state, -1)

def unroll_lstm(weights, cells, batch, dtype=torch.float32):
    """torch.nn.LSTM in the place of unroll, one after the other for K seeds; the state is h and c side by side."""
    outputs, states = [], []
    for i, x in enumerate(embed(weights, batch)):
        start = [s[None].contiguous() for s in batch.state[i % len(batch.state)].chunk(2, -1)]           # h, c
        flat = [weights[f"{name}_l0"][i] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        out, h, c = torch.lstm(x, start, flat, True, 1, 0.0, torch.is_grad_enabled(), False, False)
        outputs.append(out @ weights["project"][i] if "project" in weights else out)
        states.append(torch.cat([h[0], c[0]], -1).detach())
    return torch.stack(outputs).to(dtype), torch.stack(states)

def lstm_weights(config, words, seeds):
    """Weights of K LSTMs; one of other than --hidden units is projected back to the tied embedding's size."""
    e, h = config.hidden, config.lstm_hidden or config.hidden
    shapes = {"embedding": (words, e), "weight_ih_l0": (4 * h, e), "weight_hh_l0": (4 * h, h), "bias_ih_l0": (4 * h,),
              "bias_hh_l0": (4 * h,), **({"project": (h, e)} if h != e else {})}
    return initial(config, shapes, seeds)

def network(weights, cells, batch, dtype=torch.float32, activation_reg=0.0, slowness_reg=0.0):
    """Mean loss per token of K architectures [K], plus the activation penalties if asked for, and the next state."""
    h, state = (unroll_lstm if "weight_hh_l0" in weights else unroll)(weights, cells, batch, dtype)
    units, hidden = h.shape[-1], weights["embedding"].shape[-1]  # fewer, where it was cut to its width
    dropped = h * batch.masks["output"][..., :units].to(dtype)[:, None] if "output" in batch.masks else h
    decoder, bias = weights["embedding"][..., :units].expand(len(h), -1, -1), weights["bias"].expand(len(h), -1)
    losses = CrossEntropy.apply(torch.is_grad_enabled(), dropped.flatten(1, 2), decoder, bias, batch.targets.flatten())
    if activation_reg:
        losses = losses + activation_reg * dropped.square().mean((1, 2, 3)) * units / hidden
    if slowness_reg:
        losses = losses + slowness_reg * (h[:, 1:] - h[:, :-1]).square().mean((1, 2, 3)) * units / hidden
    return losses, state

@torch.no_grad()
def sgd_step(weights, grads, lr, clip, decay):
    """omega <- omega - lr (g min(1, clip / |g|) + decay omega), in place; for standalone networks each on its own.
    lr: [K], or [1] for shared weights. A gradient that is not finite changes nothing."""
    flat = {name: g.reshape(len(lr), -1) for name, g in grads.items()}
    norm = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat.values()]).norm(dim=0)
    lr = torch.where(torch.isfinite(norm), lr, 0.0)[:, None]
    scale = lr * (clip / norm).clamp(max=1).nan_to_num(0.0)[:, None]
    for name, g in flat.items():
        weights[name].view(len(lr), -1).mul_(1 - lr * decay).addcmul_(g.nan_to_num_(0.0, 0.0, 0.0), scale, value=-1)

def gradients(losses, weights):
    """d sum(losses) / d weights, a dict; weights that play no part have zeros."""
    return dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values()), materialize_grads=True)))

# 5. The controller ---------------------------------------------------------------------------------------------------
# K architectures, rows [K, D], and what the policy says of them: log_prob [K] of the whole row; entropy [K], the sum of
# the decisions' entropies along the row's path, whose mean estimates the policy's.
Sample = namedtuple("Sample", "rows log_prob entropy")

class Controller(nn.Module):
    """pi_theta(m): an LSTM that takes one decision after the other, each with an embedding and a head of its own.
    Sampling and scoring are the same walk, so the temperature and the tanh constant cannot differ between them."""

    def __init__(self, decisions, config, asked=False):
        super().__init__()
        size, self.decisions, self.config = config.controller_hidden, decisions, config
        self.free = [i for i, d in enumerate(decisions) if len(d.choices) > 1 or d.when]
        only = {column: d.choices[0] for d in decisions for column in d.columns}
        self.register_buffer("only", torch.tensor([only[column] for column in sorted(only)]))
        widest = max(len(d.choices) for d in decisions)
        padded = [[*d.choices, *[-1] * (widest - len(d.choices))] for d in decisions]
        self.register_buffer("values", torch.tensor(padded))
        self.start = nn.Parameter(torch.empty(size))
        self.embed = nn.Parameter(torch.empty(len(self.free), widest, size))
        self.head = nn.Parameter(torch.empty(len(self.free), size, widest))
        self.lstm = nn.LSTMCell(size, size)
        self.aim = nn.Parameter(torch.empty(size)) if asked else None  # start + asked * aim
        for name, parameter in self.named_parameters():
            draw = torch.rand(parameter.shape, generator=rng(config.seed, "controller", name))
            parameter.data.copy_((draw * 2 - 1) * 0.1)

    def forward(self, draws=None, rows=None, asked=None):
        """Walk the decisions, sampling with uniform draws [K, decisions], or taking those of rows [K, D]: a Sample.
        asked [K]: what the policy is conditioned on, standardized, if it is."""
        k = len(draws if rows is None else rows)
        x, state, out = self.start.expand(k, -1), None, self.only.repeat(k, 1)
        x = x if asked is None else x + asked[:, None] * self.aim
        log_prob = entropy = self.start.new_zeros(k)
        for f, i in enumerate(self.free):
            d, n = self.decisions[i], len(self.decisions[i].choices)
            state = self.lstm(x, state)
            logits = torch.tanh(state[0] @ self.head[f, :, :n] / self.config.temperature) * self.config.tanh_constant
            logp = F.log_softmax(logits, 1)                                              # [K, choices]
            choice = ((logp.exp().cumsum(1) < draws[:, i, None]).sum(1).clamp(max=n - 1) if rows is None
                      else (rows[:, d.columns[0], None] == self.values[i, :n]).long().argmax(1))
            matters = out.new_ones(k)  # what does not is neither probable nor uncertain
            for column, values in d.when:
                matters = matters * torch.stack([out[:, column] == value for value in values]).any(0)
            log_prob = log_prob + matters * logp.gather(1, choice[:, None])[:, 0]
            entropy = entropy - matters * (logp.exp() * logp).sum(1)
            for column in d.columns:
                out[:, column] = matters * self.values[i][choice]
            x = self.embed[f][choice * matters]
        return Sample(out, log_prob, entropy)

    def sample(self, k, *key, asked=None):
        """K architectures, drawn by rng(*key) on the CPU whatever the device."""
        return self(torch.rand(k, len(self.decisions), generator=rng(*key)).to(self.start.device), asked=asked)

class Uniform(nn.Module):
    """A policy that does not learn: uniform over the different cells of the space, or over the rows of a family."""

    def __init__(self, decisions, family=None):
        super().__init__()
        self.decisions, self.family = decisions, family
        self.size = sum(n for *_, n in ways(decisions)(0, ())) if family is None else len(family)
        self.nothing = nn.Parameter(torch.zeros(()))  # an optimizer wants a parameter

    def sample(self, k, *key):
        rows = uniform_rows(self.decisions, k, *key) if self.family is None else \
            self.family[torch.randint(self.size, (k,), generator=rng(*key))]
        entropy = torch.full((k,), math.log(self.size), device=self.nothing.device)
        return Sample(rows.to(self.nothing.device), -entropy, entropy)

# 6. Architecture gradients -------------------------------------------------------------------------------------------
# The controller should climb F(theta) = E_m R(omega*(theta); m), where omega* are the weights that training on
# architectures of pi_theta ends in. Within reach is the objective one step of SGD ahead, omega' = omega - lr clip(g):
#
#     F_1(theta) = E_m R(omega'; m),   g = E_m' grad L_T(omega; m')              R reward, L_T training loss
#     dF_1/dtheta =   E_m [ R(omega'; m) dlog pi(m)/dtheta ]                       direct: ENAS has it, at omega
#                   - E_m'[ <grad L_T(omega; m'), u> dlog pi(m')/dtheta ]          response: what ENAS leaves out
#     u = lr J^T v,   v = grad_omega' E_m R(omega'; m),   J = d clip(g) / dg
#
# Theta moves omega' only through which architectures it is trained on, so the response is a REINFORCE gradient too: an
# architecture is rewarded by what a step of training on it does to everyone's R. With u = H^-1 v at a converged
# omega*, H the Hessian of E L_T, the same formula is dF/dtheta. LOOKAHEAD says where R is evaluated, RESPONSE what v
# becomes. The functions know nothing of RNNs; toy_enas.py holds the same functions to closed forms.

# losses [K], nats per token -> rewards [K]. paper: ENAS's is 80 / perplexity.
REWARDS = {"perplexity": lambda losses: 80 * torch.exp(-losses), "loss": torch.neg}

# The next shared step as the controller foresees it: omega' = omega - lr (g min(1, clip / |g|) + decay omega). losses:
# (weights, cells [K, D], batch) -> L_T [K], differentiable once; batch: what they read, the same in every pass; cells
# [A, D]: the fold that g is estimated from; past: gradients so far, see remember; each: (weights, cells, batch, v) ->
# |grad L_T(omega; m)| and <grad L_T(omega; m), v> [K]. Losses and products are times an architecture's factor of lr.
Step = namedtuple("Step", "losses batch cells lr clip decay past each", defaults=(math.inf, 0.0, (), None))

def dot(a, b):
    """<a, b> of two dicts of tensors."""
    return sum((a[name] * b[name]).sum() for name in a)

def plus(a, b, scale=1.0):
    """a + scale b of two dicts of tensors, without gradients."""
    return {name: torch.add(a[name].detach(), b[name] * scale) for name in a}

def mean_gradient(values, weights):
    """d mean_k values(weights)_k / dweights, a dict; values: weights -> [K]."""
    leaf = {name: w.detach().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        return gradients(values(leaf).mean(), leaf)

def nudge(u):
    """eps such that a finite difference's step eps u has length .01; if u is 0 any will do."""
    return 0.01 / dot(u, u).sqrt().clamp(min=1e-30)

@torch.no_grad()
def directional(step, weights, cells, u):
    """<grad L_T(omega; m), u> = [ L_T(omega + eps u; m) - L_T(omega - eps u; m) ] / (2 eps) of K architectures [K].
    Two forward passes on the same minibatch with the same masks; the losses must be in float32 or better."""
    eps = nudge(u)
    ahead, back = (step.losses(plus(weights, u, sign * eps), cells, step.batch) for sign in (1, -1))
    return (ahead - back) / (2 * eps)

def remember(past, g, decay=0.9):
    """What the lookaheads need of the shared steps' gradients g: the last, and the decayed sum and its weight."""
    before, weight = (past["sum"], past["weight"]) if past else (dict.fromkeys(g, 0.0), 0.0)
    return {"recent": g, "sum": {name: g[name] + decay * before[name] for name in g}, "weight": 1 + decay * weight}

def momentum(weights, step):
    """g = sum_j decay^j g_{t-j} / sum_j decay^j, a mean of the shared steps' gradients, unclipped; None before any."""
    return {name: x / step.past["weight"] for name, x in step.past["sum"].items()} if step.past else None

def recent(weights, step):
    """g = g_t, of the last shared step: an extrapolation from the past, one step old; None before the first."""
    return step.past["recent"] if step.past else None

def fresh(weights, step):
    """g = d/domega mean_m L_T(omega; m) over the fold's architectures: extrapolation; the only unbiased g."""
    return mean_gradient(lambda w: step.losses(w, step.cells, step.batch), weights)

# (weights, step) -> g, the gradient that omega' is a step along, or None for omega' = omega. Not differentiated.
LOOKAHEAD = {"none": lambda weights, step: None, "momentum": momentum, "recent": recent, "fresh": fresh}

def look_ahead(weights, g, step):
    """omega' by the rule of training's step, for g instead of the sampled architecture's; the weights stay."""
    if g is None:
        return weights
    ahead, g = ({name: x.detach().clone() for name, x in y.items()} for y in (weights, g))
    sgd_step(ahead, g, next(iter(g.values())).new_full((1,), step.lr), step.clip, step.decay)
    return ahead

def no_response(v, weights, g, step, cells):
    """0: omega is held fixed, as in ENAS."""
    return torch.zeros(len(cells), device=cells.device)

def through_clip(v, g, step):
    """lr J^T v; J = d(g min(1, clip / |g|))/dg is 1, or where that clips (clip / |g|) (1 - g^ g^T), g^ = g / |g|."""
    norm = dot(g, g).sqrt()
    scale = step.lr * (step.clip / norm).clamp(max=1)
    along = torch.where(norm > step.clip, dot(v, g) / norm ** 2, 0.0)
    return {name: scale * (v[name] - along * g[name]) for name in v}

def unrolled(v, weights, g, step, cells):
    """- <grad L_T(omega; m), u>, u = lr J^T v: one step on the policy's MEAN gradient, clipped as a whole.
    With 'fresh' over the whole policy the exact dF_1/dtheta (DARTS's second order, for a sampled controller)."""
    return -directional(step, weights, cells, through_clip(v, g, step))

def neumann(v, weights, g, step, cells, terms=3):
    """- <grad L_T(omega; m), u>, u = sum_{j < terms} lr J [ (1 - lr decay) - H lr J ]^j v: many steps unrolled.
    H is the Hessian of the fold's L_T. Unclipped and undecayed, u = sum_j lr (1 - lr H)^j v tends to H^-1 v, the
    response of the converged inner problem, if lr times H's largest eigenvalue is below 2; a series whose terms grow is
    cut there. H x is a difference of gradients, [ g(omega + eps x) - g(omega - eps x) ] / (2 eps)."""
    term = total = through_clip(v, g, step)
    for _ in range(terms - 1):
        eps = nudge(term)
        ahead, back = (fresh(plus(weights, term, sign * eps), step) for sign in (1, -1))
        v = {name: (1 - step.lr * step.decay) * v[name] - (ahead[name] - back[name]) / (2 * eps) for name in v}
        size, term = dot(term, term), through_clip(v, g, step)
        shrinks = dot(term, term) <= size
        v, term = ({name: torch.where(shrinks, x, 0.0) for name, x in y.items()} for y in (v, term))
        total = plus(total, term)
    return -directional(step, weights, cells, total)

def sampled(v, weights, g, step, cells):
    """- lr min(1, clip / |g_m|) <g_m, v>, g_m = grad L_T(omega; m): what the step that ENAS really takes does, on ONE
    sampled architecture, clipped by its OWN norm.
    To first order in lr the gradient of E_m' E_m R(omega - lr clip(g_m'); m). Bounded by lr clip |v|, where unrolled is
    not: an architecture with an exploding gradient is clipped in training, but not in the mean of the policy's."""
    norm, along = step.each(weights, cells, step.batch, v)
    return -step.lr * (step.clip / norm).clamp(max=1) * along

# (v, weights, g, step, cells) -> [K]: what training on each architecture does to everyone's reward.
RESPONSE = {"none": no_response, "unrolled": unrolled, "neumann": neumann, "sampled": sampled}

def extra_rewards(look, respond, weights, cells, others, rewards, step):
    """The rewards R(omega'; m) [K] and the responses [K], whose sum REINFORCE climbs.
    rewards: (weights, cells) -> [K]. cells, others and step.cells are independent draws from the policy: omega' is made
    from step.cells, v from others; scoring those very draws again would bias both terms. Given omega' and v the mean is
    exact. Averaged over step.cells, unclipped, 'unrolled' is too where rewards are quadratic in omega, the direct term
    only where they curve alike: half the curvature times the variance of omega' is added to each."""
    g = LOOKAHEAD[look](weights, step)
    ahead = look_ahead(weights, g, step)
    with torch.no_grad():
        direct = rewards(ahead, cells)
    if respond == "none":  # spares the passes for v
        return direct, no_response(None, weights, g, step, cells)
    v = mean_gradient(lambda w: rewards(w, others), ahead)
    return direct, RESPONSE[respond](v, weights, fresh(weights, step) if g is None else g, step, cells)

def leave_one_out(rewards, memory, decay):
    """b_k = mean of the others' rewards: on the same minibatch, so its difficulty cancels. Unbiased; needs K > 1."""
    return (rewards.sum() - rewards) / max(len(rewards) - 1, 1), memory

def moving_average(rewards, memory, decay):
    """b = decayed mean of PAST rewards, bias-corrected, first leave_one_out. memory [2]: sum, weight. paper: ENAS."""
    past = torch.where(memory[1] > 0, memory[0] / memory[1].clamp(min=1e-12), leave_one_out(rewards, memory, decay)[0])
    now = torch.stack([rewards.mean(), torch.ones_like(memory[1])])
    return past, decay * memory + (1 - decay) * now

BASELINES = {"leave_one_out": leave_one_out, "moving_average": moving_average}

def worst_for_failures(rewards):
    """A reward that is not finite becomes the worst of its batch, so one broken architecture leaves the rest alone."""
    finite = torch.isfinite(rewards)
    worst = torch.where(finite, rewards, math.inf).min()
    return torch.where(finite, rewards, torch.where(torch.isfinite(worst), worst, 0.0))

def policy_loss(sample, rewards, baseline, entropy_weight):
    """Its gradient is minus an unbiased estimate of d/dtheta { E[reward] + entropy_weight * entropy of the policy }.
    mean_k [ (R_k + w H_k - b_k) log pi(m_k) + w H_k ] (Williams 1992); the H outside differentiates the entropies
    themselves, the one in the bracket the distribution that they are averaged over."""
    advantage = (rewards + entropy_weight * sample.entropy - baseline).detach()
    return -(advantage * sample.log_prob + entropy_weight * sample.entropy).mean()

# 7. Runs and records -------------------------------------------------------------------------------------------------
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WHEREABOUTS = {"out", "cache", "device", "threads", "part", "checkpoint_seconds"}  # may differ when a run resumes

def device_of(config):
    """The torch.device that --device names: cpu, cuda, cuda:1, ..., or auto."""
    kind = choose("device", re.sub(r":\d+$", "", config.device), ("auto", "cpu", "cuda"))
    if kind == "cuda" and int(f"{config.device}:0".split(":")[1]) >= torch.cuda.device_count():
        raise UserError(f"--device {config.device}: there is no such CUDA device here; use --device cpu")
    return torch.device(config.device if kind != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

@lru_cache
def tensorboard(folder):
    """add_scalar(name, value, step) of a TensorBoard writer, or of nobody where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(folder / "tensorboard")).add_scalar
    except ImportError:
        return lambda name, value, step: None

def commit():
    """The commit that this file is at, '+' if it has been changed since; '' outside a repository, or without git."""
    ask = f"git rev-parse --short=12 HEAD && (git diff --quiet HEAD -- {Path(__file__).name} || echo +)"
    answer = subprocess.run(ask, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    return answer.replace("\n", "")

class Run:
    """A folder with config.json, metrics.jsonl, checkpoint.pt, and at the end result.json; owned by one process.
    Killed at any instant, the same command goes on from the last checkpoint, which also knows how long metrics.jsonl
    was; as every random draw depends only on its key, the result is that of an undisturbed run."""

    def __init__(self, study, config):
        self.study, self.config, self.commit = study, config, commit()  # the file may change while the run goes on
        self.folder = Path(config.out or f"runs/{study}-{config.preset}-{config.seed}").expanduser()
        self.metrics, self.checkpoint = self.folder / "metrics.jsonl", self.folder / "checkpoint.pt"
        self.good, self.good_bytes = None, 0  # the last good state, and how long metrics.jsonl was then
        self.started = self.saved_at = self.spoke_at = time.time()
        self.format = f"menas {study} checkpoint 2"
        self.stop = 0  # the signal that asked to

    def __enter__(self):
        with refusing(self.folder, "; another run may be at work there: give this one another --out"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / f"lock {self.config.part.replace('/', ' of ')}".strip(), "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system's own, so a killed run frees it
        named = ",".join((self.config.cell, self.config.controller, self.config.connections))
        files = [path / "cell.json" if path.is_dir() else path for path in map(Path, re.split(r"(?:@-?\d+)?,", named))]
        cells = b"".join(path.read_bytes() for path in files if path.suffix == ".json" and path.is_file())
        path, mine = self.folder / "config.json", {"study": self.study, **asdict(self.config)}
        mine |= {"digest of its cells' files": hashlib.sha256(cells).hexdigest()[:12]} if cells else {}
        if not path.exists():
            write_json(path, mine)
        theirs = {**mine, **asdict(Config()), **read_json(path)}  # a setting newer than the run had its default
        for name in mine:
            if name not in WHEREABOUTS and theirs.get(name) != mine[name]:
                raise UserError(f"{self.folder} holds a run with {name} = {theirs.get(name)!r}, not {mine[name]!r}; "
                                "give this one another --out")
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error[0] is UserError and not self.metrics.exists():
            (self.folder / "config.json").unlink(missing_ok=True)  # nothing was done: it may be corrected
        self.lock.close()

    def on_signal(self, number, frame):
        if self.stop:  # asked twice: leave at once
            raise SystemExit(128 + number)
        self.stop = number
        if isinstance(outer := getattr(self.handlers[number], "__self__", None), Run):
            outer.stop = number  # the study of which this is a part goes no further, either

    def restore(self):
        """The state to resume from, or None for a fresh start; metrics.jsonl is cut back to what it was then."""
        if self.checkpoint.exists():
            with refusing(self.checkpoint, "; delete it to start again"):
                saved = torch.load(self.checkpoint, map_location=device_of(self.config), weights_only=True)
                choose("format", saved.get("format"), [self.format])
            self.good, self.good_bytes = saved["state"], saved["metrics_bytes"]
            self.started -= saved["seconds"]
        with open(self.metrics, "ab") as file:
            file.truncate(self.good_bytes)
        return copy.deepcopy(self.good)

    def keep(self, state):
        """Remember a state known to be good; write it if the last checkpoint is old."""
        self.good, self.good_bytes = copy.deepcopy(state), self.metrics.stat().st_size
        if time.time() - self.saved_at >= self.config.checkpoint_seconds:
            self.save()

    def save(self):
        if self.good is not None:
            saved = dict(format=self.format, state=self.good, metrics_bytes=self.good_bytes)
            write_atomically(self.checkpoint, {**saved, "seconds": time.time() - self.started})
        self.saved_at = time.time()

    def obey(self):
        """Leave on SIGTERM or Ctrl-C, with the last good state on disk."""
        if self.stop:
            self.save()
            self.say(f"stopped by {signal.Signals(self.stop).name}; the same command goes on from here")
            raise SystemExit(128 + self.stop)

    def mine(self, i):
        """Is a study's i-th sub-run this command's? Under --part I/N one of N is."""
        part, parts = map(int, (self.config.part or "1/1").split("/"))
        return i % parts == part - 1

    def end_of_part(self):
        """Leave, if this command was for a part only: the study needs the others, too."""
        if self.config.part:
            self.say(f"part {self.config.part} is done; without --part, the same command sums all of them up")
            raise SystemExit(0)

    def say(self, text):
        print(f"[{self.study}] {text}", flush=True)

    def log(self, line, done, total, words):
        """A line of metrics.jsonl, which has no times; now and then one for who waits: done of total, words read."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, float):
                tensorboard(self.folder)(name, value, line["step"])
        if (now := time.time()) - self.spoke_at >= 5 or done >= total:
            self.spoke_at, spent = now, now - self.started
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            self.say(f"{100 * done / total:3.0f} %  {shown}  {words / spent:,.0f} words/s  "
                     f"{timedelta(seconds=int(spent * (total / done - 1)))} left")

    def finish(self, metrics):
        gpu = device_of(self.config).type == "cuda"
        record = {"study": self.study, "config": asdict(self.config), "seed": self.config.seed, "commit": self.commit,
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                  "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
                  "seconds": round(time.time() - self.started, 1), "metrics": metrics}
        write_json(self.folder / "result.json", record)
        return record

# 8. Evaluate and train -----------------------------------------------------------------------------------------------
def to_device(tensors, device):
    """A dict of tensors, moved; without their gradients."""
    return {name: tensor.detach().to(device) for name, tensor in tensors.items()}

def zero_state(weights, batch):
    """h before the first word [1, B, H]; an LSTM's c beside it. A memory that a state lacks is 0, see unroll."""
    width = 2 * weights["weight_hh_l0"].shape[-1] if "weight_hh_l0" in weights else weights["embedding"].shape[-1]
    return weights["embedding"].new_zeros(1, batch, width)

@torch.no_grad()
def evaluate(weights, cells, tokens, batch=64, bptt=70, dtype=torch.float32, warm=70, masks=lambda inputs, at: {}):
    """Mean loss [K] over a whole split: every token but the first exactly once, no dropout. Its exp() is perplexity.
    warm: words read before a stream's first scored one, so that cutting the text in streams hardly matters.
    masks: (inputs [T, B], their place) -> those of a perturbed input."""
    n, total = len(tokens) - 1, 0.0                                                      # targets
    text = Stream(tokens, min(batch, max(1, n // warm)), bptt)
    inputs, targets = text.inputs[:text.length], text.targets[:text.length]
    before = inputs[-warm:].roll(1, 1)  # the end of the stream before [warm, B]; the first has no words before it
    zeros = zero_state(weights, inputs.shape[1])
    state = network(weights, cells, Batch(before, torch.full_like(before, -1), zeros, masks(before, -1)), dtype)[1]
    state[:, 0] = 0
    for lo in range(0, text.length, bptt):
        part = Batch(inputs[lo:lo + bptt], targets[lo:lo + bptt], state, masks(inputs[lo:lo + bptt], lo))
        losses, state = network(weights, cells, part, dtype)
        total = total + losses * (part.targets >= 0).sum()
    return total / n

def perplexity(loss):
    """exp(loss); infinite where that overflows or the loss is not a number."""
    return math.exp(loss) if math.isfinite(loss) and loss < 700 else math.inf

def train_step(weights, cells, batch, lr, config, share=1.0):
    """SGD on the mean loss of K architectures, times share [K] (TASKS), or on each's own: losses, state, gradient."""
    for w in weights.values():
        w.requires_grad_()
    losses, state = network(weights, cells, batch, DTYPES[config.dtype], config.activation_reg, config.slowness_reg)
    grads = gradients(share * losses / len(losses) if is_shared(weights) else losses, weights)
    sgd_step(weights, grads, lr, config.clip, config.weight_decay)
    return losses.detach(), state, grads

# (epochs done, epochs in all) -> factor of lr. paper: decay is ENAS-pytorch's, .96 an epoch once 15 are done.
SCHEDULES = {"constant": lambda epoch, epochs: 1.0, "decay": lambda epoch, epochs: 0.96 ** max(0, int(epoch) - 14),
             "cosine": lambda epoch, epochs: 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))}

@torch.no_grad()
def validate(config, s, valid, epoch):
    """Losses of the alive networks; keep the best weights; start averaging, lower lr, or let go where none improves."""
    alive, current = s["alive"], s["mean"] or s["weights"]
    loss = evaluate(current, s["cells"], valid, config.eval_batch, dtype=DTYPES[config.dtype]).float()
    better = loss < s["best_loss"][alive]
    won, lost = alive[better], alive[~better]
    for name, w in current.items():
        s["best"][name][won] = w[better]
    s["best_loss"][won], s["best_epoch"][won], s["bad"][won], s["epochs"][alive] = loss[better], epoch, 0, epoch
    s["bad"][lost] += 1
    s["lr"][lost] /= config.plateau
    s["since"][lost] = s["since"][lost].clamp(max=s["step"])  # the step from which they average
    stay = (s["bad"][alive] < config.patience) & ~s["failed"][alive]
    s["alive"], s["cells"] = alive[stay], s["cells"][stay]
    s["seeds"] = [seed for seed, stays in zip(s["seeds"], stay.tolist()) if stays]
    for part in ("weights", "mean"):
        s[part] = {name: w[stay] for name, w in s[part].items()}
    return loss

def train_networks(config, run, corpus, weights, cells, seeds):
    """Train K standalone networks as one, each by itself: its masks, clipping, lr, averaging, stopping, failure. Common
    are segment lengths. Returns the best weights of each by validation, and lists. cells: of LSTMs zeros [K, 2]."""
    device, valid = device_of(config), corpus.valid.to(device_of(config))
    stream = Stream(corpus.train.to(device), config.batch, config.bptt, (config.seed,), config.random_bptt)
    weights, full = to_device(weights, device), lambda value: torch.full((len(seeds),), value, device=device)
    s = run.restore() or {  # of the networks still in the batch, then of all K, then of the run
        "alive": torch.arange(len(seeds), device=device), "seeds": seeds, "cells": cells.to(device), "weights": weights,
        "mean": copy.deepcopy(weights) if config.average else {}, "state": zero_state(weights, config.batch),
        "best": copy.deepcopy(weights), "lr": config.lr * rates_of(cells.to(device)), "loss": full(0.0),
        "failed": full(False), "since": full(math.inf), **{name: full(0) for name in ("best_epoch", "epochs", "bad")},
        "best_loss": full(math.inf), "step": 0, "steps": 0, "where": stream.place}
    stream.place = s["where"]
    while s["seeds"] and stream.progress() < config.epochs:
        # one step of SGD on the next segment
        alive, factor = s["alive"], SCHEDULES[config.schedule](stream.progress(), config.epochs)
        segment = stream.next()
        lr = s["lr"][alive] * (len(segment.inputs) / config.bptt) * factor  # another length under --random_bptt
        state = zero_state(s["weights"], config.batch) if segment.before is None else s["state"]
        masks = to_device(draw_masks(config, len(corpus.words), config.batch, s["seeds"], s["step"]), device)
        batch = Batch(segment.inputs, segment.targets, state, masks)
        losses, state, _ = train_step(s["weights"], s["cells"], batch, lr, config)
        finite = torch.isfinite(losses)
        s["failed"][alive] |= ~finite
        s["state"] = torch.where(finite[:, None, None], state, 0.0)
        s["loss"][alive] += losses
        s["step"], s["steps"] = s["step"] + 1, s["steps"] + 1
        n = (s["step"] - s["since"][alive]).clamp(min=1)  # terms of the mean; before a network averages, w alone
        for name, mean in s["mean"].items():  # mean <- mean + (w - mean) / n
            mean.lerp_(s["weights"][name].detach(), (1 / n).to(mean.dtype).view(-1, *[1] * (mean.dim() - 1)))
        # a line of metrics, after which the state may be a checkpoint
        if segment.ends or s["steps"] >= config.log_every:
            loss = (s["loss"][alive] / s["steps"]).nanmean().item()  # of the networks that have not failed
            line = dict(step=s["step"], epoch=stream.place[0], loss=loss, perplexity=perplexity(loss))
            if segment.ends:
                scores = validate(config, s, valid, stream.place[0]).tolist()
                line.update(networks=alive.tolist(), valid_perplexity=[perplexity(x) for x in scores])
            s["loss"], s["steps"], s["where"] = torch.zeros_like(s["loss"]), 0, stream.place
            run.log(line, stream.progress(), config.epochs, s["step"] * config.batch * config.bptt)
            run.keep(s)
        run.obey()
    return s["best"], {name: s[name].tolist() for name in ("best_loss", "best_epoch", "epochs", "failed")}

# 9. Search and derive ------------------------------------------------------------------------------------------------
@torch.no_grad()
def warm_start(weights, cells, segment, carried, dtype):
    """The state after the segment before, read from 0 by the architectures themselves; costs a forward pass."""
    return unroll(weights, cells, Batch(segment.before, None, torch.zeros_like(carried), {}), dtype)[1]

# paper: ENAS carries h on from whatever cell read the segment before (here from the mean of them, if several did).
STATES = {"carry": lambda weights, cells, segment, carried, dtype: carried,
          "zero": lambda weights, cells, segment, carried, dtype: torch.zeros_like(carried), "warm": warm_start}

def start_batch(config, weights, cells, segment, carried, masks):
    """A Batch whose state follows the policy --state; at the start of the text it is 0 under all of them."""
    state = zero_state(weights, config.batch) if segment.before is None else \
        STATES[config.state](weights, cells, segment, carried, DTYPES[config.dtype])
    return Batch(segment.inputs, segment.targets, state, masks)

def mean_state(losses, state):
    """The mean of the states of the architectures whose loss is finite [1, B, H or 2H]."""
    finite = torch.isfinite(losses)[:, None, None]
    return torch.where(finite, state, 0.0).sum(0, keepdim=True) / finite.sum().clamp(min=1)

def perturbed(config, weights):
    """(inputs [T, B], key) -> the masks of a perturbed input: word [1, V] drops whole words at --reward_words, noise
    [1, T, B, H] is Gaussian, --reward_noise times the embeddings' root mean square; neither of them at 0."""
    def masks(inputs, *key):
        key, (words, hidden) = (config.seed, *key), weights["embedding"].shape[-2:]
        dropped = draw_masks(Config(word_dropout=config.reward_words), words, 1, [key], 0)
        drawn = {name: mask.clamp(max=1) for name, mask in dropped.items()}  # of a network that is trained without
        if config.reward_noise:
            drawn["noise"] = config.reward_noise * torch.randn(1, *inputs.shape, hidden, generator=rng("noise", *key))
        return to_device(drawn, inputs.device)
    return masks

def score(config, weights, cells, segment, carried, masks={}):
    """Losses [K] of architectures on one validation segment in eval mode, and the state to carry on [1, B, H or 2H]."""
    batch = start_batch(config, weights, cells, segment, carried, masks)
    losses, state = network(weights, cells, batch, DTYPES[config.dtype])
    return losses, mean_state(losses, state)

# rows -> factors of the training losses [K], and what is added to the rewards' [K]. results/studies.py adds a task.
TASKS = {"none": lambda cells: (torch.ones_like(cells[:, 0], dtype=torch.float32), 0.0)}

POLICIES = ("trained", "untrained", "uniform")

def policy_of(config, decisions):
    """The policy that --controller names; all have sample(k, *key)."""
    if config.controller in POLICIES:
        return Uniform(decisions) if config.controller == "uniform" else Controller(decisions, config)
    cells = [load_cell(config, name, POLICIES) for name in config.controller.split(",")]
    check_fit(cells, config.nodes, config.hidden, config.operations != "highway")
    if config.shared_samples > 1 and any(cell.rate for cell in cells):
        raise UserError("a cell with a rate of its own needs --shared_samples 1")
    return Uniform(decisions, encode(cells, config.nodes))

class Search:
    """ENAS's two players between their steps: shared weights (SGD) and controller (Adam), their places in the text.
    s is what a checkpoint holds beside them: 'past' gradients, 'sums' and 'counts' since the last line of metrics."""

    def __init__(self, config, corpus):
        self.config, self.device, self.words = config, device_of(config), len(corpus.words)
        decisions = search_space(config)
        if config.controller == "trained" and all(len(d.choices) == 1 for d in decisions):
            raise UserError("the search space has a single architecture: there is nothing to decide")
        self.remembers = config.lookahead in ("momentum", "recent")  # past gradients
        self.controller = policy_of(config, decisions).to(self.device)
        self.adam = torch.optim.Adam(self.controller.parameters(), lr=config.controller_lr,
                                     capturable=self.device.type == "cuda")
        texts = {"train": corpus.train, "valid": corpus.valid, "ahead": corpus.train}  # ahead: what foresee reads
        self.streams = {name: Stream(text.to(self.device), config.batch, config.bptt, (config.seed,),
                                     config.random_bptt and name == "train") for name, text in texts.items()}
        self.shared_steps = config.shared_steps or math.ceil(self.streams["train"].length / config.bptt)  # of a round
        zeros = torch.zeros(1, config.batch, config.hidden, device=self.device)
        self.s = {"step": 0, "weights": to_device(shared_weights(config, self.words), self.device), "past": {},
                  "state": dict.fromkeys(texts, zeros), "memory": torch.zeros(2, device=self.device),
                  "sums": torch.zeros(4, device=self.device), "counts": [0, 0]}  # loss; reward, entropy, response

    def checkpoint(self):
        return {**self.s, "where": {name: stream.place for name, stream in self.streams.items()},
                "controller": self.controller.state_dict(), "adam": self.adam.state_dict()}

    def load(self, saved):
        self.s = {name: saved[name] for name in self.s}
        for name, stream in self.streams.items():
            stream.place = saved["where"][name]
        self.controller.load_state_dict(saved["controller"])
        self.adam.load_state_dict(saved["adam"])

    def roll_back(self, good):
        """Weights and controller as they last were; the steps and the text go on, so that it will not repeat."""
        now, zeros = self.checkpoint(), {name: torch.zeros_like(h) for name, h in self.s["state"].items()}
        self.load({**copy.deepcopy(good), "state": zeros, "step": now["step"], "where": now["where"]})

    def key(self, *purpose):
        return (self.config.seed, self.s["step"], *purpose)

    def masks(self, step):
        return to_device(draw_masks(self.config, self.words, self.config.batch, [self.config.seed], step), self.device)

    def lr(self, progress, segment):
        """That of omega after so many rounds; a segment of another length has its share (--random_bptt)."""
        factor = SCHEDULES[self.config.schedule](progress, self.config.epochs + self.config.settle)
        return self.config.lr * factor * len(segment.inputs) / self.config.bptt

    def shared_step(self, progress):
        """SGD on omega: a fresh architecture (or a few) on the next training segment."""
        config, s = self.config, self.s
        cells = self.controller.sample(config.shared_samples, *self.key("shared")).rows
        segment = self.streams["train"].next()
        batch = start_batch(config, s["weights"], cells, segment, s["state"]["train"], self.masks(s["step"]))
        lr = self.lr(progress, segment) * rates_of(cells)[:1]  # with --rates there is one
        losses, state, g = train_step(s["weights"], cells, batch, lr, config, TASKS[config.task](cells)[0])
        s["state"]["train"] = mean_state(losses, state)
        if self.remembers:
            s["past"] = remember(s["past"], g)
        s["sums"][0] += losses.mean()
        s["counts"][0] += 1

    def foresee(self, progress, cells):
        """The Step that a shared step on the next training segment of its own would be, for a fold of architectures."""
        config, segment, carried = self.config, self.streams["ahead"].next(), self.s["state"]["ahead"]
        omega, past, masks = self.s["weights"], self.s["past"], self.masks(("ahead", self.s["step"]))
        strict = torch.promote_types(DTYPES[config.dtype], torch.float32)  # bfloat16 would round a difference away

        def own_losses(weights, cells, segment):
            batch = start_batch(config, omega, cells, segment, carried, masks)
            losses, state = network(weights, cells, batch, strict, config.activation_reg, config.slowness_reg)
            self.s["state"]["ahead"] = mean_state(losses, state)
            return losses * TASKS[config.task](cells)[0]

        def each(weights, cells, segment, v):
            own = inherit(weights, cells)
            grads = mean_gradient(lambda w: own_losses(w, cells, segment) * len(cells), own)
            v = {**v, "edges": v["edges"][structure(cells).edge].transpose(0, 1)}
            square = sum(x.flatten(1).square().sum(1) for x in grads.values())
            along = sum((grads[name] * v[name]).flatten(1).sum(1) for name in grads)
            return square.sqrt(), rates_of(cells) * along

        losses = lambda weights, cells, segment: own_losses(weights, cells, segment) * rates_of(cells)
        return Step(losses, segment, cells, self.lr(progress, segment), config.clip, config.weight_decay, past, each)

    def rewards_on(self, segment):
        """(weights, cells) -> rewards [K] on a validation segment; the state that they leave is carried on."""
        carried = self.s["state"]["valid"]
        masks = perturbed(self.config, self.s["weights"])(segment.inputs, self.s["step"])

        def rewards(weights, cells):
            losses, self.s["state"]["valid"] = score(self.config, weights, cells, segment, carried, masks)
            return REWARDS[self.config.reward](losses + TASKS[self.config.task](cells)[1])
        return rewards

    def rewarded(self, progress):
        """K fresh architectures on ONE validation segment, in eval mode: a Sample, its rewards and responses [K]."""
        config, s = self.config, self.s
        sample = self.controller.sample(config.controller_samples, *self.key("controller"))
        rewards, step, others = self.rewards_on(self.streams["valid"].next()), None, None
        how = config.lookahead, config.response
        if how != ("none", "none"):
            fold, others = self.controller.sample(2 * config.fold, *self.key("folds")).rows.split(config.fold)
            step = self.foresee(progress, fold)
        return sample, extra_rewards(*how, s["weights"], sample.rows, others, rewards, step)

    def entropy_weight(self, progress):
        """--entropy; in the last --anneal rounds of learning on its way to minus --penalty, a step a round."""
        config, left = self.config, self.config.epochs - progress
        share = max(0.0, 1 - left / config.anneal) if config.anneal else 0.0
        return (1 - share) * config.entropy - share * config.penalty

    def controller_step(self, progress):
        """REINFORCE on theta: one step of Adam."""
        config, s, entropy_weight = self.config, self.s, self.entropy_weight(progress)
        sample, (direct, response) = self.rewarded(progress)
        rewards = worst_for_failures(direct + response)
        value = rewards + entropy_weight * sample.entropy.detach()  # the baseline predicts all that is rewarded
        baseline, s["memory"] = BASELINES[config.baseline](value, s["memory"], config.baseline_decay)
        self.adam.zero_grad(set_to_none=False)
        policy_loss(sample, rewards, baseline, entropy_weight).backward()
        self.adam.step()
        direct, response = worst_for_failures(direct), worst_for_failures(response)
        spread = response.std(correction=0) / direct.std(correction=0).clamp(min=1e-12)
        s["sums"][1:] += torch.stack([direct.mean(), sample.entropy.detach().mean(), spread])
        s["counts"][1] += 1

    def line(self, epoch):
        """Metrics since the last line: loss, perplexity in training; reward, entropy, response's spread / direct's."""
        (loss, *rewarded), (shared, steps) = self.s["sums"].tolist(), self.s["counts"]
        self.s["sums"], self.s["counts"] = torch.zeros_like(self.s["sums"]), [0, 0]
        line = dict(step=self.s["step"], epoch=epoch)
        if shared:
            line.update(loss=loss / shared, perplexity=perplexity(loss / shared))
        if steps:
            names = ("reward", "entropy", "response")[:2 + (self.config.response != "none")]
            line.update((name, total / steps) for name, total in zip(names, rewarded))
        return line

def search(config, run, corpus, watch=lambda weights, controller, epoch: None):
    """ENAS: rounds of SGD on the shared weights, then of REINFORCE on the controller; returns both. watch sees them."""
    game = Search(config, corpus)
    round_ = game.shared_steps + (config.controller_steps if config.controller == "trained" else 0)
    total = (config.epochs + config.settle) * round_
    if saved := run.restore():
        game.load(saved)
    else:
        run.keep(game.checkpoint())
    while game.s["step"] < total:
        epoch, at = divmod(game.s["step"], round_)
        progress = epoch + min(at / game.shared_steps, 1)
        if at == 0:
            watch(game.s["weights"], game.controller, epoch)
        if at < game.shared_steps:
            game.shared_step(progress)
        elif config.warm_epochs <= epoch < config.epochs:  # before and after, these steps are empty
            game.controller_step(progress)
        step = game.s["step"] = game.s["step"] + 1
        # a line of metrics, after which the state is known to be good
        if any(game.s["counts"]) and (step % config.log_every == 0 or step % round_ in (0, game.shared_steps)):
            line = game.line(epoch)
            if not math.isfinite(sum(line.values())):
                run.say(f"a loss is not finite at step {step}: back to the weights of step {run.good['step']}")
                game.roll_back(run.good)
                line = dict(step=step, epoch=epoch, rolled_back_to=run.good["step"])
            run.log(line, step, total, step * config.batch * config.bptt)
            run.keep(game.checkpoint())
        run.obey()
    return game.s["weights"], game.controller

def losses_on(tokens, config, weights, rows, **more):
    """Losses [K], on the CPU, of a whole split under shared weights; ten architectures at a time, for memory's sake."""
    tokens, rows = tokens.to(device_of(config)), rows.to(device_of(config))
    return torch.cat([evaluate(weights, some, tokens, config.eval_batch, **more) for some in rows.split(10)]).cpu()

def derive(config, weights, rows, corpus):
    """Architectures under the shared weights on the whole validation split, best first: rows [K, D], perplexities."""
    distinct, which = (rows := rows.cpu()).unique(dim=0, return_inverse=True)
    how = dict(dtype=DTYPES[config.dtype], masks=perturbed(config, weights))
    losses, order = losses_on(corpus.valid, config, weights, distinct, **how)[which].sort(stable=True)
    return rows[order], [perplexity(loss) for loss in losses.tolist()]

# 10. The two commands ------------------------------------------------------------------------------------------------
def check(config):
    """Wrong settings, each with its name, before any work is done."""
    for name, choices in (("preset", PRESETS), ("dtype", DTYPES), ("schedule", SCHEDULES), ("state", STATES),
                          ("reward", REWARDS), ("baseline", BASELINES), ("lookahead", LOOKAHEAD), ("task", TASKS),
                          ("response", RESPONSE), ("activation_scope", ("node", "cell"))):
        choose(name, getattr(config, name), choices)
    for f in fields(config):
        value, must_be = getattr(config, f.name), f.metadata["must_be"]
        if must_be and not RANGES[must_be](value):
            raise UserError(f"--{f.name} {value} must be {must_be}: {f.metadata['help']}")
    if config.baseline == "leave_one_out" and config.controller_samples == 1:
        raise UserError("--controller_samples 1: leave_one_out needs at least 2; or --baseline moving_average")
    if config.anneal > max(0, config.epochs - config.warm_epochs):
        raise UserError(f"--anneal {config.anneal} is more than the rounds of learning, --epochs minus --warm_epochs")
    if config.rates and config.shared_samples > 1:
        raise UserError(f"--rates {config.rates}: a shared step has one architecture's rate; use --shared_samples 1")
    if config.rates and (config.controller, config.response) == ("trained", "none"):
        raise UserError(f"--rates {config.rates}: no reward at a common omega' depends on them: choose a --response")
    if config.part and not ((of := re.fullmatch(r"(\d+)/(\d+)", config.part)) and 1 <= int(of[1]) <= int(of[2])):
        raise UserError(f"--part {config.part} must be I/N, I from 1 to N")
    device_of(config)

def run_study(study, work, config):
    """Run, resume, or find finished one study, whose metrics work(config, run) gives; its record."""
    check(config)
    if config.part and not getattr(work, "parts", False):
        raise UserError(f"--part {config.part}: {study} has no sub-runs to share out")
    if config.threads:
        torch.set_num_threads(config.threads)
    with Run(study, config) as run:
        if (run.folder / "result.json").exists():
            run.say(f"already finished: {run.folder}")
            return read_json(run.folder / "result.json")
        metrics = work(config, run)
        run.end_of_part()
        return run.finish(metrics)

def load_shared(config, words, cells):
    """The shared weights of a finished search, which must fit this corpus, size and cells."""
    path = Path(config.weights) / "weights.pt"
    with refusing(path):
        weights = torch.load(path, weights_only=True)
        if weights.get("embedding", torch.empty(0)).shape != (words, config.hidden):  # standalone: one more dimension
            raise ValueError(f"it does not hold the shared weights for {words} words and --hidden {config.hidden}")
        nodes = math.isqrt(2 * len(weights["edges"]))  # there are nodes (nodes + 1) / 2 edges
        check_fit(map(decode, cells), nodes, config.hidden, weights["input"].dim() == 3)
    return weights

def study_train(config, run):
    """Train cells from scratch or from a search's shared weights, as one batch; perplexities of the best weights."""
    corpus, device = load_corpus(config), device_of(config)
    words = len(corpus.words)
    given = [re.fullmatch(r"(.*?)(?:@(-?\d+))?", name) for name in config.cell.split(",")]
    names, seeds = zip(*((x[1], int(x[2] or config.seed) + i) for x in given for i in range(config.replicas)))
    if "lstm" not in names:
        cells = encode([load_cell(config, name) for name in names])
        weights = inherit(load_shared(config, words, cells), cells) if config.weights else \
            standalone_weights(config, words, cells, seeds)
        check_fit(map(decode, cells), columns(cells).read.shape[1], config.hidden, True)
        recurrent = [recurrent_parameters(decode(row), config.hidden) for row in cells]
    elif config.weights or set(names) != {"lstm"}:
        raise UserError("--cell lstm is another network: train it in a run of its own, without --weights")
    else:
        cells, weights = torch.zeros(len(names), 2), lstm_weights(config, words, seeds)
        recurrent = [sum(w[0].numel() for name, w in weights.items() if name not in ("embedding", "bias"))] * len(names)
    best, records = train_networks(config, run, corpus, weights, cells, seeds)
    run.say("evaluating the best weights on the whole of each split, in float32")
    write_atomically(run.folder / "weights.pt", to_device(best, "cpu"))
    found = {"cell": names, "seed": seeds}
    for split in SPLITS:
        losses = evaluate(best, cells.to(device), getattr(corpus, split).to(device), config.eval_batch)
        found[f"{split}_perplexity"] = [perplexity(loss) for loss in losses.tolist()]
    widths = [width or config.hidden for width in columns(cells).width.tolist()]
    parameters = [r + words * (width + 1) for r, width in zip(recurrent, widths)]
    found.update(recurrent_parameters=recurrent, parameters=parameters, **records)
    networks = [dict(zip(found, values)) for values in zip(*found.values())]
    floor = {"floor_perplexity": corpus.floor["test"]} if corpus.floor else {}
    return {**(networks[0] if len(networks) == 1 else {}), "networks": networks, **floor}

def row_name(entry):
    """The name, as --cell takes it, of an entry of derived.json: a row, then its perplexity."""
    return "-".join(map(str, entry[:-1]))

def retrain(config, cell, folder, **more):
    """Metrics of a training from scratch, on the data and at the size of a search; more settings if asked for."""
    same = ("data", "cache", "seed", "device", "dtype", "threads", "nodes", "hidden", "checkpoint_seconds")
    settings = dict({name: getattr(config, name) for name in same}, cell=cell, out=str(folder), **more)
    if config.retrain_epochs:
        settings["epochs"] = config.retrain_epochs
    return run_study("train", study_train, configure("train", config.preset, **settings))["metrics"]

def study_search(config, run):
    """Search, then derive: the best of the controller's samples beside the best of as many uniform ones."""
    corpus = load_corpus(config)
    weights, controller = search(config, run, corpus)
    run.say(f"scoring {config.derive_samples} sampled and as many uniform architectures on the whole validation split")
    metrics, derived = {}, {}
    for name, rows in (("", controller.sample(config.derive_samples, config.seed, "derive").rows),
                       ("uniform_", uniform_rows(controller.decisions, config.derive_samples, config.seed, "uniform"))):
        rows, perplexities = derive(config, weights, rows, corpus)
        run.obey()
        derived[f"{name}cells"] = [[*row, round(p, 3)] for row, p in zip(rows.tolist(), perplexities)]
        metrics[f"{name}best_cell"] = cell_to_json(decode(rows[0]))
        metrics[f"{name}valid_perplexity"] = perplexities[0]
        metrics[f"{name}median_valid_perplexity"] = perplexities[len(perplexities) // 2]
        write_json(run.folder / f"{name}cell.json", metrics[f"{name}best_cell"])
    (run.folder / "derived.json").write_text(json.dumps(derived))  # each a row of integers, then its perplexity
    write_atomically(run.folder / "weights.pt", to_device(weights, "cpu"))
    write_atomically(run.folder / "controller.pt", to_device(controller.state_dict(), "cpu"))
    from results.report import draw_cell  # where tables and pictures are made
    draw_cell(cell_from_json(metrics["best_cell"]), "the cell found").figure.savefig(run.folder / "cell.png", dpi=110)
    if corpus.floor:
        metrics["floor_perplexity"] = corpus.floor["valid"]
    if config.retrain:
        for name, cell in (("found", row_name(derived["cells"][0])), ("lstm", "lstm")):
            metrics[name] = retrain(config, cell, run.folder / name)
    return metrics

def studies():
    """{name: (config, run) -> metrics}: these two, and those of results/, which are made of this module."""
    from results import cells, studies
    return {"search": study_search, "train": study_train, **studies.STUDIES, **cells.STUDIES}

# 11. Main -------------------------------------------------------------------------------------------------------------
def boolean(text):
    """--flag, --flag true or --flag false."""
    return ("false", "true").index(text.lower()) == 1

def parse(arguments):
    """(study, Config) of a command line; every field of Config is a flag."""
    def fail(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(prog="menas.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.error = fail
    parser.add_argument("study", help=" | ".join([*studies(), "report"]))
    for f in fields(Config):
        how = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        text = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, metavar=f.type.__name__.upper(), **how)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = nearest(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(Config)])
        raise UserError(f"unknown argument '{unknown[0]}'{near}")
    return choose("study", given.study, [*studies(), "report"]), configure(**vars(given))

def main(arguments=None):
    """Run a command line; a UserError is one line on stderr and exit code 2."""
    try:
        study, config = parse(arguments)
        from results.report import report, summary  # which reads what the studies have written
        if study == "report":
            report(config.out or "results", "README.md" if Path(config.out or "results") == Path("results") else "")
        else:
            print(f"\n{summary(run_study(study, studies()[study], config))}")
    except UserError as error:
        print(f"menas: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    from menas import main  # as others import it, so that there is one UserError
    sys.exit(main())
