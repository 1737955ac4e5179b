"""study/times.py: the numbers behind its tables, and one whole call."""

import json

import pytest

from study import times, times_page

LINE = {"dataset": "sst2", "model": "tiny", "busy": False, "started": "2026-12-01", "extra": []}
LINE |= {"machine": {"name": "a CPU", "device": "cpu", "precision": "fp32", "torch": "2.13"}}
LINE["machine"] |= {"cores": 2, "threads": 2}
LINE |= {"learning_rates": 6, "epoch_steps": 250, "run_steps": 750, "product_rate": 4e11}
LINE |= {"steps": 10, "examples": 320, "tokens": 4000, "flops": 1e11}
LINE |= {"inference": {"base": {"single_ms": [1.0, 2.0, 4.0], "examples": 64, "seconds": 0.5}}}
ROUNDS = [("LoRA", 0, 2.0), ("HiRA", 0, 2.5), ("LoRA", 1, 4.0), ("HiRA", 1, 8.0)]
LINES = [LINE | {"method": name, "round": i, "seconds": s} for name, i, s in ROUNDS]


def test_derived_numbers():
    numbers = times_page.derive(LINES)
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
    inference = times_page.derive_inference(LINES)[("LoRA", "base")]
    assert inference["p50_ms"] == [2, 2] and inference["examples_per_second"] == [128, 128]
    assert inference["p90_ms"] == pytest.approx([3.6, 3.6])  # 0.8 of the way from 2 to 4
    assert times_page.reference("HiRA / PEFT, grouped") == "HiRA"


def test_page(tmp_path):
    """Medians with quartiles; nothing from a busy machine."""
    page, file = tmp_path / "speed.md", tmp_path / "sst2-tiny.jsonl"
    busy = [json.dumps(line | {"busy": True, "started": "2027"}) for line in LINES]
    file.write_text("\n".join([*map(json.dumps, LINES), *busy]))
    page.write_text("before\n<!-- times -->\nold\n<!-- /times -->\nafter")
    times_page.write(tmp_path, page)
    [row, _] = [line for line in page.read_text().splitlines() if line.startswith("| HiRA")]
    assert row.split(" | ")[5] == "0.65 (0.575 to 0.725)" and row.endswith("not measured |")
    file.write_text("\n".join(busy))
    times_page.write(tmp_path, page)
    assert page.read_text().startswith("before\n<!-- times -->\n\nNo results yet")


def test_a_whole_call(tmp_path, monkeypatch):
    three = {name: times.METHODS[name] for name in ("Head only", "LoRA", "Sparse QLoRA")}
    monkeypatch.setattr(times, "METHODS", three)
    words = ["--dataset", "demo", "--rounds", "1", "--steps", "1", "--busy", "--out", str(tmp_path)]
    lines = [json.loads(line) for line in times.main(words).read_text().splitlines()]
    assert [line["method"] for line in lines] == [*three]
    assert all(line["busy"] and line["seconds"] > 0 and line["examples"] == 32 for line in lines)
    assert "8000" in times.study_flags("sst2", "models/all-MiniLM-L6-v2")
    assert len(lines[0]["inference"]) == 1 and len(lines[2]["inference"]) == 3
