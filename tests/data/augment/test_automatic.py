"""RandAugment, TrivialAugment and random erasing: operations against Pillow, draws per sample."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from megabatch import ArraySource, TrainLoader
from megabatch.data.augment import automatic
from megabatch.data.augment.automatic import OPERATIONS, RANDAUGMENT, TRIVIALAUGMENT
from megabatch.data.augment.crops import erasing_boxes
from megabatch.data.augment.policy import Policy, Samples

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(20, 230, (9, 12, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def batch(pixels=PIXELS):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def applied(operation, strength, ranges=RANDAUGMENT):
    result = operation(batch(), torch.tensor([strength]), ranges)
    return result[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("strength", [-0.9, 0.3, 1.0])
@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        (automatic.brightness, ImageEnhance.Brightness),
        (automatic.color, ImageEnhance.Color),
        (automatic.contrast, ImageEnhance.Contrast),
        (automatic.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_are_pillows_within_its_rounding(operation, enhancer, strength):
    expected = np.asarray(enhancer(IMAGE).enhance(1 + 0.9 * strength))
    assert np.abs(applied(operation, strength) - expected).max() < 2.1


def test_value_operations_are_pillows():
    assert np.array_equal(applied(automatic.equalize, 0.5), np.asarray(ImageOps.equalize(IMAGE)))
    assert np.array_equal(applied(automatic.posterize, 0.5), np.asarray(ImageOps.posterize(IMAGE, 6)))
    assert np.array_equal(applied(automatic.solarize, 0.5), np.asarray(ImageOps.solarize(IMAGE, 127.5)))
    assert np.abs(applied(automatic.autocontrast, 0.5) - np.asarray(ImageOps.autocontrast(IMAGE))).max() <= 1


def test_equalize_of_many_pixels_is_pillows():
    pixels = GENERATOR.normal(120, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    result = automatic.equalize(batch(pixels), torch.zeros(1), RANDAUGMENT)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(result, np.asarray(ImageOps.equalize(Image.fromarray(pixels))))
    flat = torch.full((1, 3, 64, 64), 7.0)
    assert torch.equal(automatic.equalize(flat, torch.zeros(1), RANDAUGMENT), flat)


@pytest.mark.parametrize(
    ("operation", "strength", "ranges", "matrix"),
    [
        (automatic.translate_x, 0.25, TRIVIALAUGMENT, (1, 0, 8, 0, 1, 0)),
        (automatic.translate_y, -0.125, TRIVIALAUGMENT, (1, 0, 0, 0, 1, -4)),
        (automatic.shear_x, 0.5, RANDAUGMENT, (1, 0.15, -0.15 * 8, 0, 1, 0)),
        (automatic.shear_y, 1.0, RANDAUGMENT, (1, 0, 0, 0.3, 1, -0.3 * 8)),
    ],
)
def test_geometric_operations_are_pillows_affine_transform(operation, strength, ranges, matrix):
    pixels = np.repeat(np.repeat(GENERATOR.integers(0, 255, (4, 4, 3), dtype=np.uint8), 4, 0), 4, 1)
    result = operation(batch(pixels), torch.tensor([strength]), ranges)[0].permute(1, 2, 0).numpy()
    expected = Image.fromarray(pixels).transform(
        (16, 16), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
    # Pillow fills pixels whose centre lies outside; bilinear sampling blends them at the border.
    assert np.abs(result - np.asarray(expected))[2:-2, 2:-2].max(initial=0) < 2 or "translate" in operation.__name__
    if "translate" in operation.__name__:
        assert np.abs(result - np.asarray(expected)).max() < 0.01


def test_a_rotation_by_90_degrees_moves_each_pixel_to_its_place():
    square = batch(PIXELS[:, :9])
    turned = automatic.rotate(square, torch.tensor([90 / 135]), TRIVIALAUGMENT)
    assert torch.allclose(turned, torch.rot90(square, 1, (2, 3)), atol=1e-2) or torch.allclose(
        turned, torch.rot90(square, -1, (2, 3)), atol=1e-2
    )


@pytest.mark.parametrize("number", range(len(OPERATIONS) - 2))
def test_strength_zero_changes_nothing_where_an_operation_has_a_strength(number):
    assert torch.allclose(OPERATIONS[number](batch(), torch.zeros(1), TRIVIALAUGMENT), batch(), atol=1e-3)


def samples(count, augmented=True):
    return Samples(np.zeros(count, dtype=np.int64), np.arange(count), np.full(count, augmented))


@pytest.mark.parametrize("kind", ["randaugment", "trivialaugment"])
def test_every_sample_has_its_own_draw_whatever_the_batch(kind):
    policy = Policy(seed=3, auto_augment=kind)
    images = batch().repeat(40, 1, 1, 1)
    whole = policy.auto_augmented(images, samples(40))
    part = policy.auto_augmented(images[10:20], samples(40).part(slice(10, 20)))
    assert torch.equal(whole[10:20], part)
    assert len({image.numpy().tobytes() for image in whole}) > 15
    assert torch.equal(policy.auto_augmented(images, samples(40, augmented=False)), images)


def test_operations_are_drawn_equally_often():
    policy = Policy(seed=0, auto_augment="trivialaugment")
    drawn = policy._uniform(samples(14_000), 64) * len(OPERATIONS)
    assert np.bincount(drawn.astype(int), minlength=14) == pytest.approx(1000, abs=130)


def test_erasing_boxes_have_the_published_areas_and_stay_inside():
    numbers = GENERATOR.random((4, 500))
    boxes = erasing_boxes(60, 80, *numbers)
    rows, columns = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = rows * columns / 4800
    assert areas.min() > 0.015
    assert areas.max() < 0.35
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 60).all()
    assert (boxes[:, 3] <= 80).all()
    assert (rows / columns).max() > 2
    assert (rows / columns).min() < 0.5


def test_random_erasing_erases_its_share_of_the_images():
    policy = Policy(seed=0, random_erasing=0.25)
    erased = policy.randomly_erased(torch.ones(2000, 1, 8, 8), samples(2000))
    share = float((erased.amin((1, 2, 3)) == 0).float().mean())
    assert share == pytest.approx(0.25, abs=0.04)
    assert torch.equal(policy.randomly_erased(torch.ones(9, 1, 8, 8), samples(9, False)), torch.ones(9, 1, 8, 8))


def test_a_loader_applies_both_and_its_batches_do_not_depend_on_their_bounds():
    images = torch.from_numpy(GENERATOR.integers(0, 255, (24, 3, 16, 16), dtype=np.uint8))
    source = ArraySource(images, torch.arange(24) % 2, ("a", "b"))
    pixels = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.25,) * 3, "seed": 1}
    plain = TrainLoader(source, **pixels).load(range(24), resolution=16).images
    loader = TrainLoader(source, auto_augment="randaugment", random_erasing=0.5, **pixels)
    whole = loader.load(range(24), resolution=16).images
    assert torch.equal(whole[6:12], loader.load(range(6, 12), resolution=16).images)
    assert not torch.equal(whole, plain)
