#!/usr/bin/env bash
# An any-precision ResNet-50 on ImageNet, recursive loss, 80 epochs; or, with one bit-width in
# --bit_width_list, a dedicated model by its own recipe, 120 epochs. ImageNet must lie in
# data/imagenet/train and val, one folder of images per class (or under --data-dir). Meant for a
# GPU; its time there has not been measured yet.
#   published top-1 %:  any-precision  1 bit 58.77, 2 71.66, 4 73.84, 8 74.07, 32 74.63
#                       dedicated      1 bit 57.83, 2 68.74, 4 74.12, 8 74.96, 32 75.95
#   ./train_imagenet.sh [flags of train.py]      such as --bit_width_list 2 for a dedicated model
# One process per visible GPU (PROCESSES=N for another number). On several machines, the same
# command on each, with NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host-of-rank-0 (MASTER_PORT, 29500).
# The results folder, which all machines must see, is results/imagenet_resnet50q_any, or
# results/imagenet_resnet50q_2 and so on of a dedicated model, with _bf16 or _tf32 at the end where
# --precision says so; another loss, seed or short trial needs a --results-dir of its own. The same
# command again goes on from its latest checkpoint, and so does a run of which a process died
# (MAX_RESTARTS, 3 times). Where decoding is what the GPUs wait for, benchmarks/resize_imagenet.py
# makes a smaller copy (docs/speed.md).
set -euo pipefail
. "$(dirname "$0")/environment.sh"

bits= previous= precision= trains=yes
for flag in "$@"; do  # the last --bit_width_list counts, as in train.py
    case "$previous" in --bit_width_list|--bit-width-list) bits=$flag ;; esac
    case "$flag" in --bit_width_list=*|--bit-width-list=*) bits=${flag#*=} ;; esac
    case "$previous" in --precision) precision=$flag ;; esac
    case "$flag" in --precision=*) precision=${flag#*=} ;; esac
    case "$flag" in --evaluate | --resume | --resume=*) trains= ;; esac
    previous=$flag
done
case "$bits" in
    "" | *,*)
        schedule=(--lr 0.5 --lr_decay 45,60,70 --epochs 80 --weight-decay 1e-5)
        bits=any ;;
    1 | 2) schedule=(--lr 0.1 --lr_decay 30,60,85,95,105 --epochs 120 --weight-decay 1e-5) ;;
    *) schedule=(--lr 0.1 --lr_decay 30,60,85,95,105 --epochs 120 --weight-decay 1e-4) ;;
esac
name=imagenet_resnet50q_$bits
case "$precision" in bf16 | tf32) name+=_$precision ;; esac
if [ -n "$trains" ]; then schedule+=(--results-dir "results/$name"); fi
processes=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
workers=$(($(nproc) / processes))  # each process decodes on its share of the cores
workers=$((workers > 1 ? workers : 1))
flags=(--dataset imagenet --train_split train --model resnet50q --optimizer sgd "${schedule[@]}"
    --batch-size 256 --workers "$workers")
if [ "${NNODES:-1}" -gt 1 ]; then
    launcher=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?give NODE_RANK, 0 on the first machine}"
        --master-addr "${MASTER_ADDR:?give MASTER_ADDR, the first machine}"
        --master-port "${MASTER_PORT:-29500}")
elif [ "$processes" -gt 1 ]; then
    launcher=(--standalone)
else
    train "${flags[@]}" "$@"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PYTHON_FLAGS=(-m torch.distributed.run --nproc-per-node "$processes"
    --max-restarts "${MAX_RESTARTS:-3}" "${launcher[@]}")
train "${flags[@]}" "$@"
