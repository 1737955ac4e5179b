#!/usr/bin/env bash
# The claims: measure, then renew the pictures, docs/claims.md and the pictures of docs/papers.md.
#
#   bash study/claims/run.sh               measure: about an hour on one free core
#   bash study/claims/run.sh train         the trained weights that it needs: two hours on one core
#   bash study/claims/run.sh times         step times: half an hour, on a machine with nothing else
#   bash study/claims/run.sh sparsity      pruned and small adapters: 9 hours on two free cores
#   bash study/claims/run.sh starts        where QLoRA's adapter starts: 5 hours on two
#   bash study/claims/run.sh storage       random labels: 5 hours on two
#   bash study/claims/run.sh layers        attention, MLP or all: 2 hours on two, after sparsity
#
# JOBS=4 trains this many seeds at a time (default: one a core).
# Run it from the repository's root; models/ and data/: see docs/running.md. Finished training runs
# are skipped and stopped ones continue. Without trained weights the claims about them are left out.
set -euo pipefail
out=results/claims jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
sst2="--dataset sst2 --model models/all-MiniLM-L6-v2 --train_samples 8000 --heldout 3000"
sst2+=" --head_lr 1e-2 --precision fp32 --out $out"
wiki="--dataset wikitext2 --model models/minilm-mlm --train_samples 1000 --precision fp32"
wiki+=" --out $out"

