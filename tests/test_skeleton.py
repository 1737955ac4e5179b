"""The scripts share one skeleton, so that a diff of two of them shows just the method."""

import argparse
import ast
import difflib
import importlib
import re
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
METHODS = ["lora", "hira", "qlora", "sparse_lora"]
SCRIPTS = [*METHODS, "common"]


def text_of(name):
    return (ROOT / f"{name}.py").read_text()


def node_text(name, node_name):
    """The text of one top-level function or class of a script."""
    node, = [node for node in ast.parse(text_of(name)).body if getattr(node, "name", None) == node_name]
    return ast.get_source_segment(text_of(name), node)


def tail(name):
    text = text_of(name)
    return text[text.index("\ndef main("):]


@pytest.mark.parametrize("name", ["hira", "qlora", "sparse_lora", "common"])
def test_main_to_the_end_is_the_same_text(name):
    assert tail(name) == tail("lora")


def test_main_is_short_and_calls_down_in_the_documented_order():
    calls = [node.func.id for node in ast.walk(ast.parse(node_text("lora", "main"))) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)]
    text = node_text("lora", "main")
    wanted = ["parse_args", "runs", "load_data", "load_base", "adapt", "load_adapter", "train", "evaluate", "measure",
              "save_result"]
    assert set(calls) == set(wanted) and len(text.splitlines()) <= 20
    assert [text.rindex(f"{name}(") for name in wanted] == sorted(text.rindex(f"{name}(") for name in wanted)


def test_copies_are_the_same_text():
    """But for the class docstring's first line, where Sparse LoRA must say which paper's equation it is."""
    ours, theirs = (node_text(name, "LoRALinear").splitlines() for name in ("sparse_lora", "lora"))
    assert ours[:1] + ours[2:] == theirs[:1] + theirs[2:] and '"""' in ours[1] and '"""' in theirs[1]
    assert node_text("lora", "lora_update") == node_text("qlora", "lora_update") == node_text("sparse_lora", "lora_update")


@pytest.mark.parametrize("name", METHODS)
def test_order_of_sections(name):
    """Docstring, imports, add_args, the maths, the module, adapt, main, the call of main."""
    body, text = ast.parse(text_of(name)).body, text_of(name)
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    kinds = [type(node) for node in body]
    imports = [i for i, kind in enumerate(kinds) if kind in (ast.Import, ast.ImportFrom)]
    assert imports == list(range(1, 1 + len(imports)))
    names = [node.name for node in body if hasattr(node, "name")]
    assert names[0] == "add_args" and names[-2:] == ["adapt", "main"] and kinds[-1] is ast.If
    adapters = [node.name for node in body if isinstance(node, ast.ClassDef) and "keys" in {
        target.id for item in node.body if isinstance(item, ast.Assign) for target in item.targets}]
    assert adapters
    for adapter in adapters:
        node = next(node for node in body if getattr(node, "name", None) == adapter)
        methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
        methods = [each for each in methods if each in ("__init__", "forward", "merged_weight")]
        assert methods == ["__init__", "forward", "merged_weight"], adapter
    banners = re.findall(r"^# -{20,} (.+)$", text, re.M)
    assert banners[0] == "the maths" and banners[-1] == "the method"
    places = [text.index(part) for part in ("\nimport ", "\ndef add_args(", " the maths\n", f"\nclass {adapters[-1]}(",
                                            " the method\n", "\ndef adapt(", "\ndef main(", "\nif __name__")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", METHODS)
def test_docstring_names_paper_equation_command_and_departures(name):
    doc = ast.get_docstring(ast.parse(text_of(name)))
    assert re.search(r"arXiv \d{4}\.\d{5}|ICLR", doc) and "y = " in doc and f"python {name}.py" in doc
    assert "departs from the paper" in doc


def names_and_strings(name):
    """The identifiers and the string literals of a script: (names, strings), without docstrings and comments."""
    nodes = list(ast.walk(ast.parse(text_of(name))))
    docs = {ast.get_docstring(node, clean=False) for node in nodes
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))}
    names = {getattr(node, field) for node in nodes for field in ("id", "attr", "arg", "name")
             if isinstance(getattr(node, field, None), str)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names, strings - docs


def test_common_names_no_method():
    """No identifier holds a method's name, and no string is one; prose in help texts and PEFT's own keys may."""
    names, strings = names_and_strings("common")
    assert len(names) > 300 and "replace" in names and "adapter_config.json" in strings  # the search sees the code
    assert not [name for name in names if re.search("lora|hira|sparse|nf4|prune", name, re.I)]
    named = {string for string in strings if re.search(r"lora|hira|sparse|nf4|prune|contextual", string, re.I)}
    assert {string for string in named if " " not in string} <= {
        "lora_alpha", "use_rslora", "init_lora_weights", "olora", "lora_ga"}  # PEFT's keys, and values that it knows
    assert all("LoRA paper" in string for string in named if " " in string)


@pytest.mark.parametrize("name", ["common", "compare"])
def test_nothing_branches_on_the_method(name):
    """No comparison with a method's name, but for the baseline's own --full, in the baseline's own adapt."""
    known = {*METHODS, "LORA", "HIRA"}
    for function in [node for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, ast.FunctionDef)]:
        for compare in [node for node in ast.walk(function) if isinstance(node, ast.Compare)]:
            texts = {node.value for node in ast.walk(compare) if isinstance(node, ast.Constant)}
            assert not texts & known, ast.unparse(compare)
            if name == "common" and re.search(r"\.method\b", ast.unparse(compare)):
                assert function.name == "adapt", ast.unparse(compare)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_imports_only_common(name):
    """A script stands beside common.py alone: none imports another."""
    modules = {alias.name for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, ast.Import)
               for alias in node.names}
    modules |= {node.module for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, ast.ImportFrom)}
    assert not modules & ({*SCRIPTS, "compare", "demo", "peft"} - {"common"}) and "common" in modules


