"""The layout that a reader relies on: equal mains, arrows one way, budgets, docstrings, links."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from study import unpack

ROOT = Path(__file__).parents[1]
METHODS = ["lora", "hira", "qlora", "sparse_lora"]
SCRIPTS = [*METHODS, "hybrid", "common"]
FILES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")])
BUDGET = {"common.py": 700, "compare.py": 330, "lora.py": 110, "hira.py": 150, "hybrid.py": 100}
PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])


def tree_of(path):
    return ast.parse((ROOT / path).read_text())


def source(name, node_name):
    """The text of one top-level function or class of a script."""
    [node] = [n for n in tree_of(f"{name}.py").body if getattr(n, "name", None) == node_name]
    return ast.get_source_segment((ROOT / f"{name}.py").read_text(), node)


def imported(path):
    """The top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_is_the_same_text(name):
    text, lora = ((ROOT / f"{n}.py").read_text() for n in (name, "lora"))
    assert text[text.index("\ndef main(") :] == lora[lora.index("\ndef main(") :]


def test_main_calls_down_in_the_documented_order():
    text = source("lora", "main")
    order = [
        "parse_args",
        "plan",
        "runs",
        "load_data",
        "load_base",
        "adapt",
        "load_adapter",
        "evaluate",
    ]
    order += ["train", "evaluate", "save_result", "measure", "save_result", "export"]
    assert re.findall(r"(\w+)\(", text.split('"""')[2]) == [
        *order[:12],
        "append",
        *order[12:],
    ]


def test_copies_are_the_same_text():
    """But for the line that says which paper's equation it is."""
    ours, theirs = (source(name, "LoRALinear").splitlines() for name in ("sparse_lora", "lora"))
    assert ours == theirs
    updates = {source(name, "lora_update") for name in ("lora", "qlora", "sparse_lora")}
    assert len(updates) == 1


