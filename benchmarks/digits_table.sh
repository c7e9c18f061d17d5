#!/usr/bin/env bash
# The digits tables: every loss, and a dedicated model for each bit-width, at seeds 0, 1 and 2 (24
# runs, under an hour on 2 CPU cores); then what quantizing after training gives. The same command
# again goes on where it stopped; flags go to every training.
#   JOBS=2 benchmarks/digits_table.sh [flags]        JOBS trainings at a time, one CPU thread each
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
cd "$here"
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=results/digits_table

one_run() {  # FOLDER [flags]
    if [ -e "$1/accuracy.png" ]; then return; fi
    ./train_digits.sh --results-dir "$1" "${@:2}" > /dev/null
    echo "$1"
}
export -f one_run

evaluate() {  # NAME RUN SEED BATCHES BIT_WIDTHS
    local folder="$results/$1_seed$3"
    if [ -e "$folder/evaluation.json" ]; then return; fi
    "$PYTHON" train.py --evaluate --pretrain "$results/$2_seed$3/ckpt/model_latest.pth.tar" \
        --calibrate "$4" --bit_width_list "$5" --results-dir "$folder" > /dev/null
}

for seed in 0 1 2; do
    for loss in recursive hard soft; do
        echo "one_run $results/${loss}_seed$seed --seed $seed --loss $loss $*"
    done
    for bits in 1 2 4 8 32; do
        echo "one_run $results/dedicated_${bits}_seed$seed --seed $seed --bit_width_list $bits $*"
    done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND

# The paper's comparison: a network trained at 32 bits only, quantized afterwards; and an
# any-precision one at every bit-width.
for seed in 0 1 2; do
    for batches in 0 20; do
        evaluate "post_training_$batches" dedicated_32 "$seed" "$batches" 1,2,4,8,32
    done
    evaluate every_width recursive "$seed" 20 1,2,3,4,5,6,7,8,32
done

trained=("$results"/{recursive,hard,soft,dedicated_*}_seed?)
"$PYTHON" report.py "${trained[@]}" --output "$results/last"
"$PYTHON" report.py "${trained[@]}" --epoch best --output "$results/best"
"$PYTHON" report.py "$results"/{post_training_*,every_width}_seed? --output "$results/evaluated"
