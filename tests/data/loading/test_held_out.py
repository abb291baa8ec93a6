"""A fraction of every class held out for evaluation."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch import ArraySource, open_folder
from megabatch.data.loading.held_out import held_out, hold_out


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.9))
def test_every_class_gives_its_share_and_keeps_a_sample(labels, fraction):
    labels = np.array(labels)
    chosen = held_out(labels, fraction)
    assert np.array_equal(chosen, np.unique(chosen))
    for label in np.unique(labels):
        count, size = int((labels[chosen] == label).sum()), int((labels == label).sum())
        assert count == (0 if size == 1 else min(max(1, round(fraction * size)), size - 1))


def test_the_held_out_samples_are_spread_over_the_class():
    assert not np.array_equal(held_out(np.zeros(1000, dtype=np.int64), 0.1), np.arange(100))


def test_the_two_parts_of_arrays_are_disjoint_and_complete():
    source = ArraySource(
        torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.arange(40) % 4, ("a", "b", "c", "d")
    )
    rest, chosen = hold_out(source, 0.25)
    assert len(chosen) == 8  # round(2.5) of each class
    assert sorted([*rest.images.flatten().tolist(), *chosen.images.flatten().tolist()]) == list(range(40))
    assert torch.equal(chosen.images.flatten() % 4, chosen.labels)


def test_a_part_of_files_reads_the_sources_samples():
    source, _ = open_folder(Path(__file__).parents[1] / "photos")
    rest, chosen = hold_out(source, 0.3)
    names = {source.name(i): (source.read(i), source.labels[i]) for i in range(len(source))}
    for part in (rest, chosen):
        for i in range(len(part)):
            assert names.pop(part.name(i)) == (part.read(i), part.labels[i])
    assert not names
