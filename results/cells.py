"""The studies of cells: what makes one good, and does the controller know? Like those of studies.py, (config, run) ->
metrics. Most share one skeleton: cells from somewhere, a network trained from scratch for each, a comparison.

Networks are trained in batches of AT_ONCE, each batch a sub-run of its own, as is each search; `--part I/N` does every
N-th of them, so that N commands do a study together. Networks have the learning rate, batch and dropout of `menas.py
train` with the same --preset; --lr and the like are those of the searches, but in capacity, which has none, those of
the networks. Losses are in nats per token.
"""

import json
import math
from dataclasses import replace

import torch

from menas import (ACTIVATIONS, CELLS, FAMILIES, INPUT, PRESETS, SPLITS, Controller, Node, Stream, UserError, decode,
                   derive, device_of, edge_index, encode, evaluate, inherit, is_gated, load_cell, load_corpus,
                   losses_on, perturbed, read_json, retrain, rng, row_name, run_study, search, search_space,
                   study_search, to_device, uniform_rows, write_atomically, write_json)
from results.stats import probe, ridge
from results.studies import BARE, BRIEF, LARGE, PROPERTIES, SEARCHES, depths, path_count

AT_ONCE = 25  # networks trained as one

QUICKLY = dict(BRIEF, retrain_epochs=1, replicas=2)
UNTIL_IT_STOPS = dict(retrain_epochs=75, patience=3, plateau=4.0)  # improving; tables count what ran into the limit
FULLY, FEW = dict(SEARCHES, **UNTIL_IT_STOPS), dict(BARE, retrain_epochs=1)  # an epoch of Penn Treebank takes a minute
PAPER = dict(LARGE, retrain_epochs=300, patience=10, plateau=2.0)
# preset -> study -> its settings beside the preset's own
SETTINGS = {"smoke": {
    **dict.fromkeys(("compare", "factors", "robust", "progress"), QUICKLY), "capacity": dict(QUICKLY, derive_samples=2),
    "ablate": dict(QUICKLY, cell="found,random:1", retrain_cells=1), "hidden": dict(QUICKLY, derive_samples=2),
}, "tiny": {
    "compare": dict(FULLY, replicas=10, derive_samples=10), "factors": FULLY, "robust": FULLY,
    "ablate": dict(FULLY, nodes=9, cell="found,random:1,darts_v2", retrain_cells=6),
    "capacity": dict(retrain_epochs=100, patience=5, plateau=2.0, derive_samples=20),
    "hidden": dict(SEARCHES, derive_samples=30), "progress": dict(SEARCHES, epochs=12, derive_samples=20),
}, "ptb": {
    "compare": dict(FEW, derive_samples=3), **dict.fromkeys(("factors", "robust"), FEW),
    "ablate": dict(FEW, cell="found", retrain_cells=3),
    "capacity": dict(BARE, lr=10.0, batch=10, retrain_epochs=150, patience=5, plateau=2.0, derive_samples=8),
    "hidden": dict(BARE, derive_samples=30), "progress": dict(BARE, epochs=8, derive_samples=20),
}, "paper": {
    "compare": dict(PAPER, derive_samples=10), **dict.fromkeys(("factors", "robust"), PAPER),
    "ablate": dict(PAPER, nodes=12, cell="found,random:1,random:2,enas,darts_v2,enas_lm", retrain_cells=20),
    "capacity": dict(PAPER, derive_samples=50), "hidden": dict(LARGE, derive_samples=30), "progress": LARGE,
}}
for preset, settings in SETTINGS.items():
    PRESETS[preset].update(settings)

def name_of(cell):
    """The cell as --cell takes it, its row."""
    return row_name([*encode([cell])[0].tolist(), None])

def in_plain_space(config, nodes=1):
    """A UserError if the study, which is about ENAS's own space, is asked for another."""
    other = [name for name in ("operations", "min_nodes", "widths", "rates", "connections", "activations",
                               "activation_scope") if getattr(config, name) != getattr(type(config), name)]
    if other or config.nodes < nodes:
        raise UserError(f"--{(other or ['nodes'])[0]}: this study is of ENAS's own space, of {nodes} nodes at least")

