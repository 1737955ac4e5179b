"""What runs leave on disk: results, adapters in PEFT's layout, checkpoints. Each appears whole.

safetensors and torch are imported where they are used: compare.py and --help need neither.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path

from harness.models import AdapterLayer, stand_ins
from harness.process import agree, fail, first_line, process_count, process_index, say

LIBRARIES = ("torch", "transformers", "datasets", "bitsandbytes")


@contextlib.contextmanager
def replacing(path, what):
    """Yield a path beside `path` that takes its name at the end, and goes if anything fails."""
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # the libraries have their own words for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        fail(f"--out {path.parent}: cannot write the {what} ({reason})", status=1)
    finally:
        unfinished.unlink(missing_ok=True)


def finished(run):
    """Whether `run.path` holds a result of the same settings; others end the program.

    One that was stopped while it was measured goes on: it lacks the costs, and has a checkpoint.
    """
    done = False
    if process_index() == 0 and run.path.exists() and not run.force:
        try:
            there = json.loads(run.path.read_text())
            old = dict(there["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{run.path} is not a complete result file; --force replaces it")
        differ = [
            f"--{key} {old.get(key)} there, {run.settings.get(key)} here"
            for key in sorted((old.keys() | run.settings) - {"eval_batch_size"})
            if old.get(key) != run.settings.get(key)
        ]
        if differ:
            fail(
                f"{run.path} holds a run with other settings ({'; '.join(differ)}); --name NAME "
                "keeps both, --force replaces it"
            )
        stopped = there.get("untrained") or run.path.with_suffix(".checkpoint").exists()
        done = "time" in there or not stopped
        if done and run.export:
            add = f"add --eval_only {run.path.with_suffix('')} to export it"
            fail(f"{run.path} is there already; {add}, or --force to run it again")
        more = "is there already; --force runs it again" if done else "lacks its costs: going on"
        print(run.path, more)
    return agree(done)


# ------------------------------------------------------------------------------------ checkpoints


def changing(model):
    """What a run changes: trained tensors, and buffers (a method's masks); no frozen weight."""
    frozen = {n for n, t in model.named_parameters(remove_duplicate=False) if not t.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def identity(run, data, base):
    """What a checkpoint shares with the run that continues it: all but scoring's batch size."""
    kept = {key: value for key, value in run.settings.items() if key != "eval_batch_size"}
    return json.dumps([kept, run.lr, run.seed, base.sha256, data.description, process_count()])


def save_checkpoint(run, data, base, optimizer, history):
    """Write what a stopped run needs. Random numbers depend on (seed, step): none to keep."""
    import torch

    if process_index() == 0:
        state = {
            "run": identity(run, data, base),
            "model": changing(base.model),
            "optimizer": optimizer.state_dict(),
            "history": vars(history),
        }
        with replacing(run.path.with_suffix(".checkpoint"), "checkpoint") as path:
            torch.save(state, path)


def load_checkpoint(run, data, base, optimizer, history):
    """Go on from this run's checkpoint, if there is one; an unusable one is named and left."""
    import torch

    path, state = run.path.with_suffix(".checkpoint"), None
    if process_index() == 0 and path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["run"] != identity(run, data, base):
                raise ValueError("it is of other settings")
        except Exception as error:  # torn files fail in many ways
            say(f"{path}: not usable ({first_line(error)}); starting afresh")
            state = None
    state = agree(state)
    if state:
        base.model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        vars(history).update(state["history"])
        say(f"continuing at step {history.step} from {path}")


# --------------------------------------------------------------------------------------- adapters


def adapter_tensors(model):
    """What was trained under PEFT's names: {"base_model.model.<path>.lora_A.weight": tensor, …}."""
    tensors = {
        f"base_model.model.{path}.{key}": getattr(module, name)
        for path, module in stand_ins(model).items()
        for name, key in module.keys.items()
    }
    owned = {id(tensor) for tensor in tensors.values()}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad and id(tensor) not in owned:
            tensors[f"base_model.model.{name}"] = tensor
    return tensors


def base_identity(base, method):
    """The hash of the frozen weights, and the format that the method keeps them in."""
    return ":".join(filter(None, [base.sha256, method.base_format]))


def save_adapter(run, base, method, task):
    """Write adapter and head in PEFT's layout beside the result; returns their bytes on disk."""
    from safetensors.torch import save_file

    folder, model = run.path.with_suffix(""), base.model
    tensors = {n: t.detach().cpu().contiguous() for n, t in adapter_tensors(model).items()}
    with replacing(folder / "adapter_model.safetensors", "adapter") as path:
        # One key of metadata: two come in random order.
        save_file(tensors, path, metadata={"base_sha256": base_identity(base, method)})
    size = (folder / "adapter_model.safetensors").stat().st_size
    if not method.peft:
        return size
    # PEFT saves and loads whole modules: a head's name below the base, "pooler" or "classifier".
    prefix = f"{model.base_model_prefix}."
    heads = sorted({name.removeprefix(prefix).split(".")[0] for name in base.head})
    layers = [m.base for m in stand_ins(model).values() if isinstance(m, AdapterLayer)]
    config = {
        "task_type": {"classification": "SEQ_CLS", "mlm": None, "clm": "CAUSAL_LM"}[task],
        "base_model_name_or_path": run.settings["model"],
        "inference_mode": True,
        "modules_to_save": heads or None,
        "fan_in_fan_out": any(type(layer).__name__ == "Conv1D" for layer in layers),
        **method.peft,
    }
    with replacing(folder / "adapter_config.json", "adapter") as path:
        path.write_text(json.dumps(config, indent=2) + "\n")
    return size + (folder / "adapter_config.json").stat().st_size


def load_adapter(run, base, method):
    """Put a saved adapter and head into the adapted model (--eval_only).

    Strict about names, shapes, rank, scale and base; PEFT's own folders load too. One line and
    status 2 where something does not fit.
    """
    from safetensors import safe_open
    from torch import nn

    folder, ours, model = run.eval_only, method.peft, base.model
    try:
        config = json.loads((folder / "adapter_config.json").read_text()) if ours else {}
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            sha256 = (file.metadata() or {}).get("base_sha256")
            saved = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # no such file, a torn file, another format
        fail(
            f"--eval_only {folder}: no adapter that can be read ({first_line(error)}); wanted: "
            "adapter_model.safetensors and adapter_config.json"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        fail(f"--eval_only {folder}: it started from {start!r}, which changes the base itself")
    if config.get("use_rslora"):
        fail(f"--eval_only {folder}: made with rsLoRA, which scales by alpha/√r; not supported")
    for key, flag in {"peft_type": "the script", "r": "--rank", "lora_alpha": "--alpha"}.items():
        if key in ours and config.get(key) != ours[key]:
            there, here = config.get(key), ours[key]
            fail(f"--eval_only {folder}: {key} is {there} there and {here} here; change {flag}")
    if sha256 not in (None, base_identity(base, method)):
        other = config.get("base_model_name_or_path", "unnamed")
        fail(
            f"--eval_only {folder}: trained on another base ({other}), not on --model {run.model}, "
            "or for another task, or in other bits; change --model, --dataset or the script"
        )
    if sha256 is None and method.base_format:
        say(f"--eval_only {folder}: scored on the base in {method.base_format}, as made here")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for path, module in stand_ins(model).items():
        if path in ranks:  # a pruned adapter has fewer components in some layers, at the same scale
            module.A = nn.Parameter(module.A[: ranks[path]].detach().clone())
            module.B = nn.Parameter(module.B[:, : ranks[path]].detach().clone())
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not all(name in stand_ins(model) for name in [*ranks, *alphas]) or not all(
        math.isclose(alphas.get(path, alpha) / ranks.get(path, r), alpha / r, rel_tol=1e-6)
        for path in [*ranks, *alphas]
    ):
        fail(f"--eval_only {folder}: its rank_pattern or alpha_pattern is not one of ours")
    wanted = adapter_tensors(model)
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if missing or unexpected:
        names = ", ".join([*sorted(missing)[:1], *sorted(unexpected)[:1]])
        fail(
            f"--eval_only {folder}: {len(missing)} tensors missing, {len(unexpected)} unexpected "
            f"({names}); same --targets and data set?"
        )
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            there, here = list(saved[name].shape), list(tensor.shape)
            fail(f"--eval_only {folder}: {name} is {there} there, {here} here; same --rank?")
        tensor.data.copy_(saved[name])


# ---------------------------------------------------------------------------------- result file


def environment(run):
    """What the figures depend on beside the code: versions, device, threads, load, commit."""
    import torch

    def git(*words):
        try:
            done = subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name).split("+")[0]
    cpu = None
    with contextlib.suppress(OSError):  # not Linux
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    cuda = "cuda" in run.device
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        **dict.fromkeys(LIBRARIES),
        **versions,
        "device": f"cuda {torch.cuda.get_device_name(run.device)}"
        if cuda
        else f"cpu {platform.machine()}",
        "cpu": cpu[1] if cpu else platform.processor() or None,
        "processes": process_count(),
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "load_average": os.getloadavg()[0],
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def save_result(run, data, base, method, history, scores, costs=None):
    """Write the adapter and, last, the result file, so that a result means a finished run.

    Called twice: with the scores alone before anything is measured, so that nothing after training
    can lose it, and with the costs. Returns the result's path.
    """
    if process_index() != 0:
        return run.path
    report = method.report() if costs else {}  # expensive, so only after the scores are on disk
    result = {
        "schema": 3,
        "method": run.method,
        "name": run.name,
        "dataset": run.settings["dataset"],
        "model": run.settings["model"],
        "lr": run.lr,
        "seed": run.seed,
        "untrained": history.step == 0,
        "diverged": history.diverged or scores["diverged"],
        "settings": run.settings,
        "peft": method.peft or None,
        "data": data.description,
        "base": {"sha256": base.sha256, "weights": base.weights},
        "metrics": scores["metrics"] | {"merged": (costs or {}).pop("merged", None)},
        "test_examples": scores["test_examples"],
        "curve": history.curve,
        "memory": {},
        "flops": {},
        "inference": [],
        **(costs or {}),
        "report": report,
        "environment": environment(run),
        "command": run.command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    adapter = save_adapter(run, base, method, data.task)
    if costs:
        result["disk"] = {"adapter": adapter, **costs["disk"]}
    with replacing(run.path, "result") as path:
        path.write_text(json.dumps(result) + "\n")
    if costs:
        run.path.with_suffix(".checkpoint").unlink(missing_ok=True)
        seconds, size = sum(history.laps), adapter / 2**20
        done = f"trained {history.step:,} steps in {seconds:.1f} s"
        say(f"{done}; wrote {run.path}, and the adapter ({size:.1f} MiB) beside it")
    return run.path
