#!/usr/bin/env bash
# What is still to be measured on a GPU, in about ten minutes on a free machine.
#
#   bash study/gpu.sh                 everything, on the first GPU (40 GiB of memory or more)
#   bash study/gpu.sh --small         the smallest form, on a CPU: does this script work?
#   OUT=folder DATASET=demo MODEL=demo bash study/gpu.sh      other folder, data, base
#
# It leaves in OUT (results/gpu unless set): times/*.jsonl, which belong into study/times/;
# large_step.md, a 7B decoder's step with and without checkpointing and --paged, its memory as --plan
# predicts it, as we count it and as the allocator sees it; tests.txt, the GPU tests.
set -euo pipefail
out=${OUT:-results/gpu}
mkdir -p "$out"

quiet() {  # wait until the load of the step before has gone: times.py wants at most 0.5
  while awk '{exit $1 <= 0.5}' /proc/loadavg; do sleep 5; done
}

if [ "${1:-}" = --small ]; then
  export CUDA_VISIBLE_DEVICES=
  dataset=${DATASET:-demo} model=${MODEL:-demo}
  small=(--small) rounds=1 steps=1 busy=(--busy)
  quiet() { :; }
else
  export CUDA_VISIBLE_DEVICES=0
  dataset=${DATASET:-sst2} model=${MODEL:-models/all-MiniLM-L6-v2}
  small=() rounds=7 steps=16 busy=()
fi
for precision in bf16 fp32; do
  quiet
  python study/times.py --dataset "$dataset" --model "$model" --precision $precision --peers \
    --rounds $rounds --steps $steps "${busy[@]}" --out "$out/times"
done
python study/large_step.py "${small[@]}" | tee "$out/large_step.md"
python -m pytest -q tests/test_gpu.py | tee "$out/tests.txt"
