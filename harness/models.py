"""The libraries' models: loading, names and weights of layers, the class of an adapter layer.

transformers is imported where it is used: it takes seconds, and --help must not.
"""

import contextlib
import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from harness.process import fail, first_line, library_errors, say
from harness.rows import load_config, model_folder
from harness.text import printable

# The head of a task in transformers' class names.
HEADS = {"classification": "SequenceClassification", "mlm": "MaskedLM", "clm": "CausalLM"}
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

FFN = (  # the layers into and out of a block's wide middle; a gated one has two layers into it
    ("intermediate.dense", "output.dense"),  # BERT and its relatives
    ("ffn.lin1", "ffn.lin2"),  # DistilBERT
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),  # Llama and its relatives
    ("fc1", "fc2"),  # BART, OPT, Phi
    ("DenseReluDense.wi", "DenseReluDense.wo"),  # T5
    ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),  # gated T5
    ("dense_h_to_4h", "dense_4h_to_h"),  # Falcon, BLOOM
)


class StandIn(nn.Module):
    """A module in the place of one of the model's linear layers: the common part of all of them.

    A subclass has `in_features`, `out_features`, and a `weight` (out, in) and a `bias`, which some
    models read; T5 reads a weight's dtype.
    """

    keys = {}  # trained parameter -> its name in PEFT's file; empty where nothing is trained

    def merged_weight(self):
        """The one matrix (out, in), in fp32, that does this layer's work."""
        raise NotImplementedError


class AdapterLayer(StandIn):
    """A trained adapter around a frozen linear layer `base`; subclasses add forward and keys."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = features(base)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias


def configure(config, dropout, pad, classes):
    """A copy of the model's config with this dropout everywhere, this pad id and these classes.

    LayerDrop is off: it would leave a dropped layer's adapter without a gradient.
    """
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        # ESM's token_dropout is a switch, True or False, not a probability.
        if "drop" in key and isinstance(value, float | int | None) and not isinstance(value, bool):
            setattr(config, key, 0.0 if "layer" in key else dropout)
    config.pad_token_id, config.use_cache = pad, False
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
        config.problem_type = "single_label_classification"  # not a regression head's
    return config


def informative(names):
    """The names of a head's classes, or None where there are none or numbers alone (LABEL_0, 1)."""
    generic = all(re.fullmatch(r"(LABEL_)?\d+", str(name)) for name in names)
    return None if generic else names


def class_names(config):
    """The class names, by number, of the trained head of a checkpoint; None as in informative."""
    names = config.architectures if isinstance(config.architectures, list) else []
    trained = any("SequenceClassification" in str(name) for name in names)
    labels = dict(config.id2label)  # numbers, whatever their order in config.json
    return informative([labels[number] for number in sorted(labels)] if trained else [])


def head_order(names, classes):
    """For each class of a head its number in `classes`; None where it has other classes.

    NEGATIVE is negative, unless the classes have both.
    """
    for spelling in (str, lambda name: str(name).casefold()):
        numbers = {spelling(name): number for number, name in enumerate(classes)}
        order = [numbers.get(spelling(name)) for name in names]
        if len(order) == len(classes) and {*order} == {*range(len(classes))}:
            return order
    return None


def number_as_head(examples, names):
    """The data's examples with its classes numbered as in a trained head with these class names.

    As they are where the head has no names (None: it is taken by number) or other classes.
    """
    order = head_order(names or (), examples.classes or ())
    if not order or order == sorted(order):
        return examples
    classes = [examples.classes[number] for number in order]
    train, test = (
        split | {"label": [order.index(label) for label in split["label"]]}
        for split in (examples.train, examples.test)
    )
    return replace(examples, classes=classes, train=train, test=test)


def refuse_head(flag, names, classes):
    """End the program where a head that is only scored has other classes than the data."""
    head, data = (", ".join(map(printable, [*group][:8])) for group in (names, classes))
    fail(f"{flag}: its head has the classes {head}; data: {data}")


def check_files(name, folder):
    """Refuse an index that names other files than safetensors inside the model's own folder."""
    for index in Path(folder).glob("*.safetensors.index.json"):
        try:
            text = index.read_text() if index.is_file() else ""  # a pipe would never end
            files = {*map(str, json.loads(text)["weight_map"].values())}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fail(f"--model {name}: {index.name} is not a list of files")
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                fail(f"--model {name}: {index.name} names {file}, which is not in its folder")


