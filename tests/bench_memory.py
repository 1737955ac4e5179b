"""What a 1B and a 7B decoder need in memory with each method: arithmetic on the meta device, nothing is allocated.

    python tests/bench_memory.py

Counted: the frozen base as stored, and for every trained number its fp32 value, its gradient and AdamW's two moments.
Not counted: activations, which depend on batch, length and checkpointing alone and are the same for all methods, and
the one dequantised weight that QLoRA has alive at a time. HiRA at its rank counts as LoRA does.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import common
import lora

SHAPES = {
    "1B (LLaMA-3.2-1B's shape)": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                                  "tie_word_embeddings": True},
    "7B (LLaMA-2-7B's shape)": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
                                "tie_word_embeddings": False},
}
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # NF4 with double quantisation (QLoRA, section 3)


def sizes(shape, rank=8):
    """(all base weights, of those quantised by qlora.py, trained by LoRA at `rank` on query and value)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).requires_grad_(False)
        base = sum(tensor.numel() for tensor in model.parameters())
        blocks = sum(model.get_submodule(name).weight.numel() for name in common.block_linears(model))
        lora.adapt(model, Namespace(rank=rank, alpha=None, dropout=0.0, targets=common.TARGETS["llama"]))
    return base, blocks, sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)


def table():
    """The Markdown table of README."""
    gib = 2**30
    heads = "| model | full fine-tuning, fp32 | LoRA, HiRA or Sparse LoRA, fp32 base | bf16 base | QLoRA, rest in bf16 |"
    rows = [heads, "| --- | ---: | ---: | ---: | ---: |"]
    for name, shape in SHAPES.items():
        base, blocks, trained = sizes(shape)
        kinds = (16 * base, 4 * base + 16 * trained, 2 * base + 16 * trained,
                 2 * (base - blocks) + blocks * BITS / 8 + 16 * trained)
        rows.append(f"| {name} | " + " | ".join(f"{size / gib:.1f} GiB" for size in kinds) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
