"""Turn the lines of a study's .jsonl back into result files, so that what has run is skipped.

    python study/unpack.py study/sst2.jsonl results/study

A file that is there stays as it is.
"""

import json
import sys
from pathlib import Path


def main(argv):
    """Write a result file, under the scripts' own name for it, for each line of each .jsonl."""
    *files, out = map(Path, argv)
    out.mkdir(parents=True, exist_ok=True)
    for line in (line for file in files for line in file.open()):
        run = json.loads(line)
        stem = f"{Path(run['dataset']).name}-{run['name']}-{Path(run['model']).name}"
        path = out / f"{stem}-lr{run['lr']:g}-seed{run['seed']}.json"
        if not path.exists():
            path.write_text(line)


if __name__ == "__main__":
    main(sys.argv[1:])
