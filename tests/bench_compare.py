"""How long compare.py takes from 500 result files to its tables, without plots.

python tests/bench_compare.py         it should stay below 5 s
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_compare import compare, make_study, write  # noqa: E402

GAINS = {"lora": 0, "qlora": 0, "hira": 1, "sparse_lora": 0, "lora-rank32": 1}

with tempfile.TemporaryDirectory() as folder:
    rates = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
    write(Path(folder), *make_study(GAINS, seeds=10, rows=3872, rates=rates))
    text = make_study(GAINS, seeds=10, rows=2000, rates=rates, lm=True, dataset="wikitext2")
    write(Path(folder), *text)
    size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    count, start = len(list(Path(folder).iterdir())), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        compare.main([folder, "--no_plots"])
    print(f"{count} files, {size:.0f} MiB: {time.perf_counter() - start:.2f} s")
