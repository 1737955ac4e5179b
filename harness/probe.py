"""One look before training: does an example get the same logits alone, padded and after others?

Some models do not: XLNet reads its padding, BigBird changes its attention for good at the first
short batch. Their scores would depend on the batch size. Others fail at the end of their table of
positions. No architecture is treated specially: the model itself is tried.
"""

import torch

from harness.batches import collate, longest_and_shortest
from harness.process import fail, library_errors, say


def check_logits(run, data, base, forward):
    """End the program with one line where the logits of an example depend on other examples.

    In fp32 (the model stays so) and without dropout: the longest and the shortest example alone and
    together, and the longest again after the shortest. forward(base, batch) gives the logits, which
    have to be the same within 1e-3 of the largest.
    """
    pair, targets = longest_and_shortest(data)
    count, kind = int(targets.counts[0]), base.model.config.model_type

    @torch.no_grad()
    def logits(*examples):
        return forward(base, collate(data, pair, torch.tensor(examples), targets).to(run.device))

    base.model.eval()
    with library_errors(f"--model {run.model}: {kind} cannot read {pair.lengths[0]} tokens"):
        try:
            base.model.float()
            alone, together, short, again = logits(0), logits(0, 1), logits(1), logits(0)
        except torch.OutOfMemoryError:
            say("not checked: whether logits depend on the batch; the model in fp32 does not fit")
            return
    if not (alone.isfinite().all() and short.isfinite().all()):
        weights = "the adapter's weights" if run.eval_only else "its weights"
        fail(f"--model {run.model}: {kind} gives NaN or infinite logits: {weights} are too large")
    for how, first, second in (
        ("beside a shorter one", alone, together[:count]),
        ("padded beside a longer one", short, together[count:]),
        ("after a shorter one", alone, again),
    ):
        if not first.numel():  # a block of one token predicts nothing
            continue
        largest, change = float(first.abs().max()), float((first - second).abs().max())
        if not change <= 1e-3 * largest:  # NaN is refused, too
            fail(
                f"--model {run.model}: {kind} gives an example other logits {how} (by up to "
                f"{change:.2g}, the largest is {largest:.2g}): scores would depend on the batch"
            )
