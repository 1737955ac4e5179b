"""What runs leave on disk: results, adapters in PEFT's layout, checkpoints. Each appears whole.

What is read here may come from a stranger: types, shapes and values are checked before any is used.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import subprocess
import time
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from harness.batches import count_steps
from harness.models import AdapterLayer, class_names, head_order, refuse_head, stand_ins
from harness.process import (
    agree,
    fail,
    first_line,
    is_running,
    library_errors,
    process_count,
    process_index,
    say,
)
from harness.rows import HUB, find_files

LIBRARIES = ("torch", "transformers", "datasets", "bitsandbytes")
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")  # of A and B; other starts change the base's W0


@contextlib.contextmanager
def replacing(path, what):
    """Yield a new file beside `path`; at the end it gets that name, or is removed after an error.

    Nobody can guess the new file's name, so a link that was planted in the folder receives nothing.
    The name also holds the process: what a killed process of this machine left behind is removed.
    """
    machine = zlib.crc32(platform.node().encode())
    begin = f"{path.stem}.{machine:x}-"
    unfinished = path.with_name(f"{begin}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with library_errors(f"--out {path.parent}: cannot write the {what}", status=1):
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in path.parent.glob(f"{glob.escape(begin)}*.tmp"):
                if not is_running(file.name.removeprefix(begin).split(".")[0]):
                    file.unlink(missing_ok=True)
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
    complete = all(isinstance(result.get(k), dict) for k in ("settings", "environment", "data"))
    return result if complete else {}


# ------------------------------------------------------------------------- is there such a run yet


@functools.cache
def files_sha256(dataset, data_dir):
    """The hash of the names and bytes of a data set's files; "" where it has none of its own."""
    folder, digest = Path(data_dir) / dataset if dataset in HUB else Path(dataset), hashlib.sha256()
    if not folder.exists():  # the demo's, or the hub's
        return ""
    splits = find_files(f"--dataset {dataset}", dataset, data_dir)
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
    values = [f"was {old.get(key)!s:.20}, is now {new.get(key)!s:.20}" for key in keys]
    return "; ".join(map(" ".join, zip(names, values, strict=True)))


def finished(run):
    """Whether run.path holds a finished result of this run; another run's ends the program.

    A run that was stopped while it was measured is not finished: it lacks the costs, and has a
    checkpoint.
    """
    done, folder = False, run.path.with_suffix("")
    if folder.is_symlink():
        fail(f"{folder} is a link, and the adapter belongs there; remove it")
    if process_index() == 0 and os.path.lexists(run.path) and not run.force:
        result = read_result(run.path)
        if not result:
            fail(f"{run.path} is not a complete result file; --force replaces it")
        files = files_sha256(run.dataset, run.data_dir)
        new = decisive(run.settings, run.lr, process_count(), files)
        # The hub's files have no hash, nor have the results of earlier versions.
        files = files and (result["data"].get("files_sha256") or files)
        processes = result["environment"].get("processes")
        old = decisive(result["settings"], result.get("lr"), processes, files)
        if differ := differences(old, new):
            other = f"holds a run with other settings or data ({differ})"
            fail(f"{run.path} {other}; --name NAME keeps both, --force replaces it")
        stopped = result.get("untrained") or run.path.with_suffix(".checkpoint").exists()
        done = "time" in result or not stopped
        if done and run.export:
            fail(f"{run.path} exists already; --eval_only {folder} exports it")
        if done:
            say(f"{run.path} exists already; --force runs it again")
    return agree(done)


# ------------------------------------------------------------------------------------ checkpoints


