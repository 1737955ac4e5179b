"""The experiment that the scripts share: batches, base model, training, scoring, measuring.

Run by itself it is the baseline that every adapter is measured against: the head alone on the
frozen base, or, with --full, ordinary fine-tuning of every weight.

    python common.py --dataset sst2
    python common.py --dataset sst2 --full --lr 1e-4

A script owns `main` and calls down into this file: load_data, load_base, (its own) adapt, train,
evaluate, measure. Nothing here knows a method; what one wants differently its `adapt` returns.
"""

import base64
import contextlib
import functools
import gc
import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from harness import meters, models
from harness.export import export
from harness.flags import parse_args, runs
from harness.process import explain_out_of_memory, fail, first_line, rank, say, stop_signals, world
from harness.rows import load_tokenizer, read_rows
from harness.splits import Split, describe, generator_for, seed_for, split_rows, split_text
from harness.store import load_adapter, load_checkpoint, save_checkpoint, save_result
from plan import plan

# ------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """What a run trains on and is scored on."""

    task: str  # "classification", "mlm" or "clm"
    reads_last: bool  # a classifier's head reads the last token, not the first
    classes: list | None  # the classes' names
    pad: int  # token ids
    mask: int | None
    vocab: int
    train: Split
    dev: Split
    test: Split
    official: int  # how many of the test rows are not held out from train; they come first
    description: dict  # its part of the result file


class Targets(NamedTuple):
    """What is read and what is to be predicted in one pass over a split."""

    inputs: torch.Tensor  # (total,) int32, tokens with masks in them
    flags: torch.Tensor | None  # (total,) bool, the tokens that are predicted
    counts: torch.Tensor  # (rows,) int64, how many of them a row has; 1 for a label


class Batch(NamedTuple):
    """One forward pass. Positions count through the flattened (B·L) batch."""

    ids: torch.Tensor  # (B, L) int64, padded
    mask: torch.Tensor | None  # (B, L) int64, 0 on padding; None where nothing is padded
    real: torch.Tensor  # (tokens,) int64, positions that are not padding
    read: torch.Tensor  # (R,) int64, positions whose output counts
    target: torch.Tensor  # (R,) int64, labels or token ids

    def to(self, device):
        """The batch on `device`; pinned, so that a GPU fetches it while it still computes."""
        tensors = [t.pin_memory() if "cuda" in device and t is not None else t for t in self]
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))


