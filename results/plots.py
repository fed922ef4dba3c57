"""The plotters that the studies share: a table, a cell, curves, intervals, densities, points."""
import json
import math

import torch
from matplotlib.figure import Figure

from menas import INPUT, leaves, slots_read
from results.stats import t_test
from results.studies import depths

COLOURS = {"tanh": "#7fb3d5", "relu": "#f5b041", "identity": "#d5d8dc", "sigmoid": "#82e0aa"}

def table(headers, rows):
    """A Markdown table whose columns are also aligned as plain text; floats to two decimals."""
    show = lambda x: f"{x:.2f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
    headers, text = list(map(str, headers)), [list(map(show, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *text)]
    lines = [headers, ["-" * width for width in widths], *text]
    return "\n".join("| " + " | ".join(x.ljust(width) for x, width in zip(line, widths)) + " |" for line in lines)

def draw_cell(cell, title="", axes=None):
    """The cell as a picture, input at the bottom, h_t at the top, the second predecessors' arrows dashed; returns
    matplotlib's axes."""
    depth = depths(cell)
    top = max(depth.values()) + 1
    rows = [[slot for slot, d in depth.items() if d == row and (slot is not None or cell.memory)] for row in range(top)]
    width = max(map(len, rows))
    place = {slot: (j - (len(row) - 1) / 2, y) for y, row in enumerate(rows) for j, slot in enumerate(row)}
    axes = axes or Figure(figsize=(max(4, 1.25 * width), 0.8 * top + 1), layout="constrained").subplots()
    room = axes.figure.get_figwidth() / len(axes.figure.axes)  # inches
    box = lambda x, y, text, colour="white": axes.text(
        x, y, text, ha="center", va="center", fontsize=min(11, 8.8 * room / width), zorder=3,
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
        box(*place[i + 1], f"{i}: {text}{carried}", COLOURS[node.activation] if node.operation != "sum" else "white")
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
            style = ("-", "--", ":")[len(axes.lines) // 10 % 3]  # for after ten lines the colours come again
            axes.plot(*zip(*points), style, label=record["folder"].name, marker=".", linewidth=1)
            axes.legend(fontsize=8)
    axes.set(ylabel=y.replace("_", " "))

def cut(axes, top):
    """The y axis up to there, from the least value; the legend says which lines are above it."""
    lows = {line: min(line.get_ydata()) for line in axes.lines}
    if lows:
        for line in (line for line, low in lows.items() if low > top):
            line.set_label(f"{line.get_label()}: above")
        axes.set(ylim=(.95 * min(lows.values()), top))
        axes.legend(fontsize=8)

def draw_intervals(path, panels):
    """Panels (title, x label, {name: its values, one for each seed}): the values, their means and 95 % intervals. A row
    has one name, which some of the panels may lack; 0 is marked where it is near."""
    fullest_first = sorted(panels, key=lambda panel: -len(panel[2]))
    names = list(dict.fromkeys(name for _, _, found in fullest_first for name in found))
    wide = 2 if len(panels) == 4 else min(3, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(4 * wide + 1.5, 3.4 * high), layout="constrained")
    grid = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for axes in grid[len(panels):]:
        axes.axis("off")
    for axes, (title, xlabel, found) in zip(grid, panels):
        for name, values in found.items():
            y, (mean, half, *_) = names.index(name), t_test(values)
            axes.plot(values, [y] * len(values), ".", color="#999999", label="" if y else "a seed")
            axes.errorbar(mean, y, xerr=half, fmt="o", color="tab:blue", capsize=4, label="" if y else "mean, 95 %")
        axes.set(yticks=range(len(names)), yticklabels=names, title=title, xlabel=xlabel)
        low, high = (end(x for values in found.values() for x in values) for end in (min, max))
        if low <= high - low:
            axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()  # of all, as they share it
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)

def panels(count, width=4.4, height=3.6):
    """A Figure and its axes, in a row."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]

def draw_densities(axes, groups):
    """Groups, name -> values: Gaussian kernel density estimates with Scott's bandwidth, and the values as a rug,
    those beyond the axis as triangles at its end."""
    everything = torch.tensor([x for values in groups.values() for x in values])
    low, high = everything.quantile(torch.tensor([0.0, .98])).tolist()
    at = torch.linspace(low - .1 * (high - low), high + .1 * (high - low), 400)
    for i, (name, values) in enumerate(groups.items()):
        values = torch.tensor(values)
        width = (values.std(correction=min(1, len(values) - 1)) * len(values) ** -.2).clamp(min=(high - low) / 200)
        density = torch.exp(-((at[:, None] - values) / width) ** 2 / 2).mean(1) / width / math.sqrt(2 * math.pi)
        axes.plot(at.tolist(), density.tolist(), color=f"C{i}", label=f"{name} ({len(values)})")
        inside = values <= at[-1]
        for marker, x in (("|", values[inside]), (">", values[~inside].clamp(max=at[-8]))):
            axes.plot(x.tolist(), [.02 + .022 * i] * len(x), marker, color=f"C{i}", markersize=5,
                      transform=axes.get_xaxis_transform())  # heights as shares of the panel's
    axes.set(ylabel="density", xlim=(at[0].item(), at[-1].item()))
    axes.legend(fontsize=8)

def draw_points(axes, groups, **labels):
    """Groups, name -> (x values, y values): a colour each."""
    for i, (name, (x, y)) in enumerate(groups.items()):
        axes.plot(x, y, ".", color=f"C{i}", label=name, alpha=.7)
    axes.set(**labels)
    axes.legend(fontsize=8)

def draw_bands(axes, lines, x, **labels):
    """Lines, name -> a list of values for each x: means, and 95 % intervals as error bars."""
    for i, (name, several) in enumerate(lines.items()):
        means, halves = zip(*(t_test(values)[:2] for values in several))
        axes.errorbar(x, means, yerr=halves, color=f"C{i}", marker="o", markersize=4, capsize=3, label=name)
    axes.set(**labels)
    axes.legend(fontsize=8)
