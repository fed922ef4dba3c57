"""The studies: what each runs, and what it measures. `python menas.py STUDY` runs one, `--help` tells the settings.

Each is a function (config, run) -> metrics, which become the record that results/report.py makes a table and a figure
of. Most are arms: whole searches that differ in one thing, a value for each seed, compared with the first arm's.
"""

import ctypes
import math
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit

import torch
import torch.nn.functional as F

from menas import (ACTIVATIONS, CELLS, DTYPES, INPUT, PRESETS, RESPONSE, STATES, TASKS, Batch, Controller, Search,
                   Stream, UserError, Workspace, check, columns, decode, device_of, draw_masks, encode,
                   evaluate, extra_rewards, leave_one_out, leaves, load_corpus, lstm_weights,
                   mean_gradient, named, network, perplexity, policy_loss, read_json,
                   recurrent_parameters, reference_losses, retrain, rng, row_name, run_study, score,
                   search_space, shared_weights, slots_read, study_search, to_device, uniform_rows,
                   worst_for_failures, zero_state)
from results.stats import kendall

SEARCHES = dict(epochs=6, shared_steps=60, controller_steps=20, warm_epochs=1, settle=1, derive_samples=24, replicas=5)
BRIEF = dict(epochs=1, shared_steps=5, settle=1, derive_samples=4, replicas=2)
WIDER = dict(min_nodes=2, operations="highway,glu,gate,sum")
SMALL = dict(hidden=64, nodes=8, epochs=5, batch=20, shared_steps=120, controller_steps=12, replicas=3, settle=1,
             controller_samples=8, controller_lr=.02, warm_epochs=1, derive_samples=8, retrain=True, retrain_epochs=1,
             retrain_cells=2)
BARE = dict(SMALL, dtype="float32", retrain=False, retrain_epochs=4)  # at 64 units bfloat16 is no faster
LARGE = dict(nodes=8, epochs=20, shared_steps=200, controller_lr=3.5e-3, warm_epochs=2, settle=2, replicas=10,
             derive_samples=32)
# preset -> study -> its settings beside the preset's own
SETTINGS = {"smoke": {
    **dict.fromkeys(("extra", "spaces", "anneal", "state"), dict(BRIEF, retrain=True, retrain_epochs=2)),
    "optimizer": BRIEF, "similarity": dict(replicas=2), "conditional": dict(WIDER, controller_steps=5, replicas=2),
}, "tiny": {
    "extra": dict(SEARCHES, settle=2, replicas=10, retrain=True, retrain_epochs=4),
    "similarity": dict(epochs=8, shared_steps=60, warm_epochs=2, log_every=10, replicas=5),
    "cost": dict(shared_steps=200, controller_steps=40),
    **dict.fromkeys(("spaces", "state"), dict(SEARCHES, replicas=3, retrain=True, retrain_epochs=4)),
    "anneal": dict(SEARCHES, settle=0, derive_samples=100, retrain=True),
    "optimizer": dict(SEARCHES, lr=2.5),
    "conditional": dict(WIDER, nodes=12, min_nodes=4, controller_steps=800, controller_lr=.01, entropy=.01, replicas=5),
}, "ptb": {
    "extra": SMALL, "spaces": BARE, "state": dict(BARE, retrain_epochs=2), "optimizer": dict(BARE, lr=5.0),
    "anneal": dict(BARE, settle=0, derive_samples=16, retrain=True, retrain_epochs=1),
}, "paper": {
    **dict.fromkeys(("extra", "spaces", "state", "optimizer"), LARGE), "anneal": dict(LARGE, derive_samples=100),
}}
for preset, settings in SETTINGS.items():
    PRESETS[preset].update(settings)

# 1. Arms: searches that differ in one thing

def frozen(cells):
    """(factor of the training loss [K], added to the reward's loss [K]): a last node of relu scores better by .05 nats,
    but nothing is learnt from training on it. A controller that sees only scores ends with weights that don't learn."""
    relu = columns(cells).act[:, -1] == list(ACTIVATIONS).index("relu")
    return (~relu).float(), -0.05 * relu

TASKS["frozen"] = frozen

