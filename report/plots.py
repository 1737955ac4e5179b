"""Plots of a group: one color and one marker for each method, everywhere.

Transparent, in grays that can be read on a light and on a dark page, and on a phone. A variant has
its method's color and a hollow marker. matplotlib is imported where it draws.
"""

import contextlib
import io
import math
import re
import textwrap
import warnings

import numpy as np

from harness.text import printable
from report import tables
from report.page import write
from report.results import SIGN

LOOKS = {  # a method's color and marker
    "head_only": ("#7f8791", "X"),
    "full": ("#a3752c", "P"),
    "lora": ("#3f83e0", "o"),
    "qlora": ("#ee9a1f", "s"),
    "hira": ("#16a37f", "D"),
    "sparse_lora": ("#cf5f9e", "^"),
    "contextual_lora": ("#c94f3d", "<"),
    "hybrid": ("#8a6fe0", "v"),
}
INK, FAINT = "#7a828c", "#8a929c40"  # text; grids and areas behind
QUARTILES = [0.25, 0.5, 0.75]
PARTS = (  # of memory: label, keys in a result file, color
    ("frozen weights", ("frozen weights",), "#565f6b"),
    ("trained weights", ("trained weights",), "#e0574f"),
    ("optimizer and gradients", ("optimizer", "gradients"), "#8f99a6"),
    ("activations and temporaries", ("activations", "temporaries"), "#c9d0d8"),
)


def wrapped(text, width):
    """Text for a plot, in lines of at most `width` characters; a "$" begins no formula."""
    text = "\n".join(textwrap.wrap(printable(text, 400), width))
    return text.replace("$", r"\$")


@contextlib.contextmanager
def canvas(path, title, group, note, height):
    """A figure of 6.8 × `height` inches below title and note; the file has the same bytes again."""
    import matplotlib
    from matplotlib.figure import Figure

    colors = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style = dict.fromkeys(colors, INK) | {"grid.color": FAINT, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9}
    title, note = wrapped(title, 66), wrapped(f"{group.title}. {note}", 97)
    below = 0.36 + 0.22 * title.count("\n")  # inches from the top to the note, and to the axes
    top = below + 0.2 + 0.16 * note.count("\n")
    height = height + top
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(6.8, height), dpi=160, layout="constrained")
        figure.get_layout_engine().set(rect=(0.005, 0.01, 0.985, 0.985 - top / height))
        figure.text(0.012, 1 - 0.09 / height, title, va="top", size=12, weight="bold")
        figure.text(0.012, 1 - below / height, note, va="top", size=9)
        yield figure
        image = io.BytesIO()
        figure.savefig(image, transparent=True, metadata={"Software": None})
    write(path, image.getvalue())


def look(row):
    """Color, marker and its filling: hollow for a variant."""
    color, marker = LOOKS.get(row.run.method, (INK, "h"))
    face = color if row.run.default else "none"
    return {"color": color, "marker": marker, "mfc": face, "mew": 1.8}