def sub_runs(run, work):
    """{name of a sub-run: its record}. work: name -> (folder) -> record, which is skipped if it is finished. Under
    --part some are done, and the command ends if others are missing."""
    for i, (name, do) in enumerate(work.items()):
        if run.mine(i):
            do(run.folder / name)
            run.obey()
    paths = [run.folder / name / "result.json" for name in work]
    if not all(path.exists() for path in paths):
        run.end_of_part()
    return {name: read_json(path) for name, path in zip(work, paths)}

def searches(config, run, arms={"search": {}}):
    """{arm: [(folder, its Config)]} of finished searches, --replicas of each arm, name -> settings."""
    if config.controller != "trained":
        raise UserError(f"--controller {config.controller}: this study is about the trained one")
    found = {arm: [(run.folder / f"{arm} {config.seed + i}", replace(config, seed=config.seed + i, replicas=1, part="",
                                                                     retrain=False, **settings))
                   for i in range(config.replicas)] for arm, settings in arms.items()}
    sub_runs(run, {folder.name: lambda folder, sub=sub: run_study("search", study_search, replace(sub, out=str(folder)))
                   for several in found.values() for folder, sub in several})
    return found

def shared_weights_of(folder, config):
    return to_device(torch.load(folder / "weights.pt", weights_only=True), device_of(config))

def no_worse(loss, guess):
    """The loss, or that of guessing if it is worse or none."""
    return loss if loss < guess else guess

def late_gains(path, guess):
    """By how much each network's best validation loss fell in its last two epochs, None if it had no others; path: of
    its metrics.jsonl."""
    losses = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for k, x in zip(line.get("networks", ()), line.get("valid_perplexity", ())):
            losses.setdefault(k, []).append(min(math.log(x), guess))
    return [min(x[:-2]) - min(x) if len(x) > 2 else None for _, x in sorted(losses.items())]

def train_all(config, run, names, lstms={}, judged="test", **settings):
    """Metrics of a network trained from scratch for each cell, each with a seed of its own, until it stops improving
    on validation or --retrain_epochs are over ('capped'; 'late', the last two's gain); and of LSTMs, units -> number of
    seeds, in lists by units. The loss on each split, of the best weights, is 'train', 'valid' and 'test'. One that is
    not better than guessing on the split by which it is judged has 'failed', and counts as guessing."""
    settings = dict(schedule="constant", plateau=config.plateau, patience=config.patience, **settings)
    seeded = [f"{name}@{config.seed + i}" for i, name in enumerate(names)]
    batches = {f"scratch {i // AT_ONCE}": ",".join(seeded[i:i + AT_ONCE]) for i in range(0, len(names), AT_ONCE)}
    work = {name: lambda folder, batch=batch: retrain(config, batch, folder, **settings)
            for name, batch in batches.items()}
    work |= {f"lstm {units}": lambda folder, units=units, seeds=seeds: retrain(
        config, "lstm", folder, **settings, lstm_hidden=units, replicas=seeds) for units, seeds in lstms.items()}
    guess = math.log(len(load_corpus(config).words))
    found = {}
    for name, record in sub_runs(run, work).items():
        late, found[name] = late_gains(run.folder / name / "metrics.jsonl", guess), []
        for n, gain in zip(record["metrics"]["networks"], late):
            losses = {split: math.log(n[f"{split}_perplexity"]) for split in SPLITS}
            failed = not losses[judged] < guess  # nan neither
            found[name].append({**n, **{split: no_worse(x, guess) if failed else x for split, x in losses.items()},
                                "capped": n["epochs"] >= record["config"]["epochs"], "late": gain, "failed": failed})
    return [n for name in batches for n in found[name]], {units: found[f"lstm {units}"] for units in lstms}

def ends_of(networks):
    """How their trainings ended, for the tables to count."""
    return [{name: n[name] for name in ("capped", "late", "failed")} for n in networks]

def shuffled(config, jobs):
    """So that what belongs together is not trained together."""
    return [jobs[i] for i in torch.randperm(len(jobs), generator=rng(config.seed, "order")).tolist()]

# 1. Does the controller know what is good?

def matched_units(config, wanted):
    """The units u of the LSTM whose recurrent weights, 4 u (H + u + 2) and the projection's u H, are nearest."""
    h = config.hidden
    return min(range(1, 8 * h), key=lambda u: abs(4 * u * (h + u + 2) + u * h * (u != h) - wanted))

