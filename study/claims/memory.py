"""Claim 2b. From which size does QLoRA save memory? A training step's peak under --plan.

    python -m study.claims.memory           minutes; no weights, no GPU

LoRA and QLoRA at rank 8 on query and value, in bf16, for a small encoder and decoders from 135M to
70B weights, and 512 to 32,768 tokens a batch, with and without recomputing activations.
"""

import tempfile
from argparse import Namespace

import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, LlamaConfig

import common
import lora
import qlora
from harness import flags
from plan import fake_base
from study import plans
from study.claims.shared import COLORS, INK, load, picture, save

LENGTH, BATCHES, DEPTHS = 512, (1, 8, 64), (2, 6)
SHAPES = plans.SHAPES | {"Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True)}


def config_of(shape):
    """The transformers config of a shape."""
    if shape == "MiniLM-22M":
        return BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    keys = [*plans.KEYS.split(), "vocab_size", "tie_word_embeddings"]
    return LlamaConfig(**dict(zip(keys, SHAPES[shape], strict=True)))


def peak(script, config, batch_size, checkpointing):
    """({kind: bytes} at the peak of a training step, weights of the model) of a script's --plan."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        words = ["--dataset", "wikitext2", "--model", folder, "--precision", "bf16", "--plan"]
        words += ["--batch_size", batch_size, "--max_length", LENGTH]
        words += ["--checkpointing"] * checkpointing
        args = flags.parse_args(script.__doc__, script.__file__, script.add_args, words)
        run = Namespace(**{**vars(args), "lr": 1e-3, "seed": 0, "device": "cpu"})
        with FakeTensorMode(allow_non_fake_inputs=True):
            base, batch = fake_base(run)
            method = script.adapt(run, base)
            common.place(run, base)

            def backward():
                with common.autocast(run):
                    F.cross_entropy(common.forward(base, batch), batch.target).backward()

            memory = common.step_memory(run, base, method, backward, lambda: None)["train"]
    return {"weights": base.weights, **memory}


def extended(script, config, *batch):
    """As `peak`, counted on 2 and on 6 of the config's blocks, which are alike, and extended."""
    depth, (few, more) = config.num_hidden_layers, DEPTHS
    counts = []
    for config.num_hidden_layers in DEPTHS:
        counts.append(peak(script, config, *batch))
    config.num_hidden_layers = depth
    a, b = counts
    return {kind: a[kind] + (b[kind] - a[kind]) * (depth - few) // (more - few) for kind in a}


def measure():
    rows = []
    for shape in ("MiniLM-22M", *SHAPES):
        for batch_size in BATCHES:
            for checkpointing in (False, True):
                row = {"shape": shape, "tokens": batch_size * LENGTH, "recomputed": checkpointing}
                for script in (lora, qlora):
                    counts = extended(script, config_of(shape), batch_size, checkpointing)
                    row["weights"] = counts.pop("weights")
                    row[script.__name__] = {k: size / 2**30 for k, size in counts.items()}
                    row[f"{script.__name__} GiB"] = sum(counts.values()) / 2**30
                rows.append(row)
                print({k: v for k, v in row.items() if not isinstance(v, dict)}, flush=True)
    save("memory", {"rows": sorted(rows, key=lambda row: row["weights"])})


def draw():
    rows = load("memory")["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    title = "QLoRA saves memory where weights, not activations, fill it"
    note = "Computed: share of LoRA's peak memory that QLoRA saves in a training step (bf16)."
    with picture("memory", title, note, 4.0, (1, 2), width=8.6, sharey=True) as (figure, panels):
        for axes, again in zip(panels, (False, True), strict=True):
            for batch_size, line in zip(BATCHES, ("s-", "o--", "^:"), strict=True):
                tokens = batch_size * LENGTH
                part = [r for r in rows if (r["tokens"], r["recomputed"]) == (tokens, again)]
                saved = [100 * (1 - r["qlora GiB"] / r["lora GiB"]) for r in part]
                style = {"color": COLORS["qlora"], "label": f"{tokens:,}"}
                axes.plot([r["weights"] for r in part], saved, line, ms=5, **style)
            axes.axhline(0, color=INK, lw=1)
            axes.set_xscale("log")
            ticks = [next(r["weights"] for r in rows if r["shape"] == s) for s in shapes]
            axes.set_xticks(ticks, [s.rsplit("-", 1)[1] for s in shapes])
            axes.minorticks_off()
            axes.set_title("activations recomputed" if again else "activations kept", size=10)
            axes.set_xlabel("weights of the model")
            axes.grid(axis="y")
        panels[0].set_ylabel("saved, % of LoRA's peak")
        panels[1].legend(title="tokens a batch")


if __name__ == "__main__":
    measure()
    draw()
