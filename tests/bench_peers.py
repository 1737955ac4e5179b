"""Our training loop against PEFT with transformers' Trainer, the same work on both sides, and what each of our choices gives.

    python tests/bench_peers.py --model models/all-MiniLM-L6-v2                # LoRA, QLoRA, HiRA against their peers
    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --ablate       # our choices, each switched off
    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --dataset imdb --contextual    # against our LoRA
    python tests/bench_peers.py --model models/all-MiniLM-L6-v2 --dataset imdb --profile       # where the two spend time

Both sides: the same base, rows, batch size, length limit, epochs, dtype, AdamW (fused), learning rates, the checkpoint's own
dropout, clipping, warm-up; adapter dropout 0. The clock runs from the first batch to the end of the last step. Peers run
with the Trainer's length-grouped sampler and with its default one. Every run is a process of its own; runs alternate, and
ratios are medians over the rounds, each of which has a seed of its own. Run it on a machine that does nothing else.
--random distilbert (or bert) takes that architecture with random weights and --model's tokenizer: for speed, not accuracy.
With --record the figures go to tests/bench_peers.json and from there into README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECORD, README = Path(__file__).with_suffix(".json"), ROOT / "README.md"
METHODS = ("lora", "qlora", "hira")
LR = {"hira": 1e-2}  # the others: 3e-3
ABLATIONS = ("all on", "random batches", "whole batches at once", "freed memory returned", "torch's dropout and attention",
             "plain AdamW", "autograd's backward")


def flags(args, method):
    """The command line that both sides read their settings from."""
    lr = LR.get(method, 3e-3)
    words = ["--dataset", args.dataset, "--model", args.model, "--train_samples", args.samples, "--eval_samples",
             args.eval_samples, "--epochs", 1, "--lr", lr, "--head_lr", lr, "--batch_size", args.batch_size,
             "--precision", args.precision, "--device", args.device, "--out", "/nonexistent/never-written"]
    return words + (["--max_length", args.max_length] if args.max_length else [])


def random_model(kind, model):
    """A folder with the architecture's random weights, in its usual size, and the tokenizer of `model`; made once."""
    import torch

    import common
    if not Path(model).is_dir():
        common.offline_if_unreachable()  # before transformers, which reads that answer once
    import transformers
    folder = ROOT / "models" / f"random-{kind}"
    if not folder.is_dir():
        tokenizer, _ = common.load_tokenizer(argparse.Namespace(model=model))
        torch.manual_seed(0)
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def prepare(args, script, extra=()):
    """(run, data, base model) as the script itself would make them."""
    import common
    parsed = common.parse_args(script.__doc__, script.__file__, script.add_args, [*flags(args, script.__name__), *extra])
    run = argparse.Namespace(**vars(parsed), seed=args.seed, settings=common.settings(parsed), seconds={},
                             path=Path("/nonexistent/never-written/run.json"), load_average=[])
    data = common.load_data(run)
    return run, data, common.load_base(run, data)


def accuracy(args, model, data, run):
    """Accuracy on the scored rows; None where they are too few to tell anything."""
    import common
    return common.score(model, data, run)["accuracy"] if args.eval_samples >= 500 else None


def ours(args, name, off=None, extra=()):
    """Train with one of our scripts; `off` names the one choice of ours that is switched off."""
    import torch

    import common
    script = __import__(name)
    if off == "torch's dropout and attention":
        common.quicken = lambda model: None
    if off == "whole batches at once":
        common.parts = lambda rows, lengths, size, device: [rows]
    if off == "freed memory returned":
        common.keep_freed_memory = lambda: None
    if off == "random batches":
        common.order = lambda lengths, size, *seed: list(
            torch.randperm(len(lengths), generator=common.generator(*seed, "order")).split(size))
    run, data, model = prepare(args, script, extra)
    method = script.adapt(model, run)
    if off == "plain AdamW":
        method["optimizer"] = lambda groups: torch.optim.AdamW(groups, foreach=False)
    if off == "autograd's backward" and name == "hira":
        script.HiRALinear.forward = lambda layer, x: layer.base(x) + torch.nn.functional.linear(
            x, common.weight_of(layer.base) * (layer.B @ layer.A))
    if off == "autograd's backward" and name == "qlora":
        script.NF4Linear.forward = lambda layer, x: torch.nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)
    history = common.train(model, data, run, method)
    peak = history.memory["train_peak"] - history.before
    return {"samples_per_second": history.rows / history.seconds, "padded_per_sample": history.padded / history.rows,
            "peak_mib": peak / 2**20, "accuracy": accuracy(args, model, data, run)}


