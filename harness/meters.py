"""Instruments: seconds of steps, bytes of live tensors, floating-point operations, latency.

They know nothing of the experiment: what they measure is handed to them, a function or a model.
"""

import time
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.models import stand_ins
from harness.process import process_count


class Clock:
    """Seconds of each step between `start` and `stop`, without what happens between steps.

    On CUDA a step lies between two events, which are read later: timing never makes the GPU wait.
    """

    def __init__(self, device):
        self.cuda, self.marks = "cuda" in device, []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    start = stop = mark

    def read(self):
        """The seconds of the steps since the last reading."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if self.cuda:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors by kind; `peak` is the split when their sum was largest.

    Every storage that an operator returns counts once, at its own size, until it is freed. What a
    kernel takes and frees inside is not seen. The same on every device, and for fake tensors.
    """

    def __init__(self, **tensors_by_kind):
        super().__init__()
        self.now = dict.fromkeys((*tensors_by_kind, "gradients", "activations", "temporaries"), 0)
        self.peak, self.kind = dict(self.now), {}
        for kind, tensors in tensors_by_kind.items():
            self.see(tensors, kind)

    def see(self, tree, kind):
        """Count every tensor in `tree`; one counted as a temporary becomes of this kind."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            kind_before = self.kind.get(key)
            if kind_before is None:
                weakref.finalize(storage, self.gone, key, size)
            elif kind_before == "temporaries":
                self.now[kind_before] -= size
            else:
                continue
            self.kind[key] = kind
            self.now[kind] += size
        if sum(self.now.values()) >= sum(self.peak.values()):
            self.peak = dict(self.now)

    def gone(self, key, size):
        self.now[self.kind.pop(key)] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(out, "temporaries")
        return out


def live_bytes(work, trained, device, **known):
    """Bytes at the peak of `work()`: ({kind: bytes}, what CUDA's allocator says, else None).

    known: lists of tensors that are there before, by kind. trained: tensors whose gradients count
    as such. Activations are what autograd saves for the backward pass; all else is a temporary.
    """
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device)
    live = LiveBytes(**known)

    def activation(tensor):
        live.see(tensor, "activations")
        return tensor

    def gradient(tensor):
        live.see(tensor.grad, "gradients")

    hooks = [tensor.register_post_accumulate_grad_hook(gradient) for tensor in trained]
    with live, torch.autograd.graph.saved_tensors_hooks(activation, lambda tensor: tensor):
        work()
    for hook in hooks:
        hook.remove()
    return live.peak, torch.cuda.max_memory_allocated(device) if "cuda" in device else None


def count_flops(model, work):
    """Operations of `work()`: torch's counter sees matrix products, two for a multiply-add.

    Attention is eager: the counter does not see the fused kernels on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        model.set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def fitted_flops(model, works, prices):
    """Operations of all `works`, a list of functions; at most four of them are counted.

    prices (passes, k): what the operations of a pass are a linear function of; passes of unequal
    prices are counted and a least-squares fit gives the rest.
    """
    if not works:
        return 0.0
    prices = np.array(prices, dtype=float)
    unequal = np.unique(prices, axis=0, return_index=True)[1]  # from short to long
    few = np.linspace(0, len(unequal) - 1, min(4, len(unequal))).round().astype(int)
    few = unequal[few]
    counts = np.array([count_flops(model, works[i]) for i in few], dtype=float)
    fit, *_ = np.linalg.lstsq(prices[few], counts, rcond=None)
    return float((prices @ fit).sum())


def latencies(work, states, device):
    """Milliseconds of `work()` in each of states = {name: function that makes a context}.

    In turns, so that drift hits all alike; once to warm up before each time that counts; up to 20
    rounds, fewer where they take more than 3 s a state. Returns {name: {"mean", "p50", "p95"}}.
    """
    clock, laps = Clock(device), {name: [] for name in states}
    for _ in range(20):
        for name, state in states.items():
            with state():
                work()
                clock.start()
                work()
                clock.stop()
            laps[name] += clock.read()
        if sum(map(sum, laps.values())) > 3 * len(states):
            break
    return {
        name: {
            "mean": 1000 * float(np.mean(seconds)),
            "p50": 1000 * float(np.quantile(seconds, 0.5)),
            "p95": 1000 * float(np.quantile(seconds, 0.95)),
        }
        for name, seconds in laps.items()
    }


def count_parameters(base):
    """Numbers of weights: adapter, head, trainable, total. A 4-bit weight counts as a whole one."""
    named = base.model.named_parameters()
    trained = {name: tensor.numel() for name, tensor in named if tensor.requires_grad}
    head = sum(size for name, size in trained.items() if name in base.head_names)
    modules = stand_ins(base.model).values()
    added = sum(getattr(module, key).numel() for module in modules for key in module.keys)
    trainable, total = sum(trained.values()), base.weights + added
    return {
        "adapter": trainable - head,
        "head": head,
        "trainable": trainable,
        "total": total,
        "trainable_percent": 100 * trainable / total,
    }


def describe(base):
    """The numbers of weights in words."""
    n = count_parameters(base)
    return (
        f"{n['adapter']:,} adapter + {n['head']:,} head = {n['trainable']:,} trainable of "
        f"{n['total']:,} ({n['trainable_percent']:.2f} %)"
    )


def count_disk(base, dtype):
    """Bytes of the base with its head as training keeps it, and of the merged model in `dtype`."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    for module in stand_ins(base.model).values():
        if module.keys:  # what is trained, and a method's masks over it
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            tensors = [t for t in tensors if not any(t is other for other in own)]
    stored = sum(tensor.nbytes for tensor in tensors)
    return {"base": stored, "merged": base.weights * dtype.itemsize}


def summarize_time(laps, per_epoch, sizes):
    """Seconds of training: in all, by epoch, by step (the first few, which warm up, left out).

    laps: seconds of each step; sizes: its (rows, tokens without padding).
    """
    seconds = sum(laps)
    warm = laps[min(10, len(laps) // 5) :] or [0.0]
    median, p10, p90 = (1000 * float(np.quantile(warm, q)) for q in (0.5, 0.1, 0.9))
    return {
        "train_seconds": seconds,
        "epoch_seconds": [sum(laps[i : i + per_epoch]) for i in range(0, len(laps), per_epoch)],
        "step_ms": {"median": median, "p10": p10, "p90": p90},
        "samples_per_second": sum(rows for rows, _ in sizes) / max(seconds, 1e-9),
        "tokens_per_second": sum(tokens for _, tokens in sizes) / max(seconds, 1e-9),
        "accelerator_hours": seconds * process_count() / 3600,
    }
