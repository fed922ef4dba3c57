"""Statistics, tables and figures of the records: what `python menas.py report` makes, and what a finished study prints.

menas.py writes a record for every run, RUN/result.json; here they are only read. Each table of the README stands
between two comments, and each figure beside the records, so all of them are made again by that one command.
"""
import json
import math
import re
from pathlib import Path
from statistics import stdev

import torch
from matplotlib.figure import Figure

from menas import ACTIVATIONS, ROW, UserError, cell_from_json, decode, read_json
from results.cells import STRENGTHS
from results.plots import (COLOURS, cut, draw_bands, draw_cell, draw_curves, draw_densities, draw_intervals,
                           draw_points, panels, table)
from results.stats import (bootstrap, effect_shares, kendall, mann_whitney, permutation_test, shares_interval,
                           sign_flips, spearman, t_test, welch)
from results.studies import OUTCOMES

PUBLISHED = {"enas": "- / 56.3 (first: 55.8)", "darts_v1": "60.2 / 57.6", "darts_v2": "58.1 / 55.7",
             "enas_lm": "- / 57.3"}

def short(name):
    """A cell's name; of a JSON file the run that it came from; a row of integers is what a search found."""
    if re.fullmatch(ROW, name):
        return "the cell found"
    path = Path(name)
    return " of ".join(filter(None, (path.stem, path.parent.name))) if path.suffix == ".json" else name

def table_train(records):
    """Networks trained from scratch, best first, beside the valid / test published for the cell at 800-850 units."""
    networks = [n | {"published": PUBLISHED.get(n["cell"], "") if r["config"]["data"] == "ptb" else ""}
                for r in records for n in r["metrics"]["networks"]]
    networks.sort(key=lambda n: n["test_perplexity"])
    return table(("cell", "seed", "recurrent weights", "epochs", "train", "valid", "test", "published"),
                 [(short(n["cell"]), n["seed"], n["recurrent_parameters"], n["epochs"], n["train_perplexity"],
                   n["valid_perplexity"], n["test_perplexity"], n["published"]) for n in networks])

def table_search(records):
    """Validation perplexity under the shared weights of the best and the median architecture, by their source."""
    sources = [(r, f"the {r['config']['controller']} controller", "") for r in records]
    sources += [(r, "the uniform distribution", "uniform_") for r in records]
    return table(("architectures from", "supernet trained by", "best", "median"),
                 [(name, f"{r['config']['controller']}, seed {r['seed']}", r["metrics"][f"{prefix}valid_perplexity"],
                   r["metrics"][f"{prefix}median_valid_perplexity"]) for r, name, prefix in sources])

def table_bench(records):
    """How many times faster, or smaller, than the plain loop."""
    return table(("", "ms an architecture", "plain loop / this"),
                 [(x["name"], f"{1e3 * x['seconds']:.1f}" if x["seconds"] else "", x["ratio"])
                  for r in records for x in r["metrics"]["ratios"] if "plain" not in x["name"]])

LOSSES = ("expected", "best", "scratch")  # of the OUTCOMES, in nats per token
# study of arms -> the outcomes that it is about
ABOUT = {"extra": ("expected", "scratch", "frozen"), "spaces": ("expected", "best", "scratch", "parameters"),
         "optimizer": ("expected", "rate"), "anneal": ("best", "scratch", "share"), "state": ("expected", "scratch")}

def differences(record, outcome):
    """{arm: its difference to the first arm, a value for each seed} of a record; {} if the outcome was not measured."""
    arms = record["metrics"]["arms"]
    base = next(iter(arms.values())).get(outcome, [])
    if not base or outcome == "frozen" and record["config"]["task"] == "none":
        return {}
    return {arm: [x - y for x, y in zip(found[outcome], base)] for arm, found in arms.items()}

# of the optimizer study: who has a reason to choose a rate, and who chooses without one
CHOOSING, CONTROL = ("rates, sampled", "rates, unrolled"), "rates, zero"

def show(x, sign=""):
    """A loss with three decimals, a number of weights with none, nan not at all."""
    return "" if math.isnan(x) else f"{x:{sign}.3f}" if abs(x) < 1000 else f"{x:{sign},.0f}"

def show_p(p):
    return "" if math.isnan(p) else f"{p:.3f}" if p >= .0005 else "< .001"

