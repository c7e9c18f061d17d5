#!/usr/bin/env bash
# An any-precision ResNet-20 (80, 160, 320 channels) on CIFAR-10, recursive loss, 200 epochs;
# CIFAR-10 downloads itself (170 MB). Meant for a GPU; its time there has not been measured yet.
#   published top-1 %:  any-precision  1 bit 91.89, 2 93.90, 4 93.86, 8 93.75, 32 94.11
#                       dedicated      1 bit 91.50, 2 93.26, 4 93.62, 8 93.42, 32 93.58
#   ./train_cifar10.sh [flags of train.py]
#       such as --loss hard, or --bit_width_list 2 for a dedicated model
set -euo pipefail
. "$(dirname "$0")/environment.sh"
flags=(--dataset cifar10 --train_split train --model resnet20q --optimizer adam --lr 0.001
    --lr_decay 100,150,180 --epochs 200 --batch-size 128 --weight-decay 0 --workers 4)
train "${flags[@]}" "$@"
