"""The studies of cells: what makes one good, and does the controller know? Like those of studies.py, (config, run) ->
metrics. Most share one skeleton: cells from somewhere, a network trained from scratch for each, a comparison.

Networks are trained in batches of AT_ONCE, each batch a sub-run of its own, as is each search; `--part I/N` does every
N-th of them, so that N commands do a study together. Losses are in nats per token.
"""

import math
from dataclasses import replace

import torch

from menas import (ACTIVATIONS, CELLS, INPUT, PRESETS, SPLITS, Controller, Node, UserError, decode, derive, edge_index,
                   encode, evaluate, inherit, leaves, load_cell, load_corpus, lstm_weights, perturbed, read_json,
                   retrain, rng, row_name, run_study, search, search_space, study_search, uniform_rows, write_json)
from results.stats import probe, ridge
from results.studies import BARE, BRIEF, LARGE, PROPERTIES, SEARCHES, depths, path_count

AT_ONCE = 25  # networks trained as one

QUICKLY = dict(BRIEF, retrain_epochs=1, replicas=2)
FULLY = dict(SEARCHES, retrain_epochs=25, patience=3, plateau=4.0)  # until it stops improving
# preset -> study -> its settings beside the preset's own
SETTINGS = {"smoke": {
    **dict.fromkeys(("compare", "factors", "robust", "progress"), QUICKLY), "capacity": dict(QUICKLY, derive_samples=2),
    "ablate": dict(QUICKLY, cell="found,random:1", retrain_cells=1), "hidden": dict(QUICKLY, derive_samples=20),
}, "tiny": {
    "compare": dict(FULLY, replicas=4, derive_samples=25), "factors": dict(FULLY, replicas=4), "robust": FULLY,
    "ablate": dict(FULLY, nodes=9, cell="found,random:1,darts_v2", retrain_cells=6),
    "capacity": dict(retrain_epochs=100, patience=5, plateau=2.0, derive_samples=20),
    "hidden": dict(SEARCHES, replicas=3, derive_samples=300), "progress": dict(SEARCHES, epochs=12, derive_samples=20),
}, "ptb": {
    **dict.fromkeys(("compare", "factors", "robust", "ablate", "capacity"), BARE),
    "hidden": dict(BARE, derive_samples=60), "progress": dict(BARE, epochs=8),
}, "paper": {
    "compare": dict(LARGE, replicas=4, derive_samples=25), **dict.fromkeys(("factors", "robust"), LARGE),
    "ablate": dict(LARGE, nodes=12, cell="found,random:1,random:2,enas,darts_v2,enas_lm", retrain_cells=20),
    "capacity": dict(LARGE, derive_samples=50), "hidden": dict(LARGE, derive_samples=300), "progress": LARGE,
}}
for preset, settings in SETTINGS.items():
    PRESETS[preset].update(settings)

def name_of(cell):
    """The cell as --cell takes it, its row."""
    return row_name([*encode([cell])[0].tolist(), None])

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

def searches(config, run, **settings):
    """[(folder, its Config)] of --replicas finished searches, seeded --seed, --seed + 1, ..."""
    subs = [replace(config, seed=config.seed + i, replicas=1, retrain=False, part="", **settings)
            for i in range(config.replicas)]
    name = lambda sub: " ".join(["search", str(sub.seed), *map(str, settings.values())])
    sub_runs(run, {name(sub): lambda folder, sub=sub: run_study("search", study_search, replace(sub, out=str(folder)))
                   for sub in subs})
    return [(run.folder / name(sub), sub) for sub in subs]

