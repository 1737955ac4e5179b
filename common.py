"""The experiment that all scripts share: batches, base model, training, scoring, measuring.

Each script has its own `main`, which calls the functions below in order: load_data, load_base, (the
script's) adapt, train, evaluate, measure. This file knows nothing about any method: `adapt` returns
a Method, which says what the method needs to change.
"""

import base64
import contextlib
import functools
import gc
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from harness import batches, meters, models
from harness.batches import Batch, collate, count_steps, predicted_tokens, training_batches
from harness.output_positions import compute_output_positions_only
from harness.probe import check_logits
from harness.process import (
    explain_out_of_memory,
    fail,
    library_errors,
    process_count,
    process_index,
    say,
    stop_signals,
)
from harness.progress import Progress
from harness.rows import load_tokenizer, read_examples
from harness.splits import DataFlags, Split, describe, seed_for, split_examples, split_text
from harness.store import head_classes, load_checkpoint, save_checkpoint

# ------------------------------------------------------------- the interface of a method


@dataclass
class Method:
    """What a script's `adapt` returns: how it trains. The defaults are plain training."""

    # These fields are written to PEFT's adapter_config.json. Without an adapter there are none.
    peft: dict = field(default_factory=dict)
    # How the frozen base is stored, for example "nf4". Empty means: as in the checkpoint. An
    # adapter that was trained on a base in one format is refused on a base in another.
    base_format: str = ""
    # optimizer(parameter groups, weight_decay=...) makes the optimizer.
    optimizer: Callable = functools.partial(torch.optim.AdamW, fused=True)
    # The first examples of a batch, up to this many tokens, are never cut into several passes.
    tokens_together: int = 0
    # `train` calls before_step(step, total) before each step 1 … total, and after_step(step,
    # total, lr) after the optimizer has made it. lr is the adapter's learning rate in this step.
    before_step: Callable = lambda step, total: None
    after_step: Callable = lambda step, total, lr: None
    # `train` calls finish() after the last step and adds what it returns to `peft`.
    finish: Callable = dict
    # report() returns numbers for the result file. It may take long: the scores are saved before.
    report: Callable = dict


TYPICAL_STEP = 50, 100  # step and total for before_step when costs are measured on one step

# ------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """What a run trains on and is scored on."""

    task: str  # "classification", "mlm" or "clm"
    reads_last: bool  # a classifier's head reads the last token, not the first
    classes: list | None  # the classes' names
    pad_id: int  # token ids of padding and of the mask
    mask_id: int | None
    vocab_size: int
    train: Split
    dev: Split
    test: Split
    official: int  # how many test examples are the data set's own; --heldout ones follow
    description: dict  # its part of the result file


def load_data(run):
    """The data of this run's seed, read once for all its learning rates; returns a Data."""
    return read_data(DataFlags(*(getattr(run, flag) for flag in DataFlags._fields)))