train() {  # each seed at the learning rate that was best on its dev examples in study/sst2.jsonl
  for pair in 0=2.5e-5 1=2e-4 2=1e-4 3=5e-5 4=2.5e-5 5=1e-4; do
    python baseline.py --full $sst2 --seeds ${pair%=*} --lr ${pair#*=}
  done
  for pair in 0=1.5e-3 1=1.5e-3 2=3e-3; do
    python lora.py $sst2 --seeds ${pair%=*} --lr ${pair#*=}
  done
  for pair in 0=7.5e-3 1=7.5e-3 2=1.5e-2; do
    python hira.py $sst2 --seeds ${pair%=*} --lr ${pair#*=}
  done
  # WikiText-2: the learning rate is chosen on a seed that is not used afterwards.
  python baseline.py --full $wiki --out $out/pilot --lr 1e-4 3e-4 1e-3 --seeds 9
  best=$(python - $out/pilot/*.json <<'EOF'
import json, sys
runs = [json.load(open(path)) for path in sys.argv[1:]]
print(min(runs, key=lambda run: run["metrics"]["dev"]["loss"])["lr"])
EOF
  )
  python baseline.py --full $wiki --lr "$best" --seeds 0 1 2
}

measure() {
  python -m study.claims.formats
  python -m study.claims.memory
  python -m study.claims.channels
  python -m study.claims.learning_rates
  python -m study.claims.expressive $(find $out -maxdepth 1 -type d -name '*-full-*' | sort)
  python -m study.claims.idle_rank $(find $out -maxdepth 1 -type d -name '*-lora-*' -o \
    -maxdepth 1 -type d -name '*-hira-*' | sort)
  python -m study.claims.pictures
}

times() { python -m study.claims.step_times; }

# Experiments on WikiText-2 with an adapter on every linear layer of the blocks. Seed 9 tries four
# learning rates; the study's own seeds then run the best of these, half of it and twice it.
lm=results/claims/lm all="query key value intermediate.dense output.dense"
tuned() {  # tuned NAME SEEDS SCRIPT LR FLAGS...: pilot around LR, then all seeds
  local name=$1 seeds=$2 script=$3 lr=$4 lrs; shift 4
  python $script $wiki --targets $all "$@" --name $name --out $lm/pilot --lr $lr --search 4 --seeds 9
  lrs=$(python -m study.claims.tuned --around $lm/pilot/wikitext2-$name-*.json)
  printf '%s\n' $seeds | xargs -P "$jobs" -I{} \
    python $script $wiki --targets $all "$@" --name $name --out $lm --lr $lrs --seeds {}
}
five="0 1 2 3 4"

sparsity() {
  for rank in 8 4 1; do tuned lora-r$rank "$five" lora.py 2e-3 --rank $rank; done
  for sparsity in 0 0.5 0.75 0.9375; do
    tuned pruned-$sparsity "$five" sparse_lora.py 2e-3 --rank 16 --sparsity $sparsity
  done
  tuned pruned-penalty0.1 "$five" sparse_lora.py 2e-3 --rank 16 --sparsity 0 --penalty 0.1
  tuned pruned-components0.5 "$five" sparse_lora.py 2e-3 --rank 16 --structure rank
  python -m study.claims.tuned $lm
}

starts() {
  python -m study.claims.won_back
  tuned lora-r8 "$five 5" lora.py 2e-3 --rank 8
  tuned qlora-r8 "$five 5" qlora.py 2e-3 --rank 8
  for start in loftq output_aware; do
    tuned $start-r8 "$five 5" "-m study.claims.starts" 2e-3 --rank 8 --start $start
  done
  python -m study.claims.tuned $lm
}

layers() {  # ranks that give equal numbers of weights
  local mlp="intermediate.dense" block
  for block in 0 1 2 3 4 5; do mlp+=" $block.output.dense"; done
  tuned lora-r8 "$five" lora.py 2e-3 --rank 8
  tuned attention-r18 "$five" lora.py 2e-3 --rank 18 \
    --targets query key value attention.output.dense
  tuned mlp-r14 "$five" lora.py 2e-3 --rank 14 --targets $mlp
  python -m study.claims.tuned $lm
}

allocation() {
  tuned adalora-r2 "$five" study/adalora.py 2e-3 --rank 2
  for pattern in uniform adalora_pattern gradient permuted; do
    tuned $pattern-r2 "$five" "-m study.claims.allocation" 2e-3 --rank 2 --pattern $pattern \
      --adalora $lm
  done
  python -m study.claims.tuned $lm
}

# Random labels: query and value of one block, so that few weights have to store many labels. Seed 0
# tries three learning rates; seeds 1 to 3, which draw other phrases and labels, use the best one.
phrases="--model models/all-MiniLM-L6-v2 --precision fp32 --dev_samples 16 --epochs 40"
phrases+=" --batch_size 64 --head_lr 1e-2 --max_length 16"
stored() {  # stored NAME SCRIPT LRS FLAGS...
  local name=$1 script=$2 lrs=$3 store=$out/storage lr; shift 3
  printf '%s\n' $lrs | xargs -P "$jobs" -I{} python $script $phrases "$@" --name $name \
    --dataset $store/phrases0 --out $store/pilot --seeds 0 --lr {}
  lr=$(python -m study.claims.storage --best $store/pilot/phrases0-$name-*.json)
  printf '%s\n' 1 2 3 | xargs -P "$jobs" -I{} python $script $phrases "$@" --name $name \
    --dataset $store/phrases{} --out $store --seeds {} --lr $lr
}
storage() {
  local rank seed block="--targets 4.attention.self.query 4.attention.self.value"
  for seed in 0 1 2 3; do
    python -m study.claims.storage --phrases $seed $out/storage/phrases$seed
  done
  stored head baseline.py "1e-3 1e-2 1e-1"
  for rank in 1 8; do
    stored lora-r$rank lora.py "1e-3 4e-3 1.6e-2" $block --rank $rank
    stored hira-r$rank hira.py "4e-3 1.6e-2 6.4e-2" $block --rank $rank
    stored sparse_lora-r$rank sparse_lora.py "1e-3 4e-3 1.6e-2" $block --rank $rank
  done
  python -m study.claims.storage $out/storage
}

[ $# -gt 0 ] || set -- measure
for part in "$@"; do "$part"; done
python -m study.claims.page
