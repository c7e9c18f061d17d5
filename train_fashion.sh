#!/usr/bin/env bash
# An any-precision svhnq on Fashion-MNIST (60,000 images to train on, 10,000 to test), recursive
# loss, 6 epochs: 6 minutes on 2 cores of an Intel Xeon (AVX-512). Fashion-MNIST downloads itself
# (31 MB); Debian's package has it, too, as root:
#   apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb /
#   published code, same recipe, torch 2.15, mean of seeds 0, 1, 2, test top-1 % at the last epoch:
#   1 bit 84.54, 2 88.93, 4 89.61, 8 89.75, 32 90.05
#   ./train_fashion.sh [flags of train.py]       such as --loss hard, or --bit_width_list 2
set -euo pipefail
. "$(dirname "$0")/environment.sh"
flags=(--dataset fashion-mnist --model svhnq --optimizer adam --lr 0.001 --lr_decay 3,5
    --epochs 6 --batch-size 128 --weight-decay 0)
train "${flags[@]}" "$@"