def name_rows(axes, rows):
    """The rows' labels on the y axis, the first one on top."""
    axes.set_yticks(range(len(rows)), [wrapped(row.label, 24) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def headline(group):
    """The verdicts on LoRA and each other tested method, as a title."""
    lora, others = group.lora.label, {}
    for pair in (pair for pair in group.pairs if lora in (pair.a, pair.b)):
        behind = pair.verdict == "better" and pair.ahead != lora
        verdict = "worse" if behind else pair.verdict
        others.setdefault(verdict, []).append(pair.b if pair.a == lora else pair.a)
    words = {"better": "better than", "worse": "worse than", "equal": "equal to"}
    words["undecided"] = "not told apart from"
    parts = [f"{words[x]} {tables.listing(others[x])}" for x in words if x in others]
    return f"{lora} is {'; '.join(parts)}" if parts else f"Difference from {lora}"


def forest(group, path):
    """Difference from LoRA: mean, intervals over seeds and over both, a dot per seed, margin."""
    rows = [row for row in group.rows if row.run.method != "head_only"]  # that is far away
    pairs = {row: group.versus_lora.get(row.label) for row in rows}
    pairs = {row: pair for row, pair in pairs.items() if pair and pair.each}
    if not pairs:
        return None
    note = "Thick line: 95 % interval over seeds; thin: another one, over seeds and test examples; "
    note += "dots: seeds that both methods ran; "
    margin = tables.amount(group, f"{group.margin:g}")
    note += f"gray: within the margin of {margin}."
    with canvas(path, headline(group), group, note, 0.8 + 0.42 * len(pairs)) as figure:
        axes = figure.subplots()
        axes.axvspan(-group.margin, group.margin, color=FAINT, lw=0)
        axes.axvline(0, color=LOOKS["lora"][0], lw=1.5)
        for y, (row, pair) in enumerate(pairs.items()):
            color = look(row)["color"]
            axes.plot(pair.intervals["95 % interval"], [y, y], color=color, lw=1.2)
            axes.plot(pair.intervals["95 %, seeds only"], [y, y], color=color, lw=4.5, alpha=0.55)
            axes.plot(pair.each, [y + 0.27] * len(pair.each), ".", color=color, ms=5, alpha=0.7)
            axes.plot(pair.mean, y, ms=9, **look(row))
            text = f"{pair.mean:+.2f}".replace("-", "−")
            axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center")
        name_rows(axes, list(pairs))
        unit = "percent of LoRA's perplexity (left is better)"
        if group.task == "classification":
            unit = "points of accuracy (right is better)"
        axes.set_xlabel(f"minus LoRA, in {unit}")
    return f"Difference from LoRA, {group.title}"


def lr(group, path):
    """Dev score over the learning rate: a panel per row, mean and range over the seeds."""
    rows = [row for row in group.rows if len(row.lrs) > 1 and row.run.method != "head_only"]
    if not rows:
        return None
    dev = {row: [x or [np.nan] for x in row.dev.values()] for row in rows}  # NaN: all diverged
    means = {row: np.array([np.mean(x) for x in dev[row]]) for row in rows}
    most = max(np.nanmax(mean) - np.nanmin(mean) for mean in means.values())
    unit = "points" if group.task == "classification" else "in perplexity"
    title = f"The learning rate moves the dev score by up to {most:,.1f} {unit}"
    note = "Line: mean over seeds; band: worst to best seed; dotted: best mean."
    lines = math.ceil(len(rows) / 4)
    with canvas(path, title, group, note, 0.5 + 2.2 * lines) as figure:
        panels = figure.subplots(lines, math.ceil(len(rows) / lines), sharey=True, squeeze=False)
        for axes, row in zip(panels.flat, rows, strict=False):
            color, best = look(row)["color"], np.nanargmax(SIGN[group.task] * means[row])
            axes.plot(row.lrs, means[row], ms=5, **look(row))
            low, high = ([end(x) for x in dev[row]] for end in (min, max))
            axes.fill_between(row.lrs, low, high, color=color, alpha=0.2, lw=0)
            axes.axvline(row.lrs[best], color=color, lw=1, ls=":")
            axes.set_title(f"{wrapped(row.label, 20)}\nbest: {row.lrs[best]:g}", size=10)
            axes.set_xscale("log")
            if group.task != "classification" and most > 1000:  # training broke down at one of them
                axes.set_yscale("log")
            ends = [row.lrs[0], row.lrs[-1]]
            ticks = axes.set_xticks(ends, [f"{end:g}" for end in ends])
            for tick, side in zip(ticks, ("left", "right"), strict=True):
                tick.label1.set_horizontalalignment(side)
            axes.minorticks_off()
            axes.set_xlabel("learning rate", size=9)
            axes.grid(axis="y")
        for axes in panels.flat[len(rows) :]:
            axes.set_visible(False)
        figure.supylabel(f"dev {tables.SCORES[group.task]}", size=10)
    return f"Dev score over the learning rate, {group.title}"


def memory(group, path):
    """Bytes at the peak of a training step, stacked by what they hold."""
    peaks = {row: row.costs.get("memory.train.peak") for row in group.rows}
    rows = [row for row, peak in peaks.items() if peak and not row.run.untrained]
    if not rows:
        return None
    adapters = [row for row in rows if row.run.method not in ("head_only", "full")]
    least, among = min(adapters or rows, key=peaks.get), " of the adapters" if adapters else ""
    title = f"{least.label} needs the least memory{among}: {peaks[least] / 2**20:,.0f} MiB"
    note = "Counted at the peak of a training step on the largest batch."
    with canvas(path, title, group, note, 1.1 + 0.36 * len(rows)) as figure:
        axes, left = figure.subplots(), np.zeros(len(rows))
        for label, keys, color in PARTS:
            sizes = [[row.costs.get(f"memory.train.{key}", 0) for key in keys] for row in rows]
            sizes = np.sum(sizes, 1) / 2**20
            axes.barh(range(len(rows)), sizes, left=left, color=color, label=label, height=0.62)
            left = left + sizes
        for y, size in enumerate(left):
            axes.text(size + max(left) / 100, y, f"{size:,.0f}", va="center")
        name_rows(axes, rows)
        axes.set_xlim(right=1.12 * max(left))
        axes.set_xlabel("MiB")
        figure.legend(loc="outside lower center", ncols=2)
    return f"Memory in training, {group.title}"


def training_time(group, path):
    """Seconds of a tuned run as bars: the median, the quartiles, and the test score beside it."""
    measured = group.times.training if group.times else {}
    rows = [row for row in group.rows if row.label in measured]
    if not rows:
        return None
    seconds = [np.quantile(measured[row.label]["run_seconds"], QUARTILES) for row in rows]
    low, middle, high = np.transpose(seconds)
    score = tables.SCORES[group.task].removesuffix(", %")
    title = f"Seconds to train once; behind each bar the test {score}"
    note = "Bar: median; line: quartiles."
    with canvas(path, title, group, note, 0.8 + 0.36 * len(rows)) as figure:
        axes, colors = figure.subplots(), [look(row)["color"] for row in rows]
        axes.barh(range(len(rows)), middle, color=colors, height=0.62)
        error = [middle - low, high - middle]
        axes.errorbar(middle, range(len(rows)), xerr=error, fmt="none", ecolor=INK, capsize=4)
        for y, row in enumerate(rows):
            text = f"{row.score:.2f} %" if group.task == "classification" else f"{row.score:.2f}"
            axes.text(high[y] + max(high) / 100, y, text, va="center")
        name_rows(axes, rows)
        axes.set_xlim(right=1.15 * max(high))
        axes.set_xlabel("seconds per tuned run")
    return f"Training time and score, {group.title}"


def trade_off(group, path):
    """The test score over the seconds of a tuned run, and over the milliseconds of one example."""
    measured = group.times.training if group.times else {}
    rows = [row for row in group.rows if row.label in measured and row.run.method != "head_only"]
    if not rows:
        return None
    title = "The test score over training time and over latency"
    note = "Marker: median; line: quartiles. Right: filled is merged or without an adapter, hollow "
    note += "is not merged."
    if any(row.label in measured and row not in rows for row in group.rows):
        note += " Head only is left out: its score is far worse."
    with canvas(path, title, group, note, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row in rows:
            style, label = look(row), wrapped(row.label, 24)
            states = {
                state: x
                for (name, state), x in group.times.inference.items()
                if name == row.label and "p50_ms" in x
            }
            if "merged" in states:
                states.pop("base", None)  # the base without the adapter
            points = [(left, measured[row.label]["run_seconds"], style["mfc"])]
            for state, numbers in states.items():
                face = "none" if state == "unmerged" else style["color"]
                points.append((right, numbers["p50_ms"], face))
            for axes, numbers, face in points:
                low, middle, high = np.quantile(numbers, QUARTILES)
                axes.plot([low, high], [row.score] * 2, color=style["color"], lw=1.2)
                style |= {"mfc": face, "alpha": 0.8}  # markers may lie on each other
                axes.plot(middle, row.score, ms=7, ls="", label=label, **style)
        left.set_xlabel("seconds per tuned run")
        right.set_xlabel("milliseconds for one example")
        lower = "" if group.task == "classification" else "\n(lower is better)"
        left.set_ylabel(f"test {tables.SCORES[group.task]}{lower}")
        for axes in (left, right):
            axes.grid()
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return f"Test score over training time and latency, {group.title}"


def draw(groups, folder):
    """Each group's plots, where there is something to draw: of scores and of costs, both lists of
    (file, title).
    """
    used, drawn = [], []
    for run, group in ((group.runs[0], group) for group in groups):
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{run.dataset}-{run.model}".lower())[:100]
        names = [stem, *(f"{stem}-{number}" for number in range(2, len(groups) + 1))]
        used.append(next(name for name in names if name not in used))
        parts = []
        for functions in ((forest, lr), (memory, training_time, trade_off)):
            names = {plot: plot.__name__.replace("_", "-") for plot in functions}
            files = {f"{used[-1]}-{name}.png": plot for plot, name in names.items()}
            titles = [(file, plot(group, folder / file)) for file, plot in files.items()]
            parts.append([(file, title) for file, title in titles if title])
        drawn.append(parts)
    return drawn
