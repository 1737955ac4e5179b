"""Pictures of a group: one colour and one marker for each method, everywhere.

Transparent, in greys that can be read on a light and on a dark page, and still on a phone. A
variant has its method's colour and a hollow marker. matplotlib is imported where it draws.
"""

import contextlib
import re

from harness import tables
from harness.results import METHODS, SIGN

LOOKS = {  # a method's colour and marker
    "head_only": ("#7f8791", "X"),
    "full": ("#a3752c", "P"),
    "lora": ("#3f83e0", "o"),
    "qlora": ("#ee9a1f", "s"),
    "hira": ("#16a37f", "D"),
    "sparse_lora": ("#cf5f9e", "^"),
    "hybrid": ("#8a6fe0", "v"),
}
INK, FAINT = "#7a828c", "#8a929c40"  # text; grids and areas behind
PARTS = (  # of memory: words, keys in a result file, colour
    ("frozen weights", ("frozen weights",), "#565f6b"),
    ("trained weights", ("trained weights",), "#e0574f"),
    ("optimizer and gradients", ("optimizer", "gradients"), "#8f99a6"),
    ("activations and temporaries", ("activations", "temporaries"), "#c9d0d8"),
)


@contextlib.contextmanager
def canvas(path, title, g, note, height):
    """A figure of 6.8 × `height` inches with title and what it shows; the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style = dict.fromkeys(colours, INK) | {"grid.color": FAINT, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9}
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style):
        figure = Figure(figsize=(6.8, height), dpi=160, layout="constrained")
        figure.get_layout_engine().set(rect=(0.005, 0.01, 0.985, 0.985 - 0.56 / height))
        size = min(12.5, 760 / len(title))  # a long title still fits in a line
        figure.text(0.012, 1 - 0.09 / height, title, va="top", size=size, weight="bold")
        words = f"{tables.title(g)}. {note}"
        figure.text(0.012, 1 - 0.36 / height, words, va="top", size=min(9, 800 / len(words)))
        yield figure
        figure.savefig(path, transparent=True, metadata={"Software": None})


def look(row):
    """Colour, marker and its filling: hollow for a variant."""
    colour, marker = LOOKS.get(row["method"], (INK, "h"))
    face = colour if row["name"] == row["method"] else "none"
    return {"color": colour, "marker": marker, "mfc": face, "mew": 1.8}


def measured(g, place):
    """The trained rows that have a number there."""
    return [row for row in g["rows"] if place in row["costs"] and not row["untrained"]]


def forest(g, path):
    """Difference from LoRA: mean, intervals of seeds and of both noises, a dot a seed, margin."""
    rows = [row for row in g["rows"] if row["beside"] and row["beside"]["intervals"]]
    rows = [row for row in rows if row["method"] != "head_only"][::-1]  # far away from the others
    if not rows:
        return None
    note = "95 % over seeds (thick), over test rows, too (thin); dots: seeds."
    with canvas(path, tables.versus_lora(g), g, note, 1.35 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        axes.axvspan(-g["margin"], g["margin"], color=FAINT, lw=0)
        axes.axvline(0, color=LOOKS["lora"][0], lw=1.5)
        for y, row in enumerate(rows):
            pair, style = row["beside"], look(row)
            colour = style["color"]
            axes.plot(pair["intervals"]["both"], [y, y], color=colour, lw=1.2)
            axes.plot(pair["intervals"]["seeds"], [y, y], color=colour, lw=4.5, alpha=0.55)
            dots = [y - 0.27] * len(pair["each"])
            axes.plot(pair["each"], dots, ".", color=colour, ms=5, alpha=0.7)
            axes.plot(pair["mean"], y, ms=9, **style)
            text = f"{pair['mean']:+.2f}".replace("-", "−")
            axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(rows) - 0.4)
        unit = "points of accuracy (right is better)"
        if g["task"] != "classification":
            unit = "percent of the perplexity (left is better)"
        axes.set_xlabel(f"minus LoRA, in {unit}")
    return f"Difference from LoRA, {tables.title(g)}"


def rates(g, path):
    """Dev score over the learning rate: a panel for each method, mean and range over the seeds."""
    rows = [row for row in g["rows"] if len(row["rates"]) > 1 and row["method"] != "head_only"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if not methods:
        return None
    means = {row["label"]: [sum(x) / len(x) for x in row["dev"].values()] for row in rows}
    most = max(max(mean) - min(mean) for mean in means.values())
    unit = "points" if g["task"] == "classification" else "in perplexity"
    title = f"The choice of the learning rate moves the dev score by up to {most:,.1f} {unit}"
    note = "Line: mean over seeds; band: from the worst seed to the best."
    lines = 1 if len(methods) <= 4 else 2
    with canvas(path, title, g, note, 1.2 + 2.1 * lines) as figure:
        panels = figure.subplots(lines, -(-len(methods) // lines), sharey=True, squeeze=False)
        for axes, method in zip(panels.flat, methods, strict=False):
            own = [row for row in rows if row["method"] == method]
            for row, dashes in zip(own, ("-", "--", ":", "-.") * len(own), strict=False):
                name = row["label"] if row["name"] != method else None
                style = look(row) | {"ls": dashes, "ms": 5, "mew": 1.2, "label": name}
                axes.plot(row["rates"], means[row["label"]], **style)
                if row is own[0]:
                    low, high = ([end(x) for x in row["dev"].values()] for end in (min, max))
                    axes.fill_between(
                        row["rates"], low, high, color=style["color"], alpha=0.2, lw=0
                    )
            ends = [end(rate for row in own for rate in row["rates"]) for end in (min, max)]
            axes.set_xscale("log")
            if g["task"] != "classification" and most > 1000:  # a rate at which training broke down
                axes.set_yscale("log")
            ticks = axes.set_xticks(ends, [f"{rate:g}" for rate in ends])
            for tick, side in zip(ticks, ("left", "right"), strict=True):
                tick.label1.set_horizontalalignment(side)
            axes.minorticks_off()
            axes.set_title(METHODS.get(method, method), size=10)
            axes.set_xlabel("learning rate", size=9)
            axes.grid(axis="y")
        for axes in panels.flat[len(methods) :]:
            axes.set_visible(False)
        figure.supylabel(f"dev {tables.score_words(g)}", size=10)
        if any(row["name"] != row["method"] for row in rows):
            figure.legend(loc="outside lower center", ncols=4)
    return f"Dev score over the learning rate, {tables.title(g)}"


def memory(g, path):
    """Bytes at the peak of a training step, stacked by what they hold."""
    rows = measured(g, "memory.train.peak")
    if not rows:
        return None
    sizes = {row["label"]: row["costs"]["memory.train.peak"] / 2**20 for row in rows}
    adapters = [row["label"] for row in rows if row["method"] not in ("head_only", "full")]
    least = min(adapters or sizes, key=sizes.get)
    among = " of the adapters" if adapters else ""
    title = f"{least} needs the least memory{among}: {sizes[least]:,.0f} MiB"
    note = "Counted at the peak of a step on the largest batch."
    with canvas(path, title, g, note, 1.8 + 0.36 * len(rows)) as figure:
        axes, left = figure.subplots(), [0.0] * len(rows)
        for words, keys, colour in PARTS:
            held = [sum(row["costs"][f"memory.train.{key}"] for key in keys) for row in rows]
            held = [x / 2**20 for x in held]
            axes.barh(list(sizes), held, left=left, color=colour, label=words, height=0.62)
            left = [x + y for x, y in zip(left, held, strict=True)]
        for y, size in enumerate(left):
            axes.text(size + max(left) / 100, y, f"{size:,.0f}", va="center")
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("MiB")
        figure.legend(loc="outside lower center", ncols=2)
    return f"Memory in training, {tables.title(g)}"


def weights(g, path):
    """Tuned test score over the number of trained weights; equal numbers stand side by side."""
    rows = measured(g, "parameters.trainable")
    rows = [row for row in rows if row["method"] != "head_only"]  # far below the others
    sizes = [row["costs"]["parameters.trainable"] for row in rows]
    if len(set(sizes)) < 2:
        return None
    best = max(rows, key=lambda row: SIGN[g["task"]] * row["score"])
    count = f"{best['costs']['parameters.trainable']:,.0f} trained weights"
    title = f"Best score: {best['label']}, {best['score']:.2f} with {count}"
    note = "Line: 95 % over seeds. Rows with as many weights stand side by side."
    with canvas(path, title, g, note, 4.2) as figure:
        axes, step = figure.subplots(), (max(sizes) / min(sizes)) ** 0.022
        for i, row in enumerate(rows):
            place = sizes[:i].count(sizes[i]) - (sizes.count(sizes[i]) - 1) / 2
            x, style = sizes[i] * step**place, look(row)
            axes.plot([x, x], row["interval"], color=style["color"], lw=1.3)
            axes.plot(x, row["score"], ls="", ms=8, label=row["label"], **style)
        axes.set_xscale("log")
        axes.grid(axis="y")
        axes.set_xlabel("trained weights")
        axes.set_ylabel(f"test {tables.score_words(g)}")
        figure.legend(loc="outside right center")
    return f"Score over trained weights, {tables.title(g)}"


def speed(g, path):
    """Seconds of training, and the latency of inference as a ratio to the base in the same run."""
    ms = "inference.32.{}.latency_ms.p50"
    rows = measured(g, ms.format("unmerged"))
    if not rows:
        return None
    note = "Means over tuned runs. Between runs a machine drifts; a ratio is within a run."
    with canvas(path, "Time to train, time to answer", g, note, 1.5 + 0.36 * len(rows)) as figure:
        seconds, ratio = figure.subplots(1, 2, sharey=True)
        for y, row in enumerate(rows):
            costs, style = row["costs"], look(row)
            slower = costs[ms.format("unmerged")] / costs[ms.format("base")]
            for axes, start, x in ((seconds, 0, costs["time.train_seconds"]), (ratio, 1, slower)):
                axes.plot([start, x], [y, y], color=style["color"], lw=1.5, alpha=0.6)
                axes.plot(x, y, ms=8, **style)
        seconds.set_yticks(range(len(rows)), [row["label"] for row in rows])
        seconds.set_ylim(len(rows) - 0.5, -0.5)
        seconds.set_xlim(left=0)
        seconds.set_xlabel("training, s")
        ratio.axvline(1, color=INK, lw=1)
        ratio.tick_params(axis="y", length=0)
        ratio.set_xlabel("inference with the adapter, base = 1")
    return f"Training and inference time, {tables.title(g)}"


def draw(groups, folder):
    """Each group's pictures, where there is something to draw: [[(file, words)] per group]."""
    stems, drawn, kinds = [], [], (forest, rates, memory, weights, speed)
    for g in groups:
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{g['dataset']}-{g['model']}".lower())
        stems.append(stem)
        if stems.count(stem) > 1:  # the same data and base, trained in another way
            stem += f"-{stems.count(stem)}"
        files = {f"{stem}-{kind.__name__}.png": kind for kind in kinds}
        found = [(file, kind(g, folder / file)) for file, kind in files.items()]
        drawn.append([(file, words) for file, words in found if words])
    return drawn
