"""The results page, the terminal's text, and the sections of other pages that hold numbers."""

import re

from harness import tables
from harness.process import fail
from harness.results import DEMOS

HEAD = "# Results\n\nWritten by compare.py from the result files; do not edit.\n"
READ = """<details><summary>How to read this page</summary>

In each seed a method has the learning rate that is best on that seed's dev rows; that run's test
score counts. A difference is the mean over the seeds that both methods have. Its 95 % interval
holds two noises: training again (seeds) and other test rows. *Better*: p < 0.05, after Holm's
correction for all pairs; p is the larger of the paired t-test over seeds and of the test of both
noises. *Equal within the margin*: the 90 % intervals lie inside it. *Undecided*: neither. What
would decide supposes that difference and spread stay as seen. A difference of nothing is called
better in at most 5 % of studies, one of exactly the margin equal in at most 5 % of pairs. Verdicts
are on the four methods in the variant that most of them have, the default one before others; other
rows have an interval beside LoRA and beside their own method, not corrected for their number. A
score's interval is over seeds alone.

Memory is counted: live tensors at the peak of a step on the largest batch; *allocator* is what
CUDA's allocator held in the same work. A CPU takes a batch in smaller parts than a GPU. So memory
and times are of one device, the one of most runs here. Where a seed's tuned run was on another or
was not measured, they are of another rate's run; a row that never ran on it has none. Times are of
runs that timed inference; between runs the machine drifts. A choice at the edge of the rates is
named where more than a third of the seeds made it.

</details>
"""


def sentences(g):
    """Verdicts and cautions as a list in Markdown."""
    return "\n".join(f"- {line}" for line in [*tables.verdicts(g), *g["cautions"]])


def main(g):
    return tables.markdown(tables.main_table(g))


def pairs(g):
    """Every statistic of the pairs, of the other rows beside LoRA and beside their own methods."""
    beside = [row["beside"] for row in g["rows"] if row["beside"] and not row["tested"]]
    beside += [pair for row in g["rows"] for pair in row["parents"]]
    return tables.markdown(tables.pair_table([*g["pairs"], *beside]))


def rates(g):
    return tables.markdown(tables.rate_table(g))


def details(g, which):
    """Tables of all that was measured in the tuned runs, each below its heading."""
    found = [(heading, tables.detail_table(g, *where)) for heading, *where in which]
    found = [f"{heading}:\n\n{tables.markdown(table)}" for heading, table in found if table]
    return "\n\n".join(found)


def scores(g):
    return details(g, tables.DETAILS[:1])


def costs(g):
    return details(g, tables.DETAILS[1:])


def runs(g):
    """How much was run, with which settings, where."""
    data, hours = g["data"], sum(run["seconds"] for run in g["_runs"]) / 3600
    sizes = ", ".join(f"{data[part]:,} {part}" for part in ("train", "dev", "test"))
    said = f"{len(g['_runs']):,} runs, {hours:.1f} hours of training; rows: {sizes}"
    found = [tables.settings_table(g), tables.environment_table(g)]
    return "\n\n".join([f"{said} ({data['test_split']}).", *map(tables.markdown, found)])


SECTIONS = {  # what other pages can hold, by the name in their marks
    "verdicts": sentences,
    "table": main,
    "pairs": pairs,
    "rates": rates,
    "scores": scores,
    "costs": costs,
    "runs": runs,
}
NAMES = "|".join(SECTIONS)
MARK = re.compile(rf"(<!-- ({NAMES})(?: (\S+))? -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def group_page(g, pictures):
    """A group's part of the page: verdicts, table, pictures, and the rest folded."""
    folded = {
        "Dev score at each learning rate": rates(g),
        "Every pair": pairs(g),
        "Scores of the tuned runs": scores(g),
        "Costs of the tuned runs": costs(g),
        "Runs and settings": runs(g),
    }
    parts = [f"## {tables.title(g)}", sentences(g), main(g)]
    if g["dataset"] in DEMOS:
        parts.insert(1, "Generated text, to see everything work. It says nothing about real data.")
    parts += [f"![{words}]({file})" for file, words in pictures]
    for summary, text in folded.items():
        if text:
            parts.append(f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>")
    return "\n\n".join(parts)


def check(folder, files):
    """End the program before anything is written where a page is not ours, or has no marks."""
    path = folder / "README.md"
    if path.exists() and not path.read_text("utf-8", "replace").startswith(HEAD):
        fail(f"{path} is not a page of compare.py; --out names another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror}; name a folder that can be written")
    for file in files:
        if not file.is_file() or not MARK.search(file.read_text("utf-8")):
            fail(f"--fill {file}: no file with <!-- table --> and <!-- /table --> in it")


def write(folder, groups, skipped, pictures):
    """Write folder/README.md; pictures: for each group its [(file, words)]."""
    parts = [group_page(g, drawn) for g, drawn in zip(groups, pictures, strict=True)]
    if skipped:
        parts.append("## Skipped\n\n" + "\n".join(f"- {line}" for line in skipped))
    text = "\n\n".join([HEAD.strip(), *parts, READ])
    (folder / "README.md").write_text(text, "utf-8", newline="\n")


def terminal(groups):
    """Verdicts and the table of each group as plain text."""
    parts = []
    for g in groups:
        said, table = sentences(g).replace("**", ""), tables.plain(tables.main_table(g))
        parts += [f"== {tables.title(g)}", said, table]
    return "\n\n".join(parts)


def fill(files, groups):
    """Renew what stands between <!-- NAME --> and <!-- /NAME --> in other pages.

    NAME is one of SECTIONS: verdicts (with the cautions), table (the main one), pairs (every
    statistic), rates (dev score by learning rate), scores, costs, runs (sizes, settings, machines).
    All groups on real data stand there, or with <!-- NAME sst2 --> those of that data set.
    """

    def renew(found):
        opening, name, dataset, closing = found.groups()
        wanted = [g for g in groups if g["dataset"] == dataset or not dataset]
        wanted = [g for g in wanted if dataset or g["dataset"] not in DEMOS]
        parts = [f"**{tables.title(g)}**\n\n{SECTIONS[name](g)}\n\n" for g in wanted]
        return f"{opening}\n{''.join(parts) or 'No results yet.'}{closing}"

    for file in files:
        file.write_text(MARK.sub(renew, file.read_text("utf-8")), "utf-8", newline="\n")
