"""Runs of the study that were repeated in another way: did the result move?

    python study/checks.py        writes study/checks/README.md from study/checks/*.jsonl

Each repeated run is set beside the study's run of the same data, model, method, learning rate and
seed. study/run.sh has the commands: the blocks cpu and packing.
"""

import json
from pathlib import Path
from statistics import mean, stdev

FOLDER = Path(__file__).resolve().parent
KEYS = ("dataset", "model", "method", "name", "lr", "seed", "untrained")
CHECKS = {
    "cpu": "WikiText-2 with minilm-mlm: LoRA's tuned runs, made on an H200, repeated on a CPU.",
    "packing": "QLoRA: the study's weights were packed by bitsandbytes, whose 8-bit scales differ "
    "by one step in 2 of 1,000; here they are packed by qlora.py.",
}


def read(path):
    """The runs of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score(run):
    """Accuracy in percent, or perplexity."""
    metrics = run["metrics"]["test"]
    if "accuracy" in metrics:
        return 100 * metrics["accuracy"]
    return next(value for name, value in metrics.items() if name.endswith("perplexity"))


def section(name, runs, originals):
    """A check's table in Markdown: both scores and their difference, by run."""
    lines = [f"## {name}", "", CHECKS[name], "", "| run | study | repeated | difference |"]
    lines.append("| --- | ---: | ---: | ---: |")
    changes = {}
    for run in sorted(runs, key=lambda run: (run["untrained"], run["dataset"], run["seed"])):
        [original] = [o for o in originals if all(o[key] == run[key] for key in KEYS)]
        before, after = test_score(original), test_score(run)
        kind = "untrained" if run["untrained"] else f"seed {run['seed']}, lr {run['lr']:g}"
        title = f"{run['dataset']}, {run['name']}, {kind}"
        lines.append(f"| {title} | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
        if not run["untrained"]:
            changes[run["seed"]] = (before, after)
    if len(changes) > 1:
        differences = [after - before for before, after in changes.values()]
        spread = stdev(before for before, _ in changes.values())
        largest = max(differences, key=abs)
        lines += ["", f"Mean difference {mean(differences):+.3f}, largest {largest:+.3f}; the "]
        lines[-1] += f"standard deviation of the study's scores over these seeds is {spread:.3f}."
    return "\n".join(lines)


def main():
    """Write the page."""
    originals = [run for path in sorted(FOLDER.glob("*.jsonl")) for run in read(path)]
    parts = ["# Repeated runs\n\nWritten by study/checks.py; do not edit."]
    for path in sorted((FOLDER / "checks").glob("*.jsonl")):
        parts.append(section(path.stem, read(path), originals))
    (FOLDER / "checks" / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
