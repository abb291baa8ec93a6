"""`megabatch doctor --probe`: the model of an update, what changes gain in it, and the command."""

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import error_line, megabatch, megabatch_process
from photographs import encode, photograph

from megabatch.bench.input_stages import measure_reduction
from megabatch.bench.probe import Parts
from megabatch.data.sources.folder import FolderSource

PARTS = Parts(1000, input_s=0.2, gradients_s=0.6, update_s=0.1, exchange_s=0.5, exposed_s=0.25, contention_s=0.05)
SMALL = ["--set", "width=8", "--set", "bn_span=4", "--set", "resolution=0:8", "--set", "global_batch_size=64"]


def test_an_update_waits_for_the_longer_of_input_and_computation():
    assert PARTS.seconds() == pytest.approx(0.6 + 0.1 + 0.25 + 0.05)
    assert replace(PARTS, input_s=2.0).seconds() == pytest.approx(2.05)


@pytest.mark.parametrize(
    ("changed", "cause"), [({}, "computation"), ({"input_s": 0.8}, "input"), ({"exposed_s": 0.75}, "exchange")]
)
def test_the_part_that_takes_longest_is_the_bottleneck(changed, cause):
    assert replace(PARTS, **changed).bottleneck() == cause


def test_half_the_exchange_exposes_half_as_much():
    after = PARTS.with_exchange(0.25)
    assert after.exposed_s == pytest.approx(0.125)
    assert PARTS.gain(after) == pytest.approx(1.0 / 0.875)


def test_a_larger_batch_shares_update_and_exchange_among_more_images():
    after = PARTS.at(2000)
    assert (after.gradients_s, after.update_s, after.exposed_s) == pytest.approx((1.2, 0.1, 0.25))
    assert PARTS.gain(after) == pytest.approx(2 * 1.0 / 1.65)


def test_faster_input_gains_nothing_but_the_cores_it_frees_where_computation_is_slower():
    assert PARTS.gain(PARTS.with_input(0.0)) == pytest.approx(1.0 / 0.95)
    slow = replace(PARTS, input_s=2.0)
    assert slow.gain(slow.with_input(0.5)) == pytest.approx(2.05 / 1.025)


@pytest.mark.parametrize(("size", "side"), [((900, 1200), 150), ((100, 120), None)])
def test_large_images_decode_faster_once_they_are_reduced(tmp_path: Path, size: tuple[int, int], side: int | None):
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(encode(photograph(*size, seed=number)))
    found = measure_reduction(FolderSource(tmp_path), resolution=64, seconds=0.02)
    assert (found and found[0]) == side
    assert found is None or found[1] < 0.5


def test_the_command_measures_a_recipe_and_prints_changes_with_their_gain():
    done = megabatch("doctor", "--probe", "fashion_mnist", *SMALL, "--workers", 1, "--seconds", 0.01, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "an update of 64 images takes" in done.stdout
    names = [line[:24].strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert names == ["input alone", "computation alone", "exchange alone", "of it not hidden", "competition, waits"]
    changes = [line for line in done.stdout.splitlines() if line.startswith("change: ")]
    assert 1 <= len(changes) <= 3
    assert all(line.endswith("x the throughput") for line in changes)


@pytest.mark.slow
def test_two_workers_also_measure_their_exchange():
    done = megabatch_process("doctor", "--probe", "fashion_mnist", *SMALL, "--workers", 2, "--seconds", 0.1)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "exchange alone" in line]
    assert float(line.split()[2].replace(",", "")) > 0


def test_options_of_a_recipe_without_one_are_refused(tmp_path: Path):
    assert "--probe fashion_mnist works" in error_line(megabatch("doctor", "--workers", 2))
    assert "--probe cifar alone works" in error_line(megabatch("doctor", tmp_path, "--probe", "cifar"))
    assert "no_such" in error_line(megabatch("doctor", "--probe", "no_such"))
