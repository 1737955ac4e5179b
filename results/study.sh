#!/usr/bin/env bash
# The study behind results/README.md: learning rates chosen on dev, then every variant on SST-2, IMDB and WikiText-2.
#
#   bash results/study.sh                    everything; most of a day on two cores
#   bash results/study.sh sst2 wikitext2     these data sets only
#   JOBS=2 bash results/study.sh             runs whose times do not count go two at a time
#   LIST=3e-3 bash results/study.sh          print the commands instead, with 3e-3 as the outcome of every search
#
# Finished runs are skipped, stopped ones continue. Costs come from runs that have the machine to themselves: seeds 0 to 2
# on SST-2, seed 0 on the others. All other runs are --quality_only. Run it from the repository's root, with data/ and
# models/ there (README, "Local files").
set -euo pipefail
cores=$(nproc)

each() {  # each JOBS: run the command lines on stdin, so many at a time
  if [ -n "${LIST:-}" ]; then cat; return; fi
  OMP_NUM_THREADS=$((cores / $1 > 0 ? cores / $1 : 1)) xargs -P "$1" -I{} sh -c '{}'
}

best() {  # best DATASET NAME: the learning rate that the search chose on dev
  if [ -n "${LIST:-}" ]; then echo "$LIST"; return; fi
  python compare.py results/ --json | python -c '
import json, sys
dataset, name = sys.argv[1:]
groups = [g for g in json.load(sys.stdin)["groups"] if g["same"]["data set"] == dataset and name in g["search"]]
print(groups[0]["search"][name]["chosen"])' "$1" "$2"
}

variants() {  # variants DATASET: lines of "name script flags"; the name is the one whose search gave the learning rate
  [ "$1" = wikitext2 ] || echo "head_only common.py"
  echo "full common.py --full
lora lora.py
qlora qlora.py
hira hira.py
sparse_lora sparse_lora.py"
}

others() {  # labelled rows beside the main ones, at their method's learning rate; rank 4 is pruning by rank's control
  echo "lora sparse_lora.py --mode contextual
lora lora.py --rank 32
lora lora.py --rank 4
hira hira.py --rank 32
sparse_lora sparse_lora.py --structure rank
sparse_lora sparse_lora.py --sparsity 0 --penalty 0.3"
}

crossed() {  # SST-2's search chose two rates for LoRA and QLoRA: each at the other's, to tell the rate from the 4 bits
  echo "lora qlora.py --name qlora-loras_rate
qlora lora.py --name lora-qloras_rate"
}

trades() {  # SST-2 only: what more of contextual sparsity costs
  echo "sparse_lora sparse_lora.py --mode contextual --dense_layers 2
sparse_lora sparse_lora.py --mode contextual --dense_layers 1"
}

commands() {  # commands DATASET FLAGS: put the chosen learning rates to the variants on stdin
  while read -r name script more; do
    lr="--lr $(best "$1" "$name")"
    [ "$name" != head_only ] || lr=""
    echo "python $script $flags $lr $head_lr $more $2"
  done
}

[ $# -gt 0 ] || set -- sst2 imdb wikitext2
for dataset in "$@"; do
  # candidates: of the head, of full fine-tuning, one list for all adapters; fewer where a run takes long
  head_lr="" heads="3e-4 1e-3 3e-3 1e-2" fulls="5e-5 1e-4 2e-4 5e-4" rates="3e-4 1e-3 3e-3 1e-2 3e-2 1e-1"
  case $dataset in
    sst2)
      flags="--dataset sst2 --model models/all-MiniLM-L6-v2 --train_samples 8000 --epochs 1" alone="0 1 2" ;;
    imdb)
      flags="--dataset imdb --model models/all-MiniLM-L6-v2 --train_samples 2000 --eval_samples 2000 --epochs 1" alone=0
      heads="3e-3 1e-2 3e-2" fulls="1e-4 2e-4 5e-4" rates="1e-3 3e-3 1e-2 3e-2 1e-1" ;;
    wikitext2)
      flags="--dataset wikitext2 --model models/minilm-mlm --train_samples 1000 --eval_samples 1000 --epochs 1" alone=0
      fulls="1e-4 2e-4 5e-4 1e-3" rates="3e-3 1e-2 3e-2 1e-1 3e-1" ;;
  esac
  if [ "$dataset" != wikitext2 ]; then  # one --head_lr for all, chosen with the head alone
    for rate in $heads; do
      echo "python common.py $flags --split dev --head_lr $rate"
    done | each "${JOBS:-1}"
    head_lr="--head_lr $(best "$dataset" head_only)"
  fi
  { for rate in $fulls; do
      echo "python common.py --full $flags --split dev --lr $rate $head_lr"
    done
    variants "$dataset" | while read -r name script mode; do
      [ "$script" = common.py ] || for rate in $rates; do
        echo "python $script $flags --split dev --lr $rate $head_lr"
      done
    done; } | each "${JOBS:-1}"
  { variants "$dataset"; others; } | commands "$dataset" "--seeds $alone" | each 1
  if [ "$dataset" = sst2 ]; then
    variants sst2 | commands sst2 "--quality_only --seeds 3 4 5 6 7 8 9" | each "${JOBS:-1}"
    crossed | commands sst2 "--quality_only --seeds 0 1 2 3 4 5 6 7 8 9" | each "${JOBS:-1}"
    trades | commands sst2 "--quality_only --seeds 0 1 2" | each "${JOBS:-1}"
    variants sst2 | commands sst2 "--quality_only --seeds 0 1 --epochs 3 --out results/3-epochs" | each "${JOBS:-1}"
  else
    { variants "$dataset"; others; } | commands "$dataset" "--quality_only --seeds 1 2" | each "${JOBS:-1}"
  fi
done
if [ -z "${LIST:-}" ]; then
  python compare.py results/ --price 0.1 --readme README.md docs/report.md  # two cloud cores, about
  python compare.py results/3-epochs/
fi
