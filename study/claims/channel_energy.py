"""How large must contextual LoRA's sample of tokens be? Energy of the picked channels, and time.

    python study/claims/channel_energy.py --model models/all-MiniLM-L6-v2

A block keeps the channels that have the most energy on a sample of tokens: the sum of squares of
what they compute. Kept energy is what these channels have over all sliced tokens of a whole batch,
divided by that of the best choice of equally many channels: a mean over batches and sliced blocks.
Relative speed is the time of a dense training step (plain LoRA) divided by that of a sparse one:
the median over batches and turns. FLOPs are those of sparse steps, divided by the dense steps'.
"""

import argparse
import itertools
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import common
import contextual_lora
from harness import batches, flags, meters, process

DATASETS = {"sst2": [], "imdb": ["--max_length", "128"]}
EVERYTHING = 10**9  # tokens
SAMPLES = {"64": 64, "128": 128, "256": 256, "all tokens": EVERYTHING}
TURNS = 5


def prepare(arguments, dataset):
    """A contextual LoRA run in whole batches of 32: (run, data, base, method, training steps)."""
    words = ["--dataset", dataset, "--model", arguments.model, *DATASETS[dataset]]
    words += ["--train_samples", "4000", "--test_samples", "100"]
    args = flags.parse_args(__doc__, contextual_lora.__file__, contextual_lora.add_args, words)
    process.choose_device(args)
    [run] = flags.runs(args)
    data = common.load_data(run)
    base = common.load_base(run, data)
    method = contextual_lora.adapt(run, base)
    method.tokens_together = EVERYTHING  # a CPU would cut a batch into parts
    common.place(run, base)
    base.model.train()
    steps = [*batches.training_batches(run, data, 1, arguments.batches + 1)]
    return run, data, base, method, steps[1:]  # the first batch is the longest of all


def set_sample(name):
    """Have contextual LoRA draw its sample from the whole batch if it takes all tokens."""
    contextual_lora.SAMPLED = SAMPLES.get(name)
    contextual_lora.CANDIDATES = EVERYTHING if name == "all tokens" else 1024


@torch.no_grad()
def kept_energy(run, data, base, method, steps):
    """The kept share of the best choice's energy, a number for each batch and sliced block."""
    shares, hidden = [], {}
    for layer in base.model.modules():
        if isinstance(layer, contextual_lora.SparseUp):
            layer.register_forward_pre_hook(lambda up, x: hidden.update({up.block: x[0]}))
    for step, examples, targets in steps:
        method.before_step(step, 1)  # far behind the dense steps; the step's number draws
        batch = batches.collate(data, data.train, examples, targets).to(run.device)
        common.forward(base, batch)
        tokens = batch.token_positions
        sliced = tokens[~torch.isin(tokens, batch.output_positions)]
        for block, x in hidden.items():
            energy = block.score(x.flatten(0, 1)[sliced]).square()
            share = energy[block.picked].sum() / energy.topk(block.keep).values.sum()
            shares.append(float(share))
    return shares


def costs(run, data, base, method, steps):
    """({sample: relative speed}, {sample: FLOPs})."""
    trained = common.trained_tensors(base.model)
    kinds = [("dense", 1), *((name, 100) for name in SAMPLES)]  # the first steps are dense
    seconds, operations = defaultdict(list), Counter()

    def work(examples, targets):
        common.gradient(run, data, base, method, examples, targets, trained).item()

    for turn in range(TURNS + 1):
        for (_, *step), (name, number) in itertools.product(steps, kinds):
            set_sample(name)
            method.before_step(number, 100)
            start = time.perf_counter()
            if turn < TURNS:
                work(*step)
                seconds[name].append(time.perf_counter() - start)
            else:
                operations[name] += meters.count_flops(base.model, partial(work, *step))
    pairs = {name: zip(seconds["dense"], seconds[name], strict=True) for name in SAMPLES}
    speeds = {name: median(dense / sparse for dense, sparse in pairs[name]) for name in SAMPLES}
    return speeds, {name: operations[name] / operations["dense"] for name in SAMPLES}


def main(argv=None):
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/all-MiniLM-L6-v2")
    parser.add_argument("--batches", type=int, default=8, help="how many batches are looked at")
    arguments = parser.parse_args(argv)
    for dataset in DATASETS:
        setup = prepare(arguments, dataset)
        speeds, operations = costs(*setup)
        print(f"{'sampled':>12}{'kept energy':>13}{'lowest':>8}{'relative speed':>16}{'FLOPs':>7}")
        for name in SAMPLES:
            set_sample(name)
            shares = kept_energy(*setup)
            print(f"{name:>12}{mean(shares):13.3f}{min(shares):8.3f}", end="")
            print(f"{speeds[name]:16.2f}{operations[name]:7.3f}")


if __name__ == "__main__":
    main()
