#!/usr/bin/env bash
# The study: run what is missing, then renew study/*.jsonl, the page and the plots. Variants of the
# methods on SST-2 (dropout, hybrids, ranks) go to study/variants/, a page of its own.
#
#   bash study/run.sh                     the blocks that study/ shows: the default below
#   bash study/run.sh imdb ranks          these blocks; each is a function below
#   JOBS=4 bash study/run.sh              so many processes at a time (default: one a core)
#   MODEL=distilbert-base-uncased bash study/run.sh sst2
#
# Finished runs are skipped, those in study/*.jsonl too, and stopped ones continue: it may be stopped
# at any time and go on in another sitting. Run it from the repository's root; data/ and models/: see
# docs/running.md.
set -euo pipefail
model=${MODEL:-models/all-MiniLM-L6-v2} out=results/study jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=1  # after nproc, which heeds it

runs() {  # runs SEEDS FLAGS...: one process a seed, its rates one after the other
  local seeds=$1 seed; shift
  for seed in $(seq 0 $((seeds - 1))); do
    echo "python $* --seeds $seed --precision fp32 --no_timing --out $out"
  done
}

four() {  # four SEEDS RATES RATE HIRAS FLAGS...: the four methods; HiRA has a rate of its own
  local seeds=$1 rates=$2 rate=$3 hiras=$4; shift 4
  for method in lora.py qlora.py sparse_lora.py; do
    runs $seeds $method "$@" --lr $rate --search $rates
  done
  runs $seeds hira.py "$@" --lr $hiras --search $rates
}

sst2() {
  four 10 6 1.5e-3 1.5e-2 $sst2
  runs 10 sparse_lora.py $sst2 --mode contextual --lr 1.5e-3 --search 5
  runs 6 common.py $sst2 --lr 4e-2 --search 5
}
full() { runs 8 common.py $sst2 --full --lr 1e-4 --search 5; }
dropout() {  # the base's own, as its config has it; the runs without are sst2's and full's
  local out=results/variants
  runs 8 lora.py $sst2 --base_dropout 0.1 --name lora-dropout0.1 --lr 1.5e-3 --search 3
  runs 8 hira.py $sst2 --base_dropout 0.1 --name hira-dropout0.1 --lr 1.5e-2 --search 3
  runs 8 common.py $sst2 --full --base_dropout 0.1 --name full-dropout0.1 --lr 1e-4 --search 3
}
hybrids() {
  local out=results/variants
  runs 5 hybrid.py $sst2 --update hira --lr 1.5e-2 --search 3
  runs 5 hybrid.py $sst2 --update contextual --lr 7.5e-4 --search 3
}
ranks() {  # alpha stays at 16, so LoRA's best rate rises with the rank and HiRA's, without 1/r, falls
  local out=results/variants
  runs 5 lora.py $sst2 --rank 2 --lr 7.5e-4 --search 3
  runs 5 lora.py $sst2 --rank 32 --lr 1.5e-3 --search 3
  runs 5 hira.py $sst2 --rank 2 --lr 1.5e-2 --search 3
  runs 5 hira.py $sst2 --rank 32 --lr 7.5e-3 --search 3
}
wikitext2() { four 6 5 4e-3 2e-2 $wiki; }
untrained() {
  runs 1 common.py $wiki
  runs 1 qlora.py $wiki --epochs 0
}
imdb() {
  four 6 4 3e-3 3e-2 $imdb
  runs 6 sparse_lora.py $imdb --mode contextual --lr 3e-3 --search 3
}
smollm2() {  # from 1e-3 (HiRA 1e-2) the rates moved up until what lay beyond was worse
  four 6 4 4e-3 2e-2 $smol
  runs 1 common.py $smol
  runs 1 qlora.py $smol --epochs 0
}

python study/unpack.py study/*.jsonl $out
python study/unpack.py study/variants/*.jsonl results/variants
sst2="--dataset sst2 --model $model --train_samples 8000 --heldout 3000 --head_lr 1e-2"
wiki="--dataset wikitext2 --model models/minilm-mlm --train_samples 1000"
imdb="--dataset imdb --model $model --train_samples 2000 --test_samples 2000 --head_lr 1e-2"
imdb+=" --max_length 128 --epochs 2"
smol="--dataset wikitext2 --model models/smollm2 --train_samples 120 --test_samples 160 --batch_size 8"
[ $# -gt 0 ] || set -- sst2 full wikitext2 untrained imdb smollm2
for block in "$@"; do "$block"; done | xargs -P "$jobs" -I{} sh -c '{}'

for dataset in sst2 wikitext2 imdb; do
  if ls $out/$dataset-*.json > /dev/null 2>&1; then
    cat $out/$dataset-*.json > study/$dataset.jsonl
  fi
done
python compare.py study/ --fill README.md docs/report.md
if ls results/variants/*.json > /dev/null 2>&1; then
  cat results/variants/*.json > study/variants/sst2.jsonl
  python compare.py study/variants/ study/sst2.jsonl --out study/variants --no_plots
fi