def compared(apart, tests):
    """Of paired differences: their mean with its interval, p, what is detectable; empty where there is none of them."""
    if len(apart) < 2 or not any(apart):
        return "", "", ""
    mean, half, p, least = t_test(apart, tests)
    return f"{show(mean, '+')} +- {show(half)}", show_p(p), show(least)

def plus_minus(mean, half, form=".3f"):
    """A mean and half of its 95 % interval as text; what is nan is left out."""
    interval = f" +- {half:{form.strip('+')}}" if math.isfinite(half) else ""
    return f"{mean:{form}}{interval}" if math.isfinite(mean) else ""

def mean_of(values, form=".3f"):
    """A sample's mean and its 95 % interval as text."""
    return plus_minus(*t_test(list(values))[:2], form)

def table_arms(records):
    """Means over the seeds, and paired differences to the first arm, or a control: of losses, less is better. p is
    corrected for the arms of an outcome, not for the outcomes."""
    rows = []
    for record, outcome in ((r, o) for r in records for o in ABOUT[r["study"]]):
        found = differences(record, outcome)
        for arm, apart in found.items():
            values = record["metrics"]["arms"][arm][outcome]
            mean = show(sum(values) / len(values))
            rows.append((OUTCOMES[outcome], arm, mean, *compared(apart, len(found) - 1), len(values)))
        for arm in CHOOSING if CONTROL in found else ():
            apart = [x - y for x, y in zip(found[arm], found[CONTROL])]
            rows.append((OUTCOMES[outcome], f"{arm}, minus {CONTROL}", "", *compared(apart, len(CHOOSING)), len(apart)))
    arms = "lookahead, response" if records[0]["study"] == "extra" else "arm"
    return table(("outcome", arms, "mean", "difference", "p, corrected", "detectable", "seeds"), rows)

def reward_errors(record):
    """{measure: {policy: a value for each seed}} of the reward under each policy for the hidden state."""
    seeds = record["metrics"]["reward"]
    return {title: {policy: [seed[policy][i] for seed in seeds] for policy in seeds[0]}
            for i, title in enumerate(("bias, nats", "Kendall's tau"))}

def table_state(records):
    """The reward's error, the searches, the context that is used, and the sentences' lengths."""
    record = records[0]
    errors, context = reward_errors(record), record["metrics"]["context"]
    lengths = record["metrics"]["sentence_lengths"]
    return "\n\n".join((
        table(("state", *errors, "tau minus carry's"),
              [(name, *(mean_of(found[name]) for found in errors.values()),
                mean_of([x - y for x, y in zip(errors["Kendall's tau"][name], errors["Kendall's tau"]["carry"])])
                if name != "carry" else "") for name in errors["bias, nats"]]),
        table_arms([record]),
        table(("words seen", *(f"{int(c) + 1} to {2 * int(c)}" if c != "1" else "2" for c in context["lstm"])),
              [(f"perplexity of {name}", *found.values()) for name, found in context.items()]),
        table(("sentences", *lengths), [("words with <eos>", *lengths.values())])))

def followed(found):
    """Of one seed's test targets: correlation of the samples with what was asked for, their mean absolute error and
    the untrained controller's on the same targets, both in the latter's standard deviations."""
    blind_to, pairs = torch.tensor(found["untrained"]), [(float(t), x) for t, v in found["targets"].items() for x in v]
    asked, got = torch.tensor(pairs).t()
    blind = sum((blind_to - float(t)).abs().mean() for t in found["targets"]) / len(found["targets"])
    errors = torch.stack(((asked - got).abs().mean(), blind)) / blind_to.std()
    return [torch.corrcoef(torch.stack((asked, got)))[0, 1].item(), *errors.tolist()]

def table_conditional(records):
    """How well samples follow targets that the controller was not trained on; means over seeds, 95 % intervals."""
    rows = []
    for name, seeds in records[0]["metrics"]["properties"].items():
        rows.append((name, *(mean_of(values, ".2f") for values in zip(*map(followed, seeds))), len(seeds)))
    return table(("asked for", "correlation", "error, sd", "error untrained, sd", "seeds"), rows)

def cosines(record):
    """{cosine: {estimator: its mean over the search, a value for each seed}}."""
    seeds = record["metrics"]["seeds"]
    return {title: {name: [seed[name][i] for seed in seeds] for name in seeds[0]}
            for i, title in enumerate(("same samples", "other samples", "of the change"))}