def train_all(config, run, names, **settings):
    """Metrics of a network trained from scratch for each cell, until it stops improving on validation; the seeds of
    the weights differ from batch to batch. Its loss on each split is 'train', 'valid' and 'test'."""
    settings = dict(schedule="constant", plateau=config.plateau, patience=config.patience, **settings)
    batches = [names[i:i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]
    work = {f"scratch {i}": lambda folder, i=i, batch=batch: retrain(
        replace(config, seed=config.seed + i), ",".join(batch), folder, **settings) for i, batch in enumerate(batches)}
    return with_losses([n for record in sub_runs(run, work).values() for n in record["metrics"]["networks"]])

def with_losses(networks):
    """The networks' metrics with the loss on each split; of one that diverged it is that of guessing, or more."""
    loss = lambda perplexity: math.log(min(perplexity, 1e6))
    return [{**n, **{split: loss(n[f"{split}_perplexity"]) for split in SPLITS}} for n in networks]

def train_lstms(config, run, units, seeds):
    """The same of LSTMs with so many units, projected to --hidden."""
    settings = dict(schedule="constant", plateau=config.plateau, patience=config.patience, replicas=seeds,
                    lstm_hidden=units)
    work = {f"lstm {units}": lambda folder: retrain(config, "lstm", folder, **settings)}
    return with_losses(sub_runs(run, work)[f"lstm {units}"]["metrics"]["networks"])

# 1. Does the controller know what is good?

def matched_units(config, wanted):
    """The units of the LSTM whose recurrent weights, projection included, are nearest to so many."""
    weights = lambda units: lstm_weights(replace(config, lstm_hidden=units), 2, [1]).items()
    count = lambda units: sum(w[0].numel() for name, w in weights(units) if name not in ("embedding", "bias"))
    return min(range(2, 4 * config.hidden), key=lambda units: abs(count(units) - wanted))

def study_compare(config, run):
    """Cells of a trained controller, of an untrained one and of the uniform distribution, --derive_samples of each from
    each of --replicas searches, every one trained from scratch; beside LSTMs, of as many units and of as many weights.

    groups: name -> one entry for each cell: its row, the search, 'shared', the loss under its shared weights on the
    whole validation split, and of the network from scratch 'train', 'valid', 'test', 'epochs'."""
    corpus, entries = load_corpus(config), []
    for folder, sub in searches(config, run):
        weights, derived = torch.load(folder / "weights.pt", weights_only=True), read_json(folder / "derived.json")
        decisions = search_space(sub)
        untrained = Controller(decisions, sub).sample(sub.derive_samples, sub.seed, "untrained").rows
        rows, perplexities = derive(sub, weights, untrained, corpus)
        groups = {"trained": derived["cells"], "uniform": derived["uniform_cells"],
                  "untrained": [[*row, p] for row, p in zip(rows.tolist(), perplexities)]}
        entries += [dict(group=group, search=sub.seed, row=row[:-1], shared=math.log(min(row[-1], 1e6)))
                    for several in zip(*groups.values()) for group, row in zip(groups, several)]  # in turn: each
    networks = train_all(config, run, [row_name([*e["row"], None]) for e in entries])  # batch has some of each
    keep = ("train", "valid", "test", "epochs", "recurrent_parameters")
    entries = [{**entry, **{name: network[name] for name in keep}} for entry, network in zip(entries, networks)]
    wanted = sum(entry["recurrent_parameters"] for entry in entries) / len(entries)
    for group, units in (("LSTM", config.hidden), ("LSTM, as many weights", matched_units(config, wanted))):
        entries += [dict(group=group, units=units, **{name: n[name] for name in keep})
                    for n in train_lstms(config, run, units, seeds=10)]
    return {"groups": {group: [e for e in entries if e["group"] == group] for group in
                       dict.fromkeys(e["group"] for e in entries)}}

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
            "all activations the same": same(cell._replace(nodes=tuple(
                node._replace(activation=act) for node in cell.nodes)) for act in ACTIVATIONS)}

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
    """Nodes removed, connections added, activations changed, --retrain_cells of each at random, of the cells of --cell
    ('found' is the one that a search finds): under the shared weights, and trained from scratch beside 5 seeds of the
    cell itself.

    cells: name -> kind of change, 'itself' for none -> pairs of losses, under the shared weights and from scratch."""
    corpus, (folder, sub) = load_corpus(config), searches(replace(config, replicas=1), run)[0]
    weights = torch.load(folder / "weights.pt", weights_only=True)
    found, jobs = {}, []
    for name in config.cell.split(","):
        cell = load_cell(config, str(folder) if name == "found" else name)
        if len(cell.nodes) > config.nodes or any(node.operation != "highway" for node in cell.nodes):
            raise UserError(f"--cell {name}: the study is for cells of ENAS's space of up to --nodes {config.nodes}")
        draw = lambda kind, all_: [all_[i] for i in torch.randperm(
            len(all_), generator=rng(config.seed, "ablate", name, kind))[:config.retrain_cells].tolist()]
        own = [(cell, list(range(len(cell.nodes))))] * 5
        jobs += [(name, kind, *x) for kind, several in
                 {"itself": own, **{k: draw(k, v) for k, v in variants(cell).items()}}.items() for x in several]
    jobs = [jobs[i] for i in torch.randperm(len(jobs), generator=rng(config.seed, "order")).tolist()]
    shared = [evaluate(*inherit_numbered(weights, [cell], [number]), corpus.valid, config.eval_batch).item()
              for _, _, cell, number in jobs]
    networks = train_all(config, run, [name_of(cell) for _, _, cell, _ in jobs])
    for (name, kind, *_), under_shared, network in zip(jobs, shared, networks):
        found.setdefault(name, {}).setdefault(kind, []).append([under_shared, network["test"]])
    return {"cells": found}