def peer(args, name, sampler):
    """Train with PEFT and the Trainer on the same rows."""
    import peft
    import torch
    import transformers
    from transformers import TrainerCallback, TrainingArguments

    import common
    common.keep_freed_memory = lambda: None
    run, data, model = prepare(args, __import__(name))
    model.set_attn_implementation("sdpa")  # as the Trainer would load it: none of our attention or dropout
    for path, module in list(model.named_modules()):
        if type(module) is common.Dropout:
            model.set_submodule(path, torch.nn.Dropout(module.p))
    heads = sorted({path.removeprefix(f"{model.base_model_prefix}.").split(".")[0] for path in run.head})
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    if name == "qlora":
        from transformers import BitsAndBytesConfig
        torch.manual_seed(common.stream(args.seed, "head"))
        model = type(model).from_pretrained(
            common.model_folder(run), num_labels=data.classes, dtype=dtype, quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[*heads, "pooler"]), device_map={"": run.device})
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    shared = {"r": run.rank, "target_modules": run.targets, "task_type": "SEQ_CLS", "modules_to_save": heads}
    config = peft.HiraConfig(**shared) if name == "hira" else peft.LoraConfig(
        lora_alpha=2 * run.rank, lora_dropout=0.0, **shared)
    torch.manual_seed(common.stream(args.seed, "adapter"))
    model = peft.get_peft_model(model, config)
    split, device = data.train, torch.device(run.device)
    rows = [{"input_ids": split.tokens[a:b].tolist(), "labels": int(label)}
            for a, b, label in zip(split.starts, split.starts[1:], split.labels, strict=False)]
    figures = {"padded": 0}

    def collate(batch):
        length = max(len(row["input_ids"]) for row in batch)
        figures["padded"] += length * len(batch)
        ids = torch.tensor([row["input_ids"] + [data.pad] * (length - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            common.reset_peak(device)
            figures["before"], figures["start"] = common.resident(device), time.perf_counter()

        def on_step_end(self, *_, **__):
            common.synchronise(device)
            figures["end"], figures["peak"] = time.perf_counter(), common.peak(device)
    grouped = {"train_sampling_strategy": "group_by_length"} if sampler == "grouped" else {}
    trainer = transformers.Trainer(
        model, TrainingArguments(
            "/tmp/never-saved", per_device_train_batch_size=run.batch_size, num_train_epochs=1, learning_rate=run.lr,
            lr_scheduler_type="linear", warmup_steps=run.warmup, weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=run.precision == "bf16", use_cpu=device.type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=args.seed,
            **grouped),
        train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.train()
    return {"samples_per_second": len(rows) / (figures["end"] - figures["start"]),
            "padded_per_sample": figures["padded"] / len(rows), "peak_mib": (figures["peak"] - figures["before"]) / 2**20,
            "accuracy": accuracy(args, model, data, run)}


PARTS = {  # what torch's profiler calls the parts of an encoder's training step on a CPU
    "products of linear layers": ("aten::mm", "aten::addmm"), "products in attention": ("aten::bmm",),
    "softmax and dropout in attention": ("QuickAttention", "QuickAttentionBackward"),  # its products are taken off
    "other dropout": ("QuickDropout", "QuickDropoutBackward"),
    "activation": ("aten::gelu", "aten::gelu_backward"),
    "layer norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "picking and gathering channels": ("aten::index", "aten::topk", "aten::sort", "aten::cat", "aten::index_copy_"),
}


def profile(args, name, extra=()):
    """Milliseconds a sample of one of our scripts' training, by part of the step."""
    import torch

    import common
    script = __import__(name)
    run, data, model = prepare(args, script, extra)
    method = script.adapt(model, run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        history = common.train(model, data, run, method)
    events = {event.key: event for event in seen.key_averages()}
    inside = ("QuickAttention", "QuickAttentionBackward", "QuickDropout", "QuickDropoutBackward")  # Functions: with their ops
    found = {part: sum(events[key].cpu_time_total if key in inside else events[key].self_cpu_time_total
                       for key in keys if key in events) for part, keys in PARTS.items()}
    found["softmax and dropout in attention"] -= found["products in attention"]
    found["all the rest"] = history.seconds * 1e6 - sum(found.values())
    return {part: us / 1000 / history.rows for part, us in found.items()} | {"all": history.seconds * 1000 / history.rows}


def slicing_gain(width, rows, sparsity=0.9):
    """Seconds of one block's attention projections and of its feed-forward layers, forward and input gradient, dense and
    sliced: {"attention": (dense, sliced), "feed-forward": (dense, sliced)}. Attention drops 0.8 times as much."""
    import torch
    import torch.nn.functional as F
    x, up = torch.randn(rows, width, requires_grad=True), torch.randn(4 * width, width)
    down, square, grad = torch.randn(width, 4 * width), torch.randn(width, width), torch.randn(rows, width)
    kept = torch.randperm(width)[:int(width * (1 - 0.8 * sparsity))].sort().values
    middle = torch.randperm(4 * width)[:int(4 * width * (1 - sparsity))].sort().values

    def attention(sliced):
        for _ in range(3):  # query, key, value: their unpicked channels become zero, since attention works at full width
            y = torch.zeros(rows, width).index_copy(1, kept, F.linear(x, square[kept])) if sliced else F.linear(x, square)
            torch.autograd.grad(y, x, grad)
        torch.autograd.grad(F.linear(x[:, kept], square[:, kept]) if sliced else F.linear(x, square), x, grad)

    def feed_forward(sliced):
        first, second = (up[middle], down[:, middle]) if sliced else (up, down)
        torch.autograd.grad(F.linear(F.gelu(F.linear(x, first)), second), x, grad)

    def seconds(work, sliced):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            work(sliced)
            times.append(time.perf_counter() - start)
        return min(times)
    return {name: (seconds(work, False), seconds(work, True))
            for name, work in (("attention", attention), ("feed-forward", feed_forward))}


def alternate(args, jobs):
    """{label: list of figures}, the jobs in turn, --rounds times; each in a fresh process, so that neither memory nor thread
    pools carry over."""
    results = {label: [] for label in jobs}
    for seed in range(args.rounds):
        for label, job in jobs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(seed), "--job", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{label} failed:\n{done.stderr[-2000:]}")
            results[label].append(json.loads(done.stdout.splitlines()[-1]))
            key = "all" if "all" in results[label][-1] else "samples_per_second"  # ms a sample in a profile
            print(f"round {seed + 1}: {label}: {key} {results[label][-1][key]:.1f}", file=sys.stderr)
    return results


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def mean_accuracy(runs):
    return f"{statistics.mean(run['accuracy'] for run in runs):.3f}" if runs[0]["accuracy"] is not None else "–"


def ratio(runs, reference):
    """How many times as fast as the reference: the median over rounds."""
    return statistics.median(a["samples_per_second"] / b["samples_per_second"] for a, b in zip(runs, reference, strict=True))


def markdown(header, rows):
    return "\n".join([f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}",
                      *(f"| {' | '.join(row)} |" for row in rows)])


def peers_table(results):
    """Ours and both peers, one row a method; peak memory over what was resident before training."""
    rows = []
    for name in METHODS:
        if f"{name} ours" in results:
            our, grouped, default = (results[f"{name} {side}"] for side in ("ours", "grouped", "default"))
            lora = f"{ratio(our, results['lora ours']):.2f}" if "lora ours" in results else "–"
            rows.append([name, *(f"{median(runs, 'samples_per_second'):.0f}" for runs in (our, grouped, default)),
                         f"{ratio(our, grouped):.2f}", f"{ratio(our, default):.2f}", lora,
                         " / ".join(f"{median(runs, 'peak_mib'):.0f}" for runs in (our, grouped)),
                         " / ".join(map(mean_accuracy, (our, grouped)))])
    return markdown(["method", "ours, samples/s", "PEFT + Trainer, length-grouped", "default sampler", "times the grouped",
                     "times the default", "times our LoRA", "peak MiB, ours / grouped", "accuracy, ours / grouped"], rows)


def relative_table(results):
    """Every run beside the first of its method ("name, what")."""
    rows = []
    for label, runs in results.items():
        first = next(key for key in results if key.split(",")[0] == label.split(",")[0])
        first = first if "lora, all on" in results else next(iter(results))
        rows.append([label, f"{median(runs, 'samples_per_second'):.1f}", f"{median(runs, 'padded_per_sample'):.1f}",
                     f"{median(runs, 'peak_mib'):.0f}", mean_accuracy(runs),
                     f"{ratio(runs, results[first]):.2f}"])
    return markdown(["training loop", "samples/s", "padded tokens a sample", "peak MiB", "accuracy", "times the first"], rows)


def profile_table(results):
    """One row for each part of a training step: milliseconds a sample, and the share of the run."""
    return markdown(["ms a sample", *results], [
        [part, *(f"{median(runs, part):.1f} ({100 * median(runs, part) / median(runs, 'all'):.0f} %)"
                 for runs in results.values())] for part in (*PARTS, "all the rest", "all")])


def table(kind, results):
    return {"peers": peers_table, "profile": profile_table}.get(kind, relative_table)(results)


def page():
    """README's part on speed, from tests/bench_peers.json."""
    text = []
    for kind, part in json.loads(RECORD.read_text()).items():
        what = f"({part['machine']}; " + ("one run each)" if part["rounds"] == 1 else
                                          f"{part['rounds']} rounds: medians, and the mean accuracy)")
        text.append(f"`{part['command']}`\n{what}:\n\n{table(kind.split()[0], part['results'])}")
    return "\n\n".join(text)


def record(args, kind, results):
    """Keep the figures, and renew what README says."""
    import torch
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    words = [word for word in sys.argv[1:] if word != "--record"]
    kept[f"{kind} {args.dataset} {args.random or Path(args.model).name} {args.device}"] = {
        "command": f"python tests/bench_peers.py {' '.join(words)}", "rounds": args.rounds,
        "machine": f"{machine}, {args.precision}, torch {torch.__version__.split('+')[0]}", "results": results}
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    before, rest = README.read_text().split("<!-- speed -->\n")
    README.write_text(f"{before}<!-- speed -->\n{page()}\n<!-- /speed -->{rest.split('<!-- /speed -->')[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="distilbert-base-uncased")
    add("--dataset", default="sst2")
    add("--samples", type=int, default=2048, help="training rows")
    add("--eval_samples", type=int, default=872)
    add("--batch_size", type=int, default=32)
    add("--max_length", type=int)
    add("--precision", default="fp32")
    add("--device", default="cpu")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--rounds", type=int, default=3)
    add("--ablate", action="store_true", help="our own choices, each switched off, instead of the peers")
    add("--contextual", nargs="*", metavar="SPARSITY[/LAYERS]", help="contextual sparsity against our LoRA instead of the "
        "peers; with /LAYERS that many first layers stay dense (default: 0.9, the shipped setting, which is half of them)")
    add("--profile", action="store_true", help="where the time goes, in LoRA and in each setting of --contextual")
    add("--random", choices=["distilbert", "bert"], help="this architecture with random weights and --model's tokenizer")
    add("--json", action="store_true")
    add("--record", action="store_true", help="keep the figures in tests/bench_peers.json and README.md")
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.random:
        args.model = random_model(args.random, args.model)
    if args.job:
        side, *rest = json.loads(args.job)
        print(json.dumps({"ours": ours, "peer": peer, "profile": profile}[side](args, *rest)))
        return
    if args.contextual is not None or args.profile:
        kind, jobs = "profile" if args.profile else "contextual", {"lora": ["lora", []]}
        for setting in args.contextual or ["0.9"]:
            sparsity, _, dense = setting.partition("/")
            layers = f", {dense} layer{'s' if dense != '1' else ''} dense" if dense else ""
            jobs[f"contextual, sparsity {sparsity}{layers}"] = [
                "sparse_lora", ["--mode", "contextual", "--sparsity", sparsity, *(["--dense_layers", dense] if dense else [])]]
        jobs = {label: ("profile", name, extra) if args.profile else ("ours", name, None, extra)
                for label, (name, extra) in jobs.items()}
    elif args.ablate:
        kind, jobs = "ablation", {f"{name}, {off}": ("ours", name, off) for name in args.methods for off in ABLATIONS
                                  if off != "autograd's backward" or name != "lora"}
    else:
        kind, jobs = "peers", {f"{name} {side}": ("ours", name) if side == "ours" else ("peer", name, side)
                               for name in args.methods for side in ("ours", "grouped", "default")}
    results = alternate(args, jobs)
    if args.record:
        record(args, kind, results)
    print(json.dumps(results, indent=1) if args.json else table(kind, results))
    for width, rows in ((384, 1024), (768, 1024)) if args.ablate and not args.json else ():
        for part, (dense, sliced) in slicing_gain(width, rows).items():
            print(f"width {width}, {rows} rows: {part} {dense * 1000:.0f} ms dense, {sliced * 1000:.0f} ms sliced at "
                  f"sparsity 0.9, {dense / sliced:.1f} times as fast")


if __name__ == "__main__":
    main()
