"""Memory and time of a real training step on a large decoder, beside what --plan predicts.

    python study/large_step.py            Llama-2-7B's shape, 1 × 512 tokens, bf16; 40 GiB of a GPU
    python study/large_step.py --small    a tiny decoder, also on a CPU

The weights are random: neither memory nor time depends on their values. No checkpoint is read.
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import lora  # noqa: E402
import qlora  # noqa: E402
from harness.meters import Clock  # noqa: E402
from plan import fake_base  # noqa: E402
from study.plans import FLAGS, KEYS, SHAPES, peak  # noqa: E402

TINY = (256, 512, 4, 4, 4, 1000, False)
WAYS = [(script, more) for script in (lora, qlora) for more in ([], ["--checkpointing"])]
# bitsandbytes pages optimizer state of 100,000 numbers or more: from rank 25 on at 4,096.
RANKS = [["--rank", rank] for rank in ("8", "64", "256")]
WAYS += [(qlora, [*rank, *paged]) for rank in RANKS for paged in ([], ["--paged"])][1:]


def measured_step(script, folder, more):
    """(counted bytes, the allocator's bytes or None, median seconds) of a training step."""
    gc.collect()  # the model before, whose hooks point back at it
    flags = [flag for flag in FLAGS if flag != "--plan"]
    flags += ["--model", str(folder), *more]
    args = script.parse_args(script.__doc__, script.__file__, script.add_args, flags)
    script.choose_device(args)
    run = Namespace(**{**vars(args), "lr": args.lr[0], "seed": 0})
    with torch.device(run.device):
        base, batch = fake_base(run)  # outside of a FakeTensorMode these tensors are real
    method = script.adapt(run, base)
    common.place(run, base)

    def inference():
        with common.autocast(run):
            return common.forward(base, batch)

    def backward():
        F.cross_entropy(inference(), batch.target).backward()

    memory = common.step_memory(run, base, method, backward, inference)
    base.model.train()
    trained = common.trained_tensors(base.model).values()
    optimizer, clock = common.make_optimizer(run, base, method), Clock(run.device)
    for _ in range(6):
        clock.start()
        backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()
    counted = sum(memory["train"].values())
    return counted, memory["train_allocator"], float(np.median(clock.read()[1:]))


def main():
    """Print a table of all WAYS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny decoder, to try the script")
    sizes = TINY if parser.parse_args().small else SHAPES["Llama-2-7B"]
    keys = [*KEYS.split(), "vocab_size", "tie_word_embeddings"]
    table = ["| GiB | --plan | counted | allocator | ms a step |", "| --- |" + " ---: |" * 4]
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**dict(zip(keys, sizes, strict=True))).save_pretrained(folder)
        for script, more in WAYS:
            planned = peak(script, folder, *more)
            with contextlib.redirect_stdout(io.StringIO()):
                counted, allocator, seconds = measured_step(script, folder, more)
            allocated = f"{allocator / 2**30:.2f}" if allocator else "not measured"
            cells = [planned, f"{counted / 2**30:.2f}", allocated, f"{1000 * seconds:.0f}"]
            table.append(f"| {' '.join([script.__name__, *more])} | {' | '.join(cells)} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
