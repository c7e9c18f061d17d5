"""Requantization of integer sums with an integer bias, to the levels of a network.

A layer's level is clip(round(p a + q), 0, n), where a is an integer sum. A runtime whose fused
kernel has no float bias computes clip(round(r (f a + b)), 0, n), with an integer b. A factor f of
the integer weights, as large as int8 allows, makes b fine. The two are equal at every a where all
their thresholds lie between the same two integers: an inequality for r at both ends of each level.
"""
from typing import NamedTuple

import numpy

LARGEST = 127  # of int8
PAIR = 2**15 - 1  # CPUs without VNNI add two products of uint8 and int8 in int16
TRIED = 4  # integers on either side of f q / p, the bias without rounding
MARGIN = 3e-6  # relative distance between the limits of r, wider than float32's rounding
LARGEST_BIAS = 2**30


class Requantization(NamedTuple):
    """f, r and b of each output channel: (O,) int64, float64 and int64."""
    factor: numpy.ndarray
    ratio: numpy.ndarray
    bias: numpy.ndarray


def requantization(integers: numpy.ndarray, p: numpy.ndarray, q: numpy.ndarray, n: int,
                   highest: int) -> Requantization | None:
    """Return how sums are requantized exactly, or None where some channel cannot be.

    integers: weights (O, ...). p, q: (O,) float64; a negative p gives a negative ratio. n: the
    highest level of the output. highest: that of the inputs.
    """
    most = min(LARGEST, PAIR // (2 * highest)) // abs(integers).max()
    if most < 1 or not (numpy.isfinite(p).all() and p.all()):
        return None

    flat = integers.reshape(len(integers), -1)
    sign = numpy.sign(p).astype(int)  # a negative p is a positive one of negative sums
    flat = flat * sign[:, None]
    smallest = highest * (flat * (flat < 0)).sum(1, keepdims=True)
    greatest = highest * (flat * (flat > 0)).sum(1, keepdims=True)
    p = abs(p)[:, None]
    q = q[:, None]
    k = numpy.arange(1, n + 1)
    first = numpy.ceil((k - 0.5 - q) / p)  # the smallest sums of levels k
    first += numpy.rint(p * first + q) < k  # where a tie is rounded to even
    first = first.clip(smallest, greatest + 1)

    gap = numpy.zeros(len(p))
    ratio = numpy.zeros(len(p))
    bias = numpy.zeros(len(p))
    factor = numpy.ones(len(p), int)
    for tried in range(most, 0, -1):
        missing = gap <= 1 + MARGIN
        for offset in range(-TRIED, TRIED + 1):
            b = numpy.rint(tried * q / p) + offset
            above = tried * first + b
            below = above - tried
            with numpy.errstate(divide="ignore"):
                low = numpy.where(above > 0, (k - 0.5) / above, numpy.inf)
                high = numpy.where(below > 0, (k - 0.5) / below, numpy.inf)
            low = numpy.where(first <= greatest, low, 0).max(1).clip(1e-3 * p[:, 0] / tried)
            high = numpy.where(first > smallest, high, numpy.inf).min(1)
            high = high.clip(max=1e3 * p[:, 0] / tried)
            better = missing & (high / low > gap) & (abs(b[:, 0]) < LARGEST_BIAS)
            gap = numpy.where(better, high / low, gap)
            ratio = numpy.where(better, numpy.sqrt(low * high), ratio)
            bias = numpy.where(better, b[:, 0], bias)
            factor = numpy.where(better, tried, factor)
        if (gap > 1 + MARGIN).all():
            return Requantization(factor, sign * ratio, (sign * bias).astype(numpy.int64))
    return None
