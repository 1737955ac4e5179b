"""Speed of our training loop: against PEFT with transformers' Trainer, and of each of our choices.

    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --dataset sst2
    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --dataset imdb --rows 64 --ours
    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --dataset sst2 --write

One process trains all of them in turns, a few steps at a time, on the same rows: what the machine
does meanwhile hits all alike. A figure is the median over the rounds of the ratio within a round,
and its quartiles. Both sides: the same base, rows, batch size, length limit, fp32 or bf16, fused
AdamW, clipping and warm-up, no dropout anywhere. The clock runs over training steps alone. Peers
run with the Trainer's length-grouped sampler and with its default one. The Trainer groups within 50
batches, and within a quarter of the rows where these are fewer: fair with --rows 1024 and more. Run
it on a machine that does nothing else. --write puts the table into docs/speed.md.
"""

import argparse
import contextlib
import functools
import math
import platform
import re
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import hira  # noqa: E402
import lora  # noqa: E402
import qlora  # noqa: E402
import sparse_lora  # noqa: E402
from harness import models  # noqa: E402
from harness.splits import generator_for, seed_for  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"


def random_order(lengths, size, *seed):
    return list(torch.randperm(len(lengths), generator=generator_for(*seed)).split(size))


def whole_batch(rows, lengths, size, run):
    return [rows]


def plain_hira(layer, x):
    update = models.weight_of(layer.base) * (layer.B @ layer.A)
    return layer.base(x) + torch.nn.functional.linear(x, update)


def plain_nf4(layer, x):
    return torch.nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)


OURS = {  # name: script, its flags, the one choice of ours that is switched off
    "LoRA": (lora, [], None),
    "QLoRA": (qlora, [], None),
    "HiRA": (hira, [], None),
    "Sparse LoRA": (sparse_lora, [], None),
    "contextual": (sparse_lora, ["--mode", "contextual"], None),
    "LoRA, random batches": (lora, [], (common, "order", random_order)),
    "LoRA, whole batches at once": (lora, [], (common, "micro_batches", whole_batch)),
    "LoRA, unread rows computed": (lora, [], (models, "AFTER_ATTENTION", {})),
    "HiRA, two products": (hira, [], (hira.HiRALinear, "forward", plain_hira)),
    "QLoRA, weights kept": (qlora, [], (qlora.NF4Linear, "forward", plain_nf4)),
}


def prepare(args, script, extra=()):
    """(run, data, base) as the script itself would make them."""
    words = ["--dataset", args.dataset, "--model", args.model, "--train_samples", args.rows]
    words += ["--test_samples", 64, "--epochs", 1, "--precision", args.precision]
    words += ["--device", args.device, "--out", Path("results") / "never-written", *extra]
    parsed = script.parse_args(script.__doc__, script.__file__, script.add_args, words)
    run = next(script.runs(parsed))
    data = common.load_data(run)
    return run, data, common.load_base(run, data)


def ours(args, name):
    """A function that trains one round and returns its seconds, and GFLOP a round."""
    script, extra, off = OURS[name]
    switch = mock.patch.object(*off) if off else contextlib.nullcontext()
    with switch:
        run, data, base = prepare(args, script, extra)
        method = script.adapt(base, run)
    if name == "contextual":  # of a run's steps 95 % are sparse, but a round's first would be dense
        after_step = method["after_step"]
        method["after_step"] = lambda step, total, lr: after_step(total, total, lr)

    def train_round():
        # Without a checkpoint: the next round would go on from it, and do nothing.
        with switch, mock.patch.object(common, "save_checkpoint"):
            history = common.train(base, data, run, method)
        assert len(history.laps) == math.ceil(args.rows / run.batch_size), "not a whole round"
        return sum(history.laps)

    train_round()  # warms up
    steps = common.steps_of(data, run, math.ceil(args.rows / run.batch_size))
    return train_round, common.count_flops(base, data, run, steps).get("total", 0) / 1e9


