"""The baseline of every adapter: the head alone on the frozen base, or ordinary fine-tuning.

y = W0·x + b                      W0, b frozen; with --full they are trained

python baseline.py --dataset sst2                       # head only: what an adapter has to beat
python baseline.py --dataset sst2 --full --lr 1e-4      # every weight: what it tries to match
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
from common import Method, evaluate, load_base, load_data, measure, train
from harness.export import export
from harness.flags import parse_args, runs
from harness.process import choose_device, join_process_group
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add the baseline's flag."""
    method = {"dest": "method", "action": "store_const", "const": "full", "default": "head_only"}
    parser.add_argument("--full", **method, help="Train every weight; use a small --lr, 1e-4.")


def adapt(run, base):
    """Add nothing; with --full the base is trained, too."""
    if run.method == "full":
        base.model.requires_grad_(True)
    return Method()


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
