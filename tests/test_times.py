"""Times: the numbers behind the tables, where they are shown, and a call of study/times.py."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_compare import make_study, write
from test_plots import has

import compare
from report import times
from study import times as study_times
from study import times_page

LINE = {"dataset": "sst2", "model": "MiniLM", "busy": False, "started": "2026-12-01", "extra": []}
LINE |= {"machine": {"name": "a CPU", "device": "cpu", "precision": "fp32", "torch": "2.13"}}
LINE["machine"] |= {"cores": 2, "threads": 2}
LINE |= {"learning_rates": 6, "epoch_steps": 250, "run_steps": 750, "product_rate": 4e11}
LINE |= {"steps": 10, "examples": 320, "tokens": 4000, "flops": 1e11}
SPEED = {"single_ms": [1.0, 2.0, 4.0], "examples": 64, "seconds": 0.5}
LINE |= {"inference": {"unmerged": SPEED, "merged": SPEED | {"single_ms": [1.0, 1.0, 3.0]}}}
ROUNDS = [("LoRA", 0, 2.0), ("HiRA", 0, 2.5), ("LoRA", 1, 4.0), ("HiRA", 1, 8.0)]
LINES = [LINE | {"method": name, "round": i, "seconds": s} for name, i, s in ROUNDS]
GPU = LINE["machine"] | {"device": "cuda", "name": "H200"}
BUSY = [line | {"busy": True, "started": "2027"} for line in LINES]


def write_lines(folder, lines):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "sst2-MiniLM.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_derived_numbers():
    numbers = times.training_times(LINES)
    assert numbers["LoRA"] == {
        "epoch_seconds": [50, 100],  # 250 steps of 0.2 and 0.4 s
        "run_seconds": [150, 300],
        "examples_per_second": [160, 80],
        "tokens_per_second": [2000, 1000],
        "relative_speed": [1, 1],
        "product_rate_percent": [12.5, 6.25],  # 50 and 25 GFLOP/s of 400
        "tuning_hours": [0.25, 0.5],  # 6 learning rates of 150 and 300 s
    }
    assert numbers["HiRA"]["relative_speed"] == [0.8, 0.5]  # to LoRA in the same round
    inference = times.inference_times(LINES)["LoRA", "unmerged"]
    assert inference["p50_ms"] == [2, 2] and inference["examples_per_second"] == [128, 128]
    assert inference["p90_ms"] == pytest.approx([3.6, 3.6])  # 0.8 of the way from 2 to 4
    assert times.reference("HiRA / PEFT, grouped") == "HiRA"
    gpu = times.training_times([line | {"machine": GPU} for line in LINES])
    assert gpu["LoRA"]["gpu_hours"] == [0.25, 0.5]


def test_the_page_of_speeds(tmp_path):
    """Medians with quartiles; nothing from a busy machine."""
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- times -->\nold\n<!-- /times -->\nafter")
    write_lines(tmp_path, LINES + BUSY)
    times_page.write(tmp_path, page)
    row = next(line for line in page.read_text().splitlines() if line.startswith("| HiRA"))
    assert row.split(" | ")[5] == "0.65 (0.575 to 0.725)"
    write_lines(tmp_path, BUSY)
    times_page.write(tmp_path, page)
    assert page.read_text().startswith("before\n<!-- times -->\n\nNo results yet")


def costs_of(folder, *flags):
    """The page's part on costs."""
    compare.main([str(folder), "--no_plots", *flags])
    text = (folder / "README.md").read_text()
    return text.split("### What it costs\n\n")[1].split("<details>")[0]


@pytest.mark.parametrize("gpu", [False, True])
def test_measurements_beside_the_results_are_shown(gpu, tmp_path):
    write(tmp_path, *make_study({"lora": 0, "hira": 1}, 2, settings={"epochs": 3}), name="s.jsonl")
    older = [line | {"started": "2020", "seconds": 99.0} for line in LINES]
    machine = GPU if gpu else LINE["machine"]
    write_lines(tmp_path / "times", older + [line | {"machine": machine} for line in LINES])
    text = costs_of(tmp_path, "--price", "2")
    assert "(250 in an epoch, 750 in a run)" in text and "2 rounds; 400 GFLOP/s" in text
    assert "| HiRA | 131 (96.9 to 166) | 394 (291 to 497) |" in text  # 0.25 and 0.8 s a step
    assert "| LoRA | merged | 1 (1 to 1) | 2.6 (2.6 to 2.6) | 128 (128 to 128) |" in text
    assert ("not measured, because no GPU ran" in text) != gpu
    assert text.count(" 0.375 (0.312 to 0.438) | 0.75 (0.625 to 0.875) |") == 1 + gpu


