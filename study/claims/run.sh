#!/usr/bin/env bash
# The claims: measure, then renew the pictures, docs/claims.md and the pictures of docs/papers.md.
#
#   bash study/claims/run.sh               measure: about an hour on one free core
#   bash study/claims/run.sh train         the trained weights that it needs: two hours on one core
#   bash study/claims/run.sh times         step times: half an hour, on a machine with nothing else
#
# Run it from the repository's root; models/ and data/: see docs/running.md. Finished training runs
# are skipped and stopped ones continue. Without trained weights the claims about them are left out.
set -euo pipefail
out=results/claims
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

[ $# -gt 0 ] || set -- measure
for part in "$@"; do "$part"; done
python -m study.claims.page
