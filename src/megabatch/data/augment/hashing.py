"""Random numbers as a pure function of (seed, epoch, sample, stream): no state, no order of calls, no worker.

A generator with state gives another number when the calls come in another order, as they do on another number of
workers. Here every number is a hash of what it is for, so any worker can draw any sample's numbers at any time.
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
    """What a number is drawn for. Two draws for one sample never share a stream; new ones go at the end."""

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
    REPLACEMENT = 15
    CROP_AREA = 32  # random-resized-crop draws up to ten pairs: streams 32..41 and 48..57
    CROP_ASPECT = 48


def mix(value: UInt64) -> UInt64:
    """A bijection of 64-bit words in which each input bit flips each output bit half of the time.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, with Stafford's variant 13).
    """
    value = (value ^ (value >> np.uint64(30))) * _FIRST_FACTOR
    value = (value ^ (value >> np.uint64(27))) * _SECOND_FACTOR
    mixed: UInt64 = value ^ (value >> np.uint64(31))
    return mixed


def words(seed: int, epoch: Integers, sample: Integers, stream: Integers) -> UInt64:
    """64 random bits for each (epoch, sample, stream), broadcast together.

    One `mix` per argument, each of them a bijection: two samples of one epoch and stream never share a word.
    """
    with np.errstate(over="ignore"):
        state = mix(as_words(seed) * GOLDEN + GOLDEN)
        for part in (stream, epoch, sample):
            state = mix(state + (as_words(part) + np.uint64(1)) * GOLDEN)
    return state


def uniform(seed: int, epoch: Integers, sample: Integers, stream: Integers) -> Float64:
    """Uniform numbers in [0, 1), multiples of 2^-53, one for each (epoch, sample, stream)."""
    fractions: Float64 = (words(seed, epoch, sample, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions


def normal(seed: int, epoch: Integers, sample: Integers, stream: int, second_stream: int) -> Float64:
    """Standard normal numbers from two uniform ones: sqrt(-2 ln(1 - u)) cos(2 pi v) (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(seed, epoch, sample, stream)))
    return np.asarray(radius * np.cos(2.0 * np.pi * uniform(seed, epoch, sample, second_stream)))


def symmetric_beta(
    alpha: float, seed: int, epoch: Integers, sample: Integers, stream: int, second_stream: int
) -> Float64:
    """Numbers of the distribution Beta(alpha, alpha), from two uniform ones and without rejection.

        B = 1/2 + sign(cos 2 pi v) / (2 sqrt(1 + 1 / ((u^(-1/alpha) - 1) cos^2 2 pi v)))

    Student's t by Bailey's polar form (1994), turned to a beta by Ulrich (1984); see Devroye 1996, "Random variate
    generation in one line of code". Holds for every alpha > 0.
    """
    radius = 1.0 - uniform(seed, epoch, sample, stream)  # in (0, 1], so that the logarithm is finite
    cosine = np.cos(2.0 * np.pi * uniform(seed, epoch, sample, second_stream))
    with np.errstate(over="ignore", divide="ignore"):
        odds = np.expm1(-np.log(radius) / alpha) * cosine * cosine
        return np.asarray(0.5 + np.sign(cosine) * 0.5 / np.sqrt(1.0 + 1.0 / odds))


def as_words(values: Integers) -> UInt64:
    """Integers as 64-bit words, negative and larger ones modulo 2^64."""
    if isinstance(values, int):
        return np.asarray(values & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(values).astype(np.uint64)
