"""The trained model as an ordinary Hugging Face checkpoint: weights merged, config, tokenizer."""

import contextlib
import copy
import os
import tempfile

import torch

from harness.models import stand_ins
from harness.process import library_errors, process_index, say
from harness.rows import load_tokenizer, model_folder


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
    from transformers import GenerationConfig

    if process_index() != 0:
        return
    folder, model = run.export.resolve(), base.model
    tokenizer, config = copy.deepcopy(load_tokenizer(run.model))
    for key in ("id2label", "label2id", "problem_type", "pad_token_id"):
        setattr(config, key, getattr(model.config, key))
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
    if whole.can_generate():  # its stop tokens may stand in generation_config.json alone
        with contextlib.suppress(OSError):  # there is none
            whole.generation_config = GenerationConfig.from_pretrained(model_folder(run.model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        library_errors(f"--export {run.export}: cannot write it", status=1),
        tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished,
    ):
        whole.save_pretrained(f"{unfinished}/model")
        tokenizer.save_pretrained(f"{unfinished}/model")
        os.rename(f"{unfinished}/model", folder)  # new, or empty: nothing of the user's is replaced
    size = sum(tensor.nbytes for tensor in whole.parameters()) / 2**20
    say(f"wrote the merged model to {run.export} ({size:,.1f} MiB, {str(dtype)[6:]})")