def table_similarity(records):
    """Mean cosine over the seeds, and its paired difference to the plain gradient's with the 95 % interval."""
    rows = []
    for name in records[0]["metrics"]["seeds"][0]:
        rows.append([name])
        for found in cosines(records[0]).values():
            apart = [x - y for x, y in zip(found[name], found["none, none"])]
            rows[-1] += [f"{t_test(found[name])[0]:.3f}", mean_of(apart, "+.3f") if name != "none, none" else ""]
    return table(("gradient at t", *(x for title in cosines(records[0]) for x in (title, "difference"))), rows)

def table_cost(records):
    """Cost and noise of a controller step's gradient, divided by the plain one's."""
    return table(("lookahead, response", "fold", "ms", "cost", "variance", "typical"),
                 [(", ".join(x["arm"][:2]), x["arm"][2], f"{x['ms']:.1f}", x["seconds"], f"{x['variance']:.3g}",
                   x["typical"])
                  for r in records for x in r["metrics"]["ratios"]])

def draw_conditional(path, record):
    """Samples against what was asked for, a panel for each property: means and standard deviations, all seeds."""
    properties = record["metrics"]["properties"]
    figure = Figure(figsize=(4 * len(properties), 3.6), layout="constrained")
    for axes, (name, seeds) in zip(figure.subplots(1, len(properties), squeeze=False)[0], properties.items()):
        for i, found in enumerate(seeds):
            for target, values in found["targets"].items():
                values = torch.tensor(values)
                axes.errorbar(float(target), values.mean(), values.std(), fmt="o", color=f"C{i}", capsize=3)
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="black", linewidth=1, label="what was asked for")
        axes.set(title=name, xlabel="asked for (not trained on)", ylabel="sampled: mean, sd (a colour a seed)")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)

# of the studies of cells

def between(low, high):
    return f"{low:+.3f} to {high:+.3f}" if math.isfinite(low + high) else ""

ENDS = ("reached the last epoch", "their last two epochs' gain", "failed")

def counted(networks):
    """How many of train_all's networks were stopped by the limit of epochs, the mean gain of the last two epochs of
    these, empty if there are none or had no others, and how many failed."""
    count = lambda what: f"{sum(n[what] for n in networks)} of {len(networks)}"
    late = [n["late"] for n in networks if n["capped"]]
    return count("capped"), f"{sum(late) / len(late):.4f}" if late and None not in late else "", count("failed")

def table_ends(metrics):
    """The same as a table; nothing for a record from before it was kept."""
    if "ends" not in metrics:
        return []
    return [table(("networks", *ENDS), [(len(metrics["ends"]), *counted(metrics["ends"]))])]

def units_of(entries):
    """What is compared: the mean test loss of the cells of each search, as they stem from one controller; of networks
    that stem from none, each one's."""
    by = {}
    for entry in entries:
        by.setdefault(entry.get("search", len(by)), []).append(entry["test"])
    return [sum(by[search]) / len(by[search]) for search in sorted(by)]

def within_searches(entries, measure):
    """A measure of each search's entries."""
    return [measure([e for e in entries if e["search"] == search]) for search in sorted({e["search"] for e in entries})]