def load(run, task, config):
    """The model with a head for the task, as stored: (model, names of the head's tensors).

    Safetensors from the model's own folder only, and no code. Links in that folder are followed:
    the hub's cache consists of them. One line and status 2 where the checkpoint cannot be used.
    """
    import transformers

    name, kind, folder = run.model, HEADS[task], model_folder(run.model)
    check_files(name, folder)
    with library_errors(f"--model {name}: cannot load it for {kind}"):
        model, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
            folder,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub id's; a folder is refused before
        fail(f"--model {name}: it holds an adapter, not a model; name its base")
    named = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    other_size = {key[0] for key in info["mismatched_keys"]}
    fresh = (set(info["missing_keys"]) | other_size) & named.keys()
    body = [key for key in fresh if key.startswith(prefix) and ".pooler." not in key]
    if body:
        lacks = f"lacks {len(body)} tensors of the model itself, {min(body)} among them"
        fail(f"--model {name}: the checkpoint {lacks}")
    if task == "classification":
        fresh |= {key for key in named if not key.startswith(prefix)}
        names, classes = class_names(load_config(name)), config.id2label.values()
        other = names and not head_order(names, classes)
        if other and not (run.epochs or run.eval_only):
            refuse_head(f"--model {name}", names, classes)
        if other or other_size:
            reason = "other classes" if other else "another number of labels"
            say(f"--model {name}: its head has {reason} and is replaced by a new one")
        if other:
            for path, module in model.named_modules():
                if path and not f"{path}.".startswith(prefix):
                    for tensor in module.parameters(recurse=False):
                        tensor._is_hf_initialized = False  # transformers draws no other ones
                    model._init_weights(module)
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

    transformers leaves some new tensors uninitialized (Longformer's LM head: 1e37 was seen).
    """
    for key, tensor in model.named_parameters():
        low, high = tensor.aminmax()  # nan if one is; isfinite() would copy the largest matrix
        if key in fresh and not -1e4 < low <= high < 1e4:
            say(f"--model {name}: {key} is missing and came uninitialized; drawn again")
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
    with library_errors(f"--model {name}: cannot run it on tokens alone"):
        a, b = (model(input_ids=x).logits[0, :-1] for x in (ids, other))
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
    """nn.Linear, GPT-2's Conv1D (transposed), or a frozen stand-in such as a 4-bit layer."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return isinstance(module, StandIn) and not module.keys


def weight_of(layer):
    """A linear layer's weight as (out, in), whichever way round the layer stores it."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def features(layer):
    """A linear layer's (in, out) widths; a 4-bit layer is not unpacked for them."""
    if type(layer).__name__ == "Conv1D":
        return tuple(layer.weight.shape)
    return layer.in_features, layer.out_features


def compute_dtype(x):
    """The dtype that products with x are computed in: autocast's inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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


def feed_forward_layers(model):
    """{block: ends of the names of its feed-forward layers, the one out last}; {} if unknown."""
    layers = [n for n, m in model.named_modules() if is_linear(m) or isinstance(m, AdapterLayer)]
    matching = [ends for ends in FFN if any(name.endswith(f".{ends[0]}") for name in layers)]
    ends = matching[0] if matching else [None]
    names = [name for name, _ in model.named_modules() if name.endswith(f".{ends[0]}")]
    return {n.removesuffix(ends[0]): ends for n in names} if set(names) <= set(layers) else {}


def activation(config):
    """The function between a block's layers into its wide middle and the one out of it."""
    from transformers.activations import ACT2FN

    keys = ("hidden_act", "activation", "activation_function", "hidden_activation", "dense_act_fn")
    names = [getattr(config, key, None) for key in keys]
    return next((ACT2FN[name] for name in names if name), nn.GELU(approximate="tanh"))  # BLOOM's


def longest_input(config, model=None):
    """How many tokens an example may have; 10⁹ where the model has no table of positions.

    A position table with a padding index counts positions from there on (RoBERTa, ESM, Luke): that
    is known of a `model` only, not of a config.
    """
    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else 10**9  # XLNet has -1
    for name, module in model.named_modules() if model else []:
        pad = module.padding_idx if isinstance(module, nn.Embedding) else None
        if "position" in name and pad is not None:
            limit = min(limit, module.num_embeddings - pad - 1)
    return limit


def check_length(run, config, model=None):
    """End the program where --max_length is not what the model can take."""
    longest = longest_input(config, model)
    if not 4 <= run.max_length <= longest:
        fail(f"--max_length {run.max_length}: {run.model} takes 4 to {longest:,} tokens")


def stand_ins(model):
    """{path: module} of the modules in the place of a linear layer, without those inside one."""
    modules = {}
    for name, module in model.named_modules():  # parents first
        inside = any(name.startswith(f"{outer}.") for outer in modules)
        if isinstance(module, StandIn) and not inside:
            modules[name] = module
    return modules


@contextlib.contextmanager
def as_plain_linears(model, merged, dtype):
    """Inside, every stand-in is an ordinary linear layer: merged, or of the base's weight alone."""
    modules = stand_ins(model)
    for path, module in modules.items():
        base = module.base if isinstance(module, AdapterLayer) else module
        weight = module.merged_weight() if merged else weight_of(base).float()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        weight = weight.detach().to(dtype, copy=True)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = base.bias
        model.set_submodule(path, plain.train(module.training))
    try:
        yield model
    finally:
        for path, module in modules.items():
            model.set_submodule(path, module)


class FP32Logits(torch.autograd.Function):
    """x·Wᵀ in fp32 for a frozen bf16 W (vocabulary, hidden), which is converted in pieces."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return torch.cat([F.linear(x, part.float()) for part in weight.split(2**14)], dim=-1)

    @staticmethod
    def backward(ctx, grad):
        pieces = zip(grad.split(2**14, dim=-1), ctx.weight.split(2**14), strict=True)
        return sum(delta @ part.float() for delta, part in pieces), None


def compute_logits_in_fp32(layer):
    """Take the linear layer that computes the logits out of autocast, in place.

    Autocast would round each logit to bf16's 8 bits, before the loss can be taken in fp32.
    """

    def forward(x):
        with torch.autocast(x.device.type, enabled=False):
            if layer.weight.dtype == torch.float32:
                return F.linear(x.float(), layer.weight, layer.bias)
            y = FP32Logits.apply(x.float(), layer.weight)
            return y if layer.bias is None else y + layer.bias

    layer.forward = forward
