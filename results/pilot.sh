#!/usr/bin/env bash
# The pilot: every kind of run on a little real data, to prove the pipeline from command to page. Two seeds are far too few
# to tell the methods apart, and the page says so. Run from the repository's root; finished runs are skipped.
set -euo pipefail
flags="--dataset sst2 --model models/all-MiniLM-L6-v2 --train_samples 2000 --epochs 1 --head_lr 3e-3 --seeds 0 1 --out results/pilot"
python common.py $flags
python common.py $flags --full --lr 2e-4
python lora.py $flags --lr 3e-3
python qlora.py $flags --lr 3e-3
python hira.py $flags --lr 1e-2
python sparse_lora.py $flags --lr 3e-3
python sparse_lora.py $flags --lr 3e-3 --mode contextual
python compare.py results/pilot/