def connected(reads, activations):
    """The cell of ENAS's space with these slots read and activations."""
    return CELLS["chain"]._replace(nodes=tuple(Node(read, act) for read, act in zip(reads, activations)))

def study_factors(config, run):
    """Connections x activations, --replicas cells of each combination, trained from scratch. The r-th of 'searched' is
    from the r-th search, the r-th of 'random' from the r-th random cell.

    losses: [connections][activations][replicas], of the test split."""
    found = [load_cell(config, str(folder)) for folder, _ in searches(config, run)]
    n, table = config.nodes, []
    rand = [decode(row) for row in uniform_rows(search_space(config), 2 * config.replicas, config.seed, "factors")]
    first = lambda name: CELLS[name]._replace(nodes=CELLS[name].nodes[:n])
    reads = {"searched": found, "random": rand[:config.replicas],
             **{name: [first(name)] * config.replicas for name in ("chain", "tree")}}
    reads = {name: [[node.read for node in cell.nodes] for cell in cells] for name, cells in reads.items()}
    mixes = {"searched": found, "random": rand[config.replicas:]}
    mixes = {name: [[node.activation for node in cell.nodes] for cell in cells] for name, cells in mixes.items()}
    mixes |= {name: [[name] * n] * config.replicas for name in ACTIVATIONS}
    keys = [(a, b, r) for r in range(config.replicas) for a in reads for b in mixes]
    keys = [keys[i] for i in torch.randperm(len(keys), generator=rng(config.seed, "order")).tolist()]
    networks = train_all(config, run, [name_of(connected(reads[a][r], mixes[b][r])) for a, b, r in keys])
    losses = {key: network["test"] for key, network in zip(keys, networks)}
    table = [[[losses[a, b, r] for r in range(config.replicas)] for b in mixes] for a in reads]
    return {"connections": list(reads), "activations": list(mixes), "losses": table}

SLICE = 20  # of the training text a 20th