def study_compare(config, run):
    """Cells of a trained controller, of an untrained one and of the uniform distribution, --derive_samples of each from
    each of --replicas searches, every one trained from scratch; beside as many LSTMs as searches, of as many units and
    of as many weights.

    groups: name -> one entry for each network: its row, the search, 'shared', the loss under its shared weights on the
    whole validation split, and from scratch 'train', 'valid', 'test', 'epochs', 'capped', 'late', 'failed'."""
    if config.replicas < 2:
        raise UserError(f"--replicas {config.replicas}: the searches are what is compared, at least 2")
    corpus, entries, guess = load_corpus(config), [], math.log(len(load_corpus(config).words))
    for folder, sub in searches(config, run)["search"]:
        derived, decisions = read_json(folder / "derived.json"), search_space(sub)
        untrained = Controller(decisions, sub).sample(sub.derive_samples, sub.seed, "untrained").rows
        rows, perplexities = derive(sub, shared_weights_of(folder, sub), untrained, corpus)
        groups = {"trained": derived["cells"], "untrained": [[*r, p] for r, p in zip(rows.tolist(), perplexities)],
                  "uniform": derived["uniform_cells"]}
        entries += [dict(group=group, search=sub.seed, row=row[:-1], shared=no_worse(math.log(row[-1]), guess))
                    for group, sampled in groups.items() for row in sampled]
    entries = shuffled(config, entries)
    lookups = [load_cell(config, row_name([*e["row"], None])) for e in entries]
    wanted = sum(PROPERTIES["parameters"](cell, config.hidden) for cell in lookups) / len(entries)
    units = {"LSTM": config.hidden, "LSTM, as many weights": matched_units(config, wanted)}
    networks, lstms = train_all(config, run, list(map(name_of, lookups)), {u: config.replicas for u in units.values()})
    keep = ("train", "valid", "test", "epochs", "capped", "late", "failed", "recurrent_parameters")
    entries = [{**entry, **{name: network[name] for name in keep}} for entry, network in zip(entries, networks)]
    groups = {group: [e for e in entries if e["group"] == group] for group in ("trained", "untrained", "uniform")}
    for group, u in units.items():
        groups[group] = [dict(units=u, **{name: n[name] for name in keep}) for n in lstms[u]]
    return {"groups": groups}

# 2. What in a cell matters?

def without(cell, i):
    """The cell without node i > 0, whose readers read what it read; and the numbers that the other nodes had."""
    moved = lambda slot: (cell.nodes[i].read if slot == i + 1 else slot) - (slot > i + 1)
    nodes = [node._replace(read=moved(node.read)) for j, node in enumerate(cell.nodes) if j != i]
    return cell._replace(nodes=tuple(nodes)), [j for j in range(len(cell.nodes)) if j != i]

def variants(cell):
    """{kind: [(a cell of ENAS's space changed in one thing, the numbers its nodes had)]}. Node 0, which alone reads
    the input pair, is never removed; a connection that is added is a second one, from an earlier node."""
    n, with_node = len(cell.nodes), lambda i, **new: cell._replace(
        nodes=(*cell.nodes[:i], cell.nodes[i]._replace(**new), *cell.nodes[i + 1:]))
    same = lambda cells: [(x, list(range(n))) for x in cells]
    return {"a node removed": [without(cell, i) for i in range(1, n)],
            "a connection added": same(with_node(i, also=slot) for i in range(1, n) for slot in range(1, i + 1)
                                       if slot != cell.nodes[i].read),
            "an activation changed": same(with_node(i, activation=act) for i in range(n) for act in ACTIVATIONS
                                          if act != cell.nodes[i].activation),
            "all activations the same": same(alike for alike in (cell._replace(nodes=tuple(
                node._replace(activation=act) for node in cell.nodes)) for act in ACTIVATIONS) if alike != cell)}

def inherit_numbered(shared, cells, numbers):
    """Standalone weights from the shared ones, each node's edges by the number that it had; rows [K, D] to go with."""
    rows = encode(cells)
    own = inherit(shared, rows)
    for k, (cell, number) in enumerate(zip(cells, numbers)):
        slot = lambda s: number[s - 1] + 1 if s else INPUT
        for i, node in enumerate(cell.nodes):
            own["edges"][k, i] = shared["edges"][edge_index(slot(node.read), number[i])]
            if node.also:
                own["edges"][k, -1] = shared["edges"][edge_index(slot(node.also), number[i])]
    return own, rows