def test_lora_and_hira_differ_by_little():
    changed = [line for line in difflib.ndiff(text_of("lora").splitlines(), text_of("hira").splitlines())
               if line.startswith(("+ ", "- "))]
    assert len(changed) < 110


# ------------------------------------------------------------------------------------------------ the command line


def parser_of(name):
    """The parser that a script builds: caught where it is about to read the words."""
    script = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        caught = []

        def stop(parser, words):
            caught.append(parser)
            raise KeyError
        patch.setattr(common.Parser, "parse_args", stop)
        with pytest.raises(KeyError):
            common.parse_args(script.__doc__, script.__file__, script.add_args, [])
    return caught[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_flag_with_its_text(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.splitlines()[0] in shown
    squeezed = " ".join(shown.split())
    written = re.findall(r'add(?:_argument)?\("(--\w+)"', text_of("common").split("# ----")[0] + text_of("common")
                         + (text_of(name) if name != "common" else ""))
    options = [action for action in parser_of(name)._actions if action.dest != "help"]
    flags = {flag for action in options for flag in action.option_strings}
    assert len(options) > 25 and flags <= set(written)
    for action in options:
        assert action.help not in (None, "", argparse.SUPPRESS) and action.default is not argparse.SUPPRESS
        text = " ".join((action.help % vars(action) if "%(" in action.help else action.help.replace("%%", "%")).split())
        assert len(text) > 15 and f" {action.option_strings[0]} " in squeezed
        assert text.replace(" ", "").replace("-", "") in squeezed.replace(" ", "").replace("-", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_default(name):
    """A flag that has a default value says in its own entry of --help which."""
    parser, missing = parser_of(name), []
    for action in parser._actions:
        default = action.default
        if action.nargs == 0 or default is None:
            continue
        text = " ".join(action.help.split()) % vars(action) if "%(" in action.help else action.help
        values = default if isinstance(default, list) else [default]
        shown = {str(value) for value in values} | {f"{value:g}" for value in values if isinstance(value, float)}
        shown |= {f"{value:.0e}".replace("e-0", "e-") for value in values if isinstance(value, float) and value}
        if not any(re.search(rf"(?<![\w.]){re.escape(each)}(?![\w]|\.\d)", text) for each in shown):
            missing.append(f"{action.option_strings[0]} {default}")
    assert not missing


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_none_of_the_slow_libraries(name):
    """transformers, datasets, bitsandbytes, scipy and matplotlib are imported where they are used, not at the top."""
    modules = set()
    for node in ast.parse(text_of(name)).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert not modules & {"transformers", "datasets", "bitsandbytes", "scipy", "matplotlib", "peft", "safetensors"}
    assert modules - sys.stdlib_module_names <= {"torch", "tqdm", "common"}


def test_only_hira_and_nobody_else_changes_the_learning_rate():
    """Each method may set its own default of a shared flag; these are the ones that do."""
    rates = {name: parser_of(name).get_default("lr") for name in SCRIPTS}
    assert rates["hira"] > rates["lora"] == rates["qlora"] == rates["sparse_lora"] == rates["common"]
    assert len({parser_of(name).get_default("head_lr") for name in SCRIPTS}) == 1


def test_readme_holds_the_memory_table_as_computed():
    """README's table of larger models is what tests/bench_memory.py prints."""
    import bench_memory
    assert bench_memory.table() in (ROOT / "README.md").read_text("utf-8")
