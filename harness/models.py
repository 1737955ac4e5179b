"""The libraries' models: loading, layers' names and weights, what stands in for a layer.

transformers is imported where it is used: it takes seconds, and --help must not.
"""

import contextlib
import copy
import math
import re

import torch
from torch import nn

from harness.process import fail, first_line, say
from harness.rows import model_folder

BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
TARGETS = (  # the query and value projections, the LoRA paper's choice; the first that all exist
    ["query", "value"],  # BERT and its relatives
    ["q_lin", "v_lin"],  # DistilBERT
    ["q_proj", "v_proj"],  # Llama and its relatives, BART, OPT, Phi
    ["query_proj", "value_proj"],  # DeBERTa-v2
    ["q", "v"],  # T5, MPNet
    ["c_attn"],  # query, key and value in one from here on: GPT-2,
    ["qkv_proj"],  # Phi-3,
    ["query_key_value"],  # Falcon, BLOOM,
    ["Wqkv"],  # ModernBERT,
    ["attention.self.in_proj"],  # DeBERTa
)
AFTER_ATTENTION = {  # the module of a block that all that follows attention goes through
    "distilbert": "sa_layer_norm",
    "gpt2": "ln_2",
    **dict.fromkeys(BERTS, "attention.output"),
    **dict.fromkeys(LLAMAS, "post_attention_layernorm"),
}


def configure(config, dropout, pad, classes):
    """A copy of the model's config with this dropout everywhere, this pad id and these classes."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if "drop" in key and "layer" not in key and isinstance(value, float | int | None):
            setattr(config, key, dropout)
    config.pad_token_id, config.use_cache = pad, False
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    return config


def load(name, task, config):
    """The model with a head for the task, as stored: (model, names of the head's tensors).

    Safetensors only, no remote code. One line and status 2 where the checkpoint cannot be used.
    """
    import transformers

    kind = {"classification": "SequenceClassification", "mlm": "MaskedLM", "clm": "CausalLM"}[task]
    try:
        model, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
            model_folder(name),
            config=config,
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # no weights, a torn file, an unknown architecture …
        fail(f"--model {name}: cannot load it for {kind} ({first_line(error)})")
    named = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    other_size = {key[0] for key in info["mismatched_keys"]}
    fresh = (set(info["missing_keys"]) | other_size) & named.keys()
    body = [key for key in fresh if key.startswith(prefix) and ".pooler." not in key]
    if body:
        lacks = f"lacks {len(body)} tensors of the model itself, {min(body)} among them"
        fail(f"--model {name}: the checkpoint {lacks}")
    if other_size:
        say(f"--model {name}: its head has another number of labels and is replaced by a new one")
    if task == "classification":
        fresh |= {key for key in named if not key.startswith(prefix)}
    elif (output := model.get_output_embeddings()) is not None:
        if any(named[key] is output.weight for key in fresh):
            lacks = "no output embeddings, tied or not: this would train a vocabulary from nothing"
            fail(f"--model {name}: the checkpoint has {lacks}")
    check_values(name, model, fresh)
    if task == "clm":
        check_causal(name, model)
    tensors = {id(named[key]) for key in fresh}  # a shared tensor counts once, by its first name
    return model, [key for key, tensor in model.named_parameters() if id(tensor) in tensors]


def bytes_of(tensor):
    """The bytes of a tensor on the CPU, of any dtype; nothing is copied."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


@torch.no_grad()
def check_values(name, model, fresh):
    """Refuse a checkpoint with nan or infinity in it; draw a new tensor again that came out wild.

    transformers leaves some new tensors uninitialised (Longformer's LM head: 1e37 was seen).
    """
    for key, tensor in model.named_parameters():
        low, high = tensor.aminmax()  # nan if one is; isfinite() would copy the largest matrix
        if key in fresh and not -1e4 < low <= high < 1e4:
            say(f"--model {name}: {key} is missing and came uninitialised; drawn again")
            tensor.zero_() if tensor.ndim < 2 else tensor.normal_(0, 0.02)
        elif not -math.inf < low <= high < math.inf:
            fail(f"--model {name}: {key} holds nan or infinity; the checkpoint is broken")


@torch.no_grad()
def check_causal(name, model):
    """Refuse a causal LM that sees the future: its perplexity would mean nothing.

    A causal model's outputs do not change when a later token does.
    """
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9)[None] % size
    other = ids.clone()
    other[0, -1] = 0
    model.eval()
    try:
        a, b = (model(input_ids=x).logits[0, :-1] for x in (ids, other))
    except Exception as error:  # a model that wants more than tokens
        fail(f"--model {name}: cannot run it on tokens alone ({first_line(error)})")
    small = max(1e-3, 8 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    if not torch.allclose(a, b, atol=small):
        fail(f"--model {name}: its attention sees later tokens, so it has no causal perplexity")


def checkpoint_activations(name, model):
    """Have the model recompute its activations in the backward pass."""
    try:  # the name of transformers from 5.23 on, and the older one
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    except ValueError as error:
        fail(f"--checkpointing: {name} cannot do it ({first_line(error)})")


def is_linear(module):
    """nn.Linear, GPT-2's Conv1D (transposed), or a frozen stand-in: 4-bit layers have no keys."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return hasattr(module, "merged_weight") and not module.keys


def weight_of(layer):
    """A linear layer's weight as (out, in), whichever way round the layer stores it."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def block_linears(model):
    """Names of the linear layers inside the blocks: not embeddings, poolers or heads."""
    named = model.base_model.named_modules(prefix=model.base_model_prefix)
    return [name for name, module in named if is_linear(module) and re.search(r"\.\d+\.", name)]


def find_targets(model, targets):
    """The ends of the names of the layers to adapt: --targets, or query and value."""
    if targets:
        return targets
    names = block_linears(model)
    for ends in TARGETS:
        if all(any(name.endswith(f".{end}") for name in names) for end in ends):
            return ends
    kind = model.config.model_type
    fail(f"--targets: none known for {kind}; name some of {layer_names(model)}")


def layer_names(model):
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in block_linears(model)}))