def table_compare(records):
    """The groups; each of them against the trained controller's, searches being the units: all cells of a search, and
    the one that is best on validation; and, within the searches, shared against standalone losses, means over those in
    which both vary. What is detectable is so by the t-test; none where so few units can't be significant anyway."""
    groups = records[0]["metrics"]["groups"]
    best_of = lambda group: within_searches(groups[group], lambda some: min(some, key=lambda e: e["valid"])["test"])
    base, *others = groups
    about = [(group, len(x), mean_of(units_of(x)), f"{stdev(e['test'] for e in x):.3f}",
              f"{min(e['test'] for e in x):.3f}", *counted(x)) for group, x in groups.items()]
    tests, rows, ranked = len(others), [], []
    for other in others:
        a, b, best = units_of(groups[base]), units_of(groups[other]), ""
        if paired := "search" in groups[other][0]:
            apart = [y - x for x, y in zip(a, b)]
            (mean, half, _, least), least_p = t_test(apart, tests), 2 / 2 ** len(apart)
            interval, p = bootstrap(lambda x: x.mean().item(), apart), sign_flips(apart)
            best = mean_of([y - x for x, y in zip(best_of(base), best_of(other))], "+.3f")
        else:
            (mean, half, _, least), least_p = welch(a, b, tests), 2 / math.comb(2 * len(a), len(a))  # as many of b
            interval, p = bootstrap(lambda x, y: (y.mean() - x.mean()).item(), a, b), permutation_test(a, b)
        less, rank_p = mann_whitney(a, b)
        rows.append((other, plus_minus(mean, half, "+.3f"), between(*interval), show_p(min(1, tests * p)), less,
                     show_p(min(1, tests * rank_p)), f"{least:.3f}" if tests * least_p <= .05 else "none", best))
    for group in (*(g for g in groups if "shared" in groups[g][0]), "all three"):
        entries = [e for g in groups for e in groups[g] if group in (g, "all three") and "shared" in e]
        order = lambda measure: [x for x in within_searches(entries, lambda some: measure(*zip(*(
            (e["shared"], e["test"]) for e in some)))) if not math.isnan(x)]
        ranked.append((group, len(entries), *(mean_of(order(measure)) for measure in (kendall, spearman))))
    return "\n\n".join((
        table(("networks of", "number", "test loss", "sd of networks", "lowest", *ENDS), about),
        table((f"minus {base}", "difference", "bootstrap, 95 %", "p, permutation", f"P({base}'s mean lower)",
               "unpaired p, Mann-Whitney", "detectable", "best of each search"), rows),
        table(("shared against standalone loss", "cells", "Kendall's tau", "Spearman's rho"), ranked)))

def draw_compare(path, record):
    """Densities of the test loss, and the loss under the shared weights against it; without networks that failed."""
    figure, (left, right) = panels(2, 5.4)
    fine = {}
    for group, entries in record["metrics"]["groups"].items():
        failed = sum(e["failed"] for e in entries)
        if failed < len(entries):
            fine[f"{group}, {failed} failed" if failed else group] = [e for e in entries if not e["failed"]]
    draw_densities(left, {group: [e["test"] for e in entries] for group, entries in fine.items()})
    left.set(xlabel="test loss of a network trained from scratch, nats", title="who makes the better cells?")
    draw_points(right, {group: ([e["shared"] for e in entries], [e["test"] for e in entries])
                        for group, entries in fine.items() if "shared" in entries[0]},
                xlabel="validation loss under the shared weights, nats", ylabel="test loss from scratch, nats",
                title="does the search's signal mean anything?")
    figure.savefig(path, dpi=100)

def changes(record):
    """{cell: {kind of change: its differences to the mean of the cell itself, (shared, from scratch)}}."""
    found = {}
    for name, kinds in record["metrics"]["cells"].items():
        shared, scratch = (sum(x) / len(x) for x in zip(*kinds["itself"]["scratch"]))
        found[name] = {kind: [(x - shared, y - scratch) for x, y in two["scratch"]] for kind, two in kinds.items()}
    return found

def table_ablate(records):
    """Mean change of the test loss, more is worse, by cell and kind of change, and how alike both scores order them."""
    rows, ranked, cells = [], [], records[0]["metrics"]["cells"]
    tests = sum(len(kinds) - 1 for kinds in cells.values())
    for name, kinds in cells.items():
        own = kinds["itself"]
        for kind, two in list(kinds.items())[1:]:
            shared = [x - own["shared"][0] for x in two["shared"]]
            mean, half, p, least = welch(*([y for _, y in x["scratch"]] for x in (own, two)), tests)
            rows.append((name, kind, len(shared), f"{sum(shared) / len(shared):+.3f}", f"{max(shared):+.3f}",
                         len(two["scratch"]), plus_minus(mean, half, "+.3f"), show_p(p), show(least)))
        pairs = [pair for kind, several in changes(records[0])[name].items() if kind != "itself" for pair in several]
        interval = bootstrap(lambda at: kendall(*zip(*(pairs[int(i)] for i in at))), range(len(pairs)), draws=500)
        itself = [y for _, y in own["scratch"]]
        ranked.append((name, f"{sum(itself) / len(itself):.3f}", f"{stdev(itself):.3f}", len(pairs),
                       f"{kendall(*zip(*pairs)):.2f} ({between(*interval)})" if math.isfinite(sum(interval)) else ""))
    return "\n\n".join((
        table(("cell", "changed", "ways", "shared: mean", "worst", "retrained", "from scratch: mean", "p, corrected",
               "detectable"), rows),
        table(("cell", "its own loss, 5 seeds", "their sd", "changes", "shared against scratch, Kendall's tau (95 %)"),
              ranked), *table_ends(records[0]["metrics"])))

