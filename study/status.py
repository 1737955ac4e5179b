"""What of the study has run: `bash study/run.sh --status` pipes its commands in here.

For each block of equal flags: runs done, runs missing, and the hours that they take on one core, by
the training time of the runs that are there (of the same data set, and script if there are any).
"""

import importlib
import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OVERHEAD = 1.4  # loading, scoring and measuring, beside the training itself


def expected(command):
    """The result files of a command of run.sh: (script, data set, [path, …])."""
    from harness.flags import planned_runs

    script, *flags = command.split()[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, flags)
    return script, args.dataset, [run.path for run in planned_runs(args)]


def seconds_of(paths):
    """Training seconds of the results that were made on a CPU."""
    results = [json.loads(path.read_text()) for path in paths]
    on_cpu = [r for r in results if r["environment"]["device"].startswith("cpu") and r.get("time")]
    return [result["time"]["train_seconds"] for result in on_cpu]


def main():
    """Read commands from standard input and print a line for each script and data set."""
    groups = {}
    for command in filter(None, map(str.strip, sys.stdin)):
        script, dataset, paths = expected(command)
        groups.setdefault((dataset, script), []).extend(paths)
    total = 0.0
    for (dataset, script), paths in groups.items():
        done = [path for path in paths if path.exists()]
        alike = done or [p for (name, _), group in groups.items() if name == dataset for p in group]
        seconds = seconds_of([path for path in alike if path.exists()])
        missing = len(paths) - len(done)
        hours = missing * OVERHEAD * median(seconds) / 3600 if seconds else 0.0
        total += hours
        known = f"{hours:.1f} hours" if seconds or not missing else "time not known yet"
        print(f"{dataset:10} {script:20} {len(done):4} done {missing:4} missing  {known}")
    print(f"about {total:.1f} hours on one core")


if __name__ == "__main__":
    main()
