"""How far the runs of a command are: a bar on a terminal, else a line at every tenth."""

import time

from tqdm import tqdm

from harness.process import process_index, say


class Progress:
    """Counts the steps of all runs of a command; run.number and run.count say which run this is.

    Runs count as equally long, and the time left follows from the steps of this run so far.
    """

    def __init__(self, run, done, total):
        before = (run.number - 1) * total
        self.step, self.total = before + done, run.count * total
        self.first, self.start = self.step, time.perf_counter()
        self.title = f"{run.name} lr {run.lr:g} seed {run.seed}"
        if run.count > 1:
            self.title = f"run {run.number} of {run.count}, {self.title}"
        quiet = process_index() > 0 or None  # None: no bar where no person watches
        options = {"desc": self.title, "leave": False, "disable": quiet}
        self.bar = tqdm(total=self.total, initial=self.step, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self):
        """Count one step."""
        self.step += 1
        self.bar.update()
        tenth = 10 * self.step // self.total
        if self.bar.disable and tenth > 10 * (self.step - 1) // self.total:
            seconds = (time.perf_counter() - self.start) / (self.step - self.first)
            left = seconds * (self.total - self.step)
            left = f"{left / 60:.0f} minutes" if left > 90 else f"{left:.0f} seconds"
            say(f"{self.title}: {10 * tenth} % of all steps, about {left} left")

    def show_loss(self, loss):
        """Put a loss behind the bar."""
        self.bar.set_postfix(loss=f"{loss:.3f}")
