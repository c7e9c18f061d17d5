#!/usr/bin/env bash
# The tables of docs/results.md: every loss, and a dedicated model for each bit-width, at seeds 0, 1
# and 2 (24 runs); then what quantizing after training gives, and the recursive networks at every
# bit-width. Digits take under an hour on 2 CPU cores, Fashion-MNIST an hour and a half. Or of
# torchvision's resnet18 or mobilenet_v2, converted, on digits: recursive and dedicated alone (18
# runs, hours). The same command again goes on where it stopped; flags go to every training.
#   JOBS=2 benchmarks/table.sh digits|fashion|resnet18|mobilenet_v2 [flags]
#                                                        JOBS trainings at a time, a thread each
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
cd "$here"
shopt -s nullglob
losses="recursive hard soft" table=${1:-}
case "$table" in
    digits | fashion) export recipe=$table; shift ;;
    resnet18 | mobilenet_v2)
        export recipe=digits
        losses=recursive
        set -- --model "torchvision:$table" --batch-size 32 --epochs 5 --lr_decay 3,4 "${@:2}" ;;
    *) echo "table.sh: error: '$table' has no table: choose digits, fashion, resnet18 or" \
        "mobilenet_v2" >&2; exit 2 ;;
esac
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=results/${table}_table

one_run() {  # FOLDER [flags]
    if [ -e "$1/accuracy.png" ]; then return; fi
    "./train_$recipe.sh" --results-dir "$1" "${@:2}" > /dev/null
    echo "$1"
}
export -f one_run

evaluate() {  # NAME RUN SEED BATCHES BIT_WIDTHS
    local folder="$results/$1_seed$3"
    if [ -e "$folder/evaluation.json" ]; then return; fi
    "$PYTHON" train.py --evaluate --pretrain "$results/$2_seed$3/ckpt/model_latest.pth.tar" \
        --calibrate "$4" --bit_width_list "$5" --results-dir "$folder" > /dev/null
    echo "$folder"
}

for loss in $losses; do
    for seed in 0 1 2; do
        echo "one_run $results/${loss}_seed$seed --seed $seed --loss $loss $*"
    done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND
for bits in 1 2 4 8 32; do
    for seed in 0 1 2; do
        echo "one_run $results/dedicated_${bits}_seed$seed --seed $seed --bit_width_list $bits $*"
    done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND

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
