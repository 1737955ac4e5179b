"""How SmolLM2 continues a prompt, untrained and with each method's adapter, for docs/report.md.

    bash study/run.sh continuation      trains the four adapters first, half an hour on one core
    python study/continuation.py results/continuation/*-seed0

Each adapter is merged and exported; transformers' `generate` takes the likeliest token 40 times.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import baseline  # noqa: E402
import hira  # noqa: E402
import lora  # noqa: E402
import qlora  # noqa: E402
import sparse_lora  # noqa: E402
from harness.text import escaped  # noqa: E402

PROMPT = "The village church was built in"
SCRIPTS = {"LoRA": lora, "QLoRA": qlora, "HiRA": hira, "Sparse LoRA": sparse_lora}
PAGE, MARK = ROOT / "docs" / "report.md", r"(<!-- continuation -->\n).*?(<!-- /continuation -->)"


def continuation(folder):
    """The text that the model in `folder` puts behind the prompt, in one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    text = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :])
    return escaped(" ".join(text.split()), 400)


def main(folders):
    """Continue the prompt with each adapter and write the table into the report."""
    adapters = {Path(folder).name.split("-")[1]: folder for folder in folders}
    rows = []
    with tempfile.TemporaryDirectory() as out:
        flags = ["--dataset", "wikitext2", "--model", "models/smollm2", "--test_samples", "160"]
        flags += ["--batch_size", "8", "--out", out, "--export", f"{out}/untrained"]
        baseline.main(flags)
        rows.append(("Untrained", continuation(f"{out}/untrained")))
        for name, script in SCRIPTS.items():
            merged = f"{out}/{script.__name__}"
            script.main(["--eval_only", adapters[script.__name__], "--export", merged])
            rows.append((name, continuation(merged)))
    lines = [f"Prompt: *{PROMPT}* …", "", "| method | continuation |", "| --- | --- |"]
    lines += [f"| {name} | {text} |" for name, text in rows]
    text = PAGE.read_text("utf-8")
    filled = re.sub(MARK, lambda m: f"{m[1]}\n" + "\n".join(lines) + f"\n\n{m[2]}", text, flags=16)
    PAGE.write_text(filled, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