@pytest.mark.parametrize("name", METHODS)
def test_order_of_a_method_script(name):
    """Docstring, imports, add_args, maths, module, adapt, main."""
    text, body = (ROOT / f"{name}.py").read_text(), tree_of(f"{name}.py").body
    doc = ast.get_docstring(tree_of(f"{name}.py"))
    assert (
        re.search(r"arXiv \d{4}\.\d{5}|ICLR", doc) and "y = " in doc and f"python {name}.py" in doc
    )
    assert "Departures from the paper" in doc
    names = [node.name for node in body if hasattr(node, "name")]
    assert names[0] == "add_args" and names[-2:] == ["adapt", "main"]
    banners = re.findall(r"^# -{20,} (.+)$", text, re.M)
    assert banners[0] == "the maths" and banners[-1] == "the method"
    for node in body:
        own = [item.name for item in getattr(node, "body", []) if isinstance(item, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef) and "merged_weight" in own:
            wanted = ["__init__", "forward", "merged_weight"]
            assert [each for each in own if each in wanted] == wanted


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_go_one_way(path):
    """method -> common -> harness, compare -> harness; hybrid is made of the methods."""
    modules = imported(path) & {*SCRIPTS, "compare", "plan", "harness", "peft"}
    allowed = {"harness"}
    if path.stem in SCRIPTS:
        allowed |= {"plan"}
    if path.stem in [*METHODS, "hybrid", "plan"]:
        allowed |= {"common"}
    if path.stem == "hybrid":
        allowed |= {"hira", "qlora", "sparse_lora"}
    assert modules <= allowed
    assert path.parent == Path("harness") or "harness" in modules


def test_common_names_no_method_and_reads_no_flags():
    text = (ROOT / "common.py").read_text()
    code = re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL)
    assert not re.search("lora|hira|nf4|prune|contextual", code, re.I)
    assert "argparse" not in imported("common.py") and "json" not in imported("common.py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_budgets_and_docstrings(path):
    lines = (ROOT / path).read_text().splitlines()
    assert len(lines) <= BUDGET.get(path.name, 450)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            top = node in tree_of(path).body or node.end_lineno - node.lineno > 12
            if top and node.end_lineno - node.lineno > 4:
                assert ast.get_docstring(node) or node.col_offset, f"{path}: {node.name}"


def test_the_training_loop_is_one_page():
    assert len(source("common", "train").splitlines()) <= 70
    nested = [n for n in ast.walk(ast.parse(source("common", "train"))) if isinstance(n, ast.For)]
    assert len(nested) <= 2  # the steps, and the rate of each group


@pytest.mark.parametrize("module", ["compare", "harness.flags", "harness.store", "harness.process"])
def test_light_modules_import_no_heavy_library(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    heavy = {"transformers", "datasets", "bitsandbytes", "matplotlib.pyplot"}
    assert done.returncode == 0 and not loaded & heavy
    assert module != "compare" or "torch" not in loaded


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_name_what_exists(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for file, name in re.findall(r"`(?:harness/)?(\w+\.py):([\w.]+)`", text):
        [path] = [path for path in FILES if path.name == file]
        nodes = {node.name for node in ast.walk(tree_of(path)) if hasattr(node, "name")}
        names = re.findall(r"^(\w+) = ", (ROOT / path).read_text(), re.M)
        assert name.split(".")[-1] in nodes | set(names), f"{file}:{name}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


@pytest.mark.parametrize("page", ["README.md", "docs/report.md"])
def test_results_in_prose_are_generated(page):
    """A decimal number in prose stands in a generated block of its page, too, or is a cited one."""
    text, block = (ROOT / page).read_text(), r"<!-- (\w+)[^>]*-->.*?<!-- /\1[^>]*-->"
    made = " ".join(found.group() for found in re.finditer(block, text, re.S))
    text = re.sub(block, "", text, flags=re.S)
    text = re.sub(r"```.*?```|\[[\d.]+\]\(\S+\)|\]\(\S+\)", "", text, flags=re.S)
    cited = {"4.127": "bits a weight of NF4", "3.10": "Python", "2.6": "the student report's"}
    decimal = r"\d+\.\d+"
    assert set(re.findall(decimal, text)) <= cited.keys() | set(re.findall(decimal, made))


@pytest.mark.parametrize(
    "folder, inputs, pages",
    [
        ("study", ["study"], ["README.md", "docs/report.md"]),
        ("study/variants", ["study/variants", "study/sst2.jsonl"], []),
    ],
)
def test_committed_pages_are_what_compare_writes(folder, inputs, pages, tmp_path, monkeypatch):
    """The study's page and the generated blocks elsewhere, from the committed results; no plots."""
    for page in pages:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.chdir(ROOT)
    fill = ["--fill", *(str(tmp_path / page) for page in pages)] if pages else []
    compare.main([*inputs, "--out", str(tmp_path / "out"), "--no_plots", *fill])
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    written = (tmp_path / "out" / "README.md").read_text().splitlines()
    kept = [line for line in (ROOT / folder / "README.md").read_text().splitlines() if line]
    assert [line for line in written if line] == [x for x in kept if not x.startswith("![")]


def test_the_committed_study_is_what_run_sh_runs(tmp_path, capsys):
    """Its commands, taken down by a stand-in for python, find their results in study/*.jsonl."""
    log, stand_in = tmp_path / "log", tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    stand_in.chmod(0o755)
    (tmp_path / "study").mkdir()
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for blocks in [], ["dropout", "hybrids", "ranks"]:
        command = ["bash", ROOT / "study" / "run.sh", *blocks]
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
    committed = [*(ROOT / "study").glob("*.jsonl"), *(ROOT / "study/variants").glob("*.jsonl")]
    unpack.main([*committed, tmp_path / "results"])
    ran = 0
    for name, *words in map(str.split, log.read_text().splitlines()):
        if "--dataset" in words:
            module = importlib.import_module(name.removesuffix(".py"))
            words += ["--out", str(tmp_path / "results")]
            args = module.parse_args(module.__doc__, module.__file__, module.add_args, words)
            assert not list(module.runs(args)), words
            ran += len(args.lr) if args.epochs else 1
    assert ran == len(list((tmp_path / "results").iterdir()))