def longest_row(config, pad):
    """How many tokens a row may have: fields that are -1, None or 0 are no limit."""
    positions, kind = getattr(config, "max_position_embeddings", None), config.model_type
    if not isinstance(positions, int) or positions <= 0:
        return 10**9
    if "roberta" in kind or kind in ("camembert", "mpnet", "longformer", "xmod", "data2vec-text"):
        return positions - pad - 1  # they count positions from there
    return positions


def adapters(model):
    """The modules that stand in for a linear layer: {path: module with keys, merged_weight()}."""
    found = {}
    for name, module in model.named_modules():  # parents first
        part_of_another = any(name.startswith(f"{outer}.") for outer in found)
        if hasattr(module, "merged_weight") and not part_of_another:
            found[name] = module
    return found


@contextlib.contextmanager
def as_plain_linears(model, merged, dtype):
    """Inside, every adapter is one ordinary linear layer: merged, or of the base's weight alone."""
    found = adapters(model)
    for path, module in found.items():
        layer = getattr(module, "base", module)
        weight = module.merged_weight() if merged else weight_of(layer).float()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        weight = weight.detach().to(dtype, copy=True)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain.train(module.training))
    try:
        yield model
    finally:
        for path, module in found.items():
            model.set_submodule(path, module)


def compute_read_rows_only(model, task, read, reads_last):
    """Have the last layer compute, after attention, only the rows that the head reads. Exact.

    read(): the flat positions (R,) that are read of the batch at hand. Encoders stay cut from there
    on. A decoder's residual stream stays whole, and the cut rows broadcast onto it: the row that is
    read is right, nobody looks at the others. A causal LM reads every row; there, and for models
    without an entry in AFTER_ATTENTION, rows are picked before the LM head alone, whose logits
    would be most of the memory. Returns whether the last layer is cut.
    """
    classify = task == "classification"

    def pick(x):  # (B, L, hidden) -> (B, 1, hidden), or (1, R, hidden) for a language model
        rows = x.flatten(0, 1)[read()]
        return rows[:, None] if classify else rows[None]

    def before(module, inputs):
        return tuple(pick(x) for x in inputs)

    def after(module, inputs, output):
        output.last_hidden_state = pick(output.last_hidden_state)
        return output

    def everywhere(module, inputs):  # the head looks for its row by the pad token: any is right now
        return pick(inputs[0]).expand(inputs[0].shape)

    name = AFTER_ATTENTION.get(model.config.model_type)
    if name and task != "clm":
        found = [m for n, m in model.base_model.named_modules() if n.endswith(f".{name}")]
        found[-1].register_forward_pre_hook(before)
    elif not classify:
        model.base_model.register_forward_hook(after)
    if classify and reads_last and isinstance(getattr(model, "score", None), nn.Linear):
        model.score.register_forward_pre_hook(everywhere)
    return name is not None and task != "clm"
