"""Where a training step's time goes: writes the table between the profile marks of docs/speed.md.

    python study/step_profile.py

LoRA and contextual LoRA take the same steps as in study/times.py, here under torch's profiler.
Product time is compared with what the counted operations would take at the machine's product rate.
The profiler slows small operations down, so the shares count, not the seconds.
"""

import contextlib
import io
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from harness import batches  # noqa: E402
from report.page import markdown  # noqa: E402
from study import times  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
MARK = re.compile(r"(<!-- profile -->\n).*?(<!-- /profile -->)", re.DOTALL)
KINDS = {  # words in an operation's name -> its row; the first that fits
    "mm": "matrix products",
    "attention": "attention",
    "gelu": "GELU",
    "layer_norm": "layer norm",
    "": "copies, sums and other small operations",
}
PYTHON = "Python, autograd and the profiler"


def shares(flags, name, data):
    """Profile 16 steps of a method: ({row: share of the time}, operations per second)."""
    script, run, _ = times.first_run(flags, name)
    base = common.load_base(run, data)
    method = script.adapt(run, base)
    common.place(run, base)
    trained, optimizer = (
        common.trained_tensors(base.model),
        common.make_optimizer(run, base, method),
    )
    lengths, size = data.train.lengths, batches.global_batch(run)
    groups = batches.length_grouped_batches(lengths, size, run.seed, 0)
    targets, chosen = (
        batches.predicted_tokens(data, data.train, 0),
        times.evenly(groups, lengths, 16),
    )

    def train():
        for examples in chosen:
            method.before_step(*common.TYPICAL_STEP)
            common.gradient(run, data, base, method, examples, targets, trained)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    base.model.train()
    train()  # warms up
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train()
        seconds = time.perf_counter() - start
    found = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            kind = next(row for word, row in KINDS.items() if word in event.key)
            found[kind] += event.self_cpu_time_total / 1e6 / seconds
    found[PYTHON] = 1 - sum(found.values())
    cut = [
        batches.micro_batches(run, lengths, examples, run.batch_size, method.tokens_together)
        for examples in chosen
    ]
    return found, common.count_flops(run, data, base, method, cut)["total"] / seconds


def main():
    """Measure both methods and write the table."""
    flags = times.study_flags("sst2", "models/all-MiniLM-L6-v2")
    table = {row: {"share of the time, %": row} for row in (*KINDS.values(), PYTHON)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags += ["--precision", "fp32", "--device", "cpu", "--out", folder]
        _, run, _ = times.first_run(flags, "LoRA")
        data = common.load_data(run)
        rate = times.product_rate(run, 384)
        machine = times.describe_machine(run)
        row = "for comparison: the counted operations at the product rate"
        ideal = {"share of the time, %": row}
        for name in ("LoRA", "Contextual LoRA"):
            found, achieved = shares(flags, name, data)
            for row, cells in table.items():
                cells[name] = f"{100 * found[row]:.0f}"
            ideal[name] = f"{100 * achieved / rate:.0f}"
    said = f"{machine['name']}, threads: {torch.get_num_threads()}, fp32, 16 steps of SST-2; "
    said += f"{rate / 1e9:.0f} GFLOP/s in one matrix product."
    made = f"{said}\n\n{markdown([*table.values(), ideal])}"
    text = PAGE.read_text("utf-8")
    PAGE.write_text(MARK.sub(lambda mark: f"{mark[1]}\n{made}\n\n{mark[2]}", text), "utf-8")


if __name__ == "__main__":
    main()
