"""Peak resident memory of QLoRA on a model of 1.1 billion weights, on a CPU.

    python study/large_model.py --tokenizer models/smollm2

It writes a model of TinyLlama's shape with random bf16 weights (2.1 GiB, in shards) into a
temporary folder and trains two steps of one example of 128 tokens in a process of its own. It
prints the peak of that process's memory beside what the imports need, the size of the checkpoint's
files, and what `--plan` predicts.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--dataset wikitext2 --max_steps 2 --batch_size 1 --max_length 128 --checkpointing"
FLAGS += " --precision bf16 --test_samples 8 --train_samples 8 --dev_samples 8"


def write_model(folder, tokenizer):
    """Write a Llama of TinyLlama's shape with random bf16 weights, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def peak(*command):
    """(output, peak resident bytes, peak anonymous bytes) of a Python process of its own.

    Anonymous memory is what the process holds itself. The rest is mostly pages of the checkpoint's
    files, which the kernel may drop at any time and read again.
    """
    with tempfile.TemporaryFile("w+") as output:
        line = [sys.executable, *map(str, command)]
        process = subprocess.Popen(line, cwd=ROOT, stdout=output, stderr=output)
        resident, anonymous = 0, 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = dict(re.findall(r"(VmHWM|RssAnon):\s*(\d+) kB", status))
            resident = max(resident, 1024 * int(kilobytes.get("VmHWM", 0)))
            anonymous = max(anonymous, 1024 * int(kilobytes.get("RssAnon", 0)))
            time.sleep(0.05)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(text)
    return text, resident, anonymous


def main():
    """Write the model, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="models/smollm2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        code = f"import study.large_model as m; m.write_model({folder!r}, {args.tokenizer!r})"
        peak("-c", code)
        files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        flags = [*FLAGS.split(), "--model", folder, "--out", f"{folder}/results"]
        plan = peak("qlora.py", *flags, "--plan")[0]
        imports = peak("-c", "import torch, transformers, qlora, bitsandbytes")
        output, *total = peak("qlora.py", *flags)
    print(plan, output, sep="\n")
    print(f"{'MiB':24}{'resident':>10}{'anonymous':>11}")
    for name, (resident, anonymous) in {"imports": imports[1:], "peak of the run": total}.items():
        print(f"{name:24}{resident / 2**20:10,.0f}{anonymous / 2**20:11,.0f}")
    print(f"{'files of the checkpoint':24}{files / 2**20:10,.0f}")


if __name__ == "__main__":
    main()
