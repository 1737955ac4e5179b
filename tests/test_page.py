"""The page, the terminal's text and the sections of other pages."""

import re

import pytest
from test_compare import METHODS, judged, make_result, make_study, write

import compare
from harness import page, tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with SST-2: one method better, two equal, some undecided, and a variant."""
    folder = tmp_path_factory.mktemp("study")
    gains = {"lora": 0, "qlora": 0, "hira": 6, "sparse_lora": 0.7, "lora-rank32": 1}
    made = make_study(gains, seeds=8, rows=1000, spread=0.7)
    write(folder, *made, name="sst2.jsonl")
    return folder


def page_of(folder, out, *flags):
    compare.main([str(folder), "--out", str(out), "--no_plots", *flags])
    return (out / "README.md").read_text("utf-8")


def test_verdicts_come_first_then_the_table_then_details(study, tmp_path):
    text = page_of(study, tmp_path)
    places = [text.index(x) for x in ("## SST-2", "is better", "| method |", "<details>")]
    assert places == sorted(places)
    lines = text.split("## SST-2 with MiniLM\n\n")[1].splitlines()
    assert lines[0].startswith("- **HiRA is better** than LoRA by ")
    assert sum(line.startswith("- ") for line in lines[:8]) <= 6


def test_sentences_of_verdicts_have_sizes_and_reasons(study, tmp_path):
    text = page_of(study, tmp_path)
    assert re.search(r"than LoRA by \d\.\d\d points \(95 % interval \d\.\d\d to \d\.\d\d\)", text)
    assert re.search(r"\*\*Undecided:\*\* .*about \d+ seeds would decide", text)
    # Planted: the second is ahead.
    assert re.search(r"LoRA − Sparse LoRA: -\d\.\d\d points \(", text)
    assert re.search(r"difference of 1 point is found in at least \d+ % of studies", text)


def test_without_verdicts_one_line_says_why(tmp_path):
    write(tmp_path, *make_study(dict.fromkeys(METHODS, 0), seeds=3), name="few.jsonl")
    text = page_of(tmp_path, tmp_path)
    assert "- **No verdict** on any pair: 6 shared seeds are needed, found: 3." in text


def test_perplexity_has_percent_and_its_own_name(tmp_path):
    made = make_study({"lora": 0, "hira": 9}, lm=True, dataset="wikitext2")
    write(tmp_path, *made, name="text.jsonl")
    text = page_of(tmp_path, tmp_path)
    assert re.search(r"HiRA is better\*\* in perplexity than LoRA by \d\.\d\d % \(", text)
    assert "masked-LM perplexity" in text and "minus LoRA, %" in text


def test_the_table_shows_what_the_numbers_are(tmp_path):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 6}))
    lora, hira = tables.main_table(group)
    row = group["rows"][1]
    assert hira["method"] == "HiRA" and hira["rates × seeds"] == "3 × 6"
    assert hira["accuracy, %"].startswith(f"{row['score']:.2f} (")
    low, high = row["beside"]["intervals"]["both"]
    assert hira["minus LoRA, points"] == f"{row['beside']['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
    assert lora["minus LoRA, points"] == "" and hira["trained weights"] == "74,498"
    assert hira["peak MiB"] == "200" and hira["GFLOP a step"] == "20.0"


def test_times_are_shown_of_timed_runs_and_hours_and_cost_of_gpus_alone(tmp_path):
    words = {"cpu x86_64": (False, False), "cuda H100": (False, True)}
    for device, (_, gpu) in words.items():
        for timed in (False, True):
            folder = tmp_path / f"{device}{timed}"
            made = make_study({"lora": 0, "hira": 1}, seeds=2, device=device, timed=timed)
            write(folder, *made, name="all.jsonl")
            text = page_of(folder, folder, "--price", "2")
            assert ("training s" in text) == timed == ("inference rows/s" in text)
            assert ("accelerator hours" in text) == (gpu and timed) == (" cost |" in text)
            assert ("| 60 | 20 |" in text) == timed == ("| epoch seconds |" in text)
            assert ("| allocator |" in text) == gpu == ("| 200 | 333 |" in text)


def test_an_untrained_row_has_a_score_alone(tmp_path):
    made = make_result("head_only", 0, name="head_only-untrained", untrained=True)
    (group,) = judged(tmp_path, made)
    (cells,) = tables.main_table(group)
    assert cells["accuracy, %"] == "80.00" and cells["rates × seeds"] == ""
    page_of(tmp_path, tmp_path)


def test_only_rows_without_a_whole_seed_are_no_error(tmp_path):
    write(tmp_path, make_result("lora", 0, 1e-3), make_result("lora", 1, 2e-3))
    assert "Left out" in page_of(tmp_path, tmp_path)


def test_every_pair_has_every_statistic_and_rows_beside_lora_have_no_p(study, tmp_path):
    text = page_of(study, tmp_path).split("<summary>Every pair</summary>")[1].split("</details>")[0]
    lines = {
        line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines() if "−" in line
    }
    assert len(lines) == 7
    assert lines["LoRA − HiRA"][-1] == "HiRA better |"
    assert lines["LoRA rank32 − LoRA"][-4:] == ["–", "–", "–", "– |"]


def test_details_have_the_rates_costs_settings_and_commits(study, tmp_path):
    text = page_of(study, tmp_path)
    for words in ("0.002: 82.00 (8 ×)", "frozen weights", "head_lr", "0123456789ab"):
        assert words in text, words
    assert "120 runs, 2.0 hours of training; rows: 8,000 train, 500 dev, 1,000 test" in text


def test_skipped_files_are_named(study, tmp_path):
    write(tmp_path, make_result())
    (tmp_path / "torn.json").write_text("{")
    assert "## Skipped\n\n- torn.json: not JSON" in page_of(tmp_path, tmp_path / "out")


def test_demos_are_marked_and_come_last(tmp_path):
    write(tmp_path, make_result(dataset="demo"), make_result(dataset="my"), make_result())
    text = page_of(tmp_path, tmp_path)
    places = [
        text.index(x) for x in ("## SST-2", "## my with", "## Demo", "nothing about real data")
    ]
    assert places == sorted(places)


def test_the_page_is_the_same_from_files_lines_and_any_folder(tmp_path):
    made = make_study({"lora": 0, "hira": 6}, seeds=6)
    write(tmp_path / "one", *made)
    write(tmp_path / "two", *made[::-1], name="all.jsonl")
    pages = [page_of(tmp_path / name, tmp_path / f"{name}-page") for name in ("one", "two")]
    assert pages[0] == pages[1] == page_of(tmp_path / "one", tmp_path / "one-page")
    assert str(tmp_path) not in pages[0]


def test_a_page_that_is_not_ours_stays(tmp_path, capsys):
    write(tmp_path, make_result())
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--out" in error
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_the_terminal_shows_verdicts_and_table(study, tmp_path, capsys):
    page_of(study, tmp_path)
    text = capsys.readouterr().out
    assert text.startswith("== SST-2 with MiniLM\n\n- HiRA is better than LoRA by")
    assert "**" not in text and "|" not in text and "accuracy, %" in text
    assert text.rstrip().endswith("README.md")


# ------------------------------------------------------------------------- sections of other pages


def test_sections_are_renewed_and_the_rest_stays(study, tmp_path):
    names = list(page.SECTIONS)
    marks = "".join(f"before {x}\n<!-- {x} -->\nold\n<!-- /{x} -->\nafter\n" for x in names)
    report = tmp_path / "report.md"
    report.write_text(marks)
    page_of(study, tmp_path / "out", "--fill", str(report))
    text = report.read_text()
    assert "old" not in text and text.count("after\n") == len(names)
    assert text.count("**SST-2 with MiniLM**") == len(names)
    page_of(study, tmp_path / "out", "--fill", str(report))
    assert report.read_text() == text


def test_a_section_of_one_data_set_and_demos_by_name_alone(tmp_path):
    write(tmp_path, make_result(), make_result(dataset="imdb"), make_result(dataset="demo"))
    report = tmp_path / "report.md"
    marks = ("table", "table imdb", "table demo", "table wikitext2")
    report.write_text("".join(f"<!-- {x} -->\n<!-- /table -->\n\n" for x in marks))
    page_of(tmp_path, tmp_path / "out", "--fill", str(report))
    parts = report.read_text().split("<!-- /table -->")
    found = [re.findall(r"\*\*(\S+) with", part) for part in parts[:4]]
    assert found == [["SST-2", "IMDB"], ["IMDB"], ["Demo"], []]
    assert "No results yet." in parts[3]


@pytest.mark.parametrize("text", [None, "no marks\n", "<!-- table -->\nnever closed\n"])
def test_a_page_without_marks_is_one_line_and_nothing_is_written(tmp_path, text, capsys):
    write(tmp_path, make_result())
    report = tmp_path / "report.md"
    if text:
        report.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path), "--fill", str(report)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "report.md" in error
    assert not (tmp_path / "README.md").exists()
