"""The batched crop and resize against that of `data/jpeg/decode.py`, which is Pillow's, and against its reference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megabatch.data.jpeg.decode import resize_box
from megabatch.errors import UserError
from megabatch.kernels.crop_resize import crop_and_resize

pytestmark = pytest.mark.usefixtures("interpreter")

SIZE = (9, 11)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
BOXES = {
    "shrunk": [3, 4, 30, 40],
    "enlarged": [2, 1, 5, 6],
    "whole": [0, 0, 40, 50],
    "fractions": [1.3, 2.6, 33.2, 40.9],
    "one row": [7, 3, 1, 20],
    "one pixel": [39, 49, 1, 1],
}


def photographs(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Smooth images with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for height, width in shapes:
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        waves = torch.stack([torch.sin(row / 7 + k) + torch.cos(column / 5 - k) for k in range(3)], dim=2)
        noise = torch.randn(height, width, 3, generator=generator)
        images.append((128 + 50 * waves + 10 * noise).clamp(0, 255).to(torch.uint8))
    return images


def to_pixels(batch: Tensor, number: int) -> np.ndarray[Any, Any]:
    """Undoes the normalisation: (rows, columns, channels), 0 to 255."""
    image = batch[number, :3].permute(1, 2, 0).double()
    return (255 * (image * torch.tensor(STD) + torch.tensor(MEAN))).numpy()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("box", BOXES)
def test_pixels_match_the_cpu_path_up_to_its_rounding_to_8_bits(box: str, backend: Any) -> None:
    (image,) = photographs((40, 50))
    boxes = torch.tensor([BOXES[box]], dtype=torch.float64)
    batch = crop_and_resize([image], boxes, size=SIZE, mean=MEAN, std=STD, dtype=torch.float32, backend=backend)
    expected = resize_box(image.numpy(), tuple(boxes[0].tolist()), SIZE)
    difference = np.abs(to_pixels(batch, 0) - expected)
    assert difference.max() < 1.1  # half a step for each of two axes, and float32
    assert difference.mean() < 0.35


@pytest.mark.slow
def test_one_launch_for_many_sizes_flips_and_layouts_matches_the_reference() -> None:
    images = photographs((40, 50), (17, 9), (90, 30))
    boxes = torch.tensor([[3, 4, 30, 40.0], [0, 0, 17, 9], [10.3, 2.6, 70.2, 20.9]])
    flip = torch.tensor([True, False, True])
    options: dict[str, Any] = {"size": SIZE, "mean": MEAN, "std": STD, "flip": flip, "dtype": torch.float32}
    expected = crop_and_resize(images, boxes, backend="reference", **options)
    ours = crop_and_resize(images, boxes, backend="triton", **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    planes = [image.permute(2, 0, 1).contiguous() for image in images]
    assert torch.equal(crop_and_resize(planes, boxes, layout="CHW", backend="triton", **options), ours)
    bordered = [torch.full((100, 100, 3), 255, dtype=torch.uint8) for _ in images]
    for border, image in zip(bordered, images, strict=True):
        border[5 : 5 + image.shape[0], 7 : 7 + image.shape[1]] = image
    inner = [b[5 : 5 + i.shape[0], 7 : 7 + i.shape[1]] for b, i in zip(bordered, images, strict=True)]
    assert torch.equal(crop_and_resize(inner, boxes, backend="triton", **options), ours)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_pixels_outside_the_box_do_not_affect_the_result(backend: Any) -> None:
    (image,) = photographs((40, 50))
    changed = torch.full_like(image, 255)
    changed[3:33, 4:44] = image[3:33, 4:44]
    box = torch.tensor([[3, 4, 30, 40]])
    first, second = (
        crop_and_resize([pixels], box, size=SIZE, mean=MEAN, std=STD, backend=backend) for pixels in (image, changed)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("channels", "padded"),
    [(3, 4), pytest.param(3, 3, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_the_batch_is_float16_channels_last_with_zero_padding_channels(
    channels: int, padded: int, backend: Any
) -> None:
    image = photographs((40, 50))[0][..., :channels]
    batch = crop_and_resize(
        [image, image],
        torch.tensor([BOXES["shrunk"]] * 2),
        size=5,
        mean=MEAN[:channels],
        std=STD[:channels],
        padded_channels=padded,
        backend=backend,
    )
    assert batch.dtype == torch.float16
    assert batch.shape == (2, padded, 5, 5)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert not batch[:, channels:].any()
    assert batch[:, :channels].any()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_out_may_be_a_slice_of_a_larger_batch(backend: Any) -> None:
    images = photographs((40, 50), (60, 45))
    boxes = torch.tensor([BOXES["shrunk"], BOXES["fractions"]])
    options: dict[str, Any] = {"size": SIZE, "mean": MEAN, "std": STD, "dtype": torch.float32, "backend": backend}
    whole = torch.full((4, *SIZE, 4), 7.0).permute(0, 3, 1, 2)
    written = crop_and_resize(images, boxes, out=whole[1:3], **options)
    assert written.data_ptr() == whole[1].data_ptr()
    assert torch.equal(whole[1:3], crop_and_resize(images, boxes, **options))
    assert bool((whole[[0, 3]] == 7).all())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_flipped_image_is_the_mirror_image(backend: Any) -> None:
    (image,) = photographs((40, 50))
    boxes = torch.tensor([BOXES["fractions"]] * 2)
    batch = crop_and_resize(
        [image, image], boxes, size=SIZE, mean=MEAN, std=STD, flip=torch.tensor([False, True]), backend=backend
    )
    assert torch.equal(batch[0].flip(2), batch[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "0 images"),
        ({"boxes": torch.tensor([[0, 0, 41, 50]])}, "box inside it"),
        ({"boxes": torch.tensor([[-1, 0, 10, 10]])}, "box inside it"),
        ({"boxes": torch.tensor([[0, 0, 0, 10]])}, "box inside it"),
        ({"boxes": torch.tensor([[0, 0, 10]])}, r"boxes \(1, 3\)"),
        ({"images": [torch.zeros(40, 50, 3)]}, "needed: uint8"),
        ({"images": [torch.zeros(40, 50, 1, dtype=torch.uint8)]}, "3 channels"),
        ({"padded_channels": 2}, "padded_channels=2"),
        ({"std": (0.0, 1.0, 1.0)}, "needed: one each per channel"),
        ({"flip": torch.tensor([True, False])}, "1 images"),
        ({"layout": "HCW"}, "needed HWC or CHW"),
        ({"out": torch.zeros(1, 4, 8, 8, dtype=torch.float16)}, "1 x 4 x 8 x 8 with the channels last in memory"),
        ({"out": torch.zeros(1, 8, 8, 4).permute(0, 3, 1, 2)}, "out is torch.float32"),
    ],
)
def test_invalid_arguments_raise_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "images": photographs((40, 50)),
        "boxes": torch.tensor([BOXES["whole"]]),
        "size": 8,
        "mean": MEAN,
        "std": STD,
    }
    with pytest.raises(UserError, match=message):
        crop_and_resize(**{**given, **changes})
