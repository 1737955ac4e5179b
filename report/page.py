"""The results page, the terminal's text, and the blocks of other pages that hold numbers."""

import re
import secrets
import shlex
from collections import Counter
from pathlib import Path

from harness.process import fail
from harness.text import escaped, printable
from report import tables
from report.results import DEMOS, SIGN
from report.times import cost_tables

HEAD = "# Results\n\nWritten by compare.py from the result files; do not edit.\n"
READ = Path(__file__).with_name("how_to_read.md").read_text("utf-8")  # ends the page
PIPELINE = """from transformers import pipeline

classify = pipeline("text-classification", "my-model")
print(classify("a text of your own"))"""
LANGUAGE_MODEL = """from transformers import AutoTokenizer, {0}

model, tokenizer = (x.from_pretrained("my-model") for x in ({0}, AutoTokenizer))
print(model(**tokenizer("a text of your own", return_tensors="pt")).logits)"""
CODE = {"classification": PIPELINE, "mlm": LANGUAGE_MODEL.format("AutoModelForMaskedLM")}
CODE |= {"clm": LANGUAGE_MODEL.format("AutoModelForCausalLM")}
SIMPLE_FIRST = ("lora", "hira", "sparse_lora", "qlora")


def write(path, data):
    """Put bytes into a file: all or none, and never through a link; a link is replaced."""
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
        unfinished.replace(path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}); name another place")
    finally:
        unfinished.unlink(missing_ok=True)


def recommend(group):
    """(row, why): the simplest tested method that is not worse than the best by the margin."""
    rows = [row for row in group.rows if row.tested]
    rows.sort(key=lambda row: SIMPLE_FIRST.index(row.run.method))
    best = max(rows, key=lambda row: SIGN[group.task] * row.score)
    simpler = rows[: rows.index(best)]
    for row in simpler:
        [pair] = [pair for pair in group.pairs if {pair.a, pair.b} == {row.label, best.label}]
        lead = pair.lead and (pair.lead[2] if pair.ahead == best.label else -pair.lead[1])
        if pair.lead and lead < group.margin:
            size = tables.amount(group, f"{max(lead, 0):.2f}", True)
            why = f"{best.label} has the best mean score, but it is ahead by at most {size}"
            return row, f"{why} (upper 95 % limit), and {row.label} is simpler."
    labels = tables.listing([row.label for row in simpler])
    why = f"{labels} may be worse by the margin or more" if labels else "it is the simplest"
    return best, f"It has the best mean score, and {why}."


def next_step(group):
    """(sentences, command, Python) to go on with; none where no tested method has runs."""
    if not any(row.tested for row in group.rows):
        return [], "", ""
    (row, why), texts = recommend(group), []
    run = max(row.picked.values(), key=lambda run: SIGN[group.task] * run.dev)
    share, size = run.majority, run.sizes["test"]
    if share and row.score < 100 * (share + 2 * (share * (1 - share) / size) ** 0.5):
        low = f"Look at the data first: the score, {row.score:.2f} %, is no better than always "
        texts = [f"{low}answering the largest class, {100 * share:.2f} % of the test examples."]
    costs = [f"{head} {text}" for head, text in tables.main_costs(row).items() if text]
    texts.append(f"Use {row.label}. {why} It costs: {', '.join(costs)}.")
    verdicts = {pair.verdict for pair in group.pairs}
    if "none" in verdicts:
        texts.append("This is a first impression: not every pair has a verdict.")
    if "undecided" in verdicts:
        size = f"This study detects differences of {tables.detected(group)} or more."
        texts.append(f"Some pairs are undecided. {size}{tables.PLAN}")
    stem = f"results/{run.dataset}-{run.name}-{run.model}-lr{run.lr:g}-seed{run.seed}"
    stem = str(run.path.with_suffix("")) if run.path.suffix == ".json" else stem
    command = f"python {row.run.method}.py --eval_only {shlex.quote(printable(stem, 500))}"
    return texts, f"{command} --export my-model", CODE[group.task]


