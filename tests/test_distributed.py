"""Two processes give the adapter of one with the doubled batch; every example is used once.

Starting processes takes longer than all that they do here: one launch of two runs every job.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import rows_flags, text_flags
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
# Run each job's script as `python script.py flags` would; log what this process wrote and used.
import gc, json, os, runpy, sys
sys.path.insert(0, {root!r})
import common
gc.freeze()
rank, logs, jobs = int(os.environ["RANK"]), {{}}, json.load(open({folder!r} + "/jobs.json"))
collate, gradient, trial = common.collate, common.gradient, common.try_model

def watch(event, args):
    modes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = event == "open" and isinstance(args[2], int) and args[2] & modes
    writes = writes or event in ("os.mkdir", "os.rename", "os.remove")
    if writes and {folder!r} + "/out" in str(args[0]):
        log.append(["write", str(args[0])])

def collating(data, split, examples, targets):
    kind = {{id(data.train): "train", id(data.dev): "dev"}}.get(id(split), "test")
    log.append([kind if not measuring else "measured", examples.tolist()])
    return collate(data, split, examples, targets)

def quietly(*args):
    measuring.append(1)
    costs = measure(*args)
    measuring.clear()
    return costs

def stopping(*args):  # before the step that the job names, if it names one
    steps[0] += 1
    if steps[0] == job.get("dies") and rank == 1:
        raise RuntimeError("this process dies")
    if steps[0] == job.get("stop"):
        raise KeyboardInterrupt
    return gradient(*args)

def trying(*args):  # its example does not count
    if job["name"] == "unreached":
        trial(*args)

measuring, measure = [], common.measure
sys.addaudithook(watch)
common.collate, common.gradient, common.measure = collating, stopping, quietly
common.try_model = trying
for job in jobs:
    if "dies" in job:  # the last one: what came before it is kept
        with open({folder!r} + "/log" + str(rank), "w") as file:
            file.write(json.dumps(logs))
    log = logs.setdefault(job["name"], [])
    steps, sys.argv = [0], job["argv"]
    try:
        runpy.run_path(os.path.join({root!r}, job["argv"][0]), run_name="__main__")
    except KeyboardInterrupt:
        pass
    except SystemExit as stop:
        log.append(["end", stop.code])
"""
UNREACHED = """
import torch, lora
adapt = lora.adapt

def unused_too(run, base):
    base.model.unused = torch.nn.Linear(2, 2)  # trained, and in no forward pass
    return adapt(run, base)

lora.adapt = unused_too
lora.main()
"""
TRAINED = ["--epochs", 16, "--lr", 5e-3, "--head_lr", 5e-3, "--train_samples", 33]
TRAINED += ["--eval_batch_size", 7]
METHODS = {  # 33 examples in batches of 16: the last has one, none for the second process
    "lora": ["lora.py"],
    "qlora": ["qlora.py", "--nf4_kernel", "torch"],
    "hira": ["hira.py"],
    "prune": ["sparse_lora.py", "--penalty", 0.05],
    "full": ["baseline.py", "--full", "--lr", 5e-4],
}
FALLEN = {"masked": 0.95, "causal": 0.95}  # random words cannot be learned much better
OTHERS = {
    "accumulated": ["lora.py", "--grad_accum", 2, "--batch_size", 4],  # the same global batch of 16
    "resumed": ["lora.py", "--save_every", 2],
}


def launch(script):
    """Run a script in two processes; returns the finished launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


def outcome(folder):
    [path] = Path(folder).glob("*.json")
    adapter = load_file(path.with_suffix("") / "adapter_model.safetensors")
    return json.loads(path.read_text()), adapter


@pytest.fixture(scope="module")
def both(models, reviews, text_dir, tmp_path_factory):
    """Every job by two processes with batches of 8: folder, logs by rank, one process's outcome."""
    folder = tmp_path_factory.mktemp("two")
    rows = [*rows_flags(models, reviews), *TRAINED]
    text = [*text_flags(models, text_dir, "bert"), *TRAINED, "--max_length", 12]
    flags = {name: [script, *rows, *own] for name, (script, *own) in (METHODS | OTHERS).items()}
    flags |= {
        "masked": ["lora.py", *text],
        "causal": ["hira.py", *text, "--model", models("gpt2", "CausalLM")],
        "unreached": [folder / "unreached.py", *rows],
    }

    def job(name, **more):
        script, *words = flags[name]
        words = words if "--batch_size" in words else [*words, "--batch_size", 8]
        argv = [script, *words, "--out", folder / "out" / name]
        return {"name": name, "argv": [str(word) for word in argv]} | more

    jobs = [job(name) for name in flags if name != "resumed"]
    jobs += [job("resumed", stop=8), job("resumed"), job("lora", dies=3) | {"name": "dead"}]
    jobs[-1]["argv"][-1] = str(folder / "dead")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "unreached.py").write_text(UNREACHED)
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), folder=str(folder)))
    done = launch(folder / "driver.py")
    assert (folder / "log0").exists() and (folder / "log1").exists(), done.stderr[-3000:]
    logs = [json.loads((folder / f"log{rank}").read_text()) for rank in (0, 1)]

    @functools.cache
    def alone(name):
        script, *words = flags["lora" if name in OTHERS else name]
        module = importlib.import_module(script.removesuffix(".py"))
        module.main([*words, "--batch_size", 16, "--out", folder / "alone" / name])
        return outcome(folder / "alone" / name)

    return folder / "out", logs, alone, done