PAIRS = [("none", "none"), ("momentum", "none"), ("recent", "none"),
         *(("fresh", response) for response in RESPONSE)]  # of lookahead and response
RESPONSE["zero"] = RESPONSE["none"]  # a control: rates to choose from, and no reason to choose one

# name -> label: what is measured of a finished search; see outcomes().
OUTCOMES = {"expected": "F", "best": "the chosen cell's loss", "scratch": "from scratch", "frozen": "fraction frozen",
            "share": "share of the chosen cell", "parameters": "recurrent weights", "rate": "log2 of the rate"}

def arms_of(study, config):
    """{arm: the settings in which it differs} of a study; the others are compared with the first."""
    gated, n, half = "highway,glu,gate,sum", config.nodes, max(1, (config.epochs - config.warm_epochs) // 2)
    return {
        "extra": {**{", ".join(pair): dict(zip(("lookahead", "response"), pair)) for pair in PAIRS},
                  "none, none, 4x steps": dict(controller_steps=4 * config.controller_steps)},  # a response's cost
        "spaces": {"ENAS": {}, "tanh only": dict(activations="tanh"), "a chain": dict(connections="chain"),
                   "a tree": dict(connections="tree"), "one activation a cell": dict(activation_scope="cell"),
                   f"{n // 2} to {n} nodes": dict(min_nodes=n // 2),
                   "three widths": dict(widths=",".join(str(config.hidden // x) for x in (4, 2, 1))),
                   "gated": dict(operations=gated), "gated, memory": dict(operations=gated, memory=True)},
        "optimizer": {"no choice": {}, "no choice, response": dict(lookahead="fresh", response="sampled"),
                      "rates and cells at random": dict(rates=".25,.5,1,2,4", controller="uniform"),
                      **{f"rates, {response}": dict(rates=".25,.5,1,2,4", lookahead="fresh", response=response)
                         for response in ("zero", "sampled", "unrolled")}},
        "anneal": {"best of a sample": {}, "annealed": dict(anneal=half),
                   "annealed, a round more": dict(anneal=half, epochs=config.epochs + 1)},
        "state": {state: dict(state=state) for state in STATES},
    }[study]

def chosen(config, derived):
    """The entry of derived.json that a search ends with: the best one, or after --anneal the most frequent."""
    return max(derived, key=derived.count) if config.anneal else derived[0]

def outcomes(config, derived, guess):
    """{outcome: its value} of derived.json's sampled cells, best first. A cell that is worse than guessing counts as
    guessing, log of the vocabulary's size, so one that diverged has a mean."""
    mean_loss = lambda perplexities: sum(math.log(min(p, guess)) for p in perplexities) / len(perplexities)
    named = chosen(config, derived)
    rows = torch.tensor([row[:-1] for row in derived])
    cells = [decode(row) for row in rows]
    mean = lambda values: sum(values) / len(cells)
    return {"expected": mean_loss([row[-1] for row in derived]), "best": mean_loss([named[-1]]),
            "frozen": 1 - TASKS[config.task](rows)[0].mean().item(), "share": derived.count(named) / len(derived),
            "parameters": mean(recurrent_parameters(cell, config.hidden) for cell in cells),
            "rate": mean(cell.rate for cell in cells)}

def study_arms(study, config, run):
    """Whole searches that differ in one thing, the arm, --replicas seeds of each: a list of values for every outcome.

    F itself, the mean validation loss of the controller's samples once the shared weights have been trained on for the
    fixed controller (--settle); and, with --retrain, that of a few of them from scratch (anneal: of the one chosen)."""
    arms, guess = arms_of(study, config), len(load_corpus(config).words)
    for settings in arms.values():  # before any work is done
        check(replace(config, **settings))
        search_space(replace(config, **settings))
    found = {name: {outcome: [] for outcome in OUTCOMES} for name in arms}
    sub_runs = [(config.seed + i, name) for i in range(config.replicas) for name in arms]
    for seed, name in (sub_run for i, sub_run in enumerate(sub_runs) if run.mine(i)):
        folder = run.folder / f"{name}, {seed}"
        sub = replace(config, seed=seed, replicas=1, retrain=False, part="", out=str(folder), **arms[name])
        run_study("search", study_search, sub)
        derived = read_json(folder / "derived.json")["cells"]
        measured = outcomes(sub, derived, guess)
        if config.retrain:
            some = torch.randperm(len(derived), generator=rng(seed, "scratch"))[:config.retrain_cells].tolist()
            entries = [chosen(sub, derived)] if study == "anneal" else [derived[i] for i in some]
            names = ",".join(map(row_name, entries))
            networks = retrain(sub, names, folder / "scratch")["networks"]
            losses = [math.log(min(network["valid_perplexity"], guess)) for network in networks]
            measured["scratch"] = sum(losses) / len(losses)
        for outcome, value in measured.items():
            found[name][outcome].append(value)
        run.obey()
    run.end_of_part()
    return {"arms": found}

# 2. The gradient that looks ahead

def learner(config, corpus):
    """The Search of a controller that has a gradient."""
    if config.controller not in ("trained", "untrained"):
        raise UserError(f"--controller {config.controller} does not learn: it has no gradient to measure")
    game = Search(config, corpus)
    game.remembers = True
    return game

def policy_gradient(controller, sample, rewards):
    """The flat leave-one-out estimate of dE[reward]/dtheta, without the entropy's part."""
    rewards = worst_for_failures(rewards.detach())
    loss = policy_loss(sample, rewards, leave_one_out(rewards, None, None)[0], 0.0)
    grads = torch.autograd.grad(-loss, list(controller.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])

def alternate(config, corpus, run):
    """A search of one shared and one controller step in turn; it stops before every --log_every-th shared step, which
    the caller then takes."""
    game = learner(config, corpus)
    steps = config.epochs * game.shared_steps
    if steps < config.log_every:
        raise UserError(f"--log_every {config.log_every} is more than the {steps} steps: nothing would be measured")
    while game.s["step"] < steps:
        if game.s["step"] % config.log_every == config.log_every - 1:
            yield game
        else:
            game.shared_step(0.0)
        if game.s["step"] >= config.warm_epochs * game.shared_steps:
            game.controller_step(0.0)
        game.s["step"] += 1
        run.obey()

def study_similarity(config, run):
    """Is the gradient that looks ahead closer to the next one? Shared and controller steps alternate one to one.

    At every --log_every-th step t: the cosine between an estimator's gradient at omega_t and the plain one at
    omega_(t+1), after the real shared step, theta as it was: on the same architectures and validation segment, and on
    others (where the last row is what the next gradient itself reaches with as many). And of the changes since the
    plain gradient at t, the predicted and the real one."""
    corpus = load_corpus(config)
    saved = run.restore() or {"seeds": []}
    for seed in range(config.seed + len(saved["seeds"]), config.seed + config.replicas):
        lines = []
        for game in alternate(replace(config, seed=seed), corpus, run):
            weights, gradient = game.s["weights"], lambda *scored: policy_gradient(game.controller, *scored)
            draw = lambda n, i: game.controller.sample(n, *game.key("similarity", i))
            samples, rewards = [draw(config.controller_samples, i) for i in range(2)], []
            for sample in samples:
                rewards.append(game.rewards_on(game.streams["valid"].next()))
                rewards[-1](weights, sample.rows)  # whose h the next segment starts from
            ahead, fold = draw(2 * config.fold, 2).rows.split(config.fold)
            step, grads = game.foresee(0.0, ahead), {}
            for pair in PAIRS:
                both = extra_rewards(*pair, weights, samples[0].rows, fold, rewards[0], step)
                grads[", ".join(pair)] = gradient(samples[0], sum(both))
            game.shared_step(0.0)
            then = [gradient(sample, reward(weights, sample.rows)) for sample, reward in zip(samples, rewards)]
            grads["the next one itself"], now = then[0], grads["none, none"]
            pairs = lambda g: ((g, then[0]), (g, then[1]), (g - now, then[0] - now))
            lines.append([[F.cosine_similarity(*pair, dim=0).item() for pair in pairs(g)] for g in grads.values()])
        saved["seeds"].append(dict(zip(grads, torch.tensor(lines).nanmean(0).tolist())))
        run.log(dict(step=seed, seed=seed), len(saved["seeds"]), config.replicas, 0)
        run.keep(saved)
    return saved

def study_cost(config, run):
    """What the extra gradient costs, and how noisy it is, for several folds: --controller_steps draws of each in turn.

    Relative to plain ENAS's: median seconds; variance, a mean that a single exploding draw may rule; and the typical
    squared deviation, a median."""
    if config.controller_steps < 2:
        raise UserError(f"--controller_steps {config.controller_steps}: a variance needs at least two draws")
    game = learner(config, load_corpus(config))
    for _ in range(game.shared_steps):  # to where the weights are no longer random
        game.shared_step(0.0)
        game.s["step"] += 1
    arms = [(look, respond, fold) for look, respond in PAIRS for fold in (1, 2, 4) if look == "fresh" or fold == 1]
    seconds, grads = ({arm: [] for arm in arms} for _ in range(2))
    for arm in arms * config.controller_steps:
        game.config = replace(config, lookahead=arm[0], response=arm[1], fold=arm[2])
        game.s["step"] += 1
        start = time.perf_counter()
        sample, rewards = game.rewarded(0.0)
        grads[arm].append(policy_gradient(game.controller, sample, sum(rewards)))
        seconds[arm].append(time.perf_counter() - start)
        run.obey()
    found = {}
    for arm, g in grads.items():
        g = torch.stack(g)                                                               # [draws, parameters]
        found[arm] = dict(seconds=sorted(seconds[arm])[len(g) // 2], variance=g.var(0).sum().item(),
                          typical=(g - g.median(0)[0]).square().sum(1).median().item())
    plain = found[arms[0]]
    return {"ratios": [{"arm": arm, "ms": 1e3 * x["seconds"], **{name: x[name] / plain[name] for name in x}}
                       for arm, x in found.items()]}

# 3. The hidden state, and a controller that is told what to aim for

def reward_error(config, folder, corpus, k=0, at_least=30):
    """{policy: [bias, tau]} of what a controller step sees of k uniform cells, under each policy for the hidden state,
    with the shared weights of one search. By default 30 cells, or as many as 700,000 words of validation text allow.

    As in a search, each segment of the validation split is read by other architectures than the one before; whole
    passes over the split, of at_least so many segments. bias: the median cell's mean loss minus that in the evaluation
    of the whole split, nats; tau: Kendall's, of the order of the cells on one segment and on the whole split, mean over
    segments."""
    weights, decisions, found = torch.load(folder / "weights.pt", weights_only=True), search_space(config), {}
    dtype, k = DTYPES[config.dtype], k or max(2, min(30, 700_000 // len(corpus.valid)))
    rows = uniform_rows(decisions, k, config.seed, "scored")
    whole = evaluate(weights, rows, corpus.valid, config.eval_batch, dtype=dtype)
    for policy in STATES:
        stream, carried = Stream(corpus.valid, config.batch, config.bptt), zero_state(weights, config.batch)
        now, losses, tokens = replace(config, state=policy), [], []
        while len(losses) < at_least or stream.place[1] > 0:
            segment = stream.next()
            losses.append(score(now, weights, rows, segment, carried)[0])
            tokens.append((segment.targets >= 0).sum())
            others = uniform_rows(decisions, config.controller_samples, config.seed, "others", len(losses))
            carried = score(now, weights, others, segment, carried)[1]
        taus = [kendall(loss, whole) for loss in losses]
        losses, tokens = torch.stack(losses), torch.stack(tokens)                        # [segments, K], [segments]
        mean = (losses * tokens[:, None]).sum(0) / tokens.sum()
        found[policy] = [(mean - whole).median().item(), sum(taus) / len(taus)]  # a few cells explode
    return found

CONTEXTS = (1, 2, 4, 8, 16, 32, 64)  # words

def study_state(config, run):
    """How should the hidden state be kept between segments whose architectures differ? And how much context is there?

    Searches under each policy; the error of the reward under each, with the weights of the first; quantiles of the
    sentences' lengths; and the validation perplexity of a trained ENAS cell and LSTM that have seen c + 1 to 2 c
    words, for c in CONTEXTS, before the one they predict."""
    corpus = load_corpus(config)
    ends = (corpus.train == corpus.words.index("<eos>")).nonzero().flatten()
    if len(ends) < 2:
        raise UserError(f"--data {config.data}: the study wants sentences, a line each, to know their lengths")
    metrics = study_arms("state", config, run)
    metrics["reward"] = [reward_error(replace(config, seed=seed), run.folder / f"carry, {seed}", corpus)
                         for seed in range(config.seed, config.seed + config.replicas)]
    quantiles, lengths = torch.tensor((.05, .25, .5, .75, .95, 1.0)), (ends[1:] - ends[:-1]).float()
    metrics["sentence_lengths"] = dict(zip(("5 %", "25 %", "50 %", "75 %", "95 %", "longest"),
                                           lengths.quantile(quantiles, interpolation="nearest").int().tolist()))
    metrics["context"] = {}
    for name, cells in (("enas", encode([CELLS["enas"]])), ("lstm", torch.zeros(1, 2))):
        epochs = 0 if config.retrain else config.retrain_epochs  # with --retrain it is the sampled cells' number
        retrain(replace(config, retrain_epochs=epochs), name, folder := run.folder / f"context {name}")
        weights = torch.load(folder / "weights.pt", weights_only=True)
        losses = [evaluate(weights, cells, corpus.valid, len(corpus.valid), warm=words) for words in CONTEXTS]
        metrics["context"][name] = {str(words): perplexity(loss.item()) for words, loss in zip(CONTEXTS, losses)}
    return metrics

def to_slots(cell, source, combine):
    """{slot: combine(values of the slots it reads)}, source for the input pair and the memory."""
    values = {None: source, INPUT: source}
    for i, node in enumerate(cell.nodes):
        values[i + 1] = combine(values[slot] for slot in slots_read(node))
    return values

def path_count(cell):
    """Paths from the input pair or the memory to h_t within a step."""
    paths = to_slots(cell, 1, sum)
    return sum(paths[i + 1] for i in leaves(cell))

def depths(cell):
    """{slot: the nodes on the longest path to it}."""
    return to_slots(cell, 0, lambda read: 1 + max(read))

PROPERTIES = {"parameters": lambda cell, hidden: recurrent_parameters(cell, hidden),
              "paths": lambda cell, hidden: path_count(cell), "depth": lambda cell, hidden: max(depths(cell).values())}

def conditional(config, name, steps):
    """A controller that is asked for a value of a property: trained on every other target of a grid, tested on those in
    between. {target: the values of 50 samples}, and those of the untrained controller."""
    decisions = search_space(config)
    controller = Controller(decisions, config, asked=True)
    value = lambda rows: torch.tensor([float(PROPERTIES[name](decode(row), config.hidden)) for row in rows])
    anywhere = value(controller.sample(500, config.seed, "targets").rows)
    mean, spread = anywhere.mean(), anywhere.std()
    targets = torch.quantile(anywhere, torch.linspace(.02, .98, 9)).round().unique()
    targets = targets[:len(targets) - 1 + len(targets) % 2]  # an odd number: the last one is trained on
    if len(targets) < 3:
        raise UserError(f"the space has too few values of {name} to ask for: --min_nodes and --operations widen it")
    adam = torch.optim.Adam(controller.parameters(), lr=config.controller_lr)
    asked = lambda target: ((target - mean) / spread).expand(config.controller_samples)
    for step in range(steps):
        target = targets[::2][torch.randint(len(targets[::2]), (), generator=rng(config.seed, "target", step))]
        sample = controller.sample(config.controller_samples, config.seed, "conditional", step, asked=asked(target))
        rewards = -(value(sample.rows) - target).abs() / spread
        adam.zero_grad()
        policy_loss(sample, rewards, leave_one_out(rewards, None, None)[0], config.entropy).backward()
        adam.step()
    with torch.no_grad():
        draw = lambda target: controller.sample(50, config.seed, "test", asked=asked(target)[:1].expand(50)).rows
        test = {target.item(): value(draw(target)) for target in targets[1::2]}
    return {"targets": {str(t): values.tolist() for t, values in test.items()}, "untrained": anywhere.tolist()}

def study_conditional(config, run):
    """Does a controller that is told what to aim for follow? Targets that it was not trained on, --replicas seeds."""
    saved = run.restore() or {"properties": {name: [] for name in PROPERTIES}}
    for name, found in saved["properties"].items():
        for seed in range(config.seed + len(found), config.seed + config.replicas):
            found.append(conditional(replace(config, seed=seed), name, config.controller_steps))
            run.say(f"{name}, seed {seed}: done")
            run.keep(saved)
            run.obey()
    return saved

# 4. Speed

# name -> hidden, batch, vocabulary, architectures at once, dtypes timed beside the plain loop in float32. Small ones
# first: a process that has freed large blocks gets its memory faster, and the plain loop gains most from that.
BENCHES = {"hidden 32, 32 at once": (32, 16, 200, 32, ("float32",)),
           "hidden 200": (200, 64, 10000, 1, ("float32", "bfloat16")),
           "hidden 1000": (1000, 64, 10000, 1, ("float32", "bfloat16"))}

def peak_memory(work):
    """KiB that a call needs at most beyond what is held before it (Linux: the kernel's high-water mark, reset)."""
    mark = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    Workspace.free.clear()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = mark()
    work()
    return mark() - before

def bench(config, case, repeats=5):
    """Yields name, seconds per architecture, ratio of the plain loop's to these: all of them in turn, medians."""
    hidden, batch, words, k, dtypes = BENCHES[case]
    config, device = replace(config, hidden=hidden, batch=batch, nodes=12), device_of(config)
    rows, tokens = encode([CELLS["enas"]] * k).to(device), torch.randint(words, (config.bptt, config.batch)).to(device)
    shared, lstm = (to_device(w, device) for w in (shared_weights(config, words), lstm_weights(config, words, [1])))
    masks = to_device(draw_masks(replace(config, hidden_dropout=.25), words, config.batch, [1], 0), device)
    # name -> weights, losses on a Batch; the LSTM has no hidden dropout, so it takes no notice of that mask
    models = {"plain": (shared, lambda w, batch: reference_losses(w, rows[0], batch)[0][None]),
              "torch.nn.LSTM": (lstm, lambda w, batch: network(w, rows, batch)[0])}
    for name in dtypes:
        models[name] = shared, lambda w, batch, dtype=DTYPES[name]: network(w, rows, batch, dtype)[0]

    @torch.no_grad()
    def work(name, train):
        weights, losses = models[name]
        batch = Batch(tokens, tokens, zero_state(weights, config.batch), masks if train else {})
        done = mean_gradient(lambda w: losses(w, batch), weights)["bias"] if train else losses(weights, batch)
        done.sum().item()  # waits for a GPU

    for label, train in (("training step", True), ("scoring", False)):
        rounds = [[timeit(lambda: work(name, train), number=1) for name in models] for _ in range(repeats + 1)]
        seconds = dict(zip(models, map(median, zip(*rounds[1:]))))  # the first is a warm-up
        seconds.update({name: seconds[name] / k for name in dtypes})
        for name in models:
            yield dict(name=f"{label}, {name}, {case}", seconds=seconds[name], ratio=seconds["plain"] / seconds[name])
        if train and device.type == "cpu" and sys.platform == "linux":
            peak = {name: peak_memory(lambda: work(name, train)) for name in (*dtypes, "plain")}
            for name in dtypes:
                ratio = k * peak["plain"] / peak[name]
                yield dict(name=f"memory of a {label}, {name}, {case}", seconds=0.0, ratio=ratio)

def study_bench(config, run):
    """Speed: the batched recurrence beside the plain loop (one architecture, float32) and torch.nn.LSTM, in one run."""
    cases = [case for case, (hidden, *_) in BENCHES.items() if hidden <= config.hidden]  # which bounds the largest
    return {"ratios": [row for case in cases for row in bench(config, case)]}

# name -> (config, run) -> metrics
STUDIES = {**{name: partial(study_arms, name) for name in ("extra", "spaces", "optimizer", "anneal")},
           "state": study_state, "conditional": study_conditional, "similarity": study_similarity, "cost": study_cost,
           "bench": study_bench}
for name in ("extra", "spaces", "optimizer", "anneal", "state"):
    STUDIES[name].parts = True  # --part may share out their sub-runs