def draw_ablate(path, record):
    """A panel for each cell: the change from scratch against that under the shared weights."""
    found = changes(record)
    figure, grid = panels(len(found))
    for axes, (name, kinds) in zip(grid, found.items()):
        draw_points(axes, {kind: tuple(zip(*pairs)) for kind, pairs in kinds.items()}, title=name,
                    xlabel="change under the shared weights, nats", ylabel="change from scratch, nats")
        axes.axhline(0, color="black", linewidth=.5)
        axes.axvline(0, color="black", linewidth=.5)
    for axes in grid[:-1]:
        axes.get_legend().remove()
    figure.savefig(path, dpi=100)

SOURCES = ("connections", "activations", "their interaction", "the rest")

def shares_of(found, without=()):
    """[(an effect's share of the variance, its 95 % interval)] in SOURCES' order, without some of the connections."""
    losses = [row for a, row in zip(found["connections"], found["losses"]) if a not in without]
    return list(zip(effect_shares(losses), shares_interval(losses)))

def table_factors(records):
    """Mean test loss of each combination, and each factor's share of the variance, with the chains and without."""
    found = records[0]["metrics"]
    means = [(a, *(f"{sum(x) / len(x):.3f}" for x in row)) for a, row in zip(found["connections"], found["losses"])]
    shares = zip(SOURCES, shares_of(found), shares_of(found, without=("chain",)))
    return "\n\n".join((
        table(("test loss", *found["activations"]), means),
        table(("share of the variance", "estimate", "95 %", "without chains", "95 %"),
              [(name, share, between(*interval), other, between(*its_own))
               for name, (share, interval), (other, its_own) in shares]), *table_ends(found)))

def draw_factors(path, record):
    """The means as a picture, and the shares with their intervals."""
    found = record["metrics"]
    figure, (left, right) = panels(2, 5.4)
    means = torch.tensor(found["losses"]).mean(2)
    middle = (means.min() + means.max()) / 2
    image = left.imshow(means.tolist(), cmap="viridis_r", aspect="auto")
    for i, row in enumerate(means.tolist()):
        for j, x in enumerate(row):
            left.text(j, i, f"{x:.2f}", ha="center", va="center", color="white" if x > middle else "black")
    left.set(xticks=range(len(found["activations"])), yticks=range(len(found["connections"])), xlabel="activations",
             ylabel="connections", title="mean test loss, nats")
    left.set_xticklabels(found["activations"], rotation=30)
    left.set_yticklabels(found["connections"])
    figure.colorbar(image, ax=left)
    for i, (label, without) in enumerate((("all", ()), ("without chains", ("chain",)))):
        for y, (share, (low, high)) in enumerate(shares_of(found, without)):
            right.errorbar(share, y + .2 * i, xerr=[[max(0, share - low)], [max(0, high - share)]], fmt="o", capsize=4,
                           color=f"C{i}", label=label if not y else None)
    right.legend()
    right.set(yticks=range(4), yticklabels=SOURCES, xlabel="share of the variance, 95 %", title="what matters?")
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=1)
    figure.savefig(path, dpi=100)

def table_capacity(records):
    """What each kind of cell reaches on the slice, and its gap to validation; both against the same cells as they are;
    and what goes with either."""
    cells, about, rows, ranked = records[0]["metrics"]["cells"], [], [], []
    measures = {"slice": lambda e: e["train"], "gap": lambda e: e["valid"] - e["train"]}
    tests = len(measures) * (len(cells) - 1)
    for kind, entries in cells.items():
        about.append((kind, len(entries), *(mean_of(list(map(f, entries))) for f in measures.values()),
                      *counted(entries)))
        apart = [compared([f(e) - f(m) for e, m in zip(entries, cells["mixed"])], tests) for f in measures.values()]
        rows += [(kind, *apart[0], *apart[1])] if kind != "mixed" else []
    for name, kinds in (("paths", ("mixed",)), ("depth", ("mixed",)), ("parameters", ("mixed", "narrow"))):
        ranked.append([name, len(kinds) * len(cells["mixed"])])
        for f in measures.values():
            def rho(at):  # of cells drawn anew, with all of their kinds
                chosen = [cells[kind][int(i)] for i in at for kind in kinds]
                return spearman([float(e[name]) for e in chosen], [f(e) for e in chosen])
            everyone = range(len(cells["mixed"]))
            ranked[-1].append(f"{rho(everyone):.2f} ({between(*bootstrap(rho, everyone, draws=500))})")
    return "\n\n".join((
        table(("activations", "cells", "loss on the slice", "gap to validation", *ENDS), about),
        table(("minus mixed", "loss on the slice", "p, corrected", "detectable",
               "gap to validation", "p, corrected", "detectable"), rows),
        table(("Spearman's rho (95 %)", "networks", "with the loss on the slice", "with the gap"), ranked)))

