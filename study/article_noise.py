"""Do neighboring blocks of running text make the standard error of a difference too small?

    python study/article_noise.py models/minilm-mlm data/wikitext2/test.parquet

Neighboring blocks of WikiText-2's test text are of one article. For LoRA's perplexity and for every
pair of methods this prints the standard error over independent blocks, over whole articles, and
over compare.py's groups of neighbors: means over seeds, at the learning rate that is best on dev.
"""

import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compare import group_neighbors  # noqa: E402
from report import results  # noqa: E402

LENGTH = 128  # tokens of a block, two of them [CLS] and [SEP]
TITLE = re.compile(r" = [^=].* = \n?$")


def articles_of_blocks(tokenizer, texts):
    """(blocks,): the number of the article that most of a block's tokens belong to."""
    lines = [text.rstrip("\n") + "\n" for text in texts if text.strip()]
    known = [line.replace("<unk>", tokenizer.unk_token) for line in lines]
    ids = tokenizer(known, add_special_tokens=False)["input_ids"]
    number = np.cumsum([bool(TITLE.match(line)) for line in lines])
    tokens = np.repeat(number, [len(line) for line in ids])
    size = LENGTH - 2
    blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return np.array([np.bincount(block).argmax() for block in blocks])


def standard_errors(values, clusters):
    """(over blocks, over clusters): standard errors of the mean of values (blocks,)."""
    rest = values - values.mean()
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], rest)
    between = (sums**2).sum() * len(sums) / (len(sums) - 1)
    return values.std(ddof=1) / len(values) ** 0.5, between**0.5 / len(values)


def main(model, parquet):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = pyarrow.parquet.read_table(parquet)["text"].to_pylist()
    articles = articles_of_blocks(tokenizer, texts)
    runs = [results.read_run(line) for line in open(ROOT / "study/wikitext2.jsonl")]
    runs = [run for run in runs if run.model == model.split("/")[-1] and not run.untrained]
    assert {run.sizes["test"] for run in runs} == {len(articles)}, "other blocks than the runs'"
    means = {}
    for method in ("lora", "qlora", "hira", "sparse_lora"):
        own = [run for run in runs if run.name == method]
        dev = Counter()
        for run in own:
            dev[run.lr] += run.dev
        best = min(dev, key=dev.get)
        means[method] = np.mean([run.values for run in own if run.lr == best], 0)
    print(f"{len(articles):,} blocks, {len(set(articles))} articles; standard errors in percent")
    label = results.METHODS
    cases = {label["lora"]: means["lora"]}
    cases |= {f"{label[a]} − {label[b]}": means[a] - means[b] for a, b in combinations(means, 2)}
    for name, values in cases.items():
        blocks, whole = standard_errors(values, articles)
        groups = group_neighbors(values[None])[0]
        errors = {"articles": whole, "groups": groups.std(ddof=1) / len(groups) ** 0.5}
        words = [f"{key} {error:.3f} ({error / blocks:.2f} ×)" for key, error in errors.items()]
        print(f"{name}: blocks {blocks:.3f}, {', '.join(words)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
