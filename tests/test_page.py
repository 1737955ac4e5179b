"""The page, the terminal's text, the next step, and the blocks of other pages."""

import re

import numpy as np
import pytest
from test_compare import METHODS, judged, make_result, make_study, refused, write

import compare
from harness.text import escaped, printable
from report import page, tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with SST-2: one method better, two equal, some undecided, and a variant."""
    folder = tmp_path_factory.mktemp("study")
    gains = {"lora": 0, "qlora": 0, "hira": 6, "sparse_lora": 0.7, "lora-rank32": 1}
    write(folder, *make_study(gains, seeds=8, rows=1000, spread=0.7), name="sst2.jsonl")
    return folder


def page_of(folder, out, *flags):
    compare.main([str(folder), "--out", str(out), "--no_plots", *flags])
    return (out / "README.md").read_text("utf-8")


def test_verdicts_come_first_then_table_next_step_and_details(study, tmp_path, capsys):
    text = page_of(study, tmp_path)
    order = ("## SST-2", "is better", "| method |", "### What to do next", "<details>")
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order)
    first = text.split("## SST-2 with MiniLM\n\n")[1].splitlines()[0]
    assert re.match(
        r"- \*\*HiRA is better\*\* than LoRA by \d\.\d\d points "
        r"\(95 % interval \d\.\d\d to \d\.\d\d\)",
        first,
    )
    assert re.search(r"\*\*Undecided:\*\* .*LoRA − Sparse LoRA: -\d\.\d\d points", text)
    detects = r"With 8 seeds and 1,000 test examples this study detects differences of [\d.]+ "
    assert re.search(detects + r"points.*plan a new study with new seeds\. Do not add", text)
    out = capsys.readouterr().out
    assert out.startswith("== SST-2 with MiniLM\n\n- HiRA is better than LoRA by")
    assert "**" not in out and "|" not in out and "accuracy, %" in out
    assert out.index("README.md") < out.index("What to do next") < out.index("pipeline(")


def test_without_verdicts_one_line_says_why(tmp_path):
    write(tmp_path, *make_study(dict.fromkeys(METHODS, 0), seeds=3), name="few.jsonl")
    text = page_of(tmp_path, tmp_path)
    why = "- **No verdict** on any pair: at least 6 shared seeds are needed, and there are 3.\n"
    assert why in text and "This is a first impression" in text and "detects" not in text


def test_perplexity_has_percent_and_its_own_name(tmp_path):
    made = make_study({"lora": 0, "hira": 9}, lm=True, dataset="wikitext2")
    write(tmp_path, *made, name="text.jsonl")
    text = page_of(tmp_path, tmp_path)
    assert re.search(r"HiRA is better\*\* in perplexity than LoRA by \d\.\d\d % \(", text)
    assert "masked-LM perplexity" in text and "minus LoRA, %" in text


def test_the_table_shows_what_the_numbers_are(tmp_path):
    made = make_study({"lora": 0, "hira": 6})
    made += make_study({"qlora": 0}, rates=(1e-3, 4e-3, 8e-3))
    (group,) = judged(tmp_path, *made)
    lora, qlora, hira = tables.main_table(group)
    row = group.rows[2]
    assert hira["method"] == "HiRA" and hira["learning rates × seeds"] == "3 × 6"
    assert hira["accuracy, %"].startswith(f"{row.score:.2f} (")
    low, high = group.versus_lora["HiRA"].intervals["95 % interval"]
    mean = group.versus_lora["HiRA"].mean
    assert hira["minus LoRA, points"] == f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
    assert lora["minus LoRA, points"] == "" and hira["trained weights"] == "74,498"
    assert hira["peak MiB"] == "200" and hira["GFLOP per step"] == "20.0"
    # At LoRA's best learning rate, which QLoRA did not run.
    same = [cells["at learning rate 0.002"] for cells in (lora, qlora, hira)]
    tests = [r["metrics"]["test"]["accuracy"] for r in made if r["lr"] == 2e-3]
    assert same == [f"{100 * np.mean(tests[:6]):.2f}", "", f"{100 * np.mean(tests[6:]):.2f}"]


def test_an_untrained_row_has_a_score_alone_and_no_next_step(tmp_path):
    made = make_result("head_only", 0, untrained=True)
    (group,) = judged(tmp_path, made)
    (cells,) = tables.main_table(group)
    assert cells["accuracy, %"] == "80.00" and cells["learning rates × seeds"] == ""
    assert "What to do next" not in page_of(tmp_path, tmp_path)


def test_only_rows_without_a_whole_seed_are_no_error(tmp_path):
    made = [make_result("lora", seed, lr, diverged=seed < 2) for seed in (0, 1) for lr in (1, 2)]
    write(tmp_path, *made)
    assert "Left out. LoRA: 2 diverged at 1, 2 diverged at 2." in page_of(tmp_path, tmp_path)


def test_details_have_every_statistic_lr_cost_setting_and_commit(study, tmp_path):
    text = page_of(study, tmp_path)
    pairs = text.split("<summary>Every pair</summary>")[1].split("</details>")[0]
    lines = {x.split(" | ")[0][2:]: x.split(" | ") for x in pairs.splitlines() if "−" in x}
    assert len(lines) == 7 and lines["LoRA − HiRA"][-1] == "HiRA better |"
    assert lines["LoRA rank 32 − LoRA"][-4:] == ["–", "–", "–", "– |"]
    assert "memory: train frozen weights, MiB | 100" in text
    assert "120 runs, 2.0 hours of training; examples: 8,000 train, 500 dev, 1,000 test." in text
    assert " 120 runs on cpu, torch 2.8, transformers 5.0.\n" in text


def test_demos_are_marked_and_come_last_and_skipped_files_are_named(tmp_path):
    write(tmp_path, make_result(dataset="demo"), make_result(dataset="my"), make_result())
    (tmp_path / "torn.json").write_text("{")
    text = page_of(tmp_path, tmp_path / "out")
    order = ("## SST-2", "## my with", "## Demo", "nothing about real data", "## Skipped")
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order)
    assert "## Skipped\n\n- torn.json: not JSON: torn, empty or not a text" in text


def test_the_page_is_the_same_from_files_lines_and_any_folder(tmp_path):
    made = make_study({"lora": 0, "hira": 6}, seeds=6)
    write(tmp_path / "one", *made)
    write(tmp_path / "two", *made[::-1], name="all.jsonl")
    pages = [page_of(tmp_path / name, tmp_path / f"{name}-page") for name in ("one", "two")]
    command = rf"python hira\.py --eval_only \S+/{made[19]['dataset']}-hira-MiniLM-lr0\.002-seed0 "
    pages = [re.sub(command, "", text) for text in pages]
    assert pages[0] == pages[1] and "--eval_only" not in pages[0]


# ---------------------------------------------------------------------------------- the next step


@pytest.mark.parametrize(
    "gains, method, why",
    [
        ((0, 0, 0, 0), "lora", "(upper 95 % limit), and LoRA is simpler|it is the simplest"),
        ((0, 0.2, 0, 0), "lora", "QLoRA has the best mean score, but it is ahead by at most"),
        ((0, 6, 6.1, 0), "hira", "best mean score, and LoRA may be worse by the margin or more"),
        ((0, 6, 0, 0), "qlora", "LoRA, HiRA and Sparse LoRA may be worse by the margin or more"),
    ],
)
@pytest.mark.parametrize("lm", [False, True])
def test_next_is_the_simplest_method_that_is_not_worse(gains, method, why, lm, tmp_path):
    gains = dict(zip(METHODS, gains, strict=True))
    made = make_study(gains, seeds=8, rows=1000, spread=0.1, lm=lm)
    for result in made:
        if (result["seed"], result["lr"]) == (3, 2e-3):  # its best run on dev
            score = result["metrics"]["dev"]
            score["mlm_perplexity" if lm else "accuracy"] = 1.0 if lm else 0.9
    write(tmp_path / "my results", *made)
    (group,) = judged(tmp_path, *made)
    group.runs[0].path, text = tmp_path, " ".join(page.next_step(group)[0])
    assert any(words in text for words in why.split("|")) and "peak MiB 200" in text
    _, command, code = page.next_step(group)
    stem = f"sst2-{method}-MiniLM-lr0.002-seed3"
    assert command == f"python {method}.py --eval_only results/{stem} --export my-model"
    assert ("AutoModelForMaskedLM" in code) == lm == ("pipeline" not in code)
    compile(code, "next", "exec")
    text = page_of(tmp_path / "my results", tmp_path / "out")
    assert f"--eval_only '{tmp_path}/my results/{stem}' --export" in text  # quoted for the shell


@pytest.mark.parametrize("score, warned", [(0.51, True), (0.6, False)])
def test_a_score_at_the_largest_class_s_share_is_said_first(score, warned, tmp_path):
    made = [make_result("lora", seed, correct=np.arange(1000) < 1000 * score) for seed in (0, 1)]
    for result in made:
        result["data"]["class_counts"] = {"train": [1, 1], "dev": [1, 1], "test": [500, 500]}
    write(tmp_path, *made)
    line = "Look at the data first: the score, 51.00 %, is no better than always answering the"
    assert (f"next\n\n- {line} largest class, 50.00 %" in page_of(tmp_path, tmp_path)) == warned


# ----------------------------------------------------------------------------- strangers' texts


def test_printable_and_escaped():
    assert printable("a\x1b[2J\n\u202e\ud800\u2028b") == "a�[2J����b"
    assert printable("x" * 50) == "x" * 39 + "…" and printable("x" * 40) == "x" * 40
    assert printable(10**50, 12) == "10000000000…" and printable("é 水 0.5") == "é 水 0.5"
    assert escaped("all-MiniLM-L6-v2, base_dropout 0.1") == "all-MiniLM-L6-v2, base_dropout 0.1"
    assert escaped("](x) <b> | `c` $d$ _e_ &amp; https://f") == (
        r"\](x) \<b\> \| \`c\` \$d\$ \_e\_ \&amp; https\://f"
    )


def test_texts_of_results_stay_texts_on_the_page_and_in_the_terminal(tmp_path, capsys):
    evil = "](javascript:x)<img onerror=x>|`\x1b]0;t\x07\x1b[2J\n# <!-- table -->"
    closing = evil + "<!-- /table -->"
    made = make_study({"lora": 0, "hira": 6}, 6, settings={evil: closing}, dataset=evil)
    for result in made:
        result |= {"model": evil, "created": evil}
        result["environment"] |= dict.fromkeys(("cpu", "torch", "device", "commit"), evil)
    made.append(make_result("qlora", 0, name=evil, dataset=evil))
    (tmp_path / "report.md").write_text("<!-- table -->\n<!-- /table -->\nend\n")
    write(tmp_path, *made, name="all.jsonl")
    (tmp_path / "a\x1b[2J\n<b>.json").write_text("{")
    compare.main([str(tmp_path), "--fill", str(tmp_path / "report.md")])
    text = (tmp_path / "README.md").read_text() + (tmp_path / "report.md").read_text()
    for part in (text, *capsys.readouterr()):
        assert part.replace("\n", "").isprintable()
    unsafe = re.compile(r"(?<!\\)(<img|<b|\]\(j|<!--|`x|\|`)")
    body = text.replace("<!-- table -->", "").replace("<!-- /table -->", "")
    assert "javascript" in body and not unsafe.search(re.sub("```.*?```", "", body, flags=re.S))
    assert text.count("\n<!-- /table -->\nend\n") == 1


# -------------------------------------------------------------------------------- what is written


def test_nothing_is_written_through_a_link(study, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.write_text(page.HEAD + "<!-- table -->\n<!-- /table -->\n")
    write(out, *make_study({"lora": 0, "hira": 6}, seeds=2), name="all.jsonl")
    before = theirs.read_bytes()
    files = [
        "README.md",
        "report.md",
        *(f"sst2-minilm-{x}.png" for x in ("forest", "lr", "memory")),
    ]
    for file in files:
        (out / file).symlink_to(theirs)
    compare.main([str(out), "--fill", str(out / "report.md")])
    assert theirs.read_bytes() == before
    assert all((out / file).is_file() and not (out / file).is_symlink() for file in files)
    assert {path.name for path in out.iterdir()} == {*files, "all.jsonl"}


@pytest.mark.parametrize("kind", ["file", "no folder", "folder of that name"])
def test_an_out_that_cannot_be_written_is_one_line(kind, study, tmp_path, capsys):
    out = tmp_path / "out" / "deep"
    if kind == "folder of that name":
        (out / "README.md").mkdir(parents=True)
    elif kind == "file":
        (tmp_path / "out").write_text("")
    else:
        out = "/proc/none"
    assert str(out) in refused(capsys, study, "--out", out, "--no_plots")


def test_a_full_disk_is_one_line_and_leaves_no_part(study, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.secrets, "token_hex", lambda _: "part")
    monkeypatch.setattr("pathlib.Path.replace", full)
    assert "No space left" in refused(capsys, study, "--out", tmp_path, "--no_plots")
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_not_ours_stays(tmp_path, capsys):
    write(tmp_path, make_result())
    (tmp_path / "README.md").write_text("# My project\n")
    assert "--out" in refused(capsys, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_blocks_are_renewed_and_the_rest_stays(study, tmp_path):
    names = list(page.SECTIONS)
    marks = "".join(f"before {x}\n<!-- {x} -->\nold\n<!-- /{x} -->\nafter\n" for x in names)
    marks += "\xa0<!-- table imdb -->\nno results of imdb: stays\n<!-- /table -->"
    report = tmp_path / "report.md"
    for end in ("\n", "\r\n"):
        report.write_bytes(marks.replace("\n", end).encode("latin-1"))
        page_of(study, tmp_path / "out", "--fill", str(report))
        text = report.read_bytes().decode("latin-1")
        assert "old" not in text and text.count(f"after{end}") == len(names)
        assert text.count("**SST-2 with MiniLM**") == len(names)
        assert text.count("\n") == text.count(end) and text.endswith(
            f"\xa0<!-- table imdb -->{end}no results of imdb: stays{end}<!-- /table -->"
        )
        page_of(study, tmp_path / "out", "--fill", str(report))
        assert report.read_bytes().decode("latin-1") == text


def test_a_block_of_one_data_set_and_demos_by_name_alone(tmp_path):
    write(tmp_path, make_result(), make_result(dataset="imdb"), make_result(dataset="demo"))
    report = tmp_path / "report.md"
    marks = ("table", "table imdb", "table demo")
    report.write_text("".join(f"<!-- {x} -->\n<!-- /table -->\n\n" for x in marks))
    page_of(tmp_path, tmp_path / "out", "--fill", str(report))
    parts = report.read_text().split("<!-- /table -->")
    shown = [re.findall(r"\*\*(\S+) with", part) for part in parts[:3]]
    assert shown == [["SST-2", "IMDB"], ["IMDB"], ["Demo"]]


@pytest.mark.parametrize("text", [None, "no marks\n", "<!-- table -->\nnever closed\n"])
def test_a_page_without_marks_is_one_line_and_nothing_is_written(tmp_path, text, capsys):
    write(tmp_path, make_result())
    report = tmp_path / "report.md"
    if text:
        report.write_text(text)
    assert "report.md" in refused(capsys, tmp_path, "--fill", report)
    assert not (tmp_path / "README.md").exists()