@functools.lru_cache(maxsize=1)
def read_data(flags):
    """Read, split and tokenize `flags.dataset`; one line and status 2 if it cannot be used."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    tokenizer, config = load_tokenizer(flags.model)
    examples = read_examples(flags.dataset, flags.data_dir)
    examples = models.number_as_head(examples, head_classes(flags, config))
    masked = config.model_type in MASKED
    last = not masked or config.is_encoder_decoder  # the token that a classifier reads
    task = "classification" if examples.classes else "mlm" if masked else "clm"
    size = getattr(config, "vocab_size", None) or len(tokenizer)
    pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]  # an added one may have no embedding
    pad = next(i for i in pads if i is not None and i < size)
    models.check_length(flags, config)
    make_splits = split_examples if examples.classes else split_text
    splits, official = make_splits(flags, examples, pad if examples.classes else masked)
    if (highest := max(int(split.tokens.max()) for split in splits.values())) >= size:
        fail(f"--model {flags.model}: token {highest} of its tokenizer, but {size} embeddings")
    ids = (pad, tokenizer.mask_token_id, min(len(tokenizer), size))
    description = describe(flags, examples, task, splits, official)
    data = Data(task, last, examples.classes, *ids, *splits.values(), official, description)
    for name in ("dev", "test"):
        if not predicted_tokens(data, splits[name], name).counts.any():
            fail(f"--dataset {flags.dataset}: no token of its {name} text is predicted; add text")
    return data


# ------------------------------------------------------------------------------------- base model


@dataclass
class Base:
    """The pre-trained model. Everything but its head is frozen."""

    model: nn.Module
    head_names: list  # the names of the tensors that are trained, beside an adapter
    sha256: str  # the hash of the frozen weights
    weights: int  # the number of all weights, before an adapter is added
    task: str  # as in Data
    # Whether the last block computes only the tokens whose output is used (output_positions.py).
    last_block_cut: bool = False
    # The batch of the latest forward pass. `forward` sets it; the cut last block and
    # contextual_lora.py read it.
    batch: Batch | None = None


def load_base(run, data):
    """The pre-trained model; a classifier's head, and what the checkpoint lacks, are trained.

    The run's seed draws what is missing, so that every method starts from the same head.
    """
    _, config = load_tokenizer(run.model)
    config = models.configure(config, run.base_dropout, data.pad_id, data.classes)
    torch.manual_seed(seed_for(run.seed, "head"))  # what is missing is drawn while loading
    model, head = models.load(run, data.task, config)
    models.check_length(run, config, model)
    base = make_base(run, model, head, data.task, data.reads_last)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(b"" if name in head else models.bytes_of(tensor))
    base.sha256 = digest.hexdigest()
    torch.manual_seed(seed_for(run.seed, "adapter"))
    return base


def make_base(run, model, head, task, reads_last):
    """The Base of a model whose tensors `head` are trained; without the hash of its weights."""
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in head)
    base = Base(model, head, "", sum(tensor.numel() for tensor in model.parameters()), task)
    positions = (lambda: base.batch.output_positions), reads_last
    base.last_block_cut = compute_output_positions_only(model, task, *positions)
    if run.precision == "bf16":
        output = None if task == "classification" else model.get_output_embeddings()
        for name, layer in model.named_modules():
            if layer is output or isinstance(layer, nn.Linear) and f"{name}.weight" in head:
                models.compute_logits_in_fp32(layer)
    if run.checkpointing:
        models.checkpoint_activations(run.model, model)
    return base


def replace(run, base, targets, make):
    """Put make(layer) in the place of every frozen linear layer whose name ends with a target.

    Returns the new layers by name. RuntimeError if the model has adapters already.
    """
    model, names = base.model, []
    if any(module.keys for module in models.stand_ins(model).values()):
        raise RuntimeError("this model has adapters already; load the base again for new ones")
    linears = [name for name, module in model.named_modules() if models.is_linear(module)]
    frozen = [name for name in linears if not trained_tensors(model.get_submodule(name))]
    for target in targets:
        matches = [name for name in frozen if f".{name}".endswith(f".{target}")]
        if not matches:
            available = models.layer_names(model)
            fail(f"--targets {target}: no linear layer has this name; there are {available}")
        names += matches
    with explain_out_of_memory(run, "a smaller --rank"):
        layers = {name: make(model.get_submodule(name)) for name in dict.fromkeys(names)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


# --------------------------------------------------------------------------------------- training


@dataclass
class History:
    """What a training run leaves behind, and what a checkpoint keeps of it."""

    step: int = 0
    curve: list = field(default_factory=list)  # (step, learning rate, mean loss since the last one)
    losses: list = field(default_factory=list)  # (step, learning rate, loss) not yet in the curve
    laps: list = field(default_factory=list)  # seconds of each step
    diverged: bool = False  # the loss became NaN or infinite, and training ended


def frozen_dtype(run):
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def autocast(run):
    """bf16 products where --precision says so."""
    kind = torch.device(run.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=run.precision == "bf16")


def place(run, base):
    """Move the model to the device: frozen matrices in --precision, everything else in fp32."""
    # The previous run's model refers to itself through its hooks: only this frees its memory.
    gc.collect()
    for tensor in base.model.parameters():
        fp32 = tensor.requires_grad or tensor.ndim < 2
        tensor.data = tensor.to(run.device, torch.float32 if fp32 else frozen_dtype(run))
    for tensor in base.model.buffers():
        tensor.data = tensor.to(run.device)


def forward(base, batch):
    """Logits of the positions whose output is used: (R, classes), or (R, vocabulary)."""
    base.batch = batch
    types = {} if batch.types is None else {"token_type_ids": batch.types}
    logits = base.model(input_ids=batch.ids, attention_mask=batch.attention_mask, **types).logits
    # All positions come back where the cut was bypassed (OPT's classifier calls its decoder).
    if logits.ndim == 3 and logits.shape[:2] == batch.ids.shape:
        logits = logits.flatten(0, 1)[batch.output_positions]
    return logits.float().flatten(0, -2)


def trained_tensors(model):
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def make_optimizer(run, base, method):
    """The method's optimizer: the adapter at --lr, the head at --head_lr.

    If only the head is trained, it uses --lr, because that is the flag that is tuned.
    """
    trained = trained_tensors(base.model)
    head = [tensor for name, tensor in trained.items() if name in base.head_names]
    rest = [tensor for name, tensor in trained.items() if name not in base.head_names]
    groups = [(rest, run.lr), (head, run.head_lr if rest else run.lr)]
    groups = [{"params": tensors, "lr": lr, "initial_lr": lr} for tensors, lr in groups if tensors]
    return method.optimizer(groups, weight_decay=run.weight_decay)


def train(run, data, base, method):
    """Train what requires a gradient; returns the History.

    AdamW with linear warm-up and decay, gradients clipped at norm 1. The clock measures steps only.
    If the loss becomes NaN or infinite, this run ends and the command continues with the next one.
    """
    history, trained, total = History(), trained_tensors(base.model), count_steps(run, data)
    with explain_out_of_memory(run):
        place(run, base)
        check_logits(run, data, base, forward)
        if not trained or not total:
            say("nothing is trained: the model is scored as it is")
            return history
        say(f"{run.name}: {meters.describe(base)}, {run.precision} on {run.device}")
        try_model(run, data, base, method, trained)
        optimizer = make_optimizer(run, base, method)
        load_checkpoint(run, data, base, optimizer, history)
    clock, progress = meters.Clock(run.device), Progress(run, history.step, total)
    with explain_out_of_memory(run), stop_signals() as stop, progress:
        for step, examples, targets in training_batches(run, data, history.step + 1, total):
            clock.start()
            base.model.train()
            lr = set_learning_rate(optimizer, step, total, run.warmup)
            torch.manual_seed(seed_for(run.seed, "dropout", step, process_index()))
            method.before_step(step, total)
            loss = gradient(run, data, base, method, examples, targets, trained)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            method.after_step(step, total, lr)
            optimizer.zero_grad(set_to_none=True)
            clock.stop()
            history.step = step
            history.losses.append((step, lr, loss))
            progress.update()
            if step == total or step % max(1, total // 50) == 0:  # reading a loss makes a GPU wait
                log_losses(history, progress)
            save = stop or step == total or run.save_every and step % run.save_every == 0
            if save and not history.diverged:
                history.laps += clock.read()
                save_checkpoint(run, data, base, optimizer, history)
            if stop or history.diverged:
                break
    if stop:
        fail(f"stopped at step {history.step}; the same command continues", 128 + stop[0])
    history.laps += clock.read()
    method.peft = method.peft | method.finish()
    return history


def try_model(run, data, base, method, trained):
    """End the program with one line if the model cannot be trained on these data."""
    place(run, base)  # check_logits left it in fp32
    base.model.train()
    kind = base.model.config.model_type
    refusal = f"--model {run.model}: {kind} cannot be trained in {run.precision}"
    with library_errors(refusal), explain_out_of_memory(run):
        targets = predicted_tokens(data, data.train, run.seed, 0)
        examples = torch.zeros(process_count(), dtype=torch.int64)  # one for each process
        gradient(run, data, base, method, examples, targets, trained)
    base.model.zero_grad(set_to_none=True)


def learning_rate_scale(step, total, warmup):
    """The fraction of the peak learning rate at `step` (1 … total): linear rise, then fall."""
    rise = step / max(1, warmup * total)
    return min(rise, (total - step + 1) / max(1, (1 - warmup) * total), 1.0)


def set_learning_rate(optimizer, step, total, warmup):
    """Set each group's learning rate for this step; returns the first group's, the adapter's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_scale(step, total, warmup)
    return optimizer.param_groups[0]["lr"]


