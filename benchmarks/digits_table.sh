#!/usr/bin/env bash
# The README's digits table: every loss, and a dedicated model per bit-width, at seeds 0, 1 and 2 (24 runs, about an
# hour on 2 CPU cores). Runs that are there already are kept, interrupted ones go on. Flags are passed to every run.
#   JOBS=2 benchmarks/digits_table.sh [flags]        JOBS runs at a time, one CPU thread each
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

one_run() {  # NAME SEED [flags]
    local folder="results/digits_table/$1_seed$2"
    if [ -e "$folder/accuracy.png" ]; then return; fi
    if [ -e "$folder/ckpt/model_latest.pth.tar" ]; then
        ./train_digits.sh --resume "$folder"
    else
        ./train_digits.sh --results-dir "$folder" --seed "$2" "${@:3}"
    fi > /dev/null
    echo "$folder"
}
export -f one_run

for seed in 0 1 2; do
    for loss in recursive hard soft; do echo "one_run $loss $seed --loss $loss $*"; done
    for bits in 1 2 4 8 32; do echo "one_run dedicated_$bits $seed --bit_width_list $bits $*"; done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND

"$PYTHON" report.py results/digits_table/*
