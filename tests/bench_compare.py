"""How long compare.py takes from 5,000 made-up result files (3 data sets, 8 names) to its tables, without plots.

    python tests/bench_compare.py         it should stay below 5 s on two cores
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from test_compare import compare, result, write

NAMES = ("head_only", "full", "lora", "lora-rank32", "qlora", "hira", "sparse_lora", "sparse_lora-contextual")
ITEMS = {"sst2": 872, "imdb": 25_000, "wikitext2": 0}  # scored rows with one bit each

rng = np.random.default_rng(0)
with tempfile.TemporaryDirectory() as folder:
    for i in range(5000):
        dataset, name, seed = tuple(ITEMS)[i % 3], NAMES[i // 3 % 8], i // 24
        bits = rng.random(ITEMS[dataset]) < rng.normal(0.85, 0.01) if ITEMS[dataset] else None
        items = ITEMS[dataset] or 872
        write(Path(folder), result(name, seed, dataset=dataset, bits=bits, items=items, lm=bits is None))
    size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        compare.main([folder, "--no_plots"])
    print(f"5,000 files, {size:.0f} MiB: {time.perf_counter() - start:.2f} s")
