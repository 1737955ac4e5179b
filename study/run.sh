#!/usr/bin/env bash
# The study: run what is missing, then renew study/*.jsonl, the page and the plots. Variants of the
# methods on SST-2 (dropout, hybrids, ranks) go to study/variants/, a page of its own.
#
#   bash study/run.sh                     the blocks that study/ shows: the default below
#   bash study/run.sh imdb ranks          these blocks; each is a function below
#   bash study/run.sh --status imdb       print what is done, what is missing, and the hours left
#   bash study/run.sh --list imdb         print the commands
#   JOBS=4 bash study/run.sh              this many processes at a time (default: one a core)
#   MODEL=distilbert-base-uncased LM=gpt2 bash study/run.sh sst2 wikitext2
#
# Commands come seed by seed: all methods and learning rates of a seed, then the next seed. Finished
# runs are skipped, those in study/*.jsonl too, and stopped ones continue: it may be stopped at any
# time and go on in another sitting. Run it from the repository's root; data/ and models/: see
# docs/running.md.
set -euo pipefail
model=${MODEL:-models/all-MiniLM-L6-v2} lm=${LM:-models/minilm-mlm} decoder=${LM:-models/smollm2}
out=results/study jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=1  # after nproc, which heeds it

run() {  # run SCRIPT FLAGS...: the commands of one method; xargs gets them seed by seed
  echo "python $* --seeds $seed --precision fp32 --out $out"
}

four() {  # four N LR HIRA FLAGS...: the four methods with N learning rates each, around LR or HIRA
  local n=$1 lr=$2 hira=$3; shift 3
  for method in lora.py qlora.py sparse_lora.py; do
    run $method "$@" --lr $lr --search $n
  done
  run hira.py "$@" --lr $hira --search $n
}

seeds() {  # seeds N COMMAND...: the command for the seeds 0 … N - 1
  local n=$1 seed; shift
  for seed in $(seq 0 $((n - 1))); do "$@"; done
}

sst2_seed() {
  four 6 1.5e-3 1.5e-2 $sst2
  run contextual_lora.py $sst2 --lr 1.5e-3 --search 5
}
sst2() {
  seeds 10 sst2_seed
  seeds 6 run baseline.py $sst2 --lr 4e-2 --search 5
}
full() { seeds 8 run baseline.py $sst2 --full --lr 1e-4 --search 5; }
wikitext2() { seeds 6 four 5 4e-3 2e-2 $wiki; }
cpu() {  # LoRA's tuned runs of the H200 again: does the machine matter?
  local out=results/cpu
  seeds 6 run lora.py $wiki --lr 8e-3
}
packing() {  # QLoRA's tuned runs, packed by our code: the study's were packed by bitsandbytes
  local out=results/packing seed=0 lr
  for lr in 7.5e-4 7.5e-4 1.5e-3 7.5e-4 7.5e-4 7.5e-4; do
    run qlora.py $sst2 --lr $lr
    seed=$((seed + 1))
  done
  seeds 1 run qlora.py $wiki --epochs 0
}
untrained() {
  seeds 1 run baseline.py $wiki
  seeds 1 run qlora.py $wiki --epochs 0
}
imdb_seed() {
  four 4 3e-3 3e-2 $imdb
  run contextual_lora.py $imdb --lr 3e-3 --search 4
}
imdb() { seeds 8 imdb_seed; }
smollm2() {  # from 1e-3 (HiRA 1e-2) the learning rates moved up until those beyond were worse
  seeds 6 four 4 4e-3 2e-2 $smol
  seeds 1 run baseline.py $smol
  seeds 1 run qlora.py $smol --epochs 0
}
smollm2_longer_seed() {  # four times the steps: does the order hold, or is it who learns fastest?
  for method in lora.py qlora.py; do run $method $smol --epochs 12 --lr 4e-3; done
  run hira.py $smol --epochs 12 --lr 2e-2
}
smollm2_longer() { local out=results/longer; seeds 2 smollm2_longer_seed; }
continuation() {  # adapters of SmolLM2 for study/continuation.py: seed 0, tuned
  local out=results/continuation
  seeds 1 run lora.py $smol --lr 4e-3
  seeds 1 run qlora.py $smol --lr 8e-3
  seeds 1 run sparse_lora.py $smol --lr 8e-3
  seeds 1 run hira.py $smol --lr 2e-2
}
full_data_seed() {  # at the learning rate that most seeds chose; no verdict
  local flags="--dataset sst2 --model $model --head_lr 1e-2"
  for method in lora.py qlora.py sparse_lora.py; do run $method $flags --lr 1.5e-3; done
  run hira.py $flags --lr 1.5e-2
  run baseline.py $flags --full --lr 1e-4
}
full_data_imdb() {
  local flags="--dataset imdb --model $model --head_lr 1e-2 --epochs 1"
  for method in lora.py qlora.py sparse_lora.py; do run $method $flags --lr 3e-3; done
  run hira.py $flags --lr 3e-2
}
full_data() { local out=results/full_data; seeds 3 full_data_seed; seeds 1 full_data_imdb; }