def peer(args, name, sampler):
    """A function that trains one round with PEFT and the Trainer and returns its seconds."""
    import peft
    import transformers

    script = OURS[name][0]
    with mock.patch.object(models, "compute_read_rows_only", lambda *_: None):
        run, data, base = prepare(args, script)
    model, dtype = base.model, torch.bfloat16 if run.precision == "bf16" else torch.float32
    prefix = f"{model.base_model_prefix}."
    heads = sorted({path.removeprefix(prefix).split(".")[0] for path in base.head})
    if name == "QLoRA":
        quantised = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*heads, "pooler"],
        )
        torch.manual_seed(seed_for(run.seed, "head"))
        model = type(model).from_pretrained(
            models.model_folder(run.model),
            config=model.config,
            dtype=dtype,
            quantization_config=quantised,
            device_map={"": run.device},
        )
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    shared = {
        "r": run.rank,
        "target_modules": models.find_targets(base.model, None),
        "task_type": "SEQ_CLS",
        "modules_to_save": heads,
    }
    if name == "HiRA":
        config = peft.HiraConfig(**shared)
    else:
        config = peft.LoraConfig(lora_alpha=run.alpha, lora_dropout=0.0, **shared)
    model = peft.get_peft_model(model, config)
    split = data.train
    rows = [
        {"input_ids": split.tokens[a:b].tolist(), "labels": int(label)}
        for a, b, label in zip(split.starts, split.starts[1:], split.labels, strict=False)
    ]
    pad = transformers.DataCollatorWithPadding(common.load_tokenizer(run.model)[0])
    clock = {}

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            if "cuda" in run.device:
                torch.cuda.synchronize()
            clock["end"] = time.perf_counter()

    options = {"train_sampling_strategy": "group_by_length"} if sampler == "grouped" else {}
    settings = transformers.TrainingArguments(
        "/tmp/never-saved",
        per_device_train_batch_size=run.batch_size,
        num_train_epochs=1,
        learning_rate=run.lr,
        lr_scheduler_type="linear",
        warmup_steps=run.warmup,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=run.precision == "bf16",
        use_cpu="cpu" in run.device,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )

    def train_round():
        trainer = transformers.Trainer(
            model, settings, train_dataset=rows, data_collator=pad, callbacks=[Clock()]
        )
        trainer.train()
        return clock["end"] - clock["start"]

    train_round()
    return train_round, 0.0


def product_rate(device, dtype):
    """GFLOP a second of this machine's own matrix product, of a feed-forward layer's shape."""
    x, w = torch.randn(1024, 384, device=device), torch.randn(384, 1536, device=device)
    x, w, best = x.to(dtype), w.to(dtype), 0.0
    for _ in range(20):
        if "cuda" in device:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            x @ w
        if "cuda" in device:
            torch.cuda.synchronize()
        rate = 10 * 2 * 1024 * 384 * 1536 / (time.perf_counter() - start) / 1e9
        best = max(best, rate)
    return best


def table(args, seconds, flops, rate):
    """Markdown: rows a second, and how many times as fast the reference is in the same round."""
    lines = [
        "| | rows/s | reference | is so many times as fast | quartiles | of the product rate |"
    ]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: |")
    for name, own in seconds.items():
        reference = re.split(" / |, ", name)[0]
        if reference == name:
            reference = "LoRA"
        low, ratio, high = np.quantile(
            np.array(own) / np.array(seconds[reference]), [0.25, 0.5, 0.75]
        )
        cells = [name, f"{args.rows / np.median(own):.1f}"]
        cells += (
            [reference, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"] if name != "LoRA" else ["–"] * 3
        )
        share = flops[name] / np.median(own) / rate
        cells.append(f"{100 * share:.0f} %" if share else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="distilbert-base-uncased")
    add("--dataset", default="sst2")
    add("--rows", type=int, default=512, help="training rows a round, 32 a step")
    add("--rounds", type=int, default=7)
    add("--precision", default="fp32")
    add("--device", default="cpu")
    add("--peers", action="store_true", help="the peers alone, without our choices switched off")
    add("--ours", action="store_true", help="our methods and choices alone, without the peers")
    add("--grouped", action="store_true", help="LoRA, QLoRA, HiRA and their grouped peers alone")
    add("--write", action="store_true", help="put the table into docs/speed.md")
    args = parser.parse_args()
    makers = {name: functools.partial(ours, args, name) for name in OURS}
    if args.peers:
        makers = {name: make for name, make in makers.items() if OURS[name][2] is None}
    three, samplers = ("LoRA", "QLoRA", "HiRA"), ("grouped", "default")
    if args.grouped:
        makers, samplers = {name: makers[name] for name in three}, samplers[:1]
    for name in () if args.ours else three:
        for sampler in samplers:
            makers[f"{name} / PEFT, {sampler}"] = functools.partial(peer, args, name, sampler)
    jobs, flops = {}, {}
    for name, make in makers.items():
        jobs[name], flops[name] = make()
    seconds = {name: [] for name in jobs}
    for number in range(args.rounds):
        for name, train_round in jobs.items():
            seconds[name].append(train_round())
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    rate = product_rate(args.device, dtype)
    words = [word for word in sys.argv[1:] if word != "--write"]
    machine = platform.machine()
    if "cuda" in args.device:
        machine = torch.cuda.get_device_name()
    text = (
        f"`python tests/bench_peers.py {' '.join(words)}`: {machine}, {torch.get_num_threads()} "
        f"threads, {args.precision}, torch {torch.__version__.split('+')[0]}, {args.rounds} rounds "
        f"of {args.rows} rows, {rate:.0f} GFLOP/s in one product.\n\n"
    )
    text += table(args, seconds, flops, rate)
    print(text)
    if args.write:
        mark = f"speed {args.dataset} {args.device.split(':')[0]}"
        page, section = PAGE.read_text(), f"<!-- {mark} -->\n\n{text}\n\n<!-- /{mark} -->"
        old = re.compile(rf"<!-- {mark} -->.*?<!-- /{mark} -->", re.DOTALL)
        if not old.search(page):
            raise SystemExit(f"docs/speed.md has no <!-- {mark} -->")
        PAGE.write_text(old.sub(lambda found: section, page))


if __name__ == "__main__":
    main()
