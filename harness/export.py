"""The trained model as an ordinary Hugging Face checkpoint: weights merged, config, tokenizer."""

import copy
import os
import shutil

import torch

from harness.models import stand_ins
from harness.process import fail, first_line, process_index, say
from harness.rows import load_tokenizer


@torch.no_grad()
def merged_state(model, whole):
    """The merged weights under the names of `whole`, a plain model of the same class.

    An adapter's own frozen layer is called base in here; Conv1D keeps its weight transposed.
    """
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for path, module in stand_ins(model).items():
        path = path.removesuffix(".base")
        weight, layer = module.merged_weight(), whole.get_submodule(path)
        state[f"{path}.weight"] = weight.T if type(layer).__name__ == "Conv1D" else weight
    return state


def export(run, base):
    """Write the merged model to the folder --export, whole or not at all.

    In the dtype of the checkpoint that it came from; a 4-bit base becomes its dequantized weights,
    full size. The state is loaded strictly into a fresh model of the same class before anything is
    written: every name and every shape is there.
    """
    if process_index() != 0:
        return
    folder, model = run.export.resolve(), base.model
    tokenizer, config = copy.deepcopy(load_tokenizer(run.model))
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    config.pad_token_id = model.config.pad_token_id
    own_head = model.get_output_embeddings() in stand_ins(model).values()
    if own_head:  # the embedding that it was tied to is not adapted
        config.tie_word_embeddings = False
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        whole = type(model)(config)
    state = merged_state(model, whole)
    wanted = whole.state_dict()
    # Copied, as of tensors that share their memory one name alone would be saved.
    state = {n: state[n].detach().to("cpu", dtype, copy=own_head).contiguous() for n in wanted}
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.config.dtype = dtype
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        whole.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)  # new, or empty: nothing of the user's is ever replaced
    except Exception as error:  # the libraries have their own words for a full disk
        fail(f"--export {run.export}: cannot write it ({first_line(error)})", status=1)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(tensor.nbytes for tensor in whole.parameters()) / 2**20
    say(f"wrote the merged model to {run.export} ({size:,.1f} MiB, {str(dtype)[6:]})")
