"""Claim 10. Does it matter which layers get the rank? LoRA trained anew at four rank patterns.

    python -m study.claims.allocation --dataset wikitext2 --model models/minilm-mlm --rank 2 \\
        --pattern gradient --adalora results/claims/lm

AdaLoRA decides while it trains and has another parametrization, so its score mixes two effects.
Here plain LoRA is trained from scratch with AdaLoRA's final ranks, with the same ranks permuted at
random over matrices of equal shape, with ranks by the gradient of the base, and with equal ranks.
All four patterns have as many weights as AdaLoRA's at the same seed, within 2 %.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import common
from harness import batches, flags, models
from harness.process import choose_device, fail
from harness.splits import generator_for
from harness.store import save_result
from lora import LoRALinear, add_args
from study.claims.tuned import best, draw_differences, read_results

LABELS = {"uniform-r2": "equal ranks", "adalora_pattern-r2": "AdaLoRA's final ranks"}
LABELS |= {"permuted-r2": "AdaLoRA's, permuted", "gradient-r2": "by the gradient"}
LABELS |= {"adalora-r2": "AdaLoRA itself"}
PATTERNS = ("uniform", "adalora_pattern", "gradient", "permuted")
BATCHES = 8  # training batches for the gradient of the base


def more_args(parser):
    """Add LoRA's flags, the pattern, and where AdaLoRA's results lie."""
    add_args(parser)
    parser.add_argument("--pattern", choices=PATTERNS, default="uniform", help="Which ranks.")
    folder = "Folder of the results of study/adalora.py, searched with its subfolders."
    parser.add_argument("--adalora", default="results", help=folder)


def adalora_ranks(folder, seed):
    """{layer: rank} of AdaLoRA's run of this seed with the best dev loss."""
    results = read_results(Path(folder).rglob(f"*-adalora*-seed{seed}.json"))
    if not results:
        fail(f"--adalora {folder}: no result of study/adalora.py with seed {seed} in it")
    return best(results, "dev")["report"]["ranks"]


def count_weights(ranks, shapes):
    """How many numbers A and B have: ranks and shapes (out, in) by layer."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def filled_up(order, shapes, budget):
    """{layer: rank}: one rank after the other in this order of layers, while it fits the budget."""
    ranks, left = dict.fromkeys(shapes, 0), budget
    for name in order:
        if sum(shapes[name]) <= left:
            ranks[name] += 1
            left -= sum(shapes[name])
    return ranks


def by_gradient(gradients, shapes, budget):
    """The largest σᵢ(G)²/(in + out) of all layers get a rank each: G (out, in) by layer."""
    gains = [
        (float(sigma) ** 2 / sum(shapes[name]), name)
        for name, gradient in gradients.items()
        for sigma in torch.linalg.svdvals(gradient)
    ]
    return filled_up([name for _, name in sorted(gains, reverse=True)], shapes, budget)


def permuted(ranks, shapes, generator):
    """The same ranks in random order among the layers of equal shape."""
    result = {}
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name in ranks if shapes[name] == shape]
        order = torch.randperm(len(names), generator=generator).tolist()
        result |= {name: ranks[names[i]] for name, i in zip(names, order, strict=True)}
    return result


def base_gradients(run, data, base, names):
    """{layer: the gradient of its weight (out, in)}, summed over some training batches."""
    weights = {name: models.weight_of(base.model.get_submodule(name)) for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    base.model.eval()
    for _, examples, targets in batches.training_batches(run, data, 1, BATCHES):
        batch = batches.collate(data, data.train, examples, targets).to(run.device)
        F.cross_entropy(common.forward(base, batch), batch.target).backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    return gradients


def adapt(run, data, base):
    """LoRA with a rank of its own in each layer; all have the scale alpha/rank of the flags."""
    theirs = adalora_ranks(run.adalora, run.seed)
    shapes = {n: tuple(models.weight_of(base.model.get_submodule(n)).shape) for n in theirs}
    budget = count_weights(theirs, shapes)
    if run.pattern == "uniform":  # more rounds than fit: the last one is cut
        ranks = filled_up(list(shapes) * (max(theirs.values()) + 1), shapes, budget)
    elif run.pattern == "gradient":
        common.place(run, base)
        ranks = by_gradient(base_gradients(run, data, base, shapes), shapes, budget)
    elif run.pattern == "permuted":
        ranks = permuted(theirs, shapes, generator_for(run.seed, "permuted ranks"))
    else:
        ranks = theirs
    ranks = {name: rank for name, rank in ranks.items() if rank}
    by_layer = {base.model.get_submodule(name): rank for name, rank in ranks.items()}

    def make(layer):
        rank = by_layer[layer]
        return LoRALinear(layer, rank, run.alpha * rank / run.rank, run.dropout)

    common.replace(run, base, [*ranks], make)
    alphas = {name: run.alpha * rank / run.rank for name, rank in ranks.items()}
    peft = {"peft_type": "LORA", "target_modules": [*ranks], "r": run.rank}
    peft |= {"lora_alpha": run.alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
    return common.Method(peft, report=lambda: {"ranks": ranks})


def draw():
    """Perplexity of the patterns relative to equal ranks."""
    title = "Does it matter which layers get the rank?"
    draw_differences("allocation", title, LABELS, "uniform-r2")


def main(argv=None):
    """Train, score and measure once per seed and learning rate; returns the result files."""
    args, paths = flags.parse_args(__doc__, __file__, more_args, argv), []
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