@pytest.mark.parametrize("name", [*METHODS, *OTHERS, "masked", "causal"])
def test_two_processes_equal_one_with_the_doubled_batch(both, name):
    """To 1e-5 after the loss has fallen by half; the tiny models have no dropout."""
    folder, _, alone, _ = both
    (two, together), (one, single) = outcome(folder / name), alone(name)
    losses = [loss for *_, loss in one["curve"]]
    assert min(losses[-6:]) / losses[0] < FALLEN.get(name, 0.5)
    assert single.keys() == together.keys() and single
    for key, tensor in single.items():
        if key.endswith("k_lin.bias"):  # it adds the same to all scores of a query: no gradient
            continue
        torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5)
    assert [loss for *_, loss in two["curve"]] == pytest.approx(losses, rel=1e-3, abs=1e-4)
    assert [lr for _, lr, _ in two["curve"]] == [lr for _, lr, _ in one["curve"]]
    assert two["environment"]["processes"] == 2 and one["environment"]["processes"] == 1


@pytest.mark.parametrize("name", [*METHODS, "masked", "causal"])
def test_scores_and_costs_equal_those_of_one_process(both, name):
    folder, _, alone, _ = both
    two, one = outcome(folder / name)[0], alone(name)[0]
    assert two["data"] == one["data"]
    for split in ("dev", "test"):
        assert two["metrics"][split] == pytest.approx(one["metrics"][split], rel=1e-4)
    for key, values in one["test_examples"].items():
        near = pytest.approx(values, rel=1e-3) if key == "nll" else values
        assert two["test_examples"][key] == near
    hours = 2 * two["time"]["train_seconds"] / 3600
    assert two["time"]["accelerator_hours"] == pytest.approx(hours)
    # Each share is padded to its own longest example: about the same in all.
    assert 0.94 < two["flops"]["total"] / one["flops"]["total"] < (1.1 if name == "hira" else 1.02)


@pytest.mark.parametrize("name", [*METHODS, "accumulated", "masked", "causal"])
def test_every_example_is_used_once(both, name):
    """Over both processes: to train once an epoch, to score once; and both have work."""
    folder, logs, _, _ = both
    result = outcome(folder / name)[0]

    def used(kind, log):
        return [i for event, examples in log[name] if event == kind for i in examples]

    for kind in ("train", "dev", "test"):
        parts = [used(kind, log) for log in logs]
        assert all(parts), kind
        count = Counter(parts[0] + parts[1])
        times = result["settings"]["epochs"] if kind == "train" else 1
        assert len(count) == result["data"][kind] and set(count.values()) == {times}
    steps = [sum(kind == "train" for kind, _ in log[name]) for log in logs]
    assert steps[1] < steps[0]  # of the last batch, one example, it had none


def test_a_weight_that_no_gradient_reaches_ends_every_process(both):
    """Before the all-reduce, which would make a gradient of zeros and train on silently."""
    folder, logs, _, done = both
    ends = [[value for kind, value in log["unreached"] if kind == "end"] for log in logs]
    assert ends == [[2], [2]] and not list(folder.rglob("unreached/*.json"))
    assert done.stderr.count("no gradient reaches unused.weight, unused.bias") == 2


def test_only_the_first_process_writes(both):
    folder, logs, _, done = both
    runs = len(METHODS) + len(OTHERS) + 2
    assert done.stdout.count("wrote") == runs  # nor does another one speak
    assert done.stdout.count(": dev ") == runs
    assert "continuing at step 6" in done.stdout
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".checkpoint")]
    first, second = ([event for job in log.values() for event, _ in job] for log in logs)
    assert first.count("write") > len(METHODS) and second.count("write") == 0


def test_a_process_that_dies_ends_the_job(both):
    """In the middle of training: the other one does not wait forever; there is no result."""
    folder, _, _, done = both
    assert done.returncode != 0 and "this process dies" in done.stderr
    dead = folder.parent / "dead"
    assert not [path for path in dead.rglob("*") if path.is_file()]
