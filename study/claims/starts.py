"""QLoRA whose adapter starts from the error of the 4-bit weights: a training script like qlora.py.

    python -m study.claims.starts --dataset wikitext2 --model models/minilm-mlm --start loftq

    y = Q·x + b + (α/r)·B·A·x    Q: what the 4 bits stand for; A, B: see start_values.py

--start zero is QLoRA as it is, peft_loftq is LoftQ as PEFT starts it, without dividing by α/r.
"""

import torch

import common
import qlora
from harness import batches, flags, models
from harness.process import choose_device
from harness.store import save_result
from study.claims.shared import block_weights
from study.claims.start_values import loftq, output_aware

STARTS = ("zero", "peft_loftq", "loftq", "output_aware")
BATCHES = 8  # training batches for the covariance of a layer's input


def add_args(parser):
    """Add QLoRA's flags and --start."""
    qlora.add_args(parser)
    start = "Where A and B start."
    parser.add_argument("--start", choices=STARTS, default="output_aware", help=start)


@torch.no_grad()
def covariances(run, data, base, names):
    """{name: X·Xᵀ/tokens (in, in)} of the layers' inputs X in the first training batches.

    Texts of one length: padding would count.
    """
    sums, tokens, hooks = {}, {}, []
    for name in names:

        def add(_, x, name=name):
            x = x[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        hooks.append(base.model.get_submodule(name).register_forward_pre_hook(add))
    base.model.eval()
    for _, examples, targets in batches.training_batches(run, data, 1, BATCHES):
        batch = batches.collate(data, data.train, examples, targets)
        common.forward(base, batch.to(str(base.model.device)))
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / tokens[name] for name in names}


@torch.no_grad()
def adapt(run, data, base):
    """QLoRA on base.model, in place, with A and B set as --start says; returns the Method."""
    weights = block_weights(base.model)
    aware = run.start == "output_aware"
    squares = covariances(run, data, base, weights) if aware else {}
    method = qlora.adapt(run, base)
    for name, layer in models.stand_ins(base.model).items():
        if run.start == "zero" or not isinstance(layer, models.AdapterLayer):
            continue
        W, Q = weights[name].float(), layer.base.weight.to(weights[name].device)
        if aware:
            A, B = output_aware(W, Q, squares[name], run.rank, layer.scale)
        else:
            A, B = loftq(W, Q, run.rank, 1.0 if run.start == "peft_loftq" else layer.scale)
        layer.A.copy_(A)
        layer.B.copy_(B)
    return method


def main(argv=None):
    """Start, train, score and measure once per seed and learning rate; returns the result files."""
    args, paths = flags.parse_args(__doc__, __file__, add_args, argv), []
    choose_device(args)
    for run in flags.runs(args):
        data = common.load_data(run)
        base = common.load_base(run, data)
        method = adapt(run, data, base)
        history = common.train(run, data, base, method)
        scores = common.evaluate(run, data, base)
        save_result(run, data, base, method, history, scores)
        costs = common.measure(run, data, base, method, history)
        paths.append(save_result(run, data, base, method, history, scores, costs))
    return paths


if __name__ == "__main__":
    main()
