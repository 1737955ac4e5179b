"""Two methods at once, composed from the other files: HiRA or contextual sparsity on a 4-bit base.

    y = (deq(W) ⊙ (1 + B·A))·x + b                 --update hira: QHiRA
    y = deq(W)·x + b + (α/r)·B·A·x                 --update contextual: contextual QLoRA, where
                                                   feed-forward W is sliced after unpacking
    python hybrid.py --dataset sst2 --update hira
    python hybrid.py --dataset sst2 --update contextual

No new maths: qlora.py's 4-bit layers take the place of the frozen ones, and hira.py or
contextual_lora.py adapts them. Neither paper has the other's half. What to expect: HiRA cannot move
the 9 % of a weight's entries that NF4 rounds to zero; and a sliced 4-bit layer is unpacked whole
before its channels are picked, so contextual sparsity saves the product, not the unpacking. The
unpacked weights of the sliced layers also stay until the backward pass: --plan shows them as
activations.
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import argparse

import contextual_lora
import hira
from common import evaluate, load_base, load_data, measure, train
from harness.export import export
from harness.flags import adapter_args, parse_args, positive, refuse_idle, runs
from harness.process import choose_device, join_process_group
from harness.store import load_adapter, save_result
from plan import plan
from qlora import nf4_args, quantize_blocks

RATES = {"hira": [2e-2], "contextual": [2e-3]}  # the default learning rates of the two scripts
CONTEXTUAL = {"alpha", "channel_sparsity", "dense_layers", "dense_tokens", "estimator"}


class Update(argparse.Action):
    """--update, which also sets the default of --lr."""

    def __call__(self, parser, args, value, option=None):
        if args.lr is parser.get_default("lr"):  # an equal one on the command line is another list
            args.lr = RATES[value]
        args.update = value


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.set_defaults(lr=RATES["hira"])
    add = parser.add_argument
    update = "The method that adapts the 4-bit base."
    add("--update", choices=[*RATES], default="hira", action=Update, help=update)
    scaling = "contextual: the update is scaled by alpha/rank."
    add("--alpha", type=positive, default=16.0, help=scaling)
    contextual_lora.slicing_args(parser)
    nf4_args(parser)


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    if run.update == "hira":
        refuse_idle(run, CONTEXTUAL, "--update hira")
    quantized = quantize_blocks(run, base)
    method = (hira if run.update == "hira" else contextual_lora).adapt(run, base)
    reports = quantized["report"], method.report
    method.report = lambda: reports[0]() | reports[1]()
    method.base_format = quantized["base_format"]
    method.optimizer = quantized.get("optimizer", method.optimizer)
    return method


def main(argv=None):
    """Adapt, train, score and measure once per seed and learning rate; returns the result files."""
    args, paths = parse_args(__doc__, __file__, add_args, argv), []
    choose_device(args)
    join_process_group(args)
    if args.plan:
        return plan(args, adapt)
    for run in runs(args):
        data = load_data(run)
        base = load_base(run, data)
        method = adapt(run, base)
        if run.eval_only:
            load_adapter(run, base, method)
            evaluate(run, data, base)
        else:
            history = train(run, data, base, method)
            scores = evaluate(run, data, base)
            save_result(run, data, base, method, history, scores)  # measuring may be interrupted
            costs = measure(run, data, base, method, history)
            paths.append(save_result(run, data, base, method, history, scores, costs))
        if run.export:
            export(run, base)
    return paths


if __name__ == "__main__":
    main()