def study_capacity(config, run):
    """How much can a cell learn by heart? --derive_samples random cells, each as it is, with a width of a half or a
    quarter, and with each single activation, trained on a small slice of the text for as long as the loss on that very
    slice falls.

    cells: kind -> for each cell 'paths', 'depth', 'parameters', 'train', the loss on the slice, and 'valid'."""
    texts, corpus = run.folder / "slice", load_corpus(config)
    texts.mkdir(exist_ok=True)
    lines = lambda tokens: [line.split() for line in " ".join(corpus.words[i] for i in tokens.tolist()).split("<eos>")]
    part = lines(corpus.train[:len(corpus.train) // SLICE])
    known = {word for line in part for word in line}
    valid = [line for line in lines(corpus.valid) if "<unk>" in known or {*line} <= known]
    for split, text in (("train", part), ("valid", part), ("test", valid)):
        (texts / f"{split}.txt").write_text("\n".join(map(" ".join, text)))
    cells = [decode(row) for row in uniform_rows(search_space(config), config.derive_samples, config.seed, "capacity")]
    width = lambda i: config.hidden // (2, 4)[i % 2]
    same = lambda cell, act: cell._replace(nodes=tuple(node._replace(activation=act) for node in cell.nodes))
    kinds = {"mixed": cells, "narrow": [cell._replace(width=width(i)) for i, cell in enumerate(cells)],
             **{act: [same(cell, act) for cell in cells] for act in ACTIVATIONS}}
    jobs = [(kind, several[i]) for i in range(len(cells)) for kind, several in kinds.items()]
    networks = train_all(replace(config, data=str(texts)), run, [name_of(cell) for _, cell in jobs])
    found = {kind: [] for kind in kinds}
    for (kind, cell), network in zip(jobs, networks):
        found[kind].append({**{name: measure(cell, config.hidden) for name, measure in PROPERTIES.items()},
                            "train": network["valid"], "valid": network["test"]})  # see the texts
    return {"cells": found}

# 3. Perturbed input as an objective

PERTURBED = {"words dropped": [0.0, .05, .1, .2, .3], "noise": [0.0, .25, .5, .75, 1.0]}
OBJECTIVES = {"plain": {}, "words dropped": dict(reward_words=.2), "noise": dict(reward_noise=.5)}

def study_robust(config, run):
    """Cells found by searches whose reward is measured on perturbed input, those of plain searches, and LSTMs, all
    trained plainly from scratch, --replicas of each: the test loss against the strength of a perturbation.

    losses: perturbation -> found by -> [strengths][replicas]."""
    corpus, names = load_corpus(config), {}
    for name, settings in OBJECTIVES.items():
        folders = [folder for folder, _ in searches(config, run, **settings)]
        names.update({(name, i): name_of(load_cell(config, str(folder))) for i, folder in enumerate(folders)})
    train_all(config, run, list(names.values()))
    train_lstms(config, run, config.hidden, config.replicas)
    cells = encode([load_cell(config, name) for name in names.values()], config.nodes)
    saved = [torch.load(run.folder / f"scratch {i}" / "weights.pt", weights_only=True)
             for i in range(math.ceil(len(names) / AT_ONCE))]
    weights = {name: torch.cat([w[name] for w in saved]) for name in saved[0]}
    lstm = torch.load(run.folder / f"lstm {config.hidden}" / "weights.pt", weights_only=True)
    found = {}
    for kind, strengths in PERTURBED.items():
        lines = {name: [] for name in (*OBJECTIVES, "LSTM")}
        for strength in strengths:
            how = dict(reward_words=strength) if kind == "words dropped" else dict(reward_noise=strength)
            masks = perturbed(replace(config, **how), weights)
            measure = lambda w, rows: evaluate(w, rows, corpus.test, config.eval_batch, masks=masks).tolist()
            losses = dict(zip(names, measure(weights, cells)))
            for name in OBJECTIVES:
                lines[name].append([losses[name, i] for i in range(config.replicas)])
            lines["LSTM"].append(measure(lstm, torch.zeros(config.replicas, 2)))
        found[kind] = lines
    return {"strengths": PERTURBED, "losses": found}

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
            "leaves": lambda cell: len(leaves(cell)), **{f"nodes with {act}": uses(act) for act in ACTIVATIONS}}

def steered(controller, direction, key, k=200):
    """{strength: rows [K, D] sampled while so many times the direction [H] is added to every hidden state}."""
    found = {}
    for strength in (-2.0, -1.0, 0.0, 1.0, 2.0):
        push = lambda module, inputs, output: (output[0] + strength * direction, output[1])
        hook = controller.lstm.register_forward_hook(push)
        with torch.no_grad():
            found[strength] = controller.sample(k, *key).rows
        hook.remove()
    return found

def study_hidden(config, run):
    """Does the controller's final hidden state know the architecture? Of --replicas searches' controllers, and of the
    untrained ones that they started from, on --derive_samples uniform cells and on pairs of cells.

    controllers: trained or not -> for each seed 'distances', of pairs that differ by one edit and of random ones,
    'pairs', for random pairs the distance of their states, the decisions in which they differ, the difference of their
    losses, 'probes', what is linear in the state, 'steered', the mean of a measure when the state is pushed along the
    probe's direction, and 'plane', two principal components of the states and the cells' losses."""
    corpus, found = load_corpus(config), {"untrained": [], "trained": []}
    for folder, sub in searches(config, run):
        weights = torch.load(folder / "weights.pt", weights_only=True)
        decisions, draw = search_space(sub), rng(sub.seed, "hidden")
        rows = uniform_rows(decisions, sub.derive_samples, sub.seed, "hidden")
        losses = torch.cat([evaluate(weights, part, corpus.valid, sub.eval_batch) for part in rows.split(10)]).double()
        losses = losses.clamp(max=math.log(len(corpus.words)))
        cells = [decode(row) for row in rows]
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
            push = {}
            for measure in ("depth", "nodes with tanh"):
                direction = ridge(states, measured[measure])
                direction = direction / direction.norm() * centred.norm(dim=1).mean()
                pushed = steered(controller, direction.float(), (sub.seed, "push"))
                push[measure] = {str(strength): sum(MEASURES[measure](decode(row)) for row in drawn) / len(drawn)
                                 for strength, drawn in pushed.items()}
            found[name].append({
                "distances": {**{kind: (states_of(controller, other) - states).norm(dim=1).tolist()
                                 for kind, other in edits.items()}, "random": far.tolist()},
                "pairs": [far.tolist(), (rows[i] != rows[j]).sum(1).tolist(), (losses[i] - losses[j]).abs().tolist()],
                "probes": {measure: probe(states, values) for measure, values in measured.items()},
                "steered": push, "plane": [*plane.t().tolist(), losses.tolist()]})
    return {"controllers": found}

# 5. A search, watched

def study_progress(config, run):
    """A search, and before each of its rounds the best of --derive_samples cells of the controller on the whole
    validation split, and the probabilities of its decisions, from 200 samples.

    rounds: 'best', a row and its perplexity, and 'shares', decision -> [choices]."""
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
