"""How long training and inference take: numbers, their tables, and where they were measured.

study/times.py measures all methods in turns in one process and writes a line of JSON per method and
round. Such files in a folder times/ beside the results are read here. Without them, runs with
--timing give the numbers, one per seed. A cell is the median, with the quartiles behind it.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

from harness.text import printable
from report.results import facts

TRAINING = {  # key of a number: the column's title
    "epoch_seconds": "s per epoch",
    "run_seconds": "s per tuned run",
    "examples_per_second": "examples/s",
    "tokens_per_second": "tokens/s",
    "relative_speed": "relative speed",
    "product_rate_percent": "% of the product rate",
    "tuning_hours": "machine hours of tuning one seed",
    "study_hours": "of tuning all seeds",
    "gpu_hours": "GPU hours of tuning one seed",
    "price": "its price",
}
INFERENCE = {
    "p50_ms": "one example, p50 ms",
    "p90_ms": "p90 ms",
    "p95_ms": "p95 ms",
    "examples_per_second": "examples/s at 32",
}
IN_RUNS = {  # where the costs of a run have them
    "p50_ms": "inference.1.{}.latency_ms.p50",
    "p95_ms": "inference.1.{}.latency_ms.p95",
    "examples_per_second": "inference.32.{}.samples_per_second",
}
TIMED = ["time.train_seconds", "time.samples_per_second", "time.tokens_per_second"]


@dataclass(eq=False)
class Times:
    """The numbers of each method: one of each round, or one of each seed."""

    source: str  # sentences: where and how they were measured
    training: dict  # {method: {key of TRAINING: numbers}}
    inference: dict  # {(method, "base", "unmerged" or "merged"): {key of INFERENCE: numbers}}
    first: dict  # line of the measurement: data set, base, steps, machine


def reference(method, lora="LoRA"):
    """The method that a relative speed is relative to: LoRA, or for a variant its own method."""
    plain = re.split(" / |, ", method)[0]
    return lora if plain == method else plain


def training_numbers(line):
    """The numbers of TRAINING that one line gives, without the relative speed.

    Seconds of an epoch and a run are the study's steps times the mean of the measured steps. Tuning
    is one seed at all learning rates.
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
        numbers["gpu_hours"] = line.get("processes", 1) * numbers["tuning_hours"]
    return numbers


def training_times(lines, lora="LoRA"):
    """{method: {key of TRAINING: numbers, one a round}} of one measurement."""
    trained = {(x["method"], x["round"]): training_numbers(x) for x in lines if "seconds" in x}
    result = {}
    for (method, turn), numbers in trained.items():
        other = trained.get((reference(method, lora), turn))
        if other:  # missing in a round that was stopped
            speeds = [x["examples_per_second"] for x in (numbers, other)]
            numbers["relative_speed"] = speeds[0] / speeds[1]
        for key, value in numbers.items():
            result.setdefault(method, {}).setdefault(key, []).append(value)
    return result


def inference_times(lines):
    """{(method, state): {key of INFERENCE: numbers, one a round}} of one measurement."""
    result = {}
    for line in lines:
        for state, numbers in line.get("inference", {}).items():
            p50, p90 = np.quantile(numbers["single_ms"], [0.5, 0.9])
            speed = numbers["examples"] / numbers["seconds"]
            row = result.setdefault((line["method"], state), {})
            for key, value in (("p50_ms", p50), ("p90_ms", p90), ("examples_per_second", speed)):
                row.setdefault(key, []).append(float(value))
    return result


def read(path):
    """The Times of each measurement in a file of study/times.py; busy lines are left out.

    Of two measurements with the same flags on the same machine the later one counts.
    """
    sessions, measurements = {}, []
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        if not line["busy"]:
            key = json.dumps([line["machine"], line["extra"]])
            sessions.setdefault(key, {}).setdefault(line["started"], []).append(line)
    for lines in (started[max(started)] for started in sessions.values()):
        first, rounds = lines[0], len({line["round"] for line in lines})
        machine, rate = first["machine"], np.median([line["product_rate"] for line in lines])
        source = f"{machine['name']}, cores: {machine['cores']}, threads: {machine['threads']}, "
        source += f"{machine['precision']}, torch {machine['torch']}; {first['started']}, {rounds} "
        source += f"rounds; {figure(rate / 1e9)} GFLOP/s in one matrix product. Tuning one seed "
        source += f"takes {first['learning_rates']} runs, one for each learning rate."
        numbers = training_times(lines), inference_times(lines)
        measurements.append(Times(source, *numbers, first))
    return measurements


