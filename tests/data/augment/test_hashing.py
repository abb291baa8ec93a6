import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.augment import hashing

INT64 = st.integers(-(2**63), 2**63 - 1)
NUM_DRAWS = 200_000


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def within_five_sigma(statistic: float, degrees: int) -> bool:
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_the_mixer_is_splitmix64_whose_first_outputs_from_seed_0_are_published():
    # Vigna's splitmix64.c started at state 0 gives these three words.
    states = np.arange(1, 4, dtype=np.uint64) * hashing.GOLDEN
    assert [hex(w) for w in hashing.mix_bits(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_each_input_bit_flips_each_output_bit_half_of_the_time():
    samples = np.arange(4000)
    base = hashing.random_words(7, 3, samples, 5)
    for bit in range(0, 40, 3):
        flipped = hashing.random_words(7, 3, samples ^ (1 << bit), 5)
        changes = np.unpackbits((base ^ flipped).view(np.uint8).reshape(-1, 8), axis=1).mean(0)
        assert np.abs(changes - 0.5).max() < 5 * 0.5 / np.sqrt(len(samples))


@pytest.mark.parametrize("argument", ["seed", "epoch", "sample", "stream"])
def test_uniform_numbers_fill_64_bins_evenly_along_each_argument(argument):
    values = {"seed": 1, "epoch": 2, "sample": 3, "stream": 4}
    if argument == "seed":
        draws = np.array([hashing.uniform(seed, 2, 3, 4) for seed in range(20_000)])
    else:
        draws = hashing.uniform(**{**values, argument: np.arange(NUM_DRAWS)})
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert within_five_sigma(chi_square(counts), 63)
    assert draws.min() >= 0
    assert draws.max() < 1


def test_pairs_of_neighbouring_samples_epochs_and_streams_are_independent():
    samples = np.arange(NUM_DRAWS)
    here = (hashing.uniform(1, 5, samples, 3) * 16).astype(int)
    for other in (
        hashing.uniform(1, 5, samples + 1, 3),
        hashing.uniform(1, 6, samples, 3),
        hashing.uniform(1, 5, samples, 4),
    ):
        counts = np.bincount(here * 16 + (other * 16).astype(int), minlength=256)
        assert within_five_sigma(chi_square(counts), 255)


@settings(deadline=None)
@given(seed=INT64, epoch=st.integers(0, 2**40), samples=st.lists(INT64, min_size=1, max_size=20))
def test_a_number_does_not_depend_on_the_others_in_the_call(seed, epoch, samples):
    together = hashing.uniform(seed, epoch, np.array(samples), hashing.Stream.FLIP)
    alone = [hashing.uniform(seed, epoch, sample, hashing.Stream.FLIP) for sample in samples]
    np.testing.assert_array_equal(together, alone)


@settings(deadline=None)
@given(seed=INT64, epoch=INT64, sample=INT64, other=INT64)
def test_two_samples_of_one_epoch_never_share_a_word(seed, epoch, sample, other):
    same = hashing.random_words(seed, epoch, sample, 0) == hashing.random_words(seed, epoch, other, 0)
    assert bool(same) == (sample == other)


def test_epochs_and_samples_broadcast_together():
    epochs, samples = np.arange(3)[:, None], np.arange(5)
    grid = hashing.uniform(9, epochs, samples, 2)
    assert grid.shape == (3, 5)
    assert grid[2, 4] == hashing.uniform(9, 2, 4, 2)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_symmetric_beta_has_the_moments_of_the_beta_distribution(alpha):
    draws = hashing.symmetric_beta(alpha, 1, 0, np.arange(NUM_DRAWS), 20, 21)
    assert draws.min() >= 0
    assert draws.max() <= 1
    moment = 1.0
    for k in range(1, 5):  # E[B^k] = product of (alpha + j) / (2 alpha + j) for j < k
        moment *= (alpha + k - 1) / (2 * alpha + k - 1)
        assert np.mean(draws**k) == pytest.approx(moment, abs=5 * 0.5 / np.sqrt(NUM_DRAWS))


def test_beta_with_alpha_1_is_uniform():
    draws = hashing.symmetric_beta(1.0, 3, 0, np.arange(NUM_DRAWS), 20, 21)
    counts = np.bincount((draws * 50).astype(int), minlength=50)
    assert within_five_sigma(chi_square(counts), 49)


def test_streams_of_the_ten_crop_attempts_do_not_overlap():
    streams = [*hashing.Stream, *range(hashing.Stream.CROP_AREA + 1, hashing.Stream.CROP_AREA + 10)]
    streams += range(hashing.Stream.CROP_ASPECT + 1, hashing.Stream.CROP_ASPECT + 10)
    assert len(set(map(int, streams))) == len(streams)
