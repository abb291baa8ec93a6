"""Random numbers as a pure function of (seed, epoch, sample, stream), independent of call order and of workers.

The output of a stateful generator depends on the order of calls, which changes with the number of workers. Here each
number is a hash of its coordinates, so any worker can draw any sample's numbers at any time.
"""

from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]
Integers: TypeAlias = "int | np.integer | NDArray[np.integer]"

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: steps of it visit all 2^64 values
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """Purpose of a draw. Two draws for one sample never share a stream. Values must not change: add new ones."""

    ORDER = 0
    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    CROP_TOP = 3
    CROP_LEFT = 4
    FLIP = 5
    CUTOUT_TOP = 6
    CUTOUT_LEFT = 7
    BRIGHTNESS = 8
    CONTRAST = 9
    MIX_KIND = 10
    MIX_WEIGHT = 11
    MIX_ANGLE = 12
    MIX_TOP = 13
    MIX_LEFT = 14
    HELD_OUT = 15
    ERASE = 16
    ERASE_AREA = 17
    ERASE_ASPECT = 18
    ERASE_TOP = 19
    ERASE_LEFT = 20
    SLOT_ORDER = 21
    CLASS_ORDER = 22
    CROP_AREA = 32  # a random resized crop draws up to ten pairs: streams 32..41 and 48..57
    CROP_ASPECT = 48
    AUTO_OPERATION = 64  # up to eight operations: streams 64..71, 72..79 and 80..87
    AUTO_STRENGTH = 72
    AUTO_SIGN = 80


def mix_bits(value: UInt64) -> UInt64:
    """Bijection of 64-bit words; flipping an input bit flips each output bit with probability 1/2.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, with Stafford's variant 13).
    """
    value = (value ^ (value >> np.uint64(30))) * _FIRST_FACTOR
    value = (value ^ (value >> np.uint64(27))) * _SECOND_FACTOR
    mixed: UInt64 = value ^ (value >> np.uint64(31))
    return mixed


def random_words(seed: int, epoch: Integers, sample: Integers, stream: Integers) -> UInt64:
    """64 random bits for each (epoch, sample, stream), which broadcast together.

    Applies the bijection `mix_bits` once per argument, so two samples of one epoch and stream never share a word.
    """
    with np.errstate(over="ignore"):
        state = mix_bits(as_words(seed) * GOLDEN + GOLDEN)
        for part in (stream, epoch, sample):
            state = mix_bits(state + (as_words(part) + np.uint64(1)) * GOLDEN)
    return state


def uniform(seed: int, epoch: Integers, sample: Integers, stream: Integers) -> Float64:
    """Uniform numbers in [0, 1), multiples of 2^-53, one for each (epoch, sample, stream)."""
    fractions: Float64 = (random_words(seed, epoch, sample, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions


def symmetric_beta(
    alpha: float, seed: int, epoch: Integers, sample: Integers, stream: int, second_stream: int
) -> Float64:
    """Draws from Beta(alpha, alpha), alpha > 0, each from two uniform numbers u and v, without rejection.

        B = 1/2 + sign(cos 2 pi v) / (2 sqrt(1 + 1 / ((u^(-1/alpha) - 1) cos^2 2 pi v)))

    Student's t by Bailey's polar form (1994), transformed to a beta by Ulrich (1984); see Devroye 1996, "Random
    variate generation in one line of code".
    """
    radius = 1.0 - uniform(seed, epoch, sample, stream)  # in (0, 1], so that the logarithm is finite
    cosine = np.cos(2.0 * np.pi * uniform(seed, epoch, sample, second_stream))
    with np.errstate(over="ignore", divide="ignore"):
        odds = np.expm1(-np.log(radius) / alpha) * cosine * cosine
        return np.asarray(0.5 + np.sign(cosine) * 0.5 / np.sqrt(1.0 + 1.0 / odds))


def as_words(values: Integers) -> UInt64:
    """Integers modulo 2^64, as 64-bit words."""
    if isinstance(values, int):
        return np.asarray(values & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(values).astype(np.uint64)
