"""What the claims' scripts share: a run of a method script, result files, the look of a picture."""

import contextlib
import json
import math
import tempfile
from pathlib import Path

import common
from harness import flags, models, process
from report.plots import FAINT, INK, LOOKS

RESULTS = Path(__file__).parent / "results"
WAITS = "*Not measured yet: see [run.sh](../study/claims/run.sh).*"
COLORS = {method: color for method, (color, _) in LOOKS.items()}
SST2 = "--dataset sst2 --model models/all-MiniLM-L6-v2 --train_samples 8000 --heldout 3000"
SST2 = f"{SST2} --head_lr 1e-2 --precision fp32".split()
WIKITEXT2 = "--dataset wikitext2 --model models/minilm-mlm --train_samples 1000 --precision fp32"
WIKITEXT2 = WIKITEXT2.split()


def prepare(script, words, seed=0):
    """A run of a method script that writes no result: (run, data, base), the base not adapted."""
    words = [*words, "--seeds", seed, "--out", tempfile.mkdtemp()]  # empty: no old checkpoint
    args = flags.parse_args(script.__doc__, script.__file__, script.add_args, words)
    process.choose_device(args)
    [run] = flags.runs(args)
    data = common.load_data(run)
    base = common.load_base(run, data)
    common.place(run, base)
    return run, data, base


def block_weights(model):
    """{name: a copy of the weight (out, in)} of the linear layers inside the blocks."""
    layers = {name: model.get_submodule(name) for name in models.block_linears(model)}
    return {name: models.weight_of(layer).detach().clone() for name, layer in layers.items()}


def set_weights(model, weights):
    """Overwrite the weights (out, in) of the layers with these names."""
    for name, weight in weights.items():
        models.weight_of(model.get_submodule(name)).data.copy_(weight)


def interval(values):
    """[mean, low, high] of independent values: a 95 % t interval."""
    from scipy.stats import t

    n, middle = len(values), mean(values)
    error = math.sqrt(sum((x - middle) ** 2 for x in values) / max(1, n - 1) / n)
    half = t.ppf(0.975, n - 1) * error if n > 1 else math.nan
    return [middle, middle - half, middle + half]


def save(name, numbers):
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(rounded(numbers), indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rounded(value):
    """The same with five significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(head, rows):
    """A Markdown table; the first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def span(values, pattern="{:+.2f}"):
    """[mean, low, high] as words."""
    mean, low, high = (pattern.format(x).replace("-", "−") for x in values)
    return f"{mean} ({low} to {high})" if math.isfinite(values[1]) else f"{mean} (one seed)"


def decided(difference, above, below):
    """`above` or `below` for a difference [mean, low, high] beyond zero, else that it is open."""
    low, high = difference[1:]
    return above if low > 0 else below if high < 0 else "undecided"


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@contextlib.contextmanager
def picture(name, title, note, height, panels=(1, 1), width=6.8, **more):
    """Yield (figure, axes) of a picture that is written to results/NAME.png; the same bytes always.

    The title is what the picture shows, the note how to read it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style = dict.fromkeys(keys, INK) | {"grid.color": FAINT, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        figure.get_layout_engine().set(rect=(0.005, 0.01, 0.985, 0.985 - 0.6 / height))
        size = min(12, 112 * width / len(title))  # a long title still fits in a line
        figure.text(0.012, 1 - 0.08 / height, title, va="top", size=size, weight="bold")
        figure.text(0.012, 1 - 0.36 / height, note, va="top", size=9)
        yield figure, figure.subplots(*panels, **more)
        figure.savefig(RESULTS / f"{name}.png", transparent=True, metadata={"Software": None})