def changing(model):
    """What a run changes: trained tensors, and buffers (a method's masks); no frozen weight."""
    frozen = {n for n, t in model.named_parameters(remove_duplicate=False) if not t.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def identity(run, data, base):
    """What a checkpoint and the run that continues it must agree in, {name: value}."""
    tokens = hashlib.sha256(json.dumps(data.description).encode()).hexdigest()
    settings = decisive(run.settings, run.lr, process_count(), tokens)
    return settings | {"base weights": base.sha256}


def save_checkpoint(run, data, base, optimizer, history):
    """Write what a stopped run needs. Random numbers depend on (seed, step): none to keep."""
    losses = [(step, lr, float(loss)) for step, lr, loss in history.losses]
    if process_index() == 0 and all(math.isfinite(loss) for _, _, loss in losses):
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
            misfit = misfit_of(state, run, data, base, optimizer)
        if misfit and not run.force:
            fail(f"{path}: {misfit}; --name NAME keeps it, --force starts afresh")
        state = None if misfit else state
    state = agree(state)
    if state:
        base.model.load_state_dict(state["model"], strict=False)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        vars(history).update(state["history"])
        say(f"continuing at step {history.step} from {path}")


def misfit_of(state, run, data, base, optimizer):
    """Why a checkpoint's state is not one of this run, in words; "" if it is."""
    old = state.get("run") if isinstance(state, dict) else None
    if not isinstance(old, dict):
        return "it is no checkpoint"
    old = json.loads(json.dumps(old, default=str, skipkeys=True))  # tensors cannot be compared
    if differ := differences(old, identity(run, data, base)):
        return f"it is of a run with other settings or data ({differ})"
    row = (0, 0.0, 0.0)
    history = {"step": 0, "curve": [row], "losses": [row], "laps": [0.0], "diverged": False}
    weights = {name: torch.zeros_like(tensor) for name, tensor in changing(base.model).items()}
    forms = {"model": weights, "optimizer": state_after_a_step(optimizer), "history": history}
    for name, form in forms.items():
        if not has_form(state.get(name), form):
            return f"its {name} does not fit this run"
    history, total = state["history"], count_steps(run, data)
    steps = {float(entry["step"]) for entry in state["optimizer"].values()} | {history["step"]}
    fits = len(steps) == 1 and 0 < history["step"] == len(history["laps"]) <= total
    return "" if fits and not history["diverged"] else f"its history is not one of {total} steps"


def state_after_a_step(optimizer):
    """The state {number: {name: value}} of a fresh optimizer after a step with a gradient of −1.

    What is positive then (a count, a square) is always so. At a learning rate of 0 no weight moves.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for tensor in group["params"]:
            tensor.grad = torch.full_like(tensor, -1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = optimizer.state_dict()["state"]
    optimizer.state.clear()
    return state


def has_form(value, form):
    """Whether a nested value has the types, keys, shapes and dtypes of `form`, and finite numbers.

    A tensor has no negative number if that of `form` is positive. A list in `form` has one element.
    """
    if type(value) is not type(form):
        return False
    if isinstance(form, dict):
        return value.keys() == form.keys() and all(has_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return all(has_form(element, form[0]) for element in value)
    if isinstance(form, tuple):
        return len(value) == len(form) and all(map(has_form, value, form))
    if isinstance(form, torch.Tensor):
        same = (value.shape, value.dtype, value.layout) == (form.shape, form.dtype, form.layout)
        same = same and value.device.type == "cpu" and bool(value.isfinite().all())
        return same and not ((value < 0).any() and (form > 0).all())
    return not isinstance(form, float) or math.isfinite(value)


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
    return f"{base.sha256}:{method.base_format}".removesuffix(":")


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
    heads = sorted({name.removeprefix(prefix).split(".")[0] for name in base.head_names})
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
    return names if names and isinstance(names, list) else None


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
    changes = {
        key: config.get(key) for key in ("use_rslora", "use_dora", "alora_invocation_tokens")
    }
    changes["init_lora_weights"] = start if start not in (True, *PLAIN_STARTS) else None
    for key, value in changes.items():
        if value:
            fail(f"{where}: made with {key} {value!s:.40}, another computation than ours")
    for key, flag in {"peft_type": "the script", "r": "--rank", "lora_alpha": "--alpha"}.items():
        if key in ours and config.get(key) != ours[key]:
            text = f"its config says {key} {config.get(key)!r:.40}, and this run {ours[key]!r}"
            fail(f"{where}: {text}; change {flag}")
    sha256 = trained_on.get("base_sha256")
    if sha256 not in (None, base_identity(base, method)):
        other = f"trained on another base than --model {run.model}, in other bits or for another"
        fail(f"{where}: {other} task; change --model, the script or --dataset")
    if sha256 is None and method.base_format:
        say(f"{where}: scored on the base in {method.base_format}, as made here")
    layers = {path: layer for path, layer in stand_ins(model).items() if layer.keys}
    cut_ranks(where, config, ours.get("r"), ours.get("lora_alpha"), layers)
    wanted = adapter_tensors(model)
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if missing or unexpected:
        names = ", ".join([*sorted(missing)[:1], *sorted(unexpected)[:1]])
        counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected ({names})"
        fail(f"{where}: {counts}; same --targets and data set?")
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{list(saved[name].shape)} in the file, {list(tensor.shape)} in this model"
            fail(f"{where}: {name} is {shapes}; same --rank?")
        # Products of much larger numbers overflow, and all scores would be NaN.
        if not saved[name].is_floating_point() or not (saved[name].float().abs() < 1e4).all():
            fail(f"{where}: {name} holds integers, NaN or numbers above 10,000: it is broken")
        tensor.data.copy_(saved[name])


def cut_ranks(where, config, r, alpha, layers):
    """Cut A and B of `layers` {path: layer} to the ranks of a pruned adapter.

    The patterns in its config must name every layer, and all layers must have the scale alpha/r.
    """
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if not ranks and not alphas:
        return
    ours = alpha and isinstance(ranks, dict) and ranks.keys() == layers.keys()
    ours = ours and all(type(rank) is int and 0 < rank <= r for rank in ranks.values())
    if not ours or alphas != {path: alpha * rank / r for path, rank in ranks.items()}:
        fail(f"{where}: its rank_pattern or alpha_pattern is not one of ours")
    for path, layer in layers.items():
        layer.A = nn.Parameter(layer.A[: ranks[path]].detach().clone())
        layer.B = nn.Parameter(layer.B[:, : ranks[path]].detach().clone())


# ------------------------------------------------------------------------------------ result file


def environment(run):
    """What the numbers depend on beside the code: versions, device, threads, load, commit."""
    values = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            values[name] = importlib.metadata.version(name).split("+")[0]
    cuda = "cuda" in run.device and f"cuda {torch.cuda.get_device_name(run.device)}"
    values["device"] = cuda or f"cpu {platform.machine()}"
    values |= {"processes": process_count(), "threads": torch.get_num_threads()}
    values |= {"precision": run.precision, "load_average": os.getloadavg()[0]}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    with contextlib.suppress(OSError):  # git is not installed
        values["commit"] = subprocess.run(command, **options).stdout.strip() or None
    return values


def save_result(run, data, base, method, history, scores, costs=None):
    """Write the adapter and, last, the result file, so that a result means a finished run.

    Called twice: with the scores alone before anything is measured, so that nothing after training
    can lose it, and with the costs. Returns the result's path.
    """
    if process_index() != 0:
        return run.path
    report = method.report() if costs else {}  # expensive, so only after the scores are on disk
    files, merged = files_sha256(run.dataset, run.data_dir), (costs or {}).pop("merged", None)
    result = {"schema": 3, "method": run.method, "name": run.name, "lr": run.lr, "seed": run.seed}
    result |= {key: run.settings[key] for key in ("dataset", "model")}
    result |= {"settings": run.settings, "untrained": history.step == 0}
    result |= {"diverged": history.diverged or scores["diverged"]}
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
        say(f"{done}; wrote {run.path}, and the adapter ({size / 2**10:,.0f} KiB) beside it")
    return run.path