def draw_capacity(path, record):
    """The loss on the slice and the gap, by kind, and against depth and paths."""
    cells = record["metrics"]["cells"]
    figure, grid = panels(3)
    draw_points(grid[0], {kind: ([e["train"] for e in x], [e["valid"] - e["train"] for e in x])
                          for kind, x in cells.items()}, xlabel="loss on the slice, nats",
                ylabel="validation loss minus that, nats", title="learnt by heart")
    for axes, name in zip(grid[1:], ("depth", "paths")):
        draw_points(axes, {kind: ([e[name] for e in cells[kind]], [e["train"] for e in cells[kind]])
                           for kind in ("mixed", "narrow")}, xlabel=name, ylabel="loss on the slice, nats",
                    title=f"against {name}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)

def table_robust(records):
    """Mean test loss of each group at each strength; and how much more than the plain cells it loses by it, 95 %, not
    corrected: of the cells paired by the search's seed, of the LSTMs not."""
    found, rows = records[0]["metrics"], []
    for kind, lines in found["losses"].items():
        for i, strength in enumerate(found["strengths"][kind]):
            plain = [x - y for x, y in zip(lines["plain"][i], lines["plain"][0])]
            rows.append([f"{kind}, {strength}"])
            for name, values in lines.items():
                rows[-1].append(mean_of(values[i]))
                if i and name != "plain":
                    lost = [x - y for x, y in zip(values[i], values[0])]
                    more = t_test([x - y for x, y in zip(lost, plain)]) if name != "LSTM" else welch(plain, lost)
                    rows[-1][-1] += f" (lost {plus_minus(*more[:2], '+.3f')} more)"
    made = table(("perturbation", *(f"found by {name}" if name != "LSTM" else name for name in lines)), rows)
    return "\n\n".join((made, *table_ends(found)))

def draw_robust(path, record):
    """Test loss against the strength, a panel for each perturbation."""
    found = record["metrics"]
    figure, grid = panels(len(found["losses"]), 5)
    for axes, (kind, lines) in zip(grid, found["losses"].items()):
        draw_bands(axes, {f"objective: {name}" if name != "LSTM" else name: x for name, x in lines.items()},
                   found["strengths"][kind], xlabel=f"strength: {kind}", ylabel="test loss, nats", title=kind)
    figure.savefig(path, dpi=100)

def hidden_measures(record):
    """{measure: {controller: a value for each seed}}."""
    mean, found = lambda x: sum(x) / len(x), {}
    for name, seeds in record["metrics"]["controllers"].items():
        for seed in seeds:
            distance, (far, edits, losses) = seed["distances"], seed["pairs"]
            measures = {"distance of a state to their mean / norm": seed["norms"][0] / seed["norms"][1]}
            measures |= {f"distance after {kind} / of random pairs": mean(distance[kind]) / mean(distance["random"])
                        for kind in ("a connection", "an activation")}
            measures.update({f"rho of distance after {kind} and its node's number": spearman(distance[kind], nodes)
                             for kind, nodes in seed["edited"].items()})
            measures["rho of distance and decisions that differ"] = spearman(far, edits)
            measures["rho of distance and difference in loss"] = spearman(far, losses)
            measures.update({f"R2 of a probe for {of}": r2 for of, r2 in seed["probes"].items()})
            for of, ways in seed["pushed"].items():  # the strongest pushes both ways
                along, anywhere = ([x[-1] - x[0] for x in ways[way]] for way in ("along the probe", "at random"))
                measures[f"{of}, pushed along the probe: change"] = mean(along)
                measures[f"{of}, pushed along the probe: its size"] = mean(list(map(abs, along)))
                measures[f"{of}, pushed at random: its size"] = mean(list(map(abs, anywhere)))
            for measure, value in measures.items():
                found.setdefault(measure, {}).setdefault(name, []).append(value)
    return found

def table_hidden(records):
    """What the hidden state knows, means over the seeds."""
    found = hidden_measures(records[0])
    names = list(next(iter(found.values())))
    return table(("of the final hidden state", *names),
                 [(measure, *(mean_of(values[name]) for name in names)) for measure, values in found.items()])

PUSHED = "nodes with tanh"  # what the figure shows

def draw_hidden(path, record):
    """The first seed's states in the plane of their principal components, coloured by loss; and all seeds' pushes."""
    controllers = record["metrics"]["controllers"]
    figure, grid = panels(len(controllers) + 1)
    for axes, (name, seeds) in zip(grid, controllers.items()):
        x, y, losses = seeds[0]["plane"]
        points = axes.scatter(x, y, c=losses, s=10, cmap="viridis_r", vmax=sorted(losses)[int(.95 * len(losses))])
        axes.set(title=f"{name} controller", xlabel="first component", ylabel="second component")
        axes.locator_params(nbins=4)
        figure.colorbar(points, ax=axes, label="loss under the shared weights, nats")
    for i, way in enumerate(("at random", "along the probe")):
        for j, line in enumerate(line for seed in controllers["trained"] for line in seed["pushed"][PUSHED][way]):
            grid[-1].plot(STRENGTHS, [y - line[len(line) // 2] for y in line], color=("#bbbbbb", "C0")[i], marker=".",
                          linewidth=1 + i, label="" if j else way)
    grid[-1].set(title="the trained one's state, pushed", xlabel="strength, in the states' mean norm",
                 ylabel=f"change of {PUSHED}, mean of 200")
    grid[-1].legend(fontsize=8)
    figure.savefig(path, dpi=100)

def table_progress(records):
    """The best cell's perplexity before each round, and how sure the policy is: its decisions' mean largest share."""
    rounds = records[0]["metrics"]["rounds"]
    sure = [sum(map(max, r["shares"].values())) / len(r["shares"]) for r in rounds]
    return table(("round", "best of the sample", "mean largest probability"),
                 [(i, r["best"][-1], x) for i, (r, x) in enumerate(zip(rounds, sure))])

def draw_progress(path, record):
    """The probabilities of every decision against the round; and beside it, as a GIF, the best cell of each round."""
    from matplotlib.animation import PillowWriter
    rounds = record["metrics"]["rounds"]
    kinds = {kind: [name for name in rounds[0]["shares"] if kind in name] for kind in ("activation", "predecessor")}
    figure, grid = panels(2, 5.4, 4.2)
    for axes, (kind, names) in zip(grid, kinds.items()):
        choices = [(name, j) for name in names for j in range(len(rounds[0]["shares"][name]))]
        lines = [[r["shares"][name][j] for r in rounds] for name, j in choices]
        labels = [f"{name.split()[-1]}: {list(ACTIVATIONS)[j] if kind == 'activation' else j}" for name, j in choices]
        image = axes.imshow(lines, aspect="auto", vmin=0, vmax=1, cmap="Blues")
        axes.set(title=f"{kind}s", xlabel="round", ylabel="node: its choice", yticks=range(len(labels)))
        axes.set_yticklabels(labels, fontsize=6)
    figure.colorbar(image, ax=grid[-1], label="probability")
    figure.savefig(path, dpi=100)
    movie, (axes, bars) = panels(2, 4.6, 4.6)
    with (writer := PillowWriter(fps=1)).saving(movie, str(path.with_suffix(".gif")), dpi=70):
        for i, r in enumerate(rounds):
            axes.clear(), bars.clear()
            draw_cell(decode(torch.tensor(r["best"][:-1])), f"before round {i}: perplexity {r['best'][-1]:.2f}", axes)
            shares = torch.tensor([r["shares"][name] for name in kinds["activation"]])
            for j, act in enumerate(ACTIVATIONS):
                before = shares[:, :j].sum(1).tolist()
                bars.barh(range(len(shares)), shares[:, j].tolist(), left=before, label=act, color=COLOURS[act])
            bars.set(xlim=(0, 1), xlabel="probability of an activation", yticks=range(len(shares)), ylabel="node")
            bars.invert_yaxis()
            bars.legend(fontsize=8, loc="upper center", bbox_to_anchor=(.5, 1.12), ncol=4)
            writer.grab_frame()

TABLES = {"train": table_train, "search": table_search, "bench": table_bench, **dict.fromkeys(ABOUT, table_arms),
          "state": table_state, "conditional": table_conditional, "similarity": table_similarity, "cost": table_cost,
          "compare": table_compare, "ablate": table_ablate, "factors": table_factors, "capacity": table_capacity,
          "robust": table_robust, "hidden": table_hidden, "progress": table_progress}

# study -> (path, record): a figure, drawn for each corpus
FIGURES = {"conditional": draw_conditional, "compare": draw_compare, "ablate": draw_ablate, "factors": draw_factors,
           "capacity": draw_capacity, "robust": draw_robust, "hidden": draw_hidden, "progress": draw_progress}

def summary(record):
    """What a finished study prints."""
    metrics = record["metrics"]
    lines = [TABLES[record["study"]]([record])]
    if "found" in metrics:
        made = table_train([{**record, "metrics": metrics[name]} for name in ("found", "lstm")])
        lines.append(f"trained from scratch:\n{made}")
        metrics = metrics["found"]
    if "floor_perplexity" in metrics:
        split = "test" if "networks" in metrics else "validation"
        lines.append(f"the best possible {split} perplexity, under the true grammar: {metrics['floor_perplexity']:.2f}")
    return "\n\n".join(lines)

def label(record):
    """The corpus, or the constructed task, of a record."""
    task = record["config"].get("task", "none")
    return record["config"]["data"] if task == "none" else task

def report(folder="results", readme="README.md"):
    """Make every table and figure again from the committed records; tables go between their marks in the README."""
    records = [{**read_json(path), "folder": path.parent} for path in sorted(Path(folder).glob("*/result.json"))]
    if not records:
        raise UserError(f"no records in {folder}/")
    group = lambda *wanted: [r for r in records if (r["study"], label(r))[:len(wanted)] == wanted]
    text = Path(readme).read_text() if Path(readme).is_file() else ""
    for study, on in sorted({(r["study"], label(r)) for r in records}):
        made = TABLES[study](group(study, on))
        print(f"{study} {on}\n{made}\n")
        marks = rf"(<!-- {study} {re.escape(on)} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
    if text:
        Path(readme).write_text(text)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    train, reward, entropy = figure.subplots(1, 3)
    draw_curves(group("train", "ptb"), train, "valid_perplexity", 1000)
    cut(train, 220)
    train.set(xlabel="thousand steps of SGD", title="training from scratch")
    draw_curves(group("search", "ptb"), reward, "reward")
    reward.set(xlabel="step of the search", title="reward, 80 / perplexity")
    draw_curves(group("search", "ptb"), entropy, "entropy")
    entropy.set(xlabel="step of the search", title="the policy's entropy, nats")
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    for study in sorted({r["study"] for r in records} & {*ABOUT, "similarity"}):
        shown = []
        for record in group(study):
            if study == "similarity":
                shown += [(title, "cosine with the " + ("real change" if "change" in title else "gradient at t + 1"), x)
                          for title, x in cosines(record).items()]
            else:
                loss = f"minus that of '{next(iter(record['metrics']['arms']))}', nats"
                shown += [(f"{label(record)}: {OUTCOMES[outcome]}", loss, differences(record, outcome))
                           for outcome in ABOUT[study] if outcome in LOSSES and differences(record, outcome)]
            if study == "state":
                shown += [(f"{label(record)}: the reward, {title.split(',')[0]}", title, x)
                          for title, x in reward_errors(record).items()]
        if shown:
            draw_intervals(Path(folder) / f"{study}.png", shown)
    first = {(r["study"], label(r)): r for r in reversed(records) if r["study"] in FIGURES}
    for (study, on), record in first.items():
        FIGURES[study](Path(folder) / (f"{study}.png" if on == "toy" else f"{study}-{Path(on).name}.png"), record)
    for record in group("search"):
        cell = cell_from_json(record["metrics"]["best_cell"])
        draw_cell(cell, "the cell found").figure.savefig(record["folder"] / "cell.png", dpi=110)