def load_data(run):
    """Read, split and tokenise `run.dataset` for this run's seed; returns a Data.

    Ends the program with one line where the data cannot be used.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    tokenizer, config = load_tokenizer(run.model)
    rows = read_rows(run.dataset, run.data_dir)
    masked = config.model_type in MASKED
    last = not masked or config.is_encoder_decoder  # the token that a classifier reads
    task = "classification" if rows.classes else "mlm" if masked else "clm"
    size = getattr(config, "vocab_size", None) or len(tokenizer)
    pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]  # an added one may have no embedding
    pad = next(i for i in pads if i is not None and i < size)
    longest = models.longest_row(config, pad)
    if not 4 <= run.max_length <= longest:
        fail(f"--max_length {run.max_length}: {run.model} takes 4 to {longest:,} tokens")
    if rows.classes:
        *splits, official = split_rows(run, rows, tokenizer, pad)
    else:
        *splits, official = split_text(run, tokenizer, masked=task == "mlm")
    highest = max(split.tokens.max().item() for split in splits)
    if highest >= size:
        fail(f"--model {run.model}: token {highest} of its tokenizer, but {size} embeddings")
    description = describe(run, rows, task, *splits, official)
    ids = (pad, tokenizer.mask_token_id, min(len(tokenizer), size))
    return Data(task, last, rows.classes, *ids, *splits, official, description)


def predicted_tokens(data, split, *seed):
    """Which tokens a language model must predict, and what it reads, as Targets.

    Masked LM (BERT §3.1): 15 % of the tokens, of which 80 % are replaced by the mask, 10 % by a
    random token, 10 % kept. One vector of random numbers over the flat tokens decides, so that
    neither batch size nor order moves a mask. Causal LM: every token with one before it in its row.
    """
    tokens = split.tokens
    if data.task == "classification":
        return Targets(tokens, None, torch.ones_like(split.labels))
    if data.task == "clm":
        inputs, flags = tokens, split.scorable.clone()
        flags[split.starts[:-1]] = False
    else:
        u = torch.rand(len(tokens), dtype=torch.float64, generator=generator_for(*seed, "masks"))
        flags = (u < 0.15) & split.scorable
        inputs = torch.where(flags & (u < 0.12), data.mask, tokens)
        swapped = flags & (u >= 0.12) & (u < 0.135)
        inputs[swapped] = ((u[swapped] - 0.12) / 0.015 * data.vocab).to(inputs.dtype)
    before = F.pad(flags.cumsum(0), (1, 0))
    return Targets(inputs, flags, before[split.starts[1:]] - before[split.starts[:-1]])


def collate(data, split, rows, targets):
    """The rows (n,) of a split as one padded Batch."""
    lengths = split.lengths[rows]
    column = torch.arange(int(lengths.max()))
    attended = column < lengths[:, None]  # (B, L)
    index = (split.starts[rows][:, None] + column).clamp(max=len(split.tokens) - 1)
    ids = torch.where(attended, targets.inputs[index], data.pad).long()
    mask = None if attended.all() else attended.long()
    real = attended.flatten().nonzero()[:, 0]
    if data.task == "classification":  # the head reads one position: [CLS], or the last token
        read = torch.arange(len(rows)) * len(column)
        if data.reads_last:
            read += lengths - 1
        return Batch(ids, mask, real, read, split.labels[rows])
    scored = attended & targets.flags[index]
    target = split.tokens[index][scored].long()
    if data.task == "clm":  # the output at a token predicts the next one
        scored = F.pad(scored[:, 1:], (0, 1))
    return Batch(ids, mask, real, scored.flatten().nonzero()[:, 0], target)


def global_batch(run):
    """Rows of an optimizer step, over all micro-batches and processes."""
    return run.batch_size * run.grad_accum * world()


def order(lengths, size, *seed):
    """Batches of `size` rows for one epoch: rows of like length together, batches in random order.

    Returns a list of index tensors that covers every row once; the last batch by length may be
    smaller. The one with the most tokens comes first: memory that does not suffice shows at once.
    """
    shuffled = torch.randperm(len(lengths), generator=generator_for(*seed, "order"))
    groups = shuffled[lengths[shuffled].argsort(stable=True)].split(size)
    batches = torch.randperm(len(groups), generator=generator_for(*seed, "batches")).tolist()
    largest = max(batches, key=lambda i: len(groups[i]) * lengths[groups[i][-1]])
    return [groups[i] for i in sorted(batches, key=lambda i: i != largest)]


def micro_batches(rows, lengths, size, run):
    """Cut the rows (n,) of a batch into what goes through the model at once: `size` rows.

    On a CPU about 1,024 tokens: what a layer writes is still in the cache when the next one reads
    it (docs/speed.md, "whole batches at once"). `lengths` is of all the split's rows.
    """
    if "cpu" in run.device and len(rows):
        size = max(1, min(size, 1024 // int(lengths[rows].max())))
    return [part for part in rows.split(size) if len(part)]


# ------------------------------------------------------------------------------------- base model


@dataclass
class Base:
    """The pre-trained model, frozen but for its head."""

    model: nn.Module
    head: list  # names of the head's tensors
    sha256: str  # of the frozen weights
    weights: int  # how many weights in all, before anything is added
    last_block_cut: bool = False  # it computes, after attention, only the rows that are read
    batch: Batch | None = None  # of the forward pass at hand, for what a method computes by row


def load_base(run, data):
    """The pre-trained model with a head for the task, on the CPU; returns a Base.

    The head is what the checkpoint lacks, and a classification head that it brings; one with
    another number of labels is drawn anew. Leaves the global generator seeded for the adapter.
    """
    _, config = load_tokenizer(run.model)
    config = models.configure(config, run.base_dropout, data.pad, data.classes)
    torch.manual_seed(seed_for(run.seed, "head"))  # what is missing is drawn while loading
    model, head = models.load(run.model, data.task, config)
    model.requires_grad_(False)
    digest, weights = hashlib.sha256(), 0
    for name, tensor in sorted(model.named_parameters()):
        tensor.requires_grad_(name in head)
        digest.update(b"" if name in head else models.bytes_of(tensor))
        weights += tensor.numel()
    base = Base(model, head, digest.hexdigest(), weights)
    read = (lambda: base.batch.read), data.reads_last
    base.last_block_cut = models.compute_read_rows_only(model, data.task, *read)
    if run.checkpointing:
        models.checkpoint_activations(run.model, model)
    torch.manual_seed(seed_for(run.seed, "adapter"))
    return base


def replace(model, targets, make):
    """Put make(layer) in the place of every frozen linear layer whose name ends with a target.

    Returns the layers' names. RuntimeError where the model has adapters already.
    """
    if any(module.keys for module in models.adapters(model).values()):
        raise RuntimeError("this model has adapters already; load the base again for new ones")
    linears = [name for name, module in model.named_modules() if models.is_linear(module)]
    frozen = [name for name in linears if not trained_tensors(model.get_submodule(name))]
    names = []
    for target in targets:
        hits = [name for name in frozen if f".{name}".endswith(f".{target}")]
        if not hits:
            known = models.layer_names(model)
            fail(f"--targets {target}: no linear layer has this name; there are {known}")
        names += hits
    names = list(dict.fromkeys(names))
    for name in names:
        model.set_submodule(name, make(model.get_submodule(name)))
    return names


# --------------------------------------------------------------------------------------- training


@dataclass
class History:
    """What a training run leaves behind, and what a checkpoint keeps of it."""

    step: int = 0
    curve: list = field(default_factory=list)  # [step, learning rate, mean loss since the last one]
    losses: list = field(default_factory=list)  # (step, learning rate, loss) not yet in the curve
    laps: list = field(default_factory=list)  # seconds of each step


def frozen_dtype(run):
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def autocast(run):
    """bf16 products where --precision says so."""
    kind = torch.device(run.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=run.precision == "bf16")


def place(base, run):
    """Move the model to the device, in fp32; with bf16 its frozen matrices in that."""
    gc.collect()  # the model of the run before, whose hooks point back at it
    with explain_out_of_memory(run):
        for tensor in base.model.parameters():
            whole = run.precision == "fp32" or tensor.requires_grad or tensor.ndim < 2
            tensor.data = tensor.float() if whole else tensor.bfloat16()
        base.model.to(run.device)


def forward(base, batch):
    """Logits of the positions that are read: (R, classes), or (R, vocabulary)."""
    base.batch = batch
    logits = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    if logits.ndim == 3 and logits.shape[:2] == batch.ids.shape:  # OPT's head passes its base by
        logits = logits.flatten(0, 1)[batch.read]
    return logits.float().flatten(0, -2)


def trained_tensors(model):
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def make_optimizer(base, run, method):
    """AdamW, or the method's own: the adapter at --lr, the head at --head_lr.

    Where only the head is trained --lr is the head's: it is what is tuned.
    """
    trained = trained_tensors(base.model)
    head = [tensor for name, tensor in trained.items() if name in base.head]
    rest = [tensor for name, tensor in trained.items() if name not in base.head]
    groups = [(rest, run.lr), (head, run.head_lr if rest else run.lr)]
    groups = [{"params": tensors, "lr": lr} for tensors, lr in groups if tensors]
    make = method.get("optimizer", functools.partial(torch.optim.AdamW, fused=True))
    return make(groups, weight_decay=run.weight_decay)


def train(base, data, run, method):
    """Train what requires a gradient; returns the History.

    AdamW with linear warm-up and decay, gradients clipped at norm 1. Only steps are on the clock.
    A loss that is not finite ends it, not the program: such a run is scored, and never chosen.
    """
    place(base, run)
    model, history, trained = base.model, History(), trained_tensors(base.model)
    size = global_batch(run)
    per_epoch = math.ceil(len(data.train.lengths) / size)
    total = 0 if run.epochs == 0 else run.max_steps or run.epochs * per_epoch
    if not trained or not total:
        say("nothing is trained: the model is scored as it is")
        return history
    say(f"{run.name}: {meters.describe(base)}, {run.precision} on {run.device}")
    optimizer = make_optimizer(base, run, method)
    peaks = [group["lr"] for group in optimizer.param_groups]
    after_step = method.get("after_step", lambda step, total, lr: None)
    load_checkpoint(run, base, data, optimizer, history)
    after_step(history.step, total, 0.0)
    try_one_row(base, data, run, trained)

    name = f"{run.name} lr {run.lr:g} seed {run.seed}"
    quiet = rank() > 0 or None  # None: no bar where nobody watches
    bar = tqdm(total=total, initial=history.step, desc=name, leave=False, disable=quiet)
    clock, batches = meters.Clock(run.device), None
    with explain_out_of_memory(run), stop_signals() as stop, bar:
        for step in range(history.step + 1, total + 1):
            epoch, place_in_epoch = divmod(step - 1, per_epoch)
            if batches is None or place_in_epoch == 0:
                targets = predicted_tokens(data, data.train, run.seed, epoch)
                batches = order(data.train.lengths, size, run.seed, epoch)
            clock.start()
            model.train()
            scale = learning_rate_scale(step, total, run.warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            lr = optimizer.param_groups[0]["lr"]
            torch.manual_seed(seed_for(run.seed, "dropout", step, rank()))  # also if continued
            loss = gradient(base, data, run, batches[place_in_epoch], targets, trained)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            after_step(step, total, lr)
            optimizer.zero_grad(set_to_none=True)
            clock.stop()
            history.step = step
            history.losses.append((step, lr, loss))
            bar.update()
            if step == total or step % max(1, total // 50) == 0:  # each look makes a GPU wait
                if not log_losses(history, bar):
                    history.laps += clock.read()
                    break
            if stop or step == total or run.save_every and step % run.save_every == 0:
                history.laps += clock.read()
                save_checkpoint(run, base, data, optimizer, history)  # scoring may be stopped, too
            if stop:
                bar.close()
                fail(f"stopped at step {step} of {total}; run it again to go on", 128 + stop[0])
    method.get("finish", lambda: None)()
    return history


def try_one_row(base, data, run, trained):
    """Have what cannot be trained end in one line before anything is: the gradient of one row."""
    targets = predicted_tokens(data, data.train, run.seed, 0)
    base.model.train()
    try:
        with explain_out_of_memory(run):
            gradient(base, data, run, torch.tensor([0]), targets, trained)
    except Exception as error:  # the libraries' models raise of every kind
        kind, why = base.model.config.model_type, f"{type(error).__name__}: {first_line(error)}"
        fail(f"--model {run.model}: {kind} cannot be trained in {run.precision} ({why})")
    base.model.zero_grad(set_to_none=True)


def learning_rate_scale(step, total, warmup):
    """The share of the peak rate at `step` (1 … total): a linear rise, then a linear fall."""
    rise = step / max(1, warmup * total)
    return min(rise, (total - step + 1) / max(1, (1 - warmup) * total), 1.0)


def gradient(base, data, run, rows, targets, trained):
    """Leave the gradient of the mean loss over the global batch `rows` in .grad; returns that loss.

    The loss is the sum over scored examples or tokens, divided by their number in all micro-batches
    and processes: cutting the batch does not change the gradient (but for channels that are picked
    for each part). Each process takes every world()-th row; one without rows adds zeros.
    """
    scored = targets.counts[rows].sum().clamp(min=1).item()
    loss = torch.zeros((), device=run.device)
    for part in micro_batches(rows[rank() :: world()], data.train.lengths, run.batch_size, run):
        batch = collate(data, data.train, part, targets).to(run.device)
        with autocast(run):  # nothing holds on to the logits: a large vocabulary's are most of it
            part_loss = F.cross_entropy(forward(base, batch), batch.target, reduction="sum")
        part_loss = part_loss / scored
        part_loss.backward()
        loss += part_loss.detach()
    if world() > 1:  # adapters are small: one flat tensor, one all-reduce a step, nothing else
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in trained.values()]
        everything = torch.cat([loss[None], *(grad.flatten() for grad in grads)])
        dist.all_reduce(everything)
        loss, sizes = everything[0], [grad.numel() for grad in grads]
        for tensor, grad in zip(trained.values(), everything[1:].split(sizes), strict=True):
            tensor.grad = grad.view_as(tensor)
    unreached = [name for name, tensor in trained.items() if tensor.grad is None]
    if unreached:
        fail(f"--targets: no gradient reaches {', '.join(unreached[:4])}; name other layers")
    return loss


def log_losses(history, bar):
    """Move the losses since the last look into the curve, as a mean; False if it is not finite."""
    step, lr, _ = history.losses[-1]
    mean = torch.tensor([float(loss) for _, _, loss in history.losses]).mean().item()
    history.losses.clear()
    if not math.isfinite(mean):
        bar.close()
        say(f"the loss is not finite at step {step}, rate {lr:.3g}: training ends; lower --lr?")
        return False
    history.curve.append([step, lr, mean])
    bar.set_postfix(loss=f"{mean:.3f}")
    return True


# ---------------------------------------------------------------------------------------- scoring


def evaluate(base, data, run):
    """Score dev and test; prints and returns {"metrics": {split: metrics}, "rows": …}.

    Accuracy, f1 (macro) and loss, or a scored token's mean loss and its exp, the perplexity. "rows"
    has which test rows are right, or each block's summed loss; "official" leaves held-out rows out.
    """
    place(base, run)
    with explain_out_of_memory(run, f"--eval_batch_size {max(1, run.eval_batch_size // 2)}"):
        dev = score(base, data, data.dev, run, "dev")
        test = score(base, data, data.test, run, "test")
    metrics = {"dev": summarise(data, data.dev, *dev), "test": summarise(data, data.test, *test)}
    if len(data.test.lengths) > data.official:
        metrics["official"] = summarise(data, data.test, *test, rows=data.official)
    nll, scored, predicted = test
    if data.classes:
        bits = np.packbits((predicted == data.test.labels).numpy())
        rows = {"correct": base64.b64encode(bits.tobytes()).decode()}
    else:
        rows = {"nll": nll.round(decimals=3).tolist(), "scored": scored.tolist()}
    first = "accuracy" if data.classes else list(metrics["test"])[-1]
    shown = " · ".join(f"{name} {part[first]:.4f}" for name, part in metrics.items())
    say(f"{run.name} lr {run.lr:g} seed {run.seed}: {first.replace('_', ' ')}: {shown}")
    return {"metrics": metrics, "rows": rows}


def scoring_parts(lengths, run):
    """What goes through the model at once while scoring: rows of like length together."""
    size = run.eval_batch_size
    batches = lengths.argsort(stable=True).split(size)
    return [part for batch in batches for part in micro_batches(batch, lengths, size, run)]


@torch.inference_mode()
def score(base, data, split, run, what):
    """One pass over a split, every row once, whatever the batch size or number of processes.

    Returns (nll, scored, predicted), each (rows,): summed loss, scored tokens, predicted class. A
    loss that is not finite counts as a guess among half a billion words, its class as wrong.
    """
    base.model.eval()
    targets, lengths = predicted_tokens(data, split, what), split.lengths
    nll = torch.zeros(len(lengths), dtype=torch.float64, device=run.device)
    predicted = torch.zeros(len(lengths), dtype=torch.int64, device=run.device)
    parts = scoring_parts(lengths, run)[rank() :: world()]
    for rows in tqdm(parts, f"scoring {what}", disable=rank() > 0 or None, leave=False):
        batch = collate(data, split, rows, targets).to(run.device)
        with autocast(run):
            logits = forward(base, batch)
        losses = F.cross_entropy(logits, batch.target, reduction="none").double()
        rows = rows.to(run.device)
        nll.index_add_(0, rows[batch.read // batch.ids.shape[1]], losses)
        if data.classes:
            predicted[rows] = logits.argmax(-1)
    if world() > 1:
        dist.all_reduce(nll)
        dist.all_reduce(predicted)
    lost = ~nll.isfinite()
    if lost.any():
        say(f"{what}: {lost.sum():,} rows have a loss that is not finite: wrong, at 20 a token")
        nll[lost], predicted[lost] = 20.0 * targets.counts.to(nll)[lost], -1
    return nll.cpu(), targets.counts, predicted.cpu()


def summarise(data, split, nll, scored, predicted, rows=None):
    """The metrics of the first `rows` rows (default: all) from what `score` returns."""
    nll, scored, predicted = nll[:rows], scored[:rows], predicted[:rows]
    loss = (nll.sum() / scored.sum()).item()
    if not data.classes:
        name = "mlm_perplexity" if data.task == "mlm" else "causal_perplexity"
        return {"loss": loss, name: math.exp(min(loss, 700))}
    labels = split.labels[:rows]
    hits, f1 = predicted == labels, []
    for label in range(len(data.classes)):  # 2·TP / (rows of the class + rows predicted as it)
        either = (labels == label).sum() + (predicted == label).sum()
        if either:
            f1.append(2 * (hits & (labels == label)).sum().item() / either.item())
    return {"accuracy": hits.double().mean().item(), "f1": sum(f1) / len(f1), "loss": loss}


# -------------------------------------------------------------------------------------- measuring


def measure(base, data, run, method, history):
    """The costs of a trained model, as the result file has them.

    What cannot be measured is left out, in a line; with --no_timing also latency and `merged`.
    """
    steps, lengths = steps_of(data, run, history.step), data.train.lengths
    sizes = [(sum(map(len, parts)), int(lengths[torch.cat(parts)].sum())) for parts in steps]
    per_epoch = math.ceil(len(lengths) / global_batch(run))
    costs = {
        "parameters": meters.count_parameters(base),
        "time": meters.summarise_time(history.laps, per_epoch, sizes),
        "disk": meters.count_disk(base, frozen_dtype(run)),
    }

    def attempt(name, work, *more):
        try:
            costs[name] = work(base, data, run, *more)
        except Exception as error:  # the scores are safe: no cost is worth a run
            say(f"{name}: not measured ({type(error).__name__}: {first_line(error)})")

    attempt("memory", count_memory, method)
    attempt("flops", count_flops, steps)
    if not run.no_timing:
        attempt("inference", time_inference)
        attempt("merged", score_merged)
    return costs


def steps_of(data, run, steps):
    """The micro-batches of every step that ran, of all processes: [[rows (n,), …], …]."""
    every, lengths = [], data.train.lengths
    for epoch in itertools.count():
        if len(every) >= steps:
            return every[:steps]
        for rows in order(lengths, global_batch(run), run.seed, epoch):
            shares = [rows[number :: world()] for number in range(world())]
            cut = (micro_batches(share, lengths, run.batch_size, run) for share in shares)
            every.append(list(itertools.chain.from_iterable(cut)))


def count_memory(base, data, run, method):
    """Bytes at the peak of a training step and of an inference batch, by kind.

    Both on the largest batch that the run had. The step has a learning rate of 0 and an optimizer
    with its state, so that nothing changes. CUDA's own peak of the same work stands beside each.
    """
    model, trained, memory = base.model, trained_tensors(base.model), {}
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    known = {"frozen weights": frozen, "trained weights": list(trained.values()), "optimizer": []}

    def peak_of(name, work):
        counted = meters.live_bytes(work, trained.values(), run.device, **known)
        memory[name], memory[f"{name}_allocator"] = counted

    if trained:
        optimizer = make_optimizer(base, run, method)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        rows = order(data.train.lengths, global_batch(run), run.seed, 0)[0]
        targets = predicted_tokens(data, data.train, run.seed, 0)

        def step():
            gradient(base, data, run, rows, targets, trained)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.train()
        step()
        states = optimizer.state.values()
        known["optimizer"] = [t for s in states for t in s.values() if torch.is_tensor(t)]
        peak_of("train", step)
        known["optimizer"] = []
        del optimizer, states  # or its state would count in inference
    model.eval()
    lengths = data.test.lengths
    rows = max(scoring_parts(lengths, run), key=lambda rows: len(rows) * lengths[rows].max())
    batch = collate(data, data.test, rows, predicted_tokens(data, data.test, "test")).to(run.device)
    with torch.no_grad(), autocast(run):
        peak_of("inference", lambda: forward(base, batch))
    return memory


def count_flops(base, data, run, steps):
    """Operations of the steps that ran, a mean step and all, and of a test row's inference.

    A pass costs so much a token, a pair of tokens and a row that is read: fitted, within 2 %. Dense
    first steps of contextual sparsity count as the later ones do.
    """

    def total(split, parts, training):
        targets, lengths, prices = predicted_tokens(data, split, "test"), split.lengths, []
        for rows in parts:
            length, read = int(lengths[rows].max()), int(targets.counts[rows].sum())
            prices.append((len(rows) * length, len(rows) * length**2, read))

        def work(i):
            batch = collate(data, split, parts[i], targets).to(run.device)
            with autocast(run), torch.set_grad_enabled(training):
                loss = F.cross_entropy(forward(base, batch), batch.target)
            if training:
                loss.backward()

        base.model.train(training)
        return meters.fitted_flops(base.model, work, prices)

    lengths = data.test.lengths
    inference = total(data.test, scoring_parts(lengths, run), training=False)
    training = total(data.train, [part for step in steps for part in step], training=True)
    step = training / max(1, len(steps))
    return {"step": step, "total": training, "inference_row": inference / len(lengths)}


@torch.inference_mode()
def time_inference(base, data, run):
    """Latency of the longest test row, and of the 32 longest: base, merged and unmerged model."""
    model, split, found = base.model.eval(), data.test, []
    targets = predicted_tokens(data, split, "test")
    merging = functools.partial(models.as_plain_linears, model, dtype=frozen_dtype(run))
    states = {"base": lambda: merging(merged=False)}
    if models.adapters(model):
        states |= {"merged": lambda: merging(merged=True), "unmerged": contextlib.nullcontext}
    for size in (1, 32):
        rows = split.lengths.argsort(descending=True, stable=True)[:size]
        batch = collate(data, split, rows, targets).to(run.device)

        def once(batch=batch):
            with autocast(run):
                forward(base, batch)

        result = {"batch": len(rows), "length": batch.ids.shape[1]}
        for name, ms in meters.latencies(once, states, run.device).items():
            result[name] = {"latency_ms": ms, "samples_per_second": 1000 * len(rows) / ms["p50"]}
        found.append(result)
    return found


def score_merged(base, data, run):
    """The test score with every adapter merged; None without an adapter."""
    if not models.adapters(base.model):
        return None
    with models.as_plain_linears(base.model, True, frozen_dtype(run)):
        return summarise(data, data.test, *score(base, data, data.test, run, "test"))


# ------------------------------------------------------------------------------------ the baseline


def add_args(parser):
    """Add the baseline's own flag."""
    method = {"dest": "method", "action": "store_const", "const": "full", "default": "head_only"}
    parser.add_argument("--full", **method, help="train every weight; wants a small --lr, 1e-4")


def adapt(base, run):
    """The baseline: nothing is added; with --full the base is trained too."""
    if run.method == "full":
        base.model.requires_grad_(True)
    return {}


def main(argv=None):
    """Adapt, train, score and measure once per seed and rate; returns the result files' paths."""
    args, paths = parse_args(__doc__, __file__, add_args, argv), []
    if args.plan:
        return plan(args, adapt)
    for run in runs(args):
        data = load_data(run)
        base = load_base(run, data)
        method = adapt(base, run)
        if run.eval_only:
            load_adapter(run, base, method)
            evaluate(base, data, run)
        else:
            history = train(base, data, run, method)
            scores = evaluate(base, data, run)
            save_result(base, data, run, method, history, scores)  # what follows cannot lose it
            costs = measure(base, data, run, method, history)
            paths.append(save_result(base, data, run, method, history, scores, costs))
        if run.export:
            export(run, base)
    return paths


if __name__ == "__main__":
    main()
