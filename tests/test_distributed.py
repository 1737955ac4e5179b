"""Two processes with a batch give the adapter of one with the doubled batch; rows are used once.

Starting processes takes longer than all that they do here: one launch of two runs every job.
"""

import functools
import gc
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
# Run each job's script as `python script.py flags` would; log what this process wrote and used.
import gc, json, os, runpy, sys
sys.path.insert(0, {root!r})
import common
gc.freeze()
common.try_one_row = lambda *_: None  # it counts no row
rank, log, jobs = int(os.environ["RANK"]), [], json.load(open({jobs!r}))
collate, gradient = batches.collate, common.gradient

def watch(event, args):
    modes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = event == "open" and isinstance(args[2], int) and args[2] & modes
    if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and {out!r} in str(args[0]):
        log.append(["write", str(args[0])])

def collating(data, split, rows, targets):
    kind = {{id(data.train): "train", id(data.dev): "dev"}}.get(id(split), "test")
    log.append([kind if not measuring else "measured", rows.tolist()])
    return collate(data, split, rows, targets)

def quietly(*args):
    measuring.append(1)
    costs = measure(*args)
    measuring.clear()
    return costs


def stopping(*args):  # before the step that the job names, if it names one
    steps[0] += 1
    if steps[0] == job.get("dies") and rank == 1:
        raise RuntimeError("this rank dies")
    if steps[0] == job.get("stop"):
        raise KeyboardInterrupt
    return gradient(*args) if not measuring else gradient(*args)
measuring, measure = [], common.measure
sys.addaudithook(watch)
batches.collate, common.gradient, common.measure = collating, stopping, quietly
for job in jobs:
    if "dies" in job:  # the last one: what came before it is kept
        with open({log!r} + str(rank), "w") as file:
            file.write(json.dumps(log))
    log.append(["job", job["name"]])
    steps, sys.argv = [0], job["argv"]
    try:
        if job["argv"][0] == "common.py":  # as a script it would be a second copy, unwatched
            common.main(job["argv"][1:])
        else:
            runpy.run_path(os.path.join({root!r}, job["argv"][0]), run_name="__main__")
    except KeyboardInterrupt:
        pass
"""
TRAINED = [
    "--epochs",
    16,
    "--lr",
    5e-3,
    "--head_lr",
    5e-3,
    "--train_samples",
    33,
    "--eval_batch_size",
    7,
]
METHODS = {  # 33 rows in global batches of 16: the last has one row, none for the second process
    "lora": ["lora.py"],
    "qlora": ["qlora.py", "--nf4_kernel", "torch"],
    "hira": ["hira.py"],
    "prune": ["sparse_lora.py", "--penalty", 0.05],
    "full": ["common.py", "--full", "--lr", 5e-4],
}
FALLEN = {"masked": 0.95, "causal": 0.95}  # words drawn at random cannot be learnt much better
OTHERS = {
    "accumulated": ["lora.py", "--grad_accum", 2, "--batch_size", 4],  # the same global batch of 16
    "resumed": ["lora.py", "--save_every", 2],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    torch.set_num_threads(threads)


def launch(script, *words):
    """Run a script in two processes; returns the finished launcher."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        str(script),
        *map(str, words),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def outcome(folder):
    [path] = Path(folder).glob("*.json")
    return json.loads(path.read_text()), load_file(
        path.with_suffix("") / "adapter_model.safetensors"
    )


