"""compare.py: statistics against scipy and by simulation, tuning, verdicts, cautions, bad files."""

import base64
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
from harness import results

METHODS = ("lora", "qlora", "hira", "sparse_lora")
PARTS = ("frozen weights", "trained weights", "optimizer", "gradients", "activations")


def make_result(
    method="lora",
    seed=0,
    lr=1e-3,
    *,
    name=None,
    dataset="sst2",
    correct=None,
    nll=None,
    dev=0.8,
    settings=None,
    timed=False,
    untrained=False,
    peak=200,
    trainable=74_498,
    device="cpu x86_64",
):
    """A result of schema 2. correct: (rows,) booleans; or nll: (blocks,), of 20 scored tokens each.

    dev: accuracy or perplexity. peak: MiB, half of it frozen weights.
    """
    if nll is None:
        task, metric = "classification", "accuracy"
        correct = np.arange(100) % 5 > 0 if correct is None else np.asarray(correct, bool)
        rows = {"correct": base64.b64encode(np.packbits(correct).tobytes()).decode()}
        score, size = float(correct.mean()), len(correct)
    else:
        task, metric, size = "mlm", "mlm_perplexity", len(nll)
        rows = {"nll": list(map(float, nll)), "scored": [20] * size}
        score = math.exp(sum(rows["nll"]) / (20 * size))
    flags = {"epochs": 0 if untrained else 1, "max_steps": None, "batch_size": 32, "grad_accum": 1}
    flags |= {"head_lr": 0.01, "max_length": 128, "rank": 8, "weight_decay": 0.0}
    memory = {part: peak * 2**20 * x / 8 for part, x in zip(PARTS, (4, 0.5, 1, 0.5, 1), strict=True)}
    memory["temporaries"] = peak * 2**20 / 8
    speed = {"latency_ms": {"mean": 10.0, "p50": 10.0, "p95": 11.0}, "samples_per_second": 320.0}
    states = {"base": speed, "merged": speed, "unmerged": speed}
    metrics = {"test": {metric: score, "loss": 0.4}, "dev": {metric: dev, "loss": 0.4}}
    return {
        "schema": 2,
        "method": method,
        "name": name or method,
        "dataset": dataset,
        "model": "models/MiniLM",
        "lr": lr,
        "seed": seed,
        "untrained": untrained,
        "settings": flags | (settings or {}),
        "data": {
            "task": task,
            "test_split": "test",
            "train": 8000,
            "dev": 500,
            "test": size,
            "official": size,
            "train_sha256": f"train {seed}",
            "dev_sha256": f"dev {seed}",
            "test_sha256": "test",
        },
        "base": {"sha256": "base", "weights": 22_000_000},
        "metrics": metrics,
        "rows": rows,
        "parameters": {"adapter": trainable - 770, "head": 770, "trainable": trainable},
        "time": {"train_seconds": 60.0, "accelerator_hours": 60 / 3600},
        "memory": {"train": memory, "train_allocator": None, "inference": dict(memory)},
        "flops": {"step": 2e10, "total": 5e12, "inference_row": 5e8},
        "inference": [{"batch": 32, "length": 64, **states}] if timed else [],
        "disk": {"adapter": 300_000, "base": 9e7, "merged": 9e7},
        "environment": {
            "device": device,
            "cpu": "EPYC",
            "processes": 1,
            "threads": 1,
            "torch": "2.8.0",
            "transformers": "5.0",
            "bitsandbytes": "0.48",
            "commit": "0123456789abcdef",
            "dirty": False,
        },
    }
