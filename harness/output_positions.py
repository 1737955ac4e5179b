"""Compute, after the last attention, only the tokens whose output is used.

A classifier reads one token of each example: the first ([CLS]), or the last one of a decoder. A
masked language model is scored on 15 % of its tokens. In the model's last block attention still
needs every token, but all that follows attention handles each token by itself. So the last block
may drop the other tokens right after attention: its feed-forward layers, the last norm and the
head then compute a fraction of the work. Every number that is used stays the same.

It is exact where everything between the last attention and the output works token by token, which
AFTER_ATTENTION lists for the architectures where we checked it (tests/test_models.py compares
losses and gradients with the uncut model). For other architectures, and for a causal language
model, where every token's output is used, tokens are picked before the language model's head
alone: its logits would be most of the memory.
"""

from torch import nn

BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
AFTER_ATTENTION = {  # the module of a block that all that follows attention goes through
    "distilbert": "sa_layer_norm",
    "gpt2": "ln_2",
    **dict.fromkeys(BERTS, "attention.output"),
    **dict.fromkeys(LLAMAS, "post_attention_layernorm"),
}


def compute_output_positions_only(model, task, positions, reads_last):
    """Cut the model's last block, in place; returns whether it is cut.

    positions(): the flat positions (R,) whose output is used, of the batch in the forward pass.
    reads_last: a classifier's head reads the last token, not the first. Encoders stay cut from the
    last attention on. A decoder's residual stream stays whole, and the cut tokens broadcast onto
    it: the token that is used is right, nobody looks at the others.
    """
    classify = task == "classification"

    def pick(x):  # (B, L, hidden) -> (B, 1, hidden), or (1, R, hidden) for a language model
        picked = x.flatten(0, 1)[positions()]
        return picked[:, None] if classify else picked[None]

    def before(module, inputs):
        return tuple(pick(x) for x in inputs)

    def after(module, inputs, output):
        output.last_hidden_state = pick(output.last_hidden_state)
        return output

    def everywhere(module, inputs):  # the head looks for its token by the pad id: any is right now
        return pick(inputs[0]).expand(inputs[0].shape)

    name = AFTER_ATTENTION.get(model.config.model_type)
    if name and task != "clm":
        modules = [m for n, m in model.base_model.named_modules() if n.endswith(f".{name}")]
        modules[-1].register_forward_pre_hook(before)
    elif not classify:
        model.base_model.register_forward_hook(after)
    if classify and reads_last and isinstance(getattr(model, "score", None), nn.Linear):
        model.score.register_forward_pre_hook(everywhere)
    return name is not None and task != "clm"
