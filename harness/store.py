"""What runs leave on disk: results, adapters in PEFT's layout, checkpoints. Each appears whole.

What is read here may come from a stranger: types, shapes and values are checked before any is used.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from harness.batches import count_steps
from harness.models import (
    AdapterLayer,
    class_names,
    head_order,
    informative,
    refuse_head,
    stand_ins,
)
from harness.process import (
    agree,
    fail,
    first_line,
    library_errors,
    process_count,
    process_index,
    say,
)
from harness.rows import HUB, find_files

LIBRARIES = ("torch", "transformers", "datasets", "bitsandbytes")


@contextlib.contextmanager
def replacing(path, what):
    """Yield a new file beside `path` that takes its name at the end, and goes if anything fails.

    Nobody can guess the new file's name, so a link that was planted in the folder receives nothing.
    """
    unfinished = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        with library_errors(f"--out {path.parent}: cannot write the {what}", status=1):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.touch(exist_ok=False)
            yield unfinished
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_object(path):
    """The JSON object in a regular file (a pipe would be waited for); {} where there is none."""
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be shown
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_result(path):
    """What a result file holds; {} where it is not a complete one."""
    result = read_object(path)
    parts = (result.get(key) for key in ("settings", "environment", "data"))
    return result if all(isinstance(part, dict) for part in parts) else {}


# ------------------------------------------------------------------------- is there such a run yet


@functools.cache
def files_sha256(dataset, data_dir):
    """The hash of the files that a data set is read from: their names and bytes.

    All data sets without files have one.
    """
    place, digest = Path(data_dir) / dataset if dataset in HUB else Path(dataset), hashlib.sha256()
    splits = find_files(f"--dataset {dataset}", dataset, data_dir) if place.exists() else {}
    for file in (file for files in splits.values() for file in files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def decisive(settings, lr, processes, files):
    """What decides a run's outcome, {name: value}: two runs of one name must agree in all of it."""
    factors = [settings.get("batch_size"), settings.get("grad_accum"), processes]
    step = math.prod(factors) if all(type(number) is int for number in factors) else None
    flags = {key: value for key, value in settings.items() if key != "eval_batch_size"}
    return flags | {"lr": lr, "examples a step": step, "data files": files}


def differences(old, new):
    """The entries in which two dicts differ, in words; "" where they agree."""
    keys = sorted(key for key in old.keys() | new if old.get(key) != new.get(key))
    names = [key if " " in key else f"--{key}" for key in keys]
    values = [f"{old.get(key)!s:.20} there, {new.get(key)!s:.20} here" for key in keys]
    return "; ".join(map(" ".join, zip(names, values, strict=True)))


def finished(run):
    """Whether run.path holds a finished result of this run; another run's ends the program.

    A run that was stopped while it was measured is not finished: it lacks the costs, and has a
    checkpoint.
    """
    done = False
    if run.path.with_suffix("").is_symlink():
        fail(f"{run.path.with_suffix('')} is a link, and the adapter belongs there; remove it")
    if process_index() == 0 and os.path.lexists(run.path) and not run.force:
        result = read_result(run.path)
        if not result:
            fail(f"{run.path} is not a complete result file; --force replaces it")
        files = files_sha256(run.dataset, run.data_dir)
        new = decisive(run.settings, run.lr, process_count(), files)
        files = result["data"].get("files_sha256", files)  # results of earlier versions have none
        processes = result["environment"].get("processes")
        old = decisive(result["settings"], result.get("lr"), processes, files)
        if differ := differences(old, new):
            other = f"holds a run with other settings or data ({differ})"
            fail(f"{run.path} {other}; --name NAME keeps both, --force replaces it")
        stopped = result.get("untrained") or run.path.with_suffix(".checkpoint").exists()
        done = "time" in result or not stopped
        if done and run.export:
            fail(f"{run.path} is there already; --eval_only {run.path.with_suffix('')} exports it")
        if done:
            say(f"{run.path} is there already; --force runs it again")
    return agree(done)


