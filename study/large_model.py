"""Peak resident memory of QLoRA on a model of 1.1 billion weights, on a CPU.

    python study/large_model.py --tokenizer models/smollm2

It writes a model of TinyLlama's shape with random bf16 weights (2.1 GiB, in shards) into a
temporary folder and trains two steps of one example of 128 tokens in a process of its own. It
prints the peak of that process's resident memory beside what the imports need, the checkpoint's
bytes, and what `--plan` predicts.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--dataset wikitext2 --max_steps 2 --batch_size 1 --max_length 128 --checkpointing"
FLAGS += " --precision bf16 --test_samples 8 --train_samples 8 --dev_samples 8"


def write_model(folder, tokenizer):
    """A Llama of TinyLlama's shape with random bf16 weights; returns the bytes of its weights."""
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
    return sum(tensor.nbytes for tensor in model.parameters())


def peak(*command):
    """Peak resident bytes of a Python process of its own."""
    code = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    line = [sys.executable, "-c", code, sys.executable, *map(str, command)]
    output = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return output, 1024 * int(output.split()[-1])


def main():
    """Write the model, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="models/smollm2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        code = (
            f"import study.large_model as m; print(m.write_model({folder!r}, {args.tokenizer!r}))"
        )
        weights = int(peak("-c", code)[0].split()[-2])
        flags = [*FLAGS.split(), "--model", folder, "--out", f"{folder}/results"]
        plan = peak("qlora.py", *flags, "--plan")[0]
        imports = peak("-c", "import torch, transformers, qlora, bitsandbytes")[1]
        output, total = peak("qlora.py", *flags)
    print(plan, output, sep="\n")
    for name, size in {
        "checkpoint": weights,
        "imports": imports,
        "peak": total,
        "peak minus imports": total - imports,
    }.items():
        print(f"{name:20} {size / 2**20:8,.0f} MiB")


if __name__ == "__main__":
    main()
