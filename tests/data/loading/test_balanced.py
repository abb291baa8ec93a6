"""Balanced sampling: equal shares of the classes, every sample of a class equally often, whatever the batches."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run_tiny, tiny_recipe

from megabatch import ArraySource, TrainLoader
from megabatch.data.loading.balanced import BalancedOrder
from megabatch.errors import RecipeError, UserError
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime

LABELS = np.array([0] * 30 + [1] * 5 + [3] * 12)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**31), st.integers(1, 5))
def test_every_epoch_has_equal_shares_of_the_classes(labels, seed, num_epochs):
    labels = np.array(labels)
    order, size = BalancedOrder(labels, seed=seed), len(labels)
    for epoch in range(num_epochs):
        _, indices = order.samples(epoch * size, size)
        counts = np.bincount(labels[indices], minlength=6)[np.unique(labels)]
        assert counts.max() - counts.min() <= 1


def test_each_pass_over_a_class_has_each_of_its_samples_once():
    passes, indices = BalancedOrder(LABELS, seed=1).samples(0, 47 * 30)
    for label in (0, 1, 3):
        members = np.flatnonzero(label == LABELS)
        for number in range(int(passes[LABELS[indices] == label].max())):  # the last may be incomplete
            chosen = indices[(LABELS[indices] == label) & (passes == number)]
            assert sorted(chosen) == members.tolist()


def test_a_pass_and_a_sample_never_occur_together_twice():
    passes, indices = BalancedOrder(LABELS, seed=1).samples(0, 47 * 10)
    assert len(set(zip(passes.tolist(), indices.tolist(), strict=True))) == 470


def test_the_stream_does_not_depend_on_how_it_is_cut_and_depends_on_the_seed():
    order = BalancedOrder(LABELS, seed=1)
    whole = order.samples(0, 200)
    parts = [order.samples(first, 25) for first in range(0, 200, 25)]
    for number in (0, 1):
        assert np.array_equal(whole[number], np.concatenate([part[number] for part in parts]))
    assert not np.array_equal(whole[1], BalancedOrder(LABELS, seed=2).samples(0, 200)[1])


def test_a_loader_delivers_the_balanced_stream_with_a_new_augmentation_at_each_repetition():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (47, 1, 12, 12), generator=generator, dtype=torch.uint8)
    source = ArraySource(images, torch.from_numpy(LABELS), tuple("abcd"))
    arguments = {"seed": 0, "pixel_mean": (0.5,), "pixel_std": (0.5,), "image_channels": 1}
    loader = TrainLoader(source, balanced=True, augmentation="pad_crop", crop_padding=3, flip=False, **arguments)
    batch = loader.load(range(47), resolution=12)
    assert sorted(np.bincount(batch.labels, minlength=4).tolist()) == [0, 15, 16, 16]
    rare = batch.images[batch.labels == 1]
    assert len({image.numpy().tobytes() for image in rare}) > 10  # of 5 images, each shown three times
    with pytest.raises(UserError, match="shuffle"):
        TrainLoader(source, balanced=True, shuffle=False, **arguments)


def test_a_recipe_can_balance_and_resumes_bitwise(tmp_path):
    recipe = tiny_recipe(sampling="balanced", total_epochs=1.0)
    whole = run_tiny(tmp_path / "whole", recipe)
    run_tiny(tmp_path / "parts", recipe, stop_at=2)
    resumed = Runtime(precision="fp32", micro_batch_size=recipe.bn_span, resume=True)
    parts = run_tiny(tmp_path / "parts", recipe, runtime=resumed)
    assert all(torch.equal(parts["weights"][name], whole["weights"][name]) for name in whole["weights"])
    assert whole["losses"] != run_tiny(tmp_path / "uniform", dataclasses.replace(recipe, sampling="uniform"))["losses"]
    with pytest.raises(RecipeError, match="sampling=uniform works"):
        validate(dataclasses.replace(recipe, shard_local=True))