# ------------------------------------------------------------------------------------ checkpoints


def changing(model):
    """What a run changes: trained tensors, and buffers (a method's masks); no frozen weight."""
    frozen = {n for n, t in model.named_parameters(remove_duplicate=False) if not t.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def identity(run, data, base):
    """What a checkpoint shares with the run that continues it."""
    tokens = hashlib.sha256(json.dumps(data.description).encode()).hexdigest()
    kept = decisive(run.settings, run.lr, process_count(), tokens)
    return kept | {"base weights": base.sha256}


def save_checkpoint(run, data, base, optimizer, history):
    """Write what a stopped run needs. Random numbers depend on (seed, step): none to keep."""
    if process_index() == 0:
        losses = [(step, lr, float(loss)) for step, lr, loss in history.losses]
        state = {
            "run": identity(run, data, base),
            "model": changing(base.model),
            "optimizer": optimizer.state_dict()["state"],
            "history": vars(history) | {"losses": losses},
        }
        with replacing(run.path.with_suffix(".checkpoint"), "checkpoint") as path:
            torch.save(state, path)


def load_checkpoint(run, data, base, optimizer, history):
    """Continue from this run's checkpoint, if there is one; one that does not fit is refused."""
    path, state = run.path.with_suffix(".checkpoint"), None
    if process_index() == 0 and path.is_file():
        with library_errors(f"{path} cannot be read; remove it to start afresh"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if misfit := misfit_of(state, run, data, base, optimizer):
            if not run.force:
                fail(f"{path}: {misfit}; --name NAME keeps it, --force starts afresh")
            state = None
    state = agree(state)
    if state:
        base.model.load_state_dict(state["model"], strict=False)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        vars(history).update(state["history"])
        say(f"continuing at step {history.step} from {path}")


def misfit_of(state, run, data, base, optimizer):
    """Why a checkpoint's state is not one of this run, in words; "" where it is."""

    def types(part):
        return {key: type(value) for key, value in part.items()} if isinstance(part, dict) else {}

    def shapes(part):
        return {key: getattr(value, "shape", None) for key, value in part.items()}

    if types(state) != dict.fromkeys(("run", "model", "optimizer", "history"), dict):
        return "it is no checkpoint"
    if differ := differences(state["run"], identity(run, data, base)):
        return f"it is of a run with other settings or data ({differ})"
    if shapes(state["model"]) != shapes(changing(base.model)):
        return "its weights are not those of this model"
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    entries = [state["optimizer"].get(number, {}) for number in range(len(tensors))]
    for tensor, entry in zip(tensors, entries, strict=True):  # AdamW: a count and two moments
        if "step" not in types(entry) or [*shapes(entry).values()].count(tensor.shape) < 2:
            return "its optimizer's state is not that of this model"
    history, total = state["history"], count_steps(run, data)
    kinds = {"step": int, "curve": list, "losses": list, "laps": list, "diverged": bool}
    sound = types(history) == kinds and 0 < history["step"] == len(history["laps"]) <= total
    rows = [*history["curve"], *history["losses"]] if sound else []
    rows += [(0, 0.0, seconds) for seconds in history["laps"]] if sound else []
    sound = sound and all(isinstance(row, list | tuple) for row in rows)
    sound = sound and all([*map(type, row)] == [int, float, float] for row in rows)
    return "" if sound else f"its history is not one of at most {total} steps"


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


def save_adapter(run, data, base, method):
    """Write adapter and head in PEFT's layout beside the result."""
    folder, model = run.path.with_suffix(""), base.model
    tensors = {n: t.detach().cpu().contiguous() for n, t in adapter_tensors(model).items()}
    trained_on = {"base_sha256": base_identity(base, method), "classes": data.classes}
    with replacing(folder / "adapter_model.safetensors", "adapter") as path:
        # One key of metadata: two come in random order.
        save_file(tensors, path, metadata={"trained_on": json.dumps(trained_on)})
    if not method.peft:
        return
    # PEFT saves and loads whole modules: a head's name below the base, "pooler" or "classifier".
    prefix = f"{model.base_model_prefix}."
    heads = sorted({name.removeprefix(prefix).split(".")[0] for name in base.head})
    layers = [m.base for m in stand_ins(model).values() if isinstance(m, AdapterLayer)]
    tasks = {"classification": "SEQ_CLS", "mlm": None, "clm": "CAUSAL_LM"}
    config = {"task_type": tasks[data.task], "base_model_name_or_path": run.settings["model"]}
    config |= {"inference_mode": True, "modules_to_save": heads or None}
    config["fan_in_fan_out"] = any(type(layer).__name__ == "Conv1D" for layer in layers)
    config |= method.peft
    with replacing(folder / "adapter_config.json", "adapter") as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder, with_config):
    """(config, tensors by name, what they were trained on) of an adapter's folder.

    The last is {"base_sha256", "classes"}, or {} in PEFT's own folders.
    """
    path, config = folder / "adapter_model.safetensors", read_object(folder / "adapter_config.json")
    try:
        if with_config and not config or not path.is_file():
            raise FileNotFoundError("one is missing, or is another kind of file")
        with safe_open(path, "pt") as file:
            trained_on = dict(json.loads((file.metadata() or {}).get("trained_on", "{}")))
            return config, {name: file.get_tensor(name) for name in file.keys()}, trained_on
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        wanted = "adapter_model.safetensors and adapter_config.json"
        fail(f"--eval_only {folder}: wanted: {wanted} of an adapter ({first_line(error)})")


def head_classes(run, config):
    """The class names, by number, of the trained head that a run starts from or scores, or None."""
    if not run.eval_only:
        return class_names(config)
    names = read_adapter(run.eval_only, False)[2].get("classes")
    return informative(names if isinstance(names, list) else [])


def load_adapter(run, base, method):
    """Put a saved adapter and head into the adapted model (--eval_only).

    Strict about names, shapes, numbers, rank, scale and base; PEFT's own folders load too. One line
    and status 2 where something does not fit.
    """
    folder, ours, model = run.eval_only, method.peft, base.model
    where = f"--eval_only {folder}"
    config, saved, trained_on = read_adapter(folder, bool(ours))
    names, classes = head_classes(run, None), model.config.id2label.values()
    if names and not head_order(names, classes):
        refuse_head(where, names, classes)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        fail(f"{where}: it started from {start!r}, which changes the base itself")
    for key in ("use_rslora", "use_dora", "alora_invocation_tokens"):
        if config.get(key):
            fail(f"{where}: made with {key}, another computation than ours; not supported")
    for key, flag in {"peft_type": "the script", "r": "--rank", "lora_alpha": "--alpha"}.items():
        if key in ours and config.get(key) != ours[key]:
            fail(f"{where}: {key} is {config.get(key)} there and {ours[key]} here; change {flag}")
    sha256 = trained_on.get("base_sha256")
    if sha256 not in (None, base_identity(base, method)):
        other = f"trained on another base than --model {run.model}, in other bits or for another"
        fail(f"{where}: {other} task; change --model, the script or --dataset")
    if sha256 is None and method.base_format:
        say(f"{where}: scored on the base in {method.base_format}, as made here")
    cut_ranks(where, config, ours.get("r"), ours.get("lora_alpha"), stand_ins(model))
    wanted = adapter_tensors(model)
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if missing or unexpected:
        names = ", ".join([*sorted(missing)[:1], *sorted(unexpected)[:1]])
        counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected ({names})"
        fail(f"{where}: {counts}; same --targets and data set?")
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            old, new = list(saved[name].shape), list(tensor.shape)
            fail(f"{where}: {name} is {old} there, {new} here; same --rank?")
        if not saved[name].is_floating_point() or not saved[name].float().isfinite().all():
            fail(f"{where}: {name} holds NaN, infinity or integers; the adapter is broken")
        tensor.data.copy_(saved[name])


def cut_ranks(where, config, r, alpha, layers):
    """Cut A and B of `layers` {path: layer} to a pruned adapter's ranks, at the scale alpha/r."""
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    known = isinstance(ranks, dict) and isinstance(alphas, dict)
    known = known and {*ranks, *alphas} <= (layers if alpha else {}).keys()
    for path in {**ranks, **alphas} if known else ():
        rank, scaled = ranks.get(path, r), alphas.get(path, alpha)
        known = known and type(rank) is int and 0 < rank <= r
        known = known and type(scaled) in (int, float) and 0 < scaled < 1e9
        known = known and math.isclose(scaled / rank, alpha / r, rel_tol=1e-6)
        if known:
            layers[path].A = nn.Parameter(layers[path].A[:rank].detach().clone())
            layers[path].B = nn.Parameter(layers[path].B[:, :rank].detach().clone())
    if not known:
        fail(f"{where}: its rank_pattern or alpha_pattern is not one of ours")


# ------------------------------------------------------------------------------------ result file


def environment(run):
    """What the figures depend on beside the code: versions, device, threads, load, commit."""

    def git(*command):
        options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        try:
            return subprocess.run(["git", *command], check=True, **options).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    numbers = {"python": platform.python_version(), **dict.fromkeys(LIBRARIES)}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name).split("+")[0]
    cpu = None
    with contextlib.suppress(OSError):  # not Linux
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    cuda = "cuda" in run.device and f"cuda {torch.cuda.get_device_name(run.device)}"
    numbers["device"] = cuda or f"cpu {platform.machine()}"
    numbers["cpu"] = cpu[1] if cpu else platform.processor() or None
    numbers |= {"processes": process_count(), "threads": torch.get_num_threads()}
    numbers |= {"precision": run.precision, "load_average": os.getloadavg()[0]}
    changes = git("status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else bool(changes)
    return numbers | {"commit": git("rev-parse", "HEAD"), "dirty": dirty}


def save_result(run, data, base, method, history, scores, costs=None):
    """Write the adapter and, last, the result file, so that a result means a finished run.

    Called twice: with the scores alone before anything is measured, so that nothing after training
    can lose it, and with the costs. Returns the result's path.
    """
    if process_index() != 0:
        return run.path
    report = method.report() if costs else {}  # expensive, so only after the scores are on disk
    files, merged = files_sha256(run.dataset, run.data_dir), (costs or {}).pop("merged", None)
    kept = {key: run.settings[key] for key in ("dataset", "model")}
    result = {"schema": 3, "method": run.method, "name": run.name, **kept, "lr": run.lr}
    result |= {"seed": run.seed, "untrained": history.step == 0}
    result |= {"diverged": history.diverged or scores["diverged"], "settings": run.settings}
    result |= {"peft": method.peft or None, "data": data.description | {"files_sha256": files}}
    result |= {"base": {"sha256": base.sha256, "weights": base.weights}}
    result |= {"metrics": scores["metrics"] | {"merged": merged}}
    result |= {"test_examples": scores["test_examples"], "curve": history.curve}
    result |= {"memory": {}, "flops": {}, "inference": [], **(costs or {}), "report": report}
    result |= {"environment": environment(run), "command": run.command}
    result["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if costs:
        size = sum(file.stat().st_size for file in run.path.with_suffix("").glob("adapter_*"))
        result["disk"] = {"adapter": size, **costs["disk"]}
    else:
        save_adapter(run, data, base, method)
    with replacing(run.path, "result") as path:
        path.write_text(json.dumps(result) + "\n")
    if costs:
        run.path.with_suffix(".checkpoint").unlink(missing_ok=True)
        done = f"trained {history.step:,} steps in {sum(history.laps):.1f} s"
        say(f"{done}; wrote {run.path}, and the adapter ({size / 2**20:.1f} MiB) beside it")
    return run.path