def load(paths, skipped):
    """The Times in all folders times/ beside the results; a bad file gets a line in `skipped`."""
    folders, measurements = {path if path.is_dir() else path.parent for path in paths}, []
    for file in sorted(file for folder in folders for file in folder.glob("times/*.jsonl")):
        try:
            measurements += read(file)
        except (ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError):
            skipped.append(f"times/{printable(file.name, 120)}: torn, or not of study/times.py")
            print(f"compare.py: skipped {skipped[-1]}", file=sys.stderr)
    return measurements


def of_group(group, measurements, price=None):
    """The Times of a group's rows: of the latest measurement with its data, base and number of
    steps, else of its own runs; None where nothing was timed. price: of a GPU's hour.
    """
    run, shared = group.runs[0], facts(group.runs[0])
    if run.untrained:
        return None
    epoch_steps = math.ceil(shared["train"] / max(1, shared["batch"]))
    run_steps = shared["max_steps"] or shared["epochs"] * epoch_steps
    wanted = {"dataset": run.dataset, "model": run.model}
    wanted |= {"epoch_steps": epoch_steps, "run_steps": run_steps}
    fitting = [x for x in measurements if all(x.first[key] == wanted[key] for key in wanted)]
    if fitting:
        times = of_measurement(group, max(fitting, key=lambda x: x.first["started"]))
    elif run_steps > 0:
        times = of_runs(group, epoch_steps, run_steps)
    else:
        return None
    rows = {row.label: row for row in group.rows}
    for label, numbers in times.training.items() if times else ():
        seeds = len(rows[label].picked)
        numbers["study_hours"] = [seeds * hours for hours in numbers["tuning_hours"]]
        if price:
            numbers["price"] = [price * hours for hours in numbers.get("gpu_hours", [])]
    return times


def of_measurement(group, measured):
    """A measurement's Times of the methods that have a row in the group."""
    rows = [row for row in group.rows if row.run.default and not row.run.untrained]
    labels = {row.run.kind: row.label for row in rows}
    training = {labels[x]: dict(y) for x, y in measured.training.items() if x in labels}
    inference = {(labels[x], z): y for (x, z), y in measured.inference.items() if x in labels}
    first = measured.first
    source = "Measured by study/times.py: the methods take turns in one process. Seconds are the "
    source += f"study's number of steps ({first['epoch_steps']:,} in an epoch, "
    source += f"{first['run_steps']:,} in a run) times the measured mean step. {measured.source}"
    return Times(source, training, inference, first)


def of_runs(group, epoch_steps, run_steps):
    """The Times of the picked runs with --timing on one machine; None if there are none."""
    picked = [(row, run) for row in group.rows for run in row.picked.values()]
    picked = [(row, run) for row, run in picked if min(run.costs.get(x, 0) for x in TIMED) > 0]
    if not picked:
        return None
    machine = Counter(run.machine for _, run in picked).most_common(1)[0][0]
    lines, inference = [], {}
    for row, run in ((row, run) for row, run in picked if run.machine == machine):
        seconds, examples, tokens = (run.costs[key] for key in TIMED)
        line = {"method": row.label, "round": run.seed, "seconds": seconds, "steps": run_steps}
        line |= {"epoch_steps": epoch_steps, "run_steps": run_steps, "flops": 0}
        line |= {"examples": seconds * examples, "tokens": seconds * tokens}
        line |= {"learning_rates": len(row.lrs), "machine": {"device": "cuda" if run.gpu else ""}}
        line["processes"] = run.costs.get("time.accelerator_hours", 0) * 3600 / seconds
        lines.append(line)
        for state in ("base", "unmerged", "merged"):
            paths = {key: path.format(state) for key, path in IN_RUNS.items()}
            for key in (key for key, path in paths.items() if path in run.costs):
                numbers = inference.setdefault((row.label, state), {})
                numbers.setdefault(key, []).append(run.costs[paths[key]])
    source = f"Measured in separate runs with --timing, one number per seed, on {machine}. A "
    source += "machine's speed drifts from run to run, so a small difference may be the machine's "
    source += "and not the method's. Tuning one seed takes a run for each learning rate."
    training = training_times(lines, group.lora.label if group.lora else "")
    return Times(source, training, inference, lines[0])


def figure(value):
    """A number as text with at least three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(numbers):
    """Median and quartiles as text."""
    if not numbers:
        return ""
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    return f"{figure(middle)} ({figure(low)} to {figure(high)})"


def cost_tables(times):
    """The tables of training and of inference: lists of {header: text}."""
    training, inference = [], []
    for method, numbers in times.training.items():
        cells = {title: cell(numbers.get(key)) for key, title in TRAINING.items()}
        training.append({"training": method} | cells)
    for (method, state), numbers in times.inference.items():
        cells = {title: cell(numbers.get(key)) for key, title in INFERENCE.items()}
        inference.append({"inference": method, "state": state} | cells)
    return training, inference
