#!/usr/bin/env bash
# An any-precision svhnq on SVHN (train and extra, joined: 604,388 images), recursive loss, 100
# epochs; SVHN downloads itself (1.6 GB), and is held in memory (3 GB). Meant for a GPU; its time
# there has not been measured yet.
#   published top-1 %:  any-precision  1 bit 88.21, 2 94.94, 4 96.19, 8 96.22, 32 96.29
#                       dedicated      1 bit 90.94, 2 96.45, 4 97.04, 8 97.04, 32 97.10
#   ./train_svhn.sh [flags of train.py]
#       such as --loss hard, or --bit_width_list 2 for a dedicated model
set -euo pipefail
. "$(dirname "$0")/environment.sh"
flags=(--dataset svhn --train_split train_extra --model svhnq --optimizer adam --lr 0.001
    --lr_decay 50,75,90 --epochs 100 --batch-size 128 --weight-decay 0 --workers 4)
train "${flags[@]}" "$@"