def study_ablate(config, run):
    """Nodes removed, connections added, activations changed, in the cells of --cell ('found' is the one that a search
    finds): all of them under the shared weights, and --retrain_cells of each kind, drawn at random, from scratch.

    cells: name -> kind of change, 'itself' for none -> 'shared', the losses under the shared weights, and 'scratch',
    pairs of that and the loss from scratch, of the cell itself 5 seeds. All on the test split. ends: see ends_of."""
    in_plain_space(config, 2)
    names = list(dict.fromkeys(config.cell.split(",")))
    own = {name: load_cell(config, name, others=("found",)) for name in names if name != "found"}
    for name, cell in own.items():
        if len(cell.nodes) > config.nodes or is_gated(cell):
            raise UserError(f"--cell {name}: the study is for cells of ENAS's space of up to --nodes {config.nodes}")
    corpus, (folder, _) = load_corpus(config), searches(replace(config, replicas=1), run)["search"][0]
    weights, found, jobs, guess = shared_weights_of(folder, config), {}, [], math.log(len(corpus.words))
    for name in names:
        cell = own[name] if name in own else load_cell(config, str(folder))
        kinds = {"itself": [(cell, list(range(len(cell.nodes))))],
                 **{kind: changed for kind, changed in variants(cell).items() if changed}}
        found[name] = {}
        for kind, changed in kinds.items():
            shared = [no_worse(losses_on(corpus.test, config, *inherit_numbered(weights, [x], [numbers])).item(), guess)
                      for x, numbers in changed]
            found[name][kind] = {"shared": shared, "scratch": []}
            draw = torch.randperm(len(changed), generator=rng(config.seed, "ablate", name, kind)).tolist()
            drawn = [0] * 5 if kind == "itself" else draw[:config.retrain_cells]
            jobs += [(name, kind, changed[i][0], shared[i]) for i in drawn]
    jobs = shuffled(config, jobs)
    networks, _ = train_all(config, run, [name_of(x) for _, _, x, _ in jobs])
    for (name, kind, _, shared), n in zip(jobs, networks):
        found[name][kind]["scratch"].append([shared, n["test"]])
    return {"cells": found, "ends": ends_of(networks)}

def study_factors(config, run):
    """Connections x activations, --replicas cells of each combination, trained from scratch. What is searched or random
    is drawn anew for every combination: 'searched' from the samples of the r-th search's controller.

    losses: [connections][activations][replicas], of the test split. ends: see ends_of."""
    in_plain_space(config, 2)
    if config.replicas < 2:
        raise UserError(f"--replicas {config.replicas}: shares of the variance need at least 2")
    n, decisions = config.nodes, search_space(config)
    sampled = [read_json(folder / "derived.json")["cells"] for folder, _ in searches(config, run)["search"]]

    def drawn(kind, *key):
        """A cell of the r-th search, key = (r, ...), or a random one."""
        cells = torch.tensor(sampled[key[0]])[:, :-1].long() if kind == "searched" else None
        at = torch.randint(len(sampled[0]), (), generator=rng(config.seed, *key))
        return decode(uniform_rows(decisions, 1, config.seed, *key)[0] if cells is None else cells[at])

    def combined(r, a, b):
        reads = [FAMILIES[a](i, False)[0] if i else INPUT for i in range(n)] if a in FAMILIES else \
            [node.read for node in drawn(a, r, a, b, "connections").nodes]
        acts = [b] * n if b in ACTIVATIONS else [node.activation for node in drawn(b, r, a, b, "activations").nodes]
        return CELLS["chain"]._replace(nodes=tuple(map(Node, reads, acts)))

    connections, activations = ("searched", "random", "chain", "tree"), ("searched", "random", *ACTIVATIONS)
    keys = shuffled(config, [(r, a, b) for r in range(config.replicas) for a in connections for b in activations])
    cells = {key: combined(*key) for key in keys}
    networks, _ = train_all(config, run, list(map(name_of, cells.values())))
    losses = {key: network["test"] for key, network in zip(cells, networks)}
    table = [[[losses[r, a, b] for r in range(config.replicas)] for b in activations] for a in connections]
    return {"connections": connections, "activations": activations, "losses": table, "ends": ends_of(networks)}

SLICE = 20, 10_000  # of the training text a 20th, at most so many words

