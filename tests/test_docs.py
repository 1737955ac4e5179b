"""What docs/ and results/study.sh say must exist: every function they name, every command they run."""

import ast
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import compare

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def names_in(path):
    """Every function, class, method and top-level constant of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    tree = ast.parse(path.read_text())
    return found | {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                    if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_that_a_page_names_exists(page):
    named = re.findall(r"\b(\w+)\.py:([\w.]*\w)", page.read_text())
    assert named
    for script, name in named:
        assert name in names_in(ROOT / f"{script}.py"), f"{script}.py:{name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def study(*datasets):
    """The command lines that results/study.sh runs, with 0.003 as the outcome of every search."""
    done = subprocess.run(["bash", ROOT / "results/study.sh", *datasets], capture_output=True, text=True, check=True, cwd=ROOT,
                          env=os.environ | {"LIST": "0.003"})
    return done.stdout.splitlines()


def test_every_line_of_the_study_is_a_command_that_its_script_takes():
    lines = study()
    parsed = {}
    for line in lines:
        python, script, *words = shlex.split(line)
        module = importlib.import_module(script.removesuffix(".py"))
        args = module.parse_args(module.__doc__, module.__file__, module.add_args, words)
        assert python == "python" and args.head_lr == (0.003 if args.method != "head_only" and args.dataset != "wikitext2"
                                                      else args.head_lr)
        for seed in args.seeds:
            search = (args.lr, args.head_lr) if args.split == "dev" else None
            key = args.out, args.dataset, args.name, seed, search
            assert key not in parsed, line  # no two runs want one file
            parsed[key] = args
    # Rule 5: dev, seed 0, the same candidates for every adapter method; the scored split only with the chosen rate.
    for dataset in ("sst2", "imdb", "wikitext2"):
        tried = {}
        for args in parsed.values():
            if args.dataset == dataset and args.split == "dev" and args.method not in ("head_only", "full"):
                tried.setdefault(args.name, []).append(args.lr)
        assert set(tried) == {"lora", "qlora", "hira", "sparse_lora"}
        assert len({tuple(rates) for rates in tried.values()}) == 1 and len(tried["lora"]) >= 4
        full = [args.lr for args in parsed.values() if (args.dataset, args.method, args.split) == (dataset, "full", "dev")]
        assert len(full) >= 3
    scored = [args for args in parsed.values() if args.split == "test"]
    assert all(args.lr == 0.003 for args in scored if args.method != "head_only")
    seeds = {}
    for args in scored:
        if args.dataset == "sst2" and args.epochs == 1:
            seeds.setdefault(args.name, set()).update(args.seeds)
    assert {name for name, found in seeds.items() if found == set(range(10))} == {
        "head_only", "full", "lora", "qlora", "hira", "sparse_lora", "qlora-loras_rate", "lora-qloras_rate"}
    assert all(found >= {0, 1, 2} for found in seeds.values()) and len(seeds) == 16


def test_one_data_set_of_the_study_alone():
    lines = study("imdb")
    assert lines and all("--dataset imdb" in line for line in lines)


def test_the_speed_table_is_made_from_the_kept_figures():
    from bench_peers import RECORD, page
    text = (ROOT / "README.md").read_text()
    inside = text.split("<!-- speed -->\n")[1].split("<!-- /speed -->")[0]
    assert inside == (page() + "\n" if RECORD.exists() else "")


def kept(path):
    """A file as git has it: a user's own runs and pages in results/ are not what is tested."""
    return subprocess.check_output(["git", "show", f":{path}"], cwd=ROOT, encoding="utf-8")


@pytest.mark.parametrize("command", ["README's", "results/pilot/", "results/3-epochs/"])
def test_the_tables_are_made_from_the_result_files(command, tmp_path):
    """README, the report and the pages are what compare.py makes of the kept files: nothing is typed, nothing is stale."""
    if command == "README's":
        command = re.search(r"`python compare\.py (results/.+? --readme .+?)`", kept("README.md"))[1]
    words = command.split()
    pages = [word for word in words if word.endswith(".md")]
    files = subprocess.check_output(["git", "ls-files", f":(glob){words[0]}*.json"], cwd=ROOT, text=True).split()
    for file in [*files, *pages]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(kept(file))
    compare.main([*(str(tmp_path / word) if word in (words[0], *pages) else word for word in words), "--no_plots"])
    for page in pages:
        assert (tmp_path / page).read_text() == kept(page), page
    page = re.sub(r"### Plots\n\n(!\[.*\]\(.*\)\n\n)+", "", kept(f"{words[0]}README.md"))
    assert page == (tmp_path / words[0] / "README.md").read_text()


def test_every_number_in_the_report_is_generated_or_cited():
    """Each decimal and each number from 100 on in the report's prose stands in a generated table, or its paragraph says where
    it comes from."""
    report = kept("docs/report.md")
    tables = "".join(re.findall(r"<!-- (\w+) -->(.*?)<!-- /\1 -->", report, re.DOTALL)[i][1] for i in range(4))
    pages = kept("results/README.md") + kept("results/3-epochs/README.md")
    known = {number.rstrip(",.") for number in re.findall(r"\d[\d,.]*", tables + pages)}
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", report, flags=re.DOTALL)
    checked = 0
    for block in re.split(r"\n\n|\n(?=\||- |\d\. )", prose):
        cited = re.search(r"arithmetic|papers\.md|README|table \d|\.json`|an assumption", block)
        words = re.sub(r"\(\S*\.png\)", "", block)
        for number in re.findall(r"(?<![\w.,-])(?:\d[\d,]*\.\d+|\d[\d,]{2,}(?![\w.]))", words):
            checked += 1
            assert number.rstrip(",") in known or cited, f"{number} in: {block[:80]}"
    assert checked > 20