@pytest.mark.parametrize("change", [{"model": "other"}, {"run_steps": 500}, {"dataset": "imdb"}])
def test_measurements_of_other_data_bases_or_budgets_are_not_shown(change, tmp_path):
    write(tmp_path, *make_study({"lora": 0}, 2, settings={"epochs": 3}), name="s.jsonl")
    write_lines(tmp_path / "times", [line | change for line in LINES])
    assert costs_of(tmp_path).startswith("Times were not measured")


BAD = [["torn"], [3], [{"busy": False}], [LINE | {"method": "x", "seconds": 0}]]


@pytest.mark.parametrize("lines", BAD)
def test_a_bad_file_of_times_is_one_line(lines, tmp_path, capsys):
    write(tmp_path, *make_study({"lora": 0}, 2), name="s.jsonl")
    write_lines(tmp_path / "times", lines)
    assert costs_of(tmp_path).startswith("Times were not measured")
    assert capsys.readouterr().err.count("times/sst2-MiniLM.jsonl: torn, or not of") == 1


@pytest.mark.parametrize("device", ["cpu x86_64", "cuda H100"])
def test_runs_with_timing_are_shown_with_a_sentence_on_drift(device, tmp_path):
    made = make_study({"lora": 0, "hira": 1}, 2, device=device, timed=True)
    for result in made:
        if result["method"] == "hira" and result["seed"] == 1:
            result["time"] |= {"train_seconds": 120.0, "samples_per_second": 80.0}
    write(tmp_path, *made, name="s.jsonl")
    text = costs_of(tmp_path, "--price", "2")
    assert "speed drifts from run to run" in text
    row = next(line for line in text.splitlines() if line.startswith("| HiRA")).split(" | ")
    assert row[1:4] == ["90 (75 to 105)", "90 (75 to 105)", "120 (100 to 140)"]
    assert row[5] == "0.75 (0.625 to 0.875)"  # to LoRA at the same seed
    assert row[6].startswith("0.075") and row[7].startswith("0.15 ")  # hours of one seed, of both
    assert ("| LoRA | merged | 10 (10 to 10) | 11 (11 to 11) | 320 (320 to 320) |") in text
    assert (len(row) == 10) == ("GPU hours of tuning" in text) == device.startswith("cuda")
    text = costs_of(tmp_path, "--price", "2") if device.startswith("cuda") else ""
    assert not text or row[8].startswith("0.05") and row[9].startswith("0.1 ")


def test_plots_of_costs_show_the_medians_and_the_scores(tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.update({len(saved): self}))
    monkeypatch.setattr("report.plots.write", lambda *_: None)
    made = make_study({"lora": 0, "hira": 6}, 2, settings={"epochs": 3})
    write(tmp_path, *made, name="s.jsonl")
    write_lines(tmp_path / "times", LINES)
    compare.main([str(tmp_path)])
    bars, left, right = [axes for figure in [*saved.values()][3:] for axes in figure.axes]
    tests = [np.mean([r["metrics"]["test"]["accuracy"] for r in made[i : i + 6]]) for i in (0, 6)]
    lora, hira = (100 * x for x in tests)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([225, 393.75])
    assert [text.get_text() for text in bars.texts] == [f"{lora:.2f} %", f"{hira:.2f} %"]
    assert has(left, [[225, lora]]) and has(left, [[393.75, hira]])
    assert has(right, [[2, lora]]) and has(right, [[1, hira]])
    text = (tmp_path / "README.md").read_text()
    for name in ("training-time", "trade-off"):
        assert f"sst2-minilm-{name}.png" in text


def test_a_whole_call(tmp_path, monkeypatch):
    three = {name: study_times.METHODS[name] for name in ("Head only", "LoRA", "Contextual QLoRA")}
    monkeypatch.setattr(study_times, "METHODS", three)
    words = ["--dataset", "demo", "--rounds", "1", "--steps", "1", "--busy", "--out", str(tmp_path)]
    lines = [json.loads(line) for line in study_times.main(words).read_text().splitlines()]
    assert [line["method"] for line in lines] == [*three]
    assert all(line["busy"] and line["seconds"] > 0 and line["examples"] == 32 for line in lines)
    assert "8000" in study_times.study_flags("sst2", "models/all-MiniLM-L6-v2")
    assert len(lines[0]["inference"]) == 1 and len(lines[2]["inference"]) == 3
