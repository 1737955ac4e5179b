#!/usr/bin/env bash
# The study: run what is missing, then renew study/*.jsonl, the page and the plots.
#
#   bash study/run.sh                     everything that is listed below
#   JOBS=4 bash study/run.sh              so many runs at a time (default: one a core)
#   MODEL=distilbert-base-uncased bash study/run.sh
#
# Finished runs are skipped and stopped ones continue, so it may be stopped at any time and go on in
# another sitting. Run it from the repository's root; data/ and models/: see docs/running.md.
set -euo pipefail
model=${MODEL:-models/all-MiniLM-L6-v2} out=results/study jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=1  # after nproc, which heeds it

runs() {  # runs SEEDS FLAGS...: the command of each seed, its rates in a row
  local seeds=$1 seed; shift
  for seed in $(seq 0 $((seeds - 1))); do
    echo "python $* --seeds $seed --no_timing --out $out"
  done
}

# A pilot: a part of SST-2, three rates. The four methods have six seeds, all else has three.
sst2="--dataset sst2 --model $model --train_samples 4000 --heldout 3000 --epochs 1 --head_lr 1e-2"
{
  for method in lora.py qlora.py sparse_lora.py; do runs 6 $method $sst2 --lr 3e-3 --search 3; done
  runs 6 hira.py $sst2 --lr 3e-2 --search 3
  runs 3 hybrid.py $sst2 --update hira --lr 3e-2 --search 3
  runs 3 hybrid.py $sst2 --update contextual --lr 3e-3 --search 3
  runs 3 sparse_lora.py $sst2 --mode contextual --lr 3e-3 --search 3
  runs 3 common.py $sst2 --lr 1e-2 --search 3
  runs 3 common.py $sst2 --full --lr 1e-4 --search 3
} | xargs -P "$jobs" -I{} sh -c '{}'

for dataset in sst2; do
  cat $out/$dataset-*.json > study/$dataset.jsonl
done
python compare.py study/ --fill README.md docs/report.md