def gradient(run, data, base, method, examples, targets, trained):
    """Leave the gradient of the mean loss over a global batch in .grad; returns that loss.

    examples (n,): of all processes; each takes every process_count()-th one. A micro-batch's loss
    is divided by the scored examples or tokens of the whole batch: how it is cut changes nothing.
    """
    scored = targets.counts[examples].sum().clamp(min=1).item()
    loss = torch.zeros((), device=run.device)
    mine, lengths = examples[process_index() :: process_count()], data.train.lengths
    size, together = run.batch_size, method.tokens_together
    for micro_batch in batches.micro_batches(run, lengths, mine, size, together):
        batch = collate(data, data.train, micro_batch, targets).to(run.device)
        with autocast(run):  # no variable keeps the logits: of a large vocabulary they are huge
            summed = F.cross_entropy(forward(base, batch), batch.target, reduction="sum")
        (summed / scored).backward()
        loss += summed.detach() / scored
    unreached = [name for name, tensor in trained.items() if tensor.grad is None]
    if unreached and len(mine):
        fail(f"--targets: no gradient reaches {', '.join(unreached[:4])}; name other layers")
    return all_reduce(loss, trained) if process_count() > 1 else loss


def all_reduce(loss, trained):
    """Sum loss and gradients over the processes, as one flat tensor a step; returns the loss."""
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in trained.values()]
    flat = torch.cat([loss[None], *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    sums = flat[1:].split([grad.numel() for grad in grads])
    for tensor, grad in zip(trained.values(), sums, strict=True):
        tensor.grad = grad.view_as(tensor)
    return flat[0]


def log_losses(history, progress):
    """Move the mean of the latest losses into the curve; if it is NaN the run has diverged."""
    step, lr, _ = history.losses[-1]
    mean = torch.tensor([float(loss) for _, _, loss in history.losses]).mean().item()
    history.losses.clear()
    if not math.isfinite(mean):
        say(f"the loss became NaN or infinite by step {step} (lr {lr:.3g}): this run ends")
        history.diverged = True
        return
    history.curve.append((step, lr, mean))
    progress.show_loss(mean)


# ---------------------------------------------------------------------------------------- scoring


def evaluate(run, data, base):
    """Score dev and test; prints and returns {"metrics", "test_examples", "diverged"}.

    metrics: {split: accuracy, f1 (macro) and loss, or a scored token's mean loss and its exp, the
    perplexity}; "official" is without --heldout. test_examples: which are right, or each
    block's summed loss. diverged: whether a loss was NaN or infinite.
    """
    advice = f"--eval_batch_size {max(1, run.eval_batch_size // 2)}; the trained weights are saved"
    with explain_out_of_memory(run, advice):
        place(run, base)
        if run.eval_only:  # other runs are checked before they train
            check_logits(run, data, base, forward)
            place(run, base)
        splits = {"test": data.test} if run.test_only else {"dev": data.dev, "test": data.test}
        scores = {name: score(run, data, base, split, name) for name, split in splits.items()}
    metrics = {name: summarize(data, split, scores[name]) for name, split in splits.items()}
    test = scores["test"]
    if len(data.test.lengths) > data.official:
        metrics["official"] = summarize(data, data.test, test, data.official)
    if data.classes:
        bits = np.packbits((test.predicted == data.test.labels).numpy())
        examples = {"correct": base64.b64encode(bits.tobytes()).decode()}
    else:
        examples = {"nll": test.nll.round(decimals=3).tolist(), "scored": test.scored.tolist()}
    first = "accuracy" if data.classes else list(metrics["test"])[-1]
    shown = " · ".join(f"{name} {values[first]:.4f}" for name, values in metrics.items())
    say(f"{run.name} lr {run.lr:g} seed {run.seed}: {first.replace('_', ' ')}: {shown}")
    diverged = any(each.diverged for each in scores.values())
    return {"metrics": metrics, "test_examples": examples, "diverged": diverged}


class Scores(NamedTuple):
    """What one pass over a split gives."""

    nll: torch.Tensor  # (examples,) float64, summed loss
    scored: torch.Tensor  # (examples,) int64, scored tokens; 1 for a label
    predicted: torch.Tensor  # (examples,) int64, the predicted class
    diverged: bool  # a loss was NaN or infinite


@torch.inference_mode()
def score(run, data, base, split, name):
    """One pass over a split, every example once, for any batch size and number of processes.

    Returns Scores. An example whose loss is NaN or infinite counts as wrong, and as 20 nats for
    each scored token.
    """
    base.model.eval()
    targets, lengths = predicted_tokens(data, split, name), split.lengths
    nll = torch.zeros(len(lengths), dtype=torch.float64, device=run.device)
    predicted = torch.zeros(len(lengths), dtype=torch.int64, device=run.device)
    mine = batches.scoring_batches(run, lengths)[process_index() :: process_count()]
    quiet = process_index() > 0 or None
    for examples in tqdm(mine, f"scoring {name}", disable=quiet, leave=False):
        batch = collate(data, split, examples, targets).to(run.device)
        with autocast(run):
            logits = forward(base, batch)
        losses = F.cross_entropy(logits, batch.target, reduction="none").double()
        examples = examples.to(run.device)
        nll.index_add_(0, examples[batch.output_positions // batch.ids.shape[1]], losses)
        if data.classes:
            predicted[examples] = logits.argmax(-1)
    if process_count() > 1:
        dist.all_reduce(nll)
        dist.all_reduce(predicted)
    invalid = ~nll.isfinite()
    if invalid.any():
        say(f"{name}: {invalid.sum():,} examples have a loss of NaN or infinity and count as wrong")
        nll[invalid], predicted[invalid] = 20.0 * targets.counts.to(nll)[invalid], -1
    return Scores(nll.cpu(), targets.counts, predicted.cpu(), bool(invalid.any()))


def summarize(data, split, scores, first=None):
    """The metrics of the `first` examples (default: all) of a split's Scores."""
    nll, scored, predicted = (tensor[:first] for tensor in scores[:3])
    loss = (nll.sum() / scored.sum()).item()
    if not data.classes:
        name = "mlm_perplexity" if data.task == "mlm" else "causal_perplexity"
        return {"loss": loss, name: math.exp(min(loss, 700))}
    labels = split.labels[:first]
    hits, f1 = predicted == labels, []
    for label in range(len(data.classes)):  # 2·TP / (examples of the class + predicted as it)
        either = (labels == label).sum() + (predicted == label).sum()
        if either:
            f1.append(2 * (hits & (labels == label)).sum().item() / either.item())
    return {"accuracy": hits.double().mean().item(), "f1": sum(f1) / len(f1), "loss": loss}


# -------------------------------------------------------------------------------------- measuring


@dataclass
class LatestCosts:
    """Memory and FLOPs of the latest run: the next one has the same if it differs in lr alone."""

    key: str = ""
    costs: dict = field(default_factory=dict)


LATEST_COSTS = LatestCosts()


def measure(run, data, base, method, history):
    """The costs in the result file; with --timing also latency and the merged model's score."""
    steps, lengths = batches.steps_of(run, data, method, history.step), data.train.lengths
    sizes = [(sum(map(len, parts)), int(lengths[torch.cat(parts)].sum())) for parts in steps]
    per_epoch = math.ceil(len(lengths) / batches.global_batch(run))
    costs = {
        "parameters": meters.count_parameters(base),
        "time": meters.summarize_time(history.laps, per_epoch, sizes),
        "disk": meters.count_disk(base, frozen_dtype(run)),
    }
    shapes = [tuple(tensor.shape) for tensor in trained_tensors(base.model).values()]
    key = repr((run.settings, run.seed, run.device, base.sha256, history.step, shapes))
    if LATEST_COSTS.key != key:
        memory = measured("memory", count_memory, run, data, base, method)
        flops = measured("flops", count_flops, run, data, base, method, steps)
        LATEST_COSTS.costs, LATEST_COSTS.key = memory | flops, key
    costs |= LATEST_COSTS.costs
    if run.timing:
        costs |= measured("inference", time_inference, run, data, base)
        costs |= measured("merged", score_merged, run, data, base)
    return costs


def measured(name, work, *arguments):
    """{name: work(*arguments)}; {} and a line if a library cannot do it: the scores are safe."""
    with library_errors(f"{name}: not measured", status=0):
        return {name: work(*arguments)}
    return {}


def count_memory(run, data, base, method):
    """Bytes at the peak of a training step and of scoring, by kind, on the largest batches."""
    trained, lengths = trained_tensors(base.model), data.test.lengths
    _, examples, targets = next(training_batches(run, data, 1, 1))
    scoring = batches.scoring_batches(run, lengths)
    largest = max(scoring, key=lambda batch: len(batch) * lengths[batch].max())
    test_targets = predicted_tokens(data, data.test, "test")
    batch = collate(data, data.test, largest, test_targets).to(run.device)

    def backward():
        gradient(run, data, base, method, examples, targets, trained)

    def inference():
        with autocast(run):
            forward(base, batch)

    return step_memory(run, base, method, backward, inference)


def step_memory(run, base, method, backward, inference):
    """Bytes at the peak of a training step and of inference, by kind; the same for fake tensors.

    backward() leaves gradients, inference() is a forward pass. With a learning rate of 0 the step
    changes nothing. CUDA's own peak is beside each count: {"train": {kind: bytes},
    "train_allocator": bytes or None, "inference": …}.
    """
    model, trained, memory = base.model, trained_tensors(base.model), {}
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    tensors = {"frozen weights": frozen, "trained weights": [*trained.values()], "optimizer": []}

    def peak_of(phase, work):
        peak = meters.live_bytes(work, trained.values(), run.device, **tensors)
        memory[phase], memory[f"{phase}_allocator"] = peak

    if trained:
        optimizer = make_optimizer(run, base, method)
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def step():
            method.before_step(*TYPICAL_STEP)
            backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.train()
        step()
        states = optimizer.state.values()
        tensors["optimizer"] = [t for s in states for t in s.values() if torch.is_tensor(t)]
        peak_of("train", step)
        tensors["optimizer"] = []
        del optimizer, states  # or its state would count in inference
    model.eval()
    with torch.no_grad():
        peak_of("inference", inference)
    return memory


def count_flops(run, data, base, method, steps):
    """Operations of a mean step, of all steps that ran, and of a test example's inference.

    A pass costs a fixed number per token, per pair of tokens and per output position: a fit from
    four passes is within 2 % of counting all. What a method does once a step is counted on one.
    """

    def passes(split, micro_batches, training):
        """Each pass as a function, and its (tokens, pairs of tokens, output positions)."""
        targets, prices = predicted_tokens(data, split, "test"), []

        def work(examples):
            batch = collate(data, split, examples, targets).to(run.device)
            with autocast(run), torch.set_grad_enabled(training):
                loss = F.cross_entropy(forward(base, batch), batch.target)
            if training:
                loss.backward()

        for batch in micro_batches:
            n, longest = len(batch), int(split.lengths[batch].max())
            prices.append((n * longest, n * longest**2, int(targets.counts[batch].sum())))
        return [functools.partial(work, batch) for batch in micro_batches], prices

    model, lengths = base.model, data.test.lengths
    scoring = passes(data.test, batches.scoring_batches(run, lengths), training=False)
    inference = meters.fitted_flops(model.eval(), *scoring)
    model.train()
    works, prices = passes(data.train, list(itertools.chain.from_iterable(steps)), training=True)
    method.before_step(*TYPICAL_STEP)
    per_step = 0.0  # what the first pass of a step does beside the others, on one of middle size
    if works and method.tokens_together:
        firsts = np.cumsum([0, *map(len, steps[:-1])])
        middle = works[sorted(firsts, key=lambda i: prices[i])[len(steps) // 2]]
        first = meters.count_flops(model, middle)  # this one prepares the step
        per_step = (first - meters.count_flops(model, middle)) * process_count()
    total = meters.fitted_flops(model, works, prices) + per_step * len(steps)
    step = total / max(1, len(steps))
    return {"step": step, "total": total, "inference_example": inference / len(lengths)}


@torch.inference_mode()
def time_inference(run, data, base):
    """Latency of the longest test example, and of the 32 longest: base, merged and unmerged."""
    model, split, timings = base.model.eval(), data.test, []
    targets = predicted_tokens(data, split, "test")
    plain = functools.partial(models.as_plain_linears, model, dtype=frozen_dtype(run))
    states = {"base": lambda: plain(merged=False)}
    if models.stand_ins(model):
        states |= {"merged": lambda: plain(merged=True), "unmerged": contextlib.nullcontext}
    for size in (1, 32):
        examples = split.lengths.argsort(descending=True, stable=True)[:size]
        batch = collate(data, split, examples, targets).to(run.device)

        def infer(batch=batch):
            with autocast(run):
                forward(base, batch)

        timing = {"batch": len(examples), "length": batch.ids.shape[1]}
        for name, ms in meters.latencies(infer, states, run.device).items():
            speed = 1000 * len(examples) / ms["p50"]
            timing[name] = {"latency_ms": ms, "samples_per_second": speed}
        timings.append(timing)
    return timings


def score_merged(run, data, base):
    """The test score with every adapter merged; None without an adapter."""
    if not models.stand_ins(base.model):
        return None
    with models.as_plain_linears(base.model, True, frozen_dtype(run)):
        return summarize(data, data.test, score(run, data, base, data.test, "test"))
