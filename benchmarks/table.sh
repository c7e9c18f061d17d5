#!/usr/bin/env bash
# The tables of docs/results.md and docs/your_own_network.md, at seeds 0, 1 and 2, by name:
#   digits, fashion            every loss and a dedicated model for each bit-width (24 runs), then what
#                              quantizing after training gives, and recursive at every bit-width: under
#                              an hour, and an hour and a half, on 2 cores of an Intel Xeon
#   fashion30                  recursive, hard and dedicated, 30 epochs (21 runs): an estimated eleven
#                              hours on 2 cores of an AMD EPYC
#   fashion_methods            MBQuant's loss, LSQ and both beside recursive, and dedicated with LSQ
#                              (27 runs): an estimated four hours there
#   nine_widths                nine bit-widths on digits, all or three a step (6 runs): half an hour there
#   resnet18, mobilenet_v2     torchvision's, converted, on digits, recursive, LSQ and
#                              dedicated (21 runs each)
# The same command again goes on where it stopped; flags go to every training.
#   JOBS=2 benchmarks/table.sh TABLE [flags]             JOBS trainings at a time, a thread each
# Runs of which benchmarks/runs/ has the metrics, without checkpoints, are not trained again, where
# they are copied before: mkdir -p results && cp -r benchmarks/runs/* results/
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
cd "$here"
shopt -s nullglob
table=${1:-} methods=() dedicated="1 2 4 8 32" dedicated_flags= evaluated=
case "$table" in
    digits | fashion)
        export recipe=$table
        methods=("recursive --loss recursive" "hard --loss hard" "soft --loss soft") evaluated=yes
        shift ;;
    fashion30)
        export recipe=fashion
        methods=("recursive --loss recursive" "hard --loss hard")
        set -- --epochs 30 --lr_decay 15,24,28 "${@:2}" ;;
    fashion_methods)
        export recipe=fashion
        methods=("recursive --loss recursive" "half --loss half" "lsq --quantizer lsq"
            "half_lsq --loss half --quantizer lsq")
        dedicated_flags="--quantizer lsq"
        shift ;;
    nine_widths)
        export recipe=digits
        methods=("all" "three --widths-per-step 3")
        dedicated=
        set -- --bit_width_list 1,2,3,4,5,6,7,8,32 "${@:2}" ;;
    resnet18 | mobilenet_v2)
        export recipe=digits
        methods=("recursive --loss recursive" "lsq --quantizer lsq")
        evaluated=yes
        set -- --model "torchvision:$table" --batch-size 32 --epochs 5 --lr_decay 3,4 "${@:2}" ;;
    *) echo "table.sh: error: '$table' has no table: choose digits, fashion, fashion30," \
        "fashion_methods, nine_widths, resnet18 or mobilenet_v2" >&2; exit 2 ;;
esac
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
results=results/${table}_table

one_run() {  # FOLDER [flags]
    if [ -s "$1/metrics.jsonl" ] && [ ! -e "$1/ckpt" ]; then return; fi  # of benchmarks/runs
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

for seed in 0 1 2; do
    for method in "${methods[@]}"; do
        read -r name flags <<< "$method"
        echo "one_run $results/${name}_seed$seed $flags --seed $seed $*"
    done
    for bits in $dedicated; do
        echo "one_run $results/dedicated_${bits}_seed$seed $dedicated_flags --seed $seed" \
            "--bit_width_list $bits $*"
    done
done | xargs -d '\n' -P "${JOBS:-2}" -I COMMAND bash -c COMMAND

trained=()
for method in "${methods[@]}"; do trained+=("$results/${method%% *}"_seed?); done
for bits in $dedicated; do trained+=("$results/dedicated_${bits}"_seed?); done
"$PYTHON" report.py "${trained[@]}" --output "$results/last"
"$PYTHON" report.py "${trained[@]}" --epoch best --output "$results/best"
if [ "$evaluated" ]; then
    for seed in 0 1 2; do
        for batches in 0 20; do
            evaluate "post_training_$batches" dedicated_32 "$seed" "$batches" 1,2,4,8,32
        done
        evaluate every_width recursive "$seed" 20 1,2,3,4,5,6,7,8,32
    done
    "$PYTHON" report.py "$results"/{post_training_*,every_width}_seed? --output "$results/evaluated"
fi