def slice_of(corpus, folder):
    """A folder of texts to overfit on: a slice of the training text, which is also what 'validation' looks at, and as
    'test' the validation text, without the sentences whose words the slice lacks, where there is no <unk>."""
    lines = lambda tokens: [line.split() for line in " ".join(corpus.words[i] for i in tokens.tolist()).split("<eos>")]
    part = lines(corpus.train[:min(len(corpus.train) // SLICE[0], SLICE[1])])
    known = {word for line in part for word in line}
    valid = [line for line in lines(corpus.valid) if "<unk>" in known or {*line} <= known]
    folder.mkdir(exist_ok=True)
    for split, text in (("train", part), ("valid", part), ("test", valid)):
        write_atomically(folder / f"{split}.txt", "\n".join(map(" ".join, text)).encode())
    return folder

def study_capacity(config, run):
    """How much can a cell learn by heart? --derive_samples random cells, each as it is, with a width of a half or a
    quarter, and with each single activation, trained without dropout on a small slice of the text for as long as the
    loss on that very slice falls.

    cells: kind -> for each cell 'paths', 'depth', 'parameters', 'train', the loss on the slice, and 'valid'; 'capped',
    'late' and 'failed' as in train_all."""
    in_plain_space(config, 2)
    corpus = load_corpus(config)
    if config.hidden < 4 or len(corpus.train) < 3 * SLICE[0]:
        raise UserError(f"--hidden {config.hidden}, --data {config.data}: a quarter of the units must be one at least, "
                        f"and a {SLICE[0]}th of the training text, {len(corpus.train)} words, three words")
    texts = slice_of(corpus, run.folder / "slice")
    cells = [decode(row) for row in uniform_rows(search_space(config), config.derive_samples, config.seed, "capacity")]
    width = lambda i: config.hidden // (2, 4)[i % 2]
    same = lambda cell, act: cell._replace(nodes=tuple(node._replace(activation=act) for node in cell.nodes))
    kinds = {"mixed": cells, "narrow": [cell._replace(width=width(i)) for i, cell in enumerate(cells)],
             **{act: [same(cell, act) for cell in cells] for act in ACTIVATIONS}}
    jobs = shuffled(config, [(kind, i) for i in range(len(cells)) for kind in kinds])
    off = dict.fromkeys(("word_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_decay"), 0.0)
    own = {name: getattr(config, name) for name in ("batch", "bptt", "lr", "clip")}  # there is no search to have them
    networks, _ = train_all(replace(config, data=str(texts)), run, [name_of(kinds[kind][i]) for kind, i in jobs],
                            judged="valid", average=False, **own, **off)
    measured = lambda cell, network: {**{name: f(cell, config.hidden) for name, f in PROPERTIES.items()},
                                      "train": network["valid"], "valid": network["test"],  # see slice_of
                                      **ends_of([network])[0]}
    found = {(kind, i): measured(kinds[kind][i], network) for (kind, i), network in zip(jobs, networks)}
    return {"cells": {kind: [found[kind, i] for i in range(len(cells))] for kind in kinds}}

# 3. Perturbed input as an objective

PERTURBED = {"words dropped": [0.0, .05, .1, .2, .3], "noise": [0.0, .25, .5, .75, 1.0]}
SEGMENTS, WORDS = 30, 35  # a perturbed loss is a mean over so many segments, or more, each with masks of its own
OBJECTIVES = {"plain": {}, "words dropped": dict(reward_words=.2), "noise": dict(reward_noise=.5)}

def study_robust(config, run):
    """Cells found by searches whose reward is measured on perturbed input, those of plain searches, and LSTMs, all
    trained plainly from scratch, --replicas of each: the test loss against the strength of a perturbation.

    losses: perturbation -> found by -> [strengths][replicas], at most that of guessing. ends: see ends_of."""
    in_plain_space(config, 2)
    corpus, device, settings = load_corpus(config), device_of(config), ("reward_words", "reward_noise")
    if any(getattr(config, setting) for setting in settings):
        raise UserError("--reward_words, --reward_noise: the study has objectives of its own, the plain one among them")
    names = {(arm, i): name_of(load_cell(config, str(folder))) for arm, several in
             searches(config, run, OBJECTIVES).items() for i, (folder, _) in enumerate(several)}
    networks, lstms = train_all(config, run, list(names.values()), {config.hidden: config.replicas})
    load = lambda name: to_device(torch.load(run.folder / name / "weights.pt", weights_only=True), device)
    saved = [load(f"scratch {i}") for i in range(math.ceil(len(names) / AT_ONCE))]
    weights = {name: torch.cat([w[name] for w in saved]) for name in saved[0]}
    cells = encode([load_cell(config, name) for name in names.values()]).to(device)
    lstm, zeros = load(f"lstm {config.hidden}"), torch.zeros(config.replicas, 2)
    streams = min(config.eval_batch, max(1, (len(corpus.test) - 1) // 70))  # as evaluate cuts the text
    passes = math.ceil(SEGMENTS / math.ceil(Stream(corpus.test, streams, WORDS).length / WORDS))
    found, guess = {}, math.log(len(corpus.words))
    for setting, (kind, strengths) in zip(settings, PERTURBED.items()):
        found[kind] = {name: [] for name in (*OBJECTIVES, "LSTM")}
        for strength in strengths:
            masks = perturbed(replace(config, **{setting: strength}), weights)
            each = [lambda inputs, *key, i=i: masks(inputs, "test", i, *key) for i in range(passes if strength else 1)]
            under = lambda w, rows: torch.stack([evaluate(w, rows, corpus.test.to(device), config.eval_batch, WORDS,
                                                          masks=m) for m in each]).mean(0).tolist()
            measure = lambda w, rows: [no_worse(x, guess) for x in under(w, rows)]
            losses = dict(zip(names, measure(weights, cells)))
            for name in OBJECTIVES:
                found[kind][name].append([losses[name, i] for i in range(config.replicas)])
            found[kind]["LSTM"].append(measure(lstm, zeros))
            run.obey()
    return {"strengths": PERTURBED, "losses": found, "ends": ends_of([*networks, *lstms[config.hidden]])}

# 4. The controller's hidden state

def states_of(controller, rows):
    """The LSTM's hidden state after the last decision, which is fed to it, too [K, H]."""
    seen = []
    hook = controller.lstm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        controller(rows=rows)
        last = controller.decisions[controller.free[-1]]
        choice = (rows[:, last.columns[0], None] == torch.tensor(last.choices)).long().argmax(1)
        final = controller.lstm(controller.embed[-1][choice], seen[-1])[0]
    hook.remove()
    return final

def edited(row, kind, draw):
    """The row of ENAS's space with one connection, or one activation, changed at random."""
    row, n = row.clone(), int(row[0])
    if kind == "a connection":
        i = int(torch.randint(2, n, (), generator=draw))  # node 1 has no choice
        row[2 + 2 * i] = 1 + (row[2 + 2 * i] - 1 + torch.randint(1, i, (), generator=draw)) % i
    else:
        i = int(torch.randint(n, (), generator=draw))
        row[3 + 2 * i] = (row[3 + 2 * i] + torch.randint(1, len(ACTIVATIONS), (), generator=draw)) % len(ACTIVATIONS)
    return row

uses = lambda act: lambda cell: sum(node.activation == act for node in cell.nodes)
MEASURES = {"paths": path_count, "depth": lambda cell: max(depths(cell).values()),
            **{f"nodes with {act}": uses(act) for act in ACTIVATIONS}}

STRENGTHS = (-4.0, -2.0, 0.0, 2.0, 4.0)  # of a push, in mean norms of the state

def steered(controller, direction, key, k=200):
    """{strength: rows [K, D] sampled while so many times the direction [H] is added to each hidden state, from which
    it is handed on}."""
    found = {}
    for strength in STRENGTHS:
        push = lambda module, inputs, output: (output[0] + strength * direction, output[1])
        hook = controller.lstm.register_forward_hook(push)
        with torch.no_grad():
            found[strength] = controller.sample(k, *key).rows
        hook.remove()
    return found

def pushed(controller, states, values, measure, *key):
    """{direction: for each such direction the means of a measure of cells sampled while the state is pushed, one for
    each strength}: the one in which a linear probe of the final states [cells, H] finds the values, and five at random,
    all as long as the states are on average."""
    random_ = [torch.randn(states.shape[1], generator=rng(*key, i), dtype=states.dtype) for i in range(5)]
    mean = lambda rows: sum(measure(decode(row)) for row in rows) / len(rows)
    along = lambda d: steered(controller, (d * states.norm(dim=1).mean() / d.norm()).float(), key)
    return {name: [list(map(mean, along(d).values())) for d in directions]
            for name, directions in (("along the probe", [ridge(states, values)]), ("at random", random_))}

def study_hidden(config, run):
    """Does the controller's final hidden state know the architecture? Of --replicas searches' controllers, and of the
    untrained ones that they started from, on ten times --derive_samples uniform cells and on pairs of them. Losses are
    under the shared weights, on the first 20,000 words of the validation text.

    controllers: trained or not -> for each seed 'distances' of states, of pairs that differ by one edit and of random
    ones; 'edited', the numbers of the edits' nodes; 'pairs', for random pairs that distance, the number of decisions in
    which they differ, and the difference of their losses; 'probes', what is linear in the state; 'pushed', see there,
    by measure; 'norms', the means of |state - mean state| and |state|; 'plane', two principal components of the states
    and the cells' losses."""
    in_plain_space(config, 3)
    corpus, found = load_corpus(config), {"untrained": [], "trained": []}
    listed = lambda values: [float(f"{x:.5g}") for x in values.tolist()]  # there are thousands
    for folder, sub in searches(config, run)["search"]:
        decisions, draw = search_space(sub), rng(sub.seed, "hidden: edits and pairs")
        rows = uniform_rows(decisions, 10 * sub.derive_samples, sub.seed, "hidden")
        losses = losses_on(corpus.valid[:20000], sub, shared_weights_of(folder, sub), rows).double()
        losses = losses.nan_to_num(math.inf).clamp(max=math.log(len(corpus.words)))
        cells = list(map(decode, rows))
        measured = {**{name: torch.tensor([float(f(cell)) for cell in cells]) for name, f in MEASURES.items()},
                    "loss": losses}
        edits = {kind: torch.stack([edited(row, kind, draw) for row in rows])
                 for kind in ("a connection", "an activation")}
        i, j = (torch.randperm(len(rows), generator=draw) for _ in range(2))
        i, j = i[i != j], j[i != j]
        for name in found:
            controller = Controller(decisions, sub)
            if name == "trained":
                controller.load_state_dict(torch.load(folder / "controller.pt", weights_only=True))
            states = states_of(controller, rows).double()
            centred = states - states.mean(0)
            plane = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].t()
            far = (states[i] - states[j]).norm(dim=1)
            distances = {kind: listed((states_of(controller, other) - states).norm(dim=1))
                         for kind, other in edits.items()}
            node = lambda other: ((other != rows).long().argmax(1) // 2 - 1).tolist()
            found[name].append({
                "distances": {**distances, "random": listed(far)},
                "edited": {kind: node(other) for kind, other in edits.items()},
                "pairs": [listed(far), (rows[i] != rows[j]).sum(1).tolist(), listed((losses[i] - losses[j]).abs())],
                "probes": {measure: probe(states, values) for measure, values in measured.items()},
                "pushed": {measure: pushed(controller, states, measured[measure], MEASURES[measure], sub.seed, measure)
                           for measure in ("depth", "nodes with tanh")},
                "norms": [centred.norm(dim=1).mean().item(), states.norm(dim=1).mean().item()],
                "plane": [*map(listed, plane.t()), listed(losses)]})
            run.obey()
    return {"controllers": found}

# 5. A search, watched

def study_progress(config, run):
    """A search, and before each of its rounds the best of --derive_samples cells of the controller on the whole
    validation split, and the probabilities of its decisions, from 200 samples.

    rounds: 'best', a row and its perplexity, and 'shares', decision -> [choices]."""
    in_plain_space(config, 3)
    corpus, decisions = load_corpus(config), search_space(config)

    def watch(weights, controller, epoch):
        with torch.no_grad():
            rows = controller.sample(config.derive_samples, config.seed, "watch", epoch).rows
            many = controller.sample(200, config.seed, "shares", epoch).rows
        rows, perplexities = derive(config, weights, rows, corpus)
        shares = {d.name: [(many[:, d.columns[0]] == value).float().mean().item() for value in d.choices]
                  for d in decisions if len(d.choices) > 1}
        write_json(run.folder / f"round {epoch}.json", {"best": [*rows[0].tolist(), perplexities[0]], "shares": shares})

    watch(*search(config, run, corpus, watch), rounds := config.epochs + config.settle)
    return {"rounds": [read_json(run.folder / f"round {i}.json") for i in range(rounds + 1)]}

STUDIES = {"compare": study_compare, "ablate": study_ablate, "factors": study_factors, "capacity": study_capacity,
           "robust": study_robust, "hidden": study_hidden, "progress": study_progress}
for name in STUDIES.keys() - {"progress"}:
    STUDIES[name].parts = True  # --part may share out their sub-runs
