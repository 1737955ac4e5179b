"""docs/speed.md's tables from study/times/*.jsonl; imports no torch.

Every number is the median over the rounds, with the quartiles behind it. A line marked busy is
never read. Of two measurements with the same flags on the same machine the later one counts.
"""

import json
import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
MARK = re.compile(r"(<!-- times -->\n).*?(<!-- /times -->)", re.DOTALL)
COMMAND = "python study/times.py --dataset sst2 --model models/all-MiniLM-L6-v2 --peers --choices"
TRAINING = {  # a line's key: the column's title
    "epoch_seconds": "s per epoch",
    "run_seconds": "s per tuned run",
    "examples_per_second": "examples/s",
    "tokens_per_second": "tokens/s",
    "relative_speed": "relative speed",
    "product_rate_percent": "% of the product rate",
    "tuning_hours": "machine hours of tuning",
    "gpu_hours": "GPU hours of tuning",
}
INFERENCE = {
    "p50_ms": "one example, p50 ms",
    "p90_ms": "p90 ms",
    "examples_per_second": "examples/s at 32",
}


def read(path):
    """The measurements of a file: lists of lines, the busy ones left out."""
    sessions = {}
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        if not line["busy"]:
            key = json.dumps([line["machine"], line["extra"]])
            sessions.setdefault(key, {}).setdefault(line["started"], []).append(line)
    return [started[max(started)] for started in sessions.values()]


def reference(method):
    """The method that a relative speed is relative to: LoRA, or for a variant its own method."""
    own = re.split(" / |, ", method)[0]
    return "LoRA" if own == method else own


def training_numbers(line):
    """The numbers of TRAINING that one line gives, without the relative speed.

    Seconds of an epoch and a tuned run are the study's steps times the mean of the measured steps.
    """
    step = line["seconds"] / line["steps"]
    numbers = {
        "epoch_seconds": line["epoch_steps"] * step,
        "run_seconds": line["run_steps"] * step,
        "examples_per_second": line["examples"] / line["seconds"],
        "tokens_per_second": line["tokens"] / line["seconds"],
        "tuning_hours": line["learning_rates"] * line["run_steps"] * step / 3600,
    }
    if line["flops"]:
        achieved = line["flops"] / line["seconds"]
        numbers["product_rate_percent"] = 100 * achieved / line["product_rate"]
    if line["machine"]["device"] == "cuda":
        numbers["gpu_hours"] = numbers["tuning_hours"]
    return numbers


def derive(lines):
    """{method: {key of TRAINING: numbers, one a round}} of one measurement."""
    trained = {(x["method"], x["round"]): training_numbers(x) for x in lines if "seconds" in x}
    result = {}
    for (method, turn), numbers in trained.items():
        other = trained.get((reference(method), turn))
        if other:  # missing in a round that was stopped
            numbers["relative_speed"] = (
                numbers["examples_per_second"] / other["examples_per_second"]
            )
        for key, value in numbers.items():
            result.setdefault(method, {}).setdefault(key, []).append(value)
    return result


def derive_inference(lines):
    """{(method, state): {key of INFERENCE: numbers, one a round}} of one measurement."""
    result = {}
    for line in lines:
        for state, numbers in line.get("inference", {}).items():
            p50, p90 = np.quantile(numbers["single_ms"], [0.5, 0.9])
            speed = numbers["examples"] / numbers["seconds"]
            row = result.setdefault((line["method"], state), {key: [] for key in INFERENCE})
            for values, value in zip(row.values(), (p50, p90, speed), strict=True):
                values.append(float(value))
    return result


def figure(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(numbers, missing="–"):
    """Median and quartiles in words."""
    if not numbers:
        return missing
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    return f"{figure(middle)} ({figure(low)} to {figure(high)})"


def table(titles, rows):
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * (len(titles) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def section(lines):
    """A measurement in Markdown: how it was made, training, inference."""
    first = lines[0]
    machine, rounds = first["machine"], len({line["round"] for line in lines})
    where = f"{machine['name']}, cores: {machine['cores']}, threads: {machine['threads']}"
    rate = np.median([line["product_rate"] for line in lines]) / 1e9
    text = f"{where}, {machine['precision']}, torch {machine['torch']}; {first['started']}, "
    text += f"{rounds} rounds; {figure(rate)} GFLOP/s in one matrix product. Tuning is "
    text += f"{first['learning_rates']} learning rates for one seed."
    missing = {"gpu_hours": "not measured"}
    training = [
        [method, *(cell(row.get(key), missing.get(key, "–")) for key in TRAINING)]
        for method, row in derive(lines).items()
    ]
    latency = [
        [method, state, *(cell(row[key]) for key in INFERENCE)]
        for (method, state), row in derive_inference(lines).items()
    ]
    parts = [text, table(["training", *TRAINING.values()], training)]
    return "\n\n".join([*parts, table(["inference", "state", *INFERENCE.values()], latency)])


def write(folder, page=PAGE):
    """Put the tables of all files in the folder between the marks of the page."""
    parts = []
    for path in sorted(folder.glob("*.jsonl")):
        for lines in read(path):
            parts += [f"## {lines[0]['dataset']} with {lines[0]['model']}", section(lines)]
    parts = parts or [f"No results yet: run `{COMMAND}` on a quiet machine."]
    text, made = page.read_text("utf-8"), "\n\n".join(parts)
    page.write_text(MARK.sub(lambda mark: f"{mark[1]}\n{made}\n\n{mark[2]}", text), "utf-8")
