"""The table of docs/running.md: what one step takes on decoders of 135M to 70B weights.

    python study/plans.py        some minutes; no weights, no GPU

It writes configs of these shapes to a temporary folder and runs each script's own --plan there.
"""

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hira  # noqa: E402
import lora  # noqa: E402
import qlora  # noqa: E402

PAGE = ROOT / "docs" / "running.md"
MARK = re.compile(r"(<!-- plans -->\n).*?(<!-- /plans -->)", re.DOTALL)
SHAPES = {  # hidden size, feed-forward size, layers, heads, key-value heads, vocabulary, tied
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000, False),
}
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
FLAGS = "--dataset wikitext2 --batch_size 1 --max_length 512 --precision bf16 --plan".split()
SCRIPTS = {"LoRA": lora, "QLoRA": qlora, "HiRA": hira}


def peak(script, folder, *more):
    """GiB at the peak of a training step, as the script prints it."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        script.main([*FLAGS, "--model", str(folder), *more])
    peak = float(re.search(r"^peak +(\S+)", shown.getvalue(), re.M)[1])
    return f"{peak / (1024 if 'MiB:' in shown.getvalue() else 1):.2f}"


def main():
    """Fill the marks of docs/running.md."""
    ways = [(name, more) for more in ([], ["--checkpointing"]) for name in SCRIPTS]
    heads = [name + (", checkpointing" if more else "") for name, more in ways]
    lines = [f"| GiB | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    with tempfile.TemporaryDirectory() as folder:
        for shape, sizes in SHAPES.items():
            more = dict(
                zip([*KEYS.split(), "vocab_size", "tie_word_embeddings"], sizes, strict=True)
            )
            LlamaConfig(**more).save_pretrained(Path(folder) / shape)
            cells = [peak(SCRIPTS[name], Path(folder) / shape, *flags) for name, flags in ways]
            lines.append(f"| {shape} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    table = "\n".join(lines)
    PAGE.write_text(MARK.sub(rf"\1\n{table}\n\n\2", PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
