"""Batches in 16 bit with zero channels: float32 batches, rounded once, in the layout that a fused stem reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import encode, photograph
from torch import Tensor

from megabatch.data.jpeg.decode import decode
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading import base_loader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import UserError
from megabatch.kernels import crop_resize

COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
KINDS = [
    {},
    {"cutout_size": 5, "random_erasing": 0.5},
    {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "cutout_size": 5},
    {"color_jitter": 0.2, "mixup_alpha": 0.4},
]
PADDED = {"padded_channels": 4, "channels_last": True}


@pytest.fixture
def photos(tmp_path: Path) -> FolderSource:
    for index in range(12):
        path = tmp_path / f"class-{index // 4}" / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photograph(40 + index, 60 - index, index), quality=90))
    return FolderSource(tmp_path)


def decode_whole(files: Sequence[Tensor]) -> list[Tensor]:
    """Stands in for nvJPEG."""
    return [torch.from_numpy(decode(file.numpy().tobytes())).permute(2, 0, 1) for file in files]


def load(source: object, *, on_gpu: bool = False, **options: object) -> Tensor:
    decoder = GpuDecoder("cpu", decode=decode_whole) if on_gpu else None
    loader = TrainLoader(source, seed=1, gpu_decoder=decoder, **COLOR, **options)
    images = loader.load(range(3, 14), resolution=20).images
    loader.close()
    return images


@pytest.mark.parametrize("on_gpu", [False, True], ids=["decoded by threads", "as decoded by a GPU"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("more", KINDS, ids=["flips", "erased", "mixed", "recoloured and mixed"])
def test_padded_images_are_the_float32_ones_rounded_once_with_zeros_behind_the_channels(photos, more, dtype, on_gpu):
    options = {"augmentation": "random_resized_crop", **more}
    plain = load(photos, on_gpu=on_gpu, channels_last=True, **options)
    images = load(photos, on_gpu=on_gpu, dtype=dtype, **PADDED, **options)
    assert (images.dtype, images.shape) == (dtype, (11, 4, 20, 20))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, :3], plain.to(dtype))
    assert not images[:, 3:].any()


def test_arrays_and_grey_images_are_padded_too(photos):
    pixels = torch.randint(0, 256, (30, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ArraySource(pixels, torch.arange(30) % 3, ("a", "b", "c"))
    grey = {"pixel_mean": (0.5,), "pixel_std": (0.2,), "image_channels": 1, "seed": 0}
    plain, padded = (
        TrainLoader(source, **grey, **more).load(range(9), resolution=20).images
        for more in ({}, {"dtype": torch.float16, **PADDED})
    )
    assert torch.equal(padded[:, :1], plain.half())
    assert padded.shape[1] == 4
    assert not padded[:, 1:].any()


def test_one_kernel_flips_normalises_rounds_and_pads_what_threads_decoded(photos, monkeypatch):
    options = {"augmentation": "random_resized_crop", "cutout_size": 5}
    expected = load(photos, channels_last=True, **options)
    calls = []

    def counted(*given: object, **how: object) -> Tensor:
        calls.append(how)
        return crop_resize.crop_and_resize(*given, **how)

    monkeypatch.setattr(base_loader, "use_triton", lambda *_: True)
    monkeypatch.setattr(base_loader, "crop_and_resize", counted)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2.0**-9)):
        images = load(photos, dtype=dtype, **PADDED, **options)
        assert images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images[:, :3].float(), expected, rtol=tolerance, atol=tolerance)
        assert not images[:, 3:].any()
    assert len(calls) == 2


def test_images_of_another_loader_format_are_converted_and_others_are_left_alone(photos):
    loader = TrainLoader(photos, seed=0, dtype=torch.float16, **PADDED, **COLOR)
    images = torch.randn(2, 3, 5, 5)
    converted = loader.formatted(images)
    assert torch.equal(converted[:, :3], images.half())
    assert loader.formatted(converted) is converted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padded_channels": 2, "channels_last": True}, "padded_channels=2, channels_last=True were given for 3"),
        ({"padded_channels": 4}, "padded_channels=4, channels_last=False were given"),
        ({"padded_channels": 0, "channels_last": True}, "needed: None or a whole number, 1 or more"),
    ],
)
def test_too_few_channels_or_another_memory_format_are_refused_with_what_works(photos, options, text):
    with pytest.raises(UserError, match=text):
        TrainLoader(photos, seed=0, **options, **COLOR)


def test_the_kernel_leaves_whole_images_as_they_are_but_for_the_normalisation():
    """A box that is as large as the output: every weight of the resize is 1 or 0."""
    pixels = torch.randint(0, 256, (3, 9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([0, 0, 9, 9]).expand(3, 4)
    options = {"size": 9, "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "dtype": torch.float32}
    flip = torch.tensor([True, False, True])
    out = crop_resize.crop_and_resize(list(pixels), boxes, flip=flip, **options)
    expected = np.where(flip[:, None, None, None], pixels.flip(2), pixels)
    torch.testing.assert_close(out[:, :3].permute(0, 2, 3, 1).numpy(), expected.astype(np.float32), rtol=1e-6, atol=0)