def markdown(table):
    """A table in Markdown, without empty columns."""
    lines = [[escaped(text, 1000) for text in line] for line in tables.cells_of(table)]
    lines[1:1] = [["---"] + ["---:"] * (len(line) - 1) for line in lines[:1]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(group):
    """Verdicts and cautions as a list in Markdown."""
    parts = [*tables.verdicts(group), *(("", caution) for caution in group.cautions)]
    starts = [f"**{escaped(start, 1000)}**" * bool(start) for start, _ in parts]
    parts = zip(starts, parts, strict=True)
    return "\n".join(f"- {start}{escaped(rest, 10_000)}" for start, (_, rest) in parts)


def pairs(group):
    """Every statistic of the pairs, of the other rows and LoRA, of variants and their methods."""
    tested = {row.label for row in group.rows if row.tested}
    others = [pair for label, pair in group.versus_lora.items() if label not in tested]
    return markdown(tables.pair_table([*group.pairs, *others, *group.parents]))


def means(group):
    """Means of the tuned runs, how much was run, and where."""
    run, hours = group.runs[0], sum(run.seconds for run in group.runs) / 3600
    sizes = ", ".join(f"{count:,} {split}" for split, count in run.sizes.items())
    text = f"{len(group.runs):,} runs, {hours:.1f} hours of training; examples: {sizes}"
    machines = Counter(run.machine for run in group.runs).most_common()
    machines = "; ".join(f"{count} runs on {escaped(machine, 100)}" for machine, count in machines)
    return f"{markdown(tables.means_table(group))}\n\n{text}. {machines}."


def next_block(group):
    """What to do next, in Markdown."""
    texts, command, code = next_step(group)
    texts = "\n".join(f"- {escaped(text, 10_000)}" for text in texts)
    return f"{texts}\n\n```bash\n{command}\n```\n\n```python\n{code}\n```" if texts else ""


def costs(group):
    """Where the times were measured, a table of training and one of inference."""
    if not group.times:
        return "Times were not measured: `--timing` adds them to a run."
    source = group.times.source
    if not any("gpu_hours" in numbers for numbers in group.times.training.values()):
        source += " GPU hours and money: not measured, because no GPU ran."
    return "\n\n".join([escaped(source, 2000), *map(markdown, cost_tables(group.times))])


SECTIONS = {  # blocks of other pages, by the name in their marks
    "verdicts": verdicts,
    "table": lambda group: markdown(tables.main_table(group)),
    "next": next_block,
    "costs": costs,
    "pairs": pairs,
}
FOLDED = {  # below the plots
    "Every pair": pairs,
    "Scores, costs and sizes of the tuned runs": means,
}
NAMES = "|".join(SECTIONS)
MARK = re.compile(rf"(<!-- ({NAMES})(?: (\S+))? -->(\r?\n)).*?(<!-- /\2 -->)", re.DOTALL)


def group_page(group, files):
    """A group's part of the page: verdicts, table, next step, plots, costs, the rest folded."""
    parts = [f"## {escaped(group.title, 200)}"]
    if group.runs[0].dataset in DEMOS:
        parts.append("Generated text, to see everything work. It says nothing about real data.")
    parts += [verdicts(group), SECTIONS["table"](group)]
    for repeat in group.repeats:
        parts.append("### Does the order hold with other settings?")
        parts += [escaped(tables.does_order_hold(group, repeat), 2000), SECTIONS["table"](repeat)]
    if step := next_block(group):
        parts.append(f"### What to do next\n\n{step}")
    images = [[f"![{escaped(title, 200)}]({file})" for file, title in part] for part in files]
    parts += [*images[0], f"### What it costs\n\n{costs(group)}", *images[1]]
    for summary, block in FOLDED.items():
        if text := block(group):
            parts.append(f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>")
    return "\n\n".join(parts)


def check(folder, files):
    """End the program before anything is written where a page is not ours, or has no marks."""
    path = folder / "README.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = path.is_file() and path.read_text("utf-8", "replace").startswith(HEAD)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror}; name a folder that can be written")
    if path.exists() and not ours:
        fail(f"{path} is not a page of compare.py; --out names another folder")
    for file in files:
        if not file.is_file() or not MARK.search(file.read_bytes().decode(errors="replace")):
            fail(f"--fill {file}: no file with <!-- table --> and <!-- /table --> in it")


def write_page(folder, groups, skipped, drawn):
    """Write folder/README.md; drawn: for each group the (file, title) of its plots, see draw()."""
    parts = [group_page(group, files) for group, files in zip(groups, drawn, strict=True)]
    if skipped:
        parts.append("## Skipped\n\n" + "\n".join(f"- {escaped(x, 400)}" for x in skipped))
    write(folder / "README.md", "\n\n".join([HEAD.strip(), *parts, READ]).encode())


def terminal(groups, path):
    """Verdicts and table of each group, where the page is, and what to do next, as plain text."""
    parts, steps = [], []
    for group in groups:
        lines = ["".join(sentence) for sentence in tables.verdicts(group)] + group.cautions
        lines = "\n".join(f"- {line}" for line in lines)
        parts += [f"== {group.title}", lines, tables.plain(tables.main_table(group))]
        texts, command, code = next_step(group)
        if texts:
            step = [f"What to do next, {group.title}:", *texts, "", command, "", code]
            steps.append("\n".join(step))
    return "\n\n".join([*parts, f"The whole page: {path}", *steps])


def fill(files, groups):
    """Renew what is between <!-- NAME --> and <!-- /NAME --> in other pages; NAME is in SECTIONS.

    It holds all groups on real data, or with <!-- NAME sst2 --> those of that data set. A block
    without results and the line ends stay.
    """

    def renew(match):
        opening, name, dataset, end, closing = match.groups()
        datasets = [dataset] if dataset else {g.runs[0].dataset for g in groups} - {*DEMOS}
        wanted = [group for group in groups if group.runs[0].dataset in datasets]
        parts = [f"\n**{escaped(g.title, 200)}**\n\n{SECTIONS[name](g)}\n" for g in wanted]
        text = "".join([*parts, "\n"]).replace("\n", end)
        return f"{opening}{text}{closing}" if wanted else match.group()

    for file in files:
        text = file.read_bytes().decode(errors="surrogateescape")
        write(file, MARK.sub(renew, text).encode(errors="surrogateescape"))