@pytest.fixture(scope="module")
def both(models, reviews, text_dir, tmp_path_factory):
    """Every job by two processes with batches of 8: folder, logs by rank, one process's outcome."""
    folder = tmp_path_factory.mktemp("two")
    rows = ["--dataset", reviews, "--model", models("distilbert"), "--max_length", 24, *TRAINED]
    text = [
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--model",
        models("bert", "MaskedLM"),
        "--max_length",
        12,
        *TRAINED,
    ]
    flags = {name: [script, *rows, *own] for name, (script, *own) in (METHODS | OTHERS).items()}
    flags |= {
        "masked": ["lora.py", *text],
        "causal": ["hira.py", *text, "--model", models("gpt2", "CausalLM")],
    }

    def job(name, **more):
        script, *words = flags[name]
        words = words if "--batch_size" in words else [*words, "--batch_size", 8]
        return {
            "name": name,
            "argv": list(map(str, [script, *words, "--out", folder / "out" / name])),
        } | more

    jobs = [job(name) for name in flags if name != "resumed"]
    jobs += [job("resumed", stop=8), job("resumed"), job("lora", dies=3) | {"name": "dead"}]
    jobs[-1]["argv"][-1] = str(folder / "dead")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "driver.py").write_text(
        DRIVER.format(
            root=str(ROOT),
            jobs=str(folder / "jobs.json"),
            out=str(folder / "out"),
            log=str(folder / "log"),
        )
    )
    done = launch(folder / "driver.py")
    assert (folder / "log0").exists() and (folder / "log1").exists(), done.stderr[-3000:]
    logs = []
    for rank in (0, 1):
        by_job = {}
        for kind, what in json.loads((folder / f"log{rank}").read_text()):
            if kind == "job":
                current = by_job.setdefault(what, [])
            else:
                current.append((kind, what))
        logs.append(by_job)

    @functools.cache
    def alone(name):
        script, *words = flags["lora" if name in OTHERS else name]
        module = importlib.import_module(script.removesuffix(".py"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "try_one_row", lambda *_: None)
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
        if key.endswith(
            "k_lin.bias"
        ):  # it adds the same to all scores of a query, so its gradient is rounding alone
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
        assert two["test_examples"][key] == (
            values if key != "nll" else pytest.approx(values, rel=1e-3)
        )
    hours = 2 * two["time"]["train_seconds"] / 3600
    assert two["time"]["accelerator_hours"] == pytest.approx(hours)
    # Each share is padded to its own longest row: about the same in all.
    assert 0.94 < two["flops"]["total"] / one["flops"]["total"] < (1.1 if name == "hira" else 1.02)


@pytest.mark.parametrize("name", [*METHODS, "accumulated", "masked", "causal"])
def test_every_row_is_used_once(both, name):
    """Over both processes: a training row once an epoch, a scored row once; and both have work."""
    folder, logs, _, _ = both
    result = outcome(folder / name)[0]

    def used(kind, log):
        return [row for what, rows in log[name] if what == kind for row in rows]

    for kind in ("train", "dev", "test"):
        parts = [used(kind, log) for log in logs]
        assert all(parts), kind
        count = Counter(parts[0] + parts[1])
        times = result["settings"]["epochs"] if kind == "train" else 1
        assert len(count) == result["data"][kind] and set(count.values()) == {times}
    steps = [sum(kind == "train" for kind, _ in log[name]) for log in logs]
    assert steps[1] < steps[0]  # of the last batch, one row, it had none


def test_only_the_first_process_writes(both):
    folder, logs, _, done = both
    runs = len(METHODS) + len(OTHERS) + 2
    assert done.stdout.count("wrote") == runs  # nor does another one speak
    assert done.stdout.count(": dev ") == runs
    assert "continuing at step 6" in done.stdout
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".checkpoint")]
    wrote = [
        [what for log in logs[rank].values() for kind, what in log if kind == "write"]
        for rank in (0, 1)
    ]
    assert len(wrote[0]) > len(METHODS) and wrote[1] == []


def test_a_process_that_dies_ends_the_job(both):
    """In the middle of training: the other one does not wait for ever; there is no result."""
    folder, _, _, done = both
    assert done.returncode != 0 and "this rank dies" in done.stderr
    dead = folder.parent / "dead"
    assert not [path for path in dead.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_wrong_input_ends_the_job(models, reviews, tmp_path):
    """torchrun ends with an error, our line is there, and nothing is written."""
    done = launch(
        "lora.py",
        "--dataset",
        reviews,
        "--model",
        models("distilbert"),
        "--max_length",
        24,
        "--targets",
        "nothing",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode != 0 and "lora.py: error: --targets nothing" in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
