#!/usr/bin/env bash
# The README's digits tables: every loss, and a dedicated model per bit-width, at seeds 0, 1 and 2 (24 runs, under an
# hour on 2 CPU cores); then what quantizing after training gives. Runs that are there already are kept, interrupted
# ones go on. Flags are passed to every training.
#   JOBS=2 benchmarks/digits_table.sh [flags]        JOBS trainings at a time, one CPU thread each
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
cd "$here"
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

evaluate() {  # NAME RUN SEED BATCHES WIDTHS
    local folder="results/digits_table/$1_seed$3"
    if [ -e "$folder/evaluation.json" ]; then return; fi
    "$PYTHON" train.py --evaluate --pretrain "results/digits_table/$2_seed$3/ckpt/model_latest.pth.tar" \
        --calibrate "$4" --bit_width_list "$5" --results-dir "$folder" > /dev/null
}

for seed in 0 1 2; do
    for loss in recursive hard soft; do echo "one_run $loss $seed --loss $loss $*"; done
    for bits in 1 2 4 8 32; do echo "one_run dedicated_$bits $seed --bit_width_list $bits $*"; done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND

# The paper's comparison: a network trained at 32 bits only, quantized afterwards; and every width of an any-precision one.
for seed in 0 1 2; do
    for batches in 0 20; do
        evaluate "post_training_$batches" dedicated_32 "$seed" "$batches" 1,2,4,8,32
    done
    evaluate every_width recursive "$seed" 20 1,2,3,4,5,6,7,8,32
done

trained=(results/digits_table/{recursive,hard,soft,dedicated_*}_seed?)
"$PYTHON" report.py "${trained[@]}" --output results/digits_table/last
"$PYTHON" report.py "${trained[@]}" --epoch best --output results/digits_table/best
"$PYTHON" report.py results/digits_table/{post_training_*,every_width}_seed? --output results/digits_table/evaluated
