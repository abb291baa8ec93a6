import pytest
import torch
from photographs import TEST_PHOTOS

from megabatch.data.jpeg.gpu import GpuDecoder, has_torchvision
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PHOTOS = FolderSource(TEST_PHOTOS / "train")
COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
EVERYTHING = {"cutout_size": 3, "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "color_jitter": 0.2}


def arrays() -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(500) % 10, tuple("abcdefghij"))


def assert_close(one: Batch, other: Batch) -> None:
    torch.testing.assert_close(one.images.cpu(), other.images.cpu(), rtol=1e-4, atol=1e-4)
    for field in ("labels", "mixed_labels", "mix_weight"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("kind", ["arrays", "photos"])
@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_a_gpu_makes_the_batches_of_a_cpu(kind, augmentation):
    options = {"seed": 1, "augmentation": augmentation, "channels_last": True, **COLOR, **EVERYTHING}
    source = arrays() if kind == "arrays" else PHOTOS
    cpu, gpu = (TrainLoader(source, device=device, **options) for device in ("cpu", "cuda"))
    batch = gpu.load(range(7, 57), resolution=32)
    assert batch.images.is_cuda
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert_close(batch, cpu.load(range(7, 57), resolution=32))


def test_batches_made_beside_heavy_work_on_the_gpu_are_whole_when_they_are_used():
    """Copies and augmentation run on a stream of their own; a missing wait would show half-made batches."""
    options = {"seed": 1, "augmentation": "random_resized_crop", **COLOR}
    cpu, gpu = (TrainLoader(PHOTOS, device=device, prefetch_batches=4, **options) for device in ("cpu", "cuda"))
    requests = [(range(p, p + 48), 64) for p in range(0, 48 * 30, 48)]
    busy, kept = torch.randn(4096, 4096, device="cuda"), []
    for batch in gpu.batches(requests):
        busy = (busy @ busy).tanh()
        kept.append(batch.images * 1.0)  # used on the main stream, at once
        batch.images.zero_()  # and the batch's memory may be given away right after
        del batch
    assert bool(torch.isfinite(busy).all())
    for images, (positions, resolution) in zip(kept, requests, strict=True):
        expected = cpu.load(positions, resolution=resolution).images
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_on_a_gpu_is_that_of_a_cpu():
    cpu, gpu = (EvalLoader(PHOTOS, resolution=48, device=device, **COLOR) for device in ("cpu", "cuda"))
    for one, other in zip(gpu.batches(0, 24, 7), cpu.batches(0, 24, 7), strict=True):
        assert_close(one, other)


needs_torchvision = pytest.mark.skipif(not has_torchvision(), reason="needs torchvision, which decodes on a GPU")


@needs_torchvision
@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_batches_decoded_on_a_gpu_are_those_of_a_cpu_but_for_the_decoders(augmentation):
    options = {"seed": 1, "augmentation": augmentation, "channels_last": True, "device": "cuda", **COLOR}
    by_cpu = TrainLoader(PHOTOS, **options)
    by_gpu = TrainLoader(PHOTOS, gpu_decoder=GpuDecoder("cuda", cache_bytes=1 << 28), **options)
    for first in (0, 24, 41):  # decoded, and then from the cache
        one, other = (loader.load(range(first, first + 24), resolution=64) for loader in (by_gpu, by_cpu))
        assert torch.equal(one.labels, other.labels)
        assert one.images.stride() == other.images.stride()
        steps = (one.images - other.images).abs().mean(dim=(1, 2, 3)) * 255 * min(COLOR["pixel_std"])
        assert steps.max() < 4


@needs_torchvision
def test_decoding_on_a_gpu_overwrites_no_neighbour_while_the_gpu_is_behind():
    """pytorch/vision#9606: tensors are let go of while work that reads them still waits, and a decode comes between."""
    loader = TrainLoader(PHOTOS, seed=1, device="cuda", gpu_decoder=GpuDecoder("cuda"), prefetch_batches=4, **COLOR)
    requests = [(range(p, p + 24), 96) for p in range(0, 24 * 20, 24)]
    expected = [loader.load(positions, resolution=size).images.clone() for positions, size in requests]
    torch.cuda.synchronize()
    sums, kept, busy = [], [], torch.randn(6144, 6144, device="cuda")
    for number, batch in enumerate(loader.batches(requests)):
        neighbours = [torch.full((3, 534, 400), number + i, dtype=torch.uint8, device="cuda") for i in range(24)]
        for _ in range(8):
            busy = (busy @ busy).tanh()
        kept.append(batch.images * 1.0)
        sums.append(torch.stack([neighbour.float().sum() for neighbour in neighbours]))
        del batch, neighbours
    for number, (images, total) in enumerate(zip(kept, sums, strict=True)):
        assert torch.equal(images, expected[number])
        assert total.tolist() == [float(3 * 534 * 400 * (number + i)) for i in range(24)]
    assert bool(torch.isfinite(busy).all())
