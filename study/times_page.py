"""Write the tables of docs/speed.md from study/times/*.jsonl; report/times.py derives them."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report import times  # noqa: E402
from report.page import markdown  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
MARK = re.compile(r"(<!-- times -->\n).*?(<!-- /times -->)", re.DOTALL)
COMMAND = "python study/times.py --dataset sst2 --model models/all-MiniLM-L6-v2 --peers --choices"


def write(folder, page=PAGE):
    """Put the tables of all files in the folder between the marks of the page."""
    parts = []
    for path in sorted(folder.glob("*.jsonl")):
        for measured in times.read(path):
            parts.append(f"## {measured.first['dataset']} with {measured.first['model']}")
            parts += [measured.source, *map(markdown, times.cost_tables(measured))]
    parts = parts or [f"No results yet: run `{COMMAND}` on a quiet machine."]
    text, made = page.read_text("utf-8"), "\n\n".join(parts)
    page.write_text(MARK.sub(lambda mark: f"{mark[1]}\n{made}\n\n{mark[2]}", text), "utf-8")
