#!/usr/bin/env bash
# An any-precision ResNet-50 on ImageNet, recursive loss, 80 epochs; or, with one bit-width in --bit_width_list, a
# dedicated model by its own recipe, 120 epochs. ImageNet must lie in data/imagenet/train and val, one folder of images
# per class (or under --data-dir). Meant for a GPU; its time there has not been measured yet.
#   published top-1 %:  any-precision  1 bit 58.77, 2 71.66, 4 73.84, 8 74.07, 32 74.63
#                       dedicated      1 bit 57.83, 2 68.74, 4 74.12, 8 74.96, 32 75.95
#   ./train_imagenet.sh [flags of train.py]      such as --bit_width_list 2 for a dedicated model
set -euo pipefail
. "$(dirname "$0")/environment.sh"

bits= previous=
for flag in "$@"; do  # the last --bit_width_list counts, as in train.py
    case "$previous" in --bit_width_list|--bit-width-list) bits=$flag ;; esac
    case "$flag" in --bit_width_list=*|--bit-width-list=*) bits=${flag#*=} ;; esac
    previous=$flag
done
case "$bits" in
    "" | *,*) schedule=(--lr 0.5 --lr_decay 45,60,70 --epochs 80 --weight-decay 1e-5) ;;
    1 | 2) schedule=(--lr 0.1 --lr_decay 30,60,85,95,105 --epochs 120 --weight-decay 1e-5) ;;
    *) schedule=(--lr 0.1 --lr_decay 30,60,85,95,105 --epochs 120 --weight-decay 1e-4) ;;
esac
recipe=(--dataset imagenet --train_split train --model resnet50q --optimizer sgd "${schedule[@]}"
    --batch-size 256 --workers 16)
train "$@"