dropout_seed() {  # the base's own, as its config has it; the runs without are sst2's and full's
  run lora.py $sst2 --base_dropout 0.1 --name lora-dropout0.1 --lr 1.5e-3 --search 3
  run hira.py $sst2 --base_dropout 0.1 --name hira-dropout0.1 --lr 1.5e-2 --search 3
  run baseline.py $sst2 --full --base_dropout 0.1 --name full-dropout0.1 --lr 1e-4 --search 3
}
dropout() { local out=results/variants; seeds 8 dropout_seed; }
hybrids_seed() {
  run hybrid.py $sst2 --update hira --lr 1.5e-2 --search 3
  run hybrid.py $sst2 --update contextual --lr 7.5e-4 --search 3
}
hybrids() { local out=results/variants; seeds 5 hybrids_seed; }
ranks_seed() {  # alpha stays 16: LoRA's best rate rises with the rank; HiRA's, without 1/r, falls
  run lora.py $sst2 --rank 2 --lr 7.5e-4 --search 3
  run lora.py $sst2 --rank 32 --lr 1.5e-3 --search 3
  run hira.py $sst2 --rank 2 --lr 1.5e-2 --search 3
  run hira.py $sst2 --rank 32 --lr 7.5e-3 --search 3
}
ranks() { local out=results/variants; seeds 5 ranks_seed; }

sst2="--dataset sst2 --model $model --train_samples 8000 --heldout 3000 --head_lr 1e-2"
wiki="--dataset wikitext2 --model $lm --train_samples 1000"
imdb="--dataset imdb --model $model --train_samples 2000 --test_samples 2000 --dev_samples 2000"
imdb+=" --head_lr 1e-2 --max_length 128 --epochs 2"
smol="--dataset wikitext2 --model $decoder --train_samples 120 --test_samples 160 --batch_size 8"

mode=run
case "${1:-}" in --status | --list) mode=$1; shift ;; esac
[ $# -gt 0 ] || set -- sst2 full wikitext2 untrained imdb smollm2
commands=$(for block in "$@"; do "$block"; done)
if [ "$mode" = --list ]; then echo "$commands"; exit; fi
python study/unpack.py study/*.jsonl $out
python study/unpack.py study/variants/*.jsonl results/variants
if [ "$mode" = --status ]; then echo "$commands" | python study/status.py; exit; fi
echo "$commands" | xargs -P "$jobs" -I{} sh -c '{}'

for dataset in sst2 wikitext2 imdb; do
  if ls $out/$dataset-*.json > /dev/null 2>&1; then
    cat $out/$dataset-*.json > study/$dataset.jsonl
  fi
done
for block in full_data longer; do
  if ls results/$block/*.json > /dev/null 2>&1; then cat results/$block/*.json > study/$block.jsonl; fi
done
for check in cpu packing; do
  if ls results/$check/*.json > /dev/null 2>&1; then
    cat results/$check/*.json > study/checks/$check.jsonl
  fi
done
python study/checks.py
python compare.py study/ --fill README.md docs/report.md
if ls results/variants/*.json > /dev/null 2>&1; then
  cat results/variants/*.json > study/variants/sst2.jsonl
  python compare.py study/variants/ study/sst2.jsonl --out study/variants --no_plots
fi
