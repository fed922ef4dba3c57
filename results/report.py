"""Statistics, tables and figures of the records: what `python menas.py report` makes, and what a finished study prints.

menas.py writes a record for every run, RUN/result.json; here they are only read. Each table of the README stands
between two comments, and each figure beside the records, so all of them are made again by that one command.
"""
import json
import math
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure

from menas import INPUT, ROW, UserError, cell_from_json, leaves, read_json, slots_read
from results.stats import t_test
from results.studies import OUTCOMES, depths

PUBLISHED = {"enas": "- / 56.3 (first: 55.8)", "darts_v1": "60.2 / 57.6", "darts_v2": "58.1 / 55.7",
             "enas_lm": "- / 57.3"}

def table(headers, rows):
    """A Markdown table whose columns are also aligned as plain text; floats to two decimals."""
    show = lambda x: f"{x:.2f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
    headers, text = list(map(str, headers)), [list(map(show, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *text)]
    lines = [headers, ["-" * width for width in widths], *text]
    return "\n".join("| " + " | ".join(x.ljust(width) for x, width in zip(line, widths)) + " |" for line in lines)

def short(name):
    """A cell's name; of a JSON file the run that it came from; a row of integers is what a search found."""
    if re.fullmatch(ROW, name):
        return "the cell found"
    return f"{Path(name).stem} of {Path(name).parent.name}" if name.endswith(".json") else name

def table_train(records):
    """Networks trained from scratch, best first, beside the valid / test published for the cell at 800-850 units."""
    networks = sorted((n for r in records for n in r["metrics"]["networks"]), key=lambda n: n["test_perplexity"])
    return table(("cell", "seed", "recurrent weights", "epochs", "train", "valid", "test", "published"),
                 [(short(n["cell"]), n["seed"], n["recurrent_parameters"], n["epochs"], n["train_perplexity"],
                   n["valid_perplexity"], n["test_perplexity"], PUBLISHED.get(n["cell"], "")) for n in networks])

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

def table_arms(records):
    """Means over the seeds, and paired differences to the first arm: of losses, less is better. p is corrected for the
    arms of an outcome, not for the outcomes."""
    rows, show = [], lambda x, sign="": f"{x:{sign}.3f}" if abs(x) < 1000 else f"{x:{sign},.0f}"
    for record, outcome in ((r, o) for r in records for o in ABOUT[r["study"]]):
        found = differences(record, outcome)
        for i, arm in enumerate(found):
            values, (mean, half, p, least) = record["metrics"]["arms"][arm][outcome], t_test(found[arm], len(found) - 1)
            compared = i and len(values) > 1
            shown = (f"{show(mean, '+')} +- {show(half)}", f"{p:.3f}", show(least)) if compared else ("", "", "")
            rows.append((OUTCOMES[outcome], arm, show(sum(values) / len(values)), *shown, len(values)))
    arms = "lookahead, response" if records[0]["study"] == "extra" else "arm"
    return table(("outcome", arms, "mean", "difference", "p, corrected", "detectable", "seeds"), rows)

def reward_errors(record):
    """{measure: {policy: a value for each seed}} of the reward under each policy for the hidden state."""
    seeds = record["metrics"]["reward"]
    return {title: {policy: [seed[policy][i] for seed in seeds] for policy in seeds[0]}
            for i, title in enumerate(("bias, nats", "Kendall's tau"))}

def table_state(records):
    """The reward's error, the searches, the context that is used, and the sentences' lengths."""
    record, mean = records[0], lambda values: "{:.3f} +- {:.3f}".format(*t_test(values)[:2])
    errors, context = reward_errors(record), record["metrics"]["context"]
    lengths = record["metrics"]["sentence_lengths"]
    return "\n\n".join((
        table(("state", *errors, "tau minus carry's"),
              [(name, *(mean(found[name]) for found in errors.values()),
                mean([x - y for x, y in zip(errors["Kendall's tau"][name], errors["Kendall's tau"]["carry"])])
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
        measures = zip(*map(followed, seeds))
        rows.append((name, *("{:.2f} +- {:.2f}".format(*t_test(list(values))[:2]) for values in measures), len(seeds)))
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
            mean, half, *_ = t_test([x - y for x, y in zip(found[name], found["none, none"])])
            rows[-1] += [f"{t_test(found[name])[0]:.3f}", f"{mean:+.3f} +- {half:.3f}" if name != "none, none" else ""]
    return table(("gradient at t", *(x for title in cosines(records[0]) for x in (title, "difference"))), rows)

def table_cost(records):
    """Cost and noise of a controller step's gradient, divided by the plain one's."""
    return table(("lookahead, response", "fold", "ms", "cost", "variance", "typical"),
                 [(", ".join(x["arm"][:2]), x["arm"][2], f"{x['ms']:.1f}", x["seconds"], f"{x['variance']:.3g}",
                   x["typical"])
                  for r in records for x in r["metrics"]["ratios"]])

TABLES = {"train": table_train, "search": table_search, "bench": table_bench, **dict.fromkeys(ABOUT, table_arms),
          "state": table_state, "conditional": table_conditional, "similarity": table_similarity, "cost": table_cost}

def summary(record):
    """What a finished study prints."""
    metrics = record["metrics"]
    lines = [TABLES[record["study"]]([record])]
    if "found" in metrics:
        made = table_train([{"metrics": metrics[name]} for name in ("found", "lstm")])
        lines.append(f"trained from scratch:\n{made}")
        metrics = metrics["found"]
    if "floor_perplexity" in metrics:
        split = "test" if "networks" in metrics else "validation"
        lines.append(f"the best possible {split} perplexity, under the true grammar: {metrics['floor_perplexity']:.2f}")
    return "\n\n".join(lines)

def draw_cell(cell, title="", axes=None):
    """The cell as a picture, input at the bottom, h_t at the top, the second predecessors' arrows dashed; returns
    matplotlib's axes."""
    depth = depths(cell)
    top = max(depth.values()) + 1
    rows = [[slot for slot, d in depth.items() if d == row and (slot is not None or cell.memory)] for row in range(top)]
    width = max(map(len, rows))
    place = {slot: (j - (len(row) - 1) / 2, y) for y, row in enumerate(rows) for j, slot in enumerate(row)}
    axes = axes or Figure(figsize=(max(4, 1.25 * width), 0.8 * top + 1), layout="constrained").subplots()
    colours = {"tanh": "#7fb3d5", "relu": "#f5b041", "identity": "#d5d8dc", "sigmoid": "#82e0aa"}

    box = lambda x, y, text, colour="white": axes.text(
        x, y, text, ha="center", va="center", fontsize=11, zorder=3,
        bbox=dict(boxstyle="round,pad=0.35", edgecolor="#333333", facecolor=colour))
    arrow = lambda x, y, x_end, y_end, **style: axes.annotate(  # from the top of one box to the bottom of another
        "", (x_end, y_end - 0.22), (x, y + 0.22), zorder=1,
        arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "color": "#333333", **style})
    box(*place[INPUT], "$x_t,\\ h_{t-1}$")
    if cell.memory:
        box(*place[None], "$m_{t-1}$")
    for i, node in enumerate(cell.nodes):
        for slot, style in zip(slots_read(node), ({}, {"linestyle": "--"})):
            arrow(*place[slot], *place[i + 1], **style)
        text = {"highway": node.activation, "sum": "+"}.get(node.operation, f"{node.operation} {node.activation}")
        carried = ", $m_t$" if i + 1 == cell.memory else ""
        box(*place[i + 1], f"{i}: {text}{carried}", colours[node.activation] if node.operation != "sum" else "white")
    for i in leaves(cell):
        arrow(*place[i + 1], 0, top, color="#aaaaaa", linestyle=":")
    box(0, top, "$h_t$ = mean")
    axes.set(xlim=(-width / 2, width / 2), ylim=(-0.5, top + 0.5), title=title)
    axes.axis("off")
    return axes

def draw_curves(records, axes, y, scale=1):
    """Metric y of metrics.jsonl against the step, a line per run."""
    for record in records:
        lines = map(json.loads, (record["folder"] / "metrics.jsonl").read_text().splitlines())
        first = lambda value: value[0] if isinstance(value, list) else value  # of several networks
        points = [(line["step"] / scale, first(line[y])) for line in lines if y in line]
        if points:
            axes.plot(*zip(*points), label=record["folder"].name, marker=".", linewidth=1)
            axes.legend(fontsize=8)
    axes.set(ylabel=y.replace("_", " "))

def draw_intervals(path, panels):
    """Panels (title, x label, {name: its values, one for each seed}): the values, their means and 95 % intervals."""
    wide = 2 if len(panels) == 4 else min(3, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(4 * wide + 1.5, 3.4 * high), layout="constrained")
    grid = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for axes in grid[len(panels):]:
        axes.axis("off")
    for axes, (title, xlabel, found) in zip(grid, panels):
        for y, values in enumerate(found.values()):
            mean, half = t_test(values)[:2]
            axes.plot(values, [y] * len(values), ".", color="#999999", label="" if y else "a seed")
            axes.errorbar(mean, y, xerr=half, fmt="o", color="tab:blue", capsize=4, label="" if y else "mean, 95 %")
        axes.set(yticks=range(len(found)), yticklabels=list(found), title=title, xlabel=xlabel)
        axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()  # of all, as they share it
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)

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
        axes.set(title=name, xlabel="asked for (not trained on)", ylabel="sampled: mean, sd")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)

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
        between = rf"(<!-- {study} {on} -->\n).*?(<!-- end -->)"
        text = re.sub(between, lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
    if text:
        Path(readme).write_text(text)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    train, reward, entropy = figure.subplots(1, 3)
    draw_curves(group("train", "ptb"), train, "valid_perplexity", 1000)
    train.set(ylim=(None, 220), xlabel="thousand steps of SGD", title="training from scratch")
    draw_curves(group("search", "ptb"), reward, "reward")
    reward.set(xlabel="step of the search", title="reward, 80 / perplexity")
    draw_curves(group("search", "ptb"), entropy, "entropy")
    entropy.set(xlabel="step of the search", title="the policy's entropy, nats")
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    for study in sorted({r["study"] for r in records} & {*ABOUT, "similarity"}):
        panels = []
        for record in group(study):
            if study == "similarity":
                panels += [(title, "cosine with the gradient at t + 1", x) for title, x in cosines(record).items()]
            else:
                loss = f"minus that of '{next(iter(record['metrics']['arms']))}', nats"
                panels += [(f"{label(record)}: {OUTCOMES[outcome]}", loss, differences(record, outcome))
                           for outcome in ABOUT[study] if outcome in LOSSES and differences(record, outcome)]
            if study == "state":
                panels += [(f"{label(record)}: the reward", title, x) for title, x in reward_errors(record).items()]
        if panels:
            draw_intervals(Path(folder) / f"{study}.png", panels)
    for record in group("conditional")[:1]:
        draw_conditional(Path(folder) / "conditional.png", record)
    for record in group("search"):
        cell = cell_from_json(record["metrics"]["best_cell"])
        draw_cell(cell, "the cell found").figure.savefig(record["folder"] / "cell.png", dpi=110)
