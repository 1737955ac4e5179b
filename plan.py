"""What a run would need, from the model's config alone: no weights, no data, no GPU.

    python qlora.py --model bert-large-uncased --dataset imdb --batch_size 4 --plan
    python lora.py --model my-7b/ --dataset wikitext2 --precision bf16 --max_length 512 --plan

The script takes one training step on fake tensors, which have shapes and no values; it is measured
as a real run is. `my-7b/` need hold nothing but its config.json.
"""

import math
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from common import Batch, autocast, forward, make_base, place, step_memory
from harness import meters, models
from harness.process import library_errors, say
from harness.rows import TEXT, load_config


def fake_base(run):
    """(Base, Batch) as load_base and collate would make them, of fake tensors without padding."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config = load_config(run.model)
    masked = config.model_type in MASKED
    task = "classification" if run.dataset not in TEXT else "mlm" if masked else "clm"
    pad = getattr(config, "pad_token_id", None) or 0  # RoBERTa counts its positions from there
    classes = ["0", "1"] if task == "classification" else None
    config = models.configure(config, run.base_dropout, pad, classes)
    model = getattr(transformers, f"AutoModelFor{models.HEADS[task]}").from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )
    models.check_length(run, config, model)
    names, prefix = [name for name, _ in model.named_parameters()], f"{model.base_model_prefix}."
    head = [n for n in names if task == "classification" and not n.startswith(prefix)]
    last = not masked or config.is_encoder_decoder
    base = make_base(run, model, head, task, last)

    examples, length = run.batch_size, run.max_length
    token_positions = torch.arange(examples * length)
    if task == "classification":
        outputs = torch.arange(examples) * length + (length - 1 if last else 0)
    else:  # a masked LM predicts 15 % of the tokens, a causal one all but each example's first
        outputs = token_positions[::7] if masked else token_positions[examples:]
    ids = torch.zeros(examples, length, dtype=torch.int64)
    return base, Batch(ids, None, None, token_positions, outputs, torch.zeros_like(outputs))


def plan(args, adapt):
    """Print the bytes at the peak of a training step and of scoring, by kind, and a step's FLOPs.

    Of whole batches, as on a GPU: a CPU's are cut into parts. 4-bit layers are unpacked by torch.
    """
    run = Namespace(**{**vars(args), "lr": args.lr[0], "seed": 0, "device": "cpu"})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with library_errors(f"--plan: cannot plan --model {run.model}"), fake:
        base, batch = fake_base(run)
        method = adapt(run, base)
        place(run, base)

        def inference():
            with autocast(run):
                return forward(base, batch)

        def backward():
            F.cross_entropy(inference(), batch.target).backward()

        memory = step_memory(run, base, method, backward, inference)
        operations = meters.count_flops(base.model.train(), backward) if "train" in memory else 0
    peaks = {"training": memory["train"]} if "train" in memory else {}
    peaks["scoring"] = memory["inference"]
    say(f"{run.name}: {meters.describe(base)}")
    large = max(sum(peak.values()) for peak in peaks.values()) >= 2**30
    unit, size = ("GiB", 2**30) if large else ("MiB", 2**20)
    shape = f"{run.batch_size} × {run.max_length} tokens, {run.precision}"
    say(f"{shape}, {'with' if run.checkpointing else 'without'} checkpointing, {unit}:")
    say(f"{'':16}" + "".join(f"{phase:>12}" for phase in peaks))
    for kind in memory["inference"]:
        say(f"{kind:16}" + "".join(f"{peak[kind] / size:12.2f}" for peak in peaks.values()))
    say(f"{'peak':16}" + "".join(f"{sum(p.values()) / size:12.2f}" for p in peaks.values()))
    say(f"{operations / 1e9:,.1f} GFLOP per training pass")
    lrs, seeds, steps = len({*args.lr}), len({*args.seeds}), args.max_steps
    if args.train_samples and not steps:
        steps = args.epochs * math.ceil(args.train_samples / (args.batch_size * args.grad_accum))
    length = f"{lrs * seeds * steps:,} steps in all" if steps else f"{args.epochs} epochs each"
    say(f"runs: {lrs * seeds} ({lrs} learning rates × {seeds} seeds), {length}")
