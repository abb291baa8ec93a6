import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from megabatch.data.augment import ops as augment


def images_of(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@settings(deadline=None)
@given(
    padding=st.integers(0, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    data=st.data(),
)
def test_shift_and_flip_is_pad_by_reflection_then_crop_then_mirror(padding, channels, height, width, data):
    images = images_of(3, channels, height, width)
    shifts = st.lists(st.integers(-padding, padding), min_size=3, max_size=3)
    rows, columns = data.draw(shifts), data.draw(shifts)
    flip = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    moved = augment.shift_and_flip(images, torch.tensor(rows), torch.tensor(columns), torch.tensor(flip))
    padded = functional.pad(images.double(), (padding,) * 4, mode="reflect").to(torch.uint8)
    for i in range(3):
        top, left = padding + rows[i], padding + columns[i]
        expected = padded[i, :, top : top + height, left : left + width]
        assert torch.equal(moved[i], expected.flip(2) if flip[i] else expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flip_some_mirrors_the_given_images_only(memory_format):
    images = images_of(4, 3, 5, 6).contiguous(memory_format=memory_format)
    flipped = augment.flip_some(images.clone(memory_format=torch.preserve_format), [1, 3])
    for i in range(4):
        assert torch.equal(flipped[i], images[i].flip(2) if i in {1, 3} else images[i])
    assert flipped.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("size", [7, 16, 40])
def test_crop_and_resize_is_pillows_antialiased_bilinear_resize_of_the_crop(size):
    images = images_of(3, 3, 31, 24)
    boxes = torch.tensor([[0, 0, 31, 24], [3, 5, 20, 11], [10, 2, 1, 9]])
    resized = augment.crop_and_resize(images, boxes, size)
    for image, (top, left, height, width), ours in zip(images, boxes.tolist(), resized, strict=True):
        crop = image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        theirs = Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.Resampling.BILINEAR)
        difference = np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(theirs))
        assert difference.max() <= 1.01  # Pillow rounds to whole numbers after each of its two passes


def test_crop_and_resize_keeps_constant_images_and_reads_nothing_outside_the_box():
    images = torch.zeros(1, 1, 20, 20, dtype=torch.uint8)
    images[:, :, 5:12, 3:10] = 200
    inside = augment.crop_and_resize(images, torch.tensor([[5, 3, 7, 7]]), 13)
    torch.testing.assert_close(inside, torch.full((1, 1, 13, 13), 200.0))


def test_resize_is_the_same_tensor_at_the_native_size():
    images = images_of(2, 1, 8, 8)
    assert augment.resize(images, 8) is images
    assert augment.resize(images, 12).shape == (2, 1, 12, 12)


@pytest.mark.parametrize("count", [1, 4, 700])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_normalize_is_pixels_over_255_minus_mean_over_std(count, channels, given, wanted):
    images = images_of(count, channels, 16, 12).contiguous(memory_format=given)
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels]
    out = torch.full(images.shape, torch.nan).contiguous(memory_format=wanted)
    assert augment.normalize(images, mean, std, out) is out
    shape = (1, -1, 1, 1)
    expected = (images.double() / 255 - torch.tensor(mean).double().view(shape)) / torch.tensor(std).double().view(
        shape
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_normalize_rounds_once_to_the_requested_dtype():
    images = images_of(3, 3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    exact = augment.normalize(images, mean, std, torch.empty(images.shape))
    half = augment.normalize(images, mean, std, torch.empty(images.shape, dtype=torch.bfloat16))
    assert torch.equal(half, exact.to(torch.bfloat16))


def test_normalize_does_not_change_float_input():
    images = images_of(1, 1, 4, 4).float()
    before = images.clone()
    augment.normalize(images, (0.5,), (0.5,), torch.empty_like(images))
    assert torch.equal(images, before)


def test_jitter_scales_brightness_then_contrast_about_the_mean_grey_and_clamps():
    images = images_of(2, 3, 5, 5).float()
    brightness, contrast = torch.tensor([1.3, 0.6]), torch.tensor([0.7, 1.4])
    ours = augment.jitter(images, brightness, contrast)
    for image, b, c, result in zip(images.double(), brightness.double(), contrast.double(), ours, strict=True):
        bright = (image * b).clamp(0, 255)
        grey = (0.299 * bright[0] + 0.587 * bright[1] + 0.114 * bright[2]).mean()
        expected = (c * bright + (1 - c) * grey).clamp(0, 255)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)


def test_jitter_of_grey_images_uses_their_mean_and_factors_of_1_change_nothing():
    images = images_of(2, 1, 4, 4).float()
    one = torch.ones(2)
    assert torch.equal(augment.jitter(images, one, one), images)
    flat = augment.jitter(images, one, torch.full((2,), 1e-9))
    torch.testing.assert_close(flat, images.mean((2, 3), keepdim=True).expand_as(images), rtol=1e-5, atol=1e-4)


def test_erase_zeroes_each_box_and_nothing_else():
    images = torch.ones(3, 2, 6, 7)
    erased = augment.erase(images, torch.tensor([[1, 2, 4, 5], [0, 0, 0, 0], [0, 0, 6, 7]]))
    assert erased[0].sum() == 2 * (42 - 9)
    assert erased[0, :, 1:4, 2:5].sum() == 0
    assert erased[1].sum() == 84
    assert erased[2].sum() == 0


def test_mix_weighs_image_and_partner_and_weight_1_is_the_image_itself():
    images, partners = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3)
    mixed = augment.mix(images, partners, torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(mixed[0], 0.3 * images[0] + 0.7 * partners[0])
    assert torch.equal(mixed[1], images[1])


def test_paste_takes_the_partner_inside_the_box():
    images, partners = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    pasted = augment.paste(images, partners, torch.tensor([[0, 1, 2, 4]]))
    assert pasted[0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_accepts_an_empty_batch(channels):
    images = torch.empty(0, channels, 8, 8, dtype=torch.uint8)
    none, boxes = torch.empty(0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)
    assert augment.shift_and_flip(images, none, none, none.bool()).shape == images.shape
    assert augment.flip_some(images, []).shape == images.shape
    assert augment.crop_and_resize(images, boxes, 5).shape == (0, channels, 5, 5)
    assert augment.normalize(images, (0.5,) * channels, (0.5,) * channels, images.float()).shape == images.shape
    floats = augment.jitter(images.float(), none.float(), none.float())
    assert augment.erase(augment.mix(floats, floats, none.float()), boxes).shape == images.shape
