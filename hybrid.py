"""Two methods at once, composed from the other files: HiRA or contextual sparsity on a 4-bit base.

    y = (deq(W) ⊙ (1 + B·A))·x + b                 --update hira: QHiRA
    y = deq(W)·x + b + (α/r)·B·A·x                 --update contextual: sparse QLoRA, where the
                                                   feed-forward W is sliced after unpacking
    python hybrid.py --dataset sst2 --base nf4 --update hira
    python hybrid.py --dataset sst2 --base nf4 --update contextual

No new maths: qlora.py's 4-bit layers take the place of the frozen ones, and hira.py or
sparse_lora.py adapts them. Neither paper has the other's half. What to expect: HiRA cannot move the
9 % of a weight's entries that NF4 rounds to zero; and a sliced 4-bit layer is unpacked whole before
its channels are picked, so contextual sparsity saves the product, not the unpacking. The unpacked
weights of the sliced layers also stay until the backward pass: --plan shows them as activations.
"""

import argparse

import hira
from common import evaluate, load_base, load_data, measure, train
from harness.export import export
from harness.flags import adapter_args, parse_args, positive, refuse_idle, runs, share
from harness.store import load_adapter, save_result
from plan import plan
from qlora import nf4_args, quantise_blocks
from sparse_lora import CONTEXTUAL, add_contextual, add_loras, contextual_args

RATES = {"hira": [2e-2], "contextual": [2e-3]}  # their own scripts' defaults


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
    add("--base", choices=["nf4"], default="nf4", help="how the frozen weights are stored")
    add("--update", choices=[*RATES], default="hira", action=Update, help="what adapts them")
    add("--alpha", type=positive, default=16.0, help="contextual: alpha/rank scales the update")
    add("--dropout", type=share, default=0.0, help="on the adapter's input")
    contextual_args(parser)
    nf4_args(parser)


# ------------------------------------------------------------------------------------- the method


def adapt(base, run):
    """Adapt every target layer of base.model, in place; returns what the experiment must know."""
    if run.update == "hira":
        refuse_idle(run, CONTEXTUAL | {"alpha"}, "--update hira")
    stored = quantise_blocks(base, run)
    if run.update == "hira":
        method = hira.adapt(base, run)
    else:
        _, method = add_loras(base, run)
        method |= add_contextual(base, run)
    return {**stored, **method, "info": lambda: stored["info"]() | method["info"]()}


def main(argv=None):
    """Adapt, train, score and measure once per seed and rate; returns the result files' paths."""
    args, paths = parse_args(__doc__, __file__, add_args, argv), []
    if args.plan:
        return plan(args, adapt)
    for run in runs(args):
        data = load_data(run)
        base = load_base(run, data)
        method = adapt(base, run)
        if run.eval_only:
            load_adapter(run, base, method)
            evaluate(base, data, run)
        else:
            history = train(base, data, run, method)
            scores = evaluate(base, data, run)
            save_result(base, data, run, method, history, scores)  # what follows cannot lose it
            costs = measure(base, data, run, method, history)
            paths.append(save_result(base, data, run, method, history, scores, costs))
        if run.export:
            export(run, base)
    return paths


if __name__ == "__main__":
    main()
