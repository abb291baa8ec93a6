"""GPU decoding with the CPU decoder in place of nvJPEG: same crops, same replaced samples, memory reused safely."""

import ctypes
import itertools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import encode, photograph
from torch import Tensor

from megabatch.data.jpeg import gpu as gpu_decode
from megabatch.data.jpeg import gpu_reader
from megabatch.data.jpeg.decode import decode, image_size
from megabatch.data.jpeg.ends import is_gpu_decodable
from megabatch.data.jpeg.gpu import GpuDecoder, nvjpeg
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError, SettingsError
from megabatch.kernels.crop_resize import crop_and_resize

COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
TOLERANCE = 4 / 255 / min(COLOR["pixel_std"])  # largest difference between the compiled decoder and a whole decode


def tensor(file: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(file, np.uint8).copy())


def decode_on_cpu(files: Sequence[Tensor]) -> list[Tensor]:
    """Stands in for nvJPEG: decodes all files, or fails if one is damaged."""
    try:
        return [torch.from_numpy(decode(bytes_of(file))).permute(2, 0, 1).contiguous() for file in files]
    except DataError as error:
        raise RuntimeError("nvJPEG: bad JPEG") from error


def bytes_of(file: Tensor) -> bytes:
    return file.numpy().tobytes()


def decoder(decode: Callable[[Sequence[Tensor]], Sequence[Tensor]] = decode_on_cpu, **options: object) -> GpuDecoder:
    return GpuDecoder("cpu", decode=decode, **options)


def write_set(folder: Path, odd: dict[int, bytes]) -> FolderSource:
    """24 small photographs of six classes; `odd` replaces some of them."""
    for index in range(24):
        path = folder / f"class-{index // 4}" / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(odd.get(index, jpeg(index)))
    return FolderSource(folder)


def jpeg(seed: int, **options: object) -> bytes:
    return encode(photograph(60 + 3 * (seed % 7), 104 - 4 * (seed % 5), seed), quality=95, **options)


def broken_inside(data: bytes) -> bytes:
    """Damaged in the middle, with an intact header and end."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\xd3" * 150 + data[middle + 300 :]


@pytest.fixture
def mixed(tmp_path: Path) -> FolderSource:
    """Photographs, a PNG, a CMYK, a truncated, an empty, a damaged and a grey file."""
    odd = {1: encode(photograph(60, 80, 1), "PNG"), 2: jpeg(2, mode="CMYK"), 5: jpeg(5)[:1500], 6: b""}
    return write_set(tmp_path, odd | {9: broken_inside(jpeg(9)), 13: jpeg(13, mode="L")})


def loaders(source: FolderSource, kind: type = TrainLoader, **options: object) -> tuple:
    shared = {"max_bad_share": 0.5, "channels_last": True, **COLOR, **options}
    return kind(source, **shared), kind(source, gpu_decoder=decoder(), **shared)


def assert_alike(gpu: Batch, cpu: Batch) -> None:
    assert gpu.num_replaced == cpu.num_replaced
    for field in ("labels", "mixed_labels", "mix_weight"):
        one, other = getattr(gpu, field), getattr(cpu, field)
        assert one is other is None or torch.equal(one, other)
    assert gpu.images.shape == cpu.images.shape
    assert gpu.images.dtype == cpu.images.dtype
    assert gpu.images.stride() == cpu.images.stride()
    difference = (gpu.images.float() - cpu.images.float()).abs()
    assert difference.mean(dim=(1, 2, 3)).max() < TOLERANCE


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
@pytest.mark.parametrize("more", [{}, {"color_jitter": 0.2, "cutout_size": 5, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}])
def test_batches_equal_those_of_the_cpu_with_the_same_samples_replaced(mixed, augmentation, more):
    cpu, gpu = loaders(mixed, seed=3, augmentation=augmentation, **more)
    replaced = 0
    for first in (0, 24, 43):
        one, other = (loader.load(range(first, first + 23), resolution=40) for loader in (gpu, cpu))
        assert_alike(one, other)
        replaced += one.num_replaced
    assert replaced >= 4
    assert gpu.num_replaced == cpu.num_replaced == replaced
    assert len(gpu.bad_samples) == len(cpu.bad_samples) == 3


def test_evaluation_batches_equal_those_of_the_cpu(mixed):
    cpu, gpu = loaders(mixed, EvalLoader, resolution=32)
    for one, other in zip(gpu.batches(0, 24, 7), cpu.batches(0, 24, 7), strict=True):
        assert_alike(one, other)


def test_prefetched_batches_equal_those_loaded_directly(mixed):
    _, gpu = loaders(mixed, seed=1, augmentation="random_resized_crop")
    requests = [(range(p, p + 8), 24) for p in range(0, 48, 8)]
    for batch, (positions, resolution) in zip(gpu.batches(requests), requests, strict=True):
        assert torch.equal(batch.images, gpu.load(positions, resolution=resolution).images)
    assert gpu.load(range(5, 5), resolution=24).images.shape == (0, 3, 24, 24)
    gpu.close()


def test_only_complete_ycbcr_or_grey_jpegs_are_decoded_on_the_gpu(mixed):
    sent: list[bytes] = []
    gpu = TrainLoader(
        mixed,
        seed=0,
        max_bad_share=0.5,
        gpu_decoder=decoder(lambda files: sent.extend(map(bytes_of, files)) or decode_on_cpu(files)),
        **COLOR,
    )
    gpu.load(range(24), resolution=16)
    assert {index for index in range(24) if mixed.read(index) in sent} == set(range(24)) - {1, 2, 5, 6}
    assert all(is_gpu_decodable(file) for file in sent)


@pytest.mark.parametrize("tail", [b"\0" * 40, b"film" * 9], ids=["zeros", "film"])
def test_what_follows_an_image_neither_hides_that_it_is_cut_off_nor_keeps_it_from_the_gpu(tmp_path, tail):
    source = write_set(tmp_path, {3: jpeg(3)[:1500] + tail, 8: jpeg(8) + tail})
    cpu, _ = loaders(source, seed=0, shuffle=False)
    sent: list[bytes] = []
    counting = decoder(lambda files: sent.extend(map(bytes_of, files)) or decode_on_cpu(files))
    gpu = TrainLoader(
        source, seed=0, shuffle=False, max_bad_share=0.5, channels_last=True, gpu_decoder=counting, **COLOR
    )
    assert_alike(gpu.load(range(24), resolution=16), cpu.load(range(24), resolution=16))
    assert list(gpu.bad_samples) == list(cpu.bad_samples) == [3]
    assert {index for index in range(24) if source.read(index) in sent} == set(range(24)) - {3}


@pytest.mark.usefixtures("either")
def test_boxes_are_those_drawn_one_by_one_from_the_sizes_that_the_decoder_reads(mixed):
    loader = TrainLoader(
        mixed, seed=5, augmentation="random_resized_crop", max_bad_share=0.5, gpu_decoder=decoder(), **COLOR
    )
    samples = loader._read((range(24), 20)).samples
    drawn = loader._samples(range(24))
    assert 19 <= samples.encoded.sum() <= 20
    for row in np.flatnonzero(samples.encoded):
        height, width = (np.array([side]) for side in image_size(mixed.read(int(drawn.indices[row]))))
        box = loader._policy.boxes(drawn.part(slice(row, row + 1)), height, width)[0]
        assert samples.boxes[row].tolist() == box.tolist()


def test_a_file_that_fails_on_the_gpu_does_not_affect_the_others(mixed):
    files = [tensor(mixed.read(index)) for index in (7, 8, 9, 10, 11)]
    images = decoder().decode(files)
    assert [image is None for image in images] == [False, False, True, False, False]
    for file, image in zip(files, images, strict=True):
        assert image is None or torch.equal(image, decode_on_cpu([file])[0])


def test_running_out_of_memory_is_not_treated_as_a_bad_file(mixed):
    def full(_: Sequence[Tensor]) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        decoder(full).decode([tensor(mixed.read(0))])


def test_an_image_whose_size_differs_from_its_header_is_decoded_on_the_host(mixed):
    """For example, if the decoder applies the EXIF orientation: the box was drawn for the image as stored."""
    cpu, _ = loaders(mixed, seed=0)
    turned = decoder(lambda files: [image.transpose(1, 2) for image in decode_on_cpu(files)])
    gpu = TrainLoader(mixed, seed=0, max_bad_share=0.5, channels_last=True, gpu_decoder=turned, **COLOR)
    assert_alike(gpu.load(range(24), resolution=16), cpu.load(range(24), resolution=16))


def test_the_number_and_size_of_images_decoded_together_is_limited(mixed, monkeypatch):
    calls: list[int] = []
    gpu = decoder(lambda files: calls.append(len(files)) or decode_on_cpu(files))
    loader = TrainLoader(mixed, seed=0, max_bad_share=0.5, gpu_decoder=gpu, **COLOR)
    whole = loader.load(range(24), resolution=16)
    assert calls[0] == 20
    monkeypatch.setattr(gpu_reader, "_MAX_BYTES", 3 * 2 * 78 * 104)
    calls.clear()
    assert torch.equal(loader.load(range(24), resolution=16).images, whole.images)
    assert len([count for count in calls if count > 1]) >= 6
    parts = list(gpu_reader._groups(np.array([5, 5, 5 << 30, 5, *[5] * 200])))
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 3), (3, 204)]
    monkeypatch.setattr(gpu_decode, "MAX_IMAGES", 7)
    calls.clear()
    assert len(gpu.decode([tensor(mixed.read(7))] * 16)) == 16
    assert calls == [7, 7, 2]


def test_cached_images_give_equal_pixels_and_are_not_decoded_again(mixed):
    calls: list[int] = []
    counting = decoder(lambda files: calls.append(len(files)) or decode_on_cpu(files), cache_bytes=1 << 30)
    options = {"seed": 0, "augmentation": "random_resized_crop", "max_bad_share": 0.5, **COLOR}
    cached, plain = (TrainLoader(mixed, gpu_decoder=gpu, **options) for gpu in (counting, decoder()))
    for first in range(0, 72, 24):
        one, other = (loader.load(range(first, first + 24), resolution=32) for loader in (cached, plain))
        assert torch.equal(one.images, other.images)
        assert one.num_replaced == other.num_replaced
        if first == 0:
            calls.clear()
    assert len(counting.cache) == 19
    assert set(calls) <= {1}  # only the file that failed is decoded again


def test_the_cache_stays_within_its_limit_and_evicts_nothing():
    cache = gpu_decode.DecodedCache(100)
    images = [torch.full((60,), i, dtype=torch.uint8) for i in range(3)]
    cache.offer(dict(enumerate(images)))
    cache.offer({7: torch.zeros(40, dtype=torch.uint8)})
    found = cache.find(np.array([7, 1, 0]))
    assert list(found) == [0, 2]
    assert found[2] is images[0]
    assert len(cache) == 2


# ---- pytorch/vision#9606: nvJPEG writes at the time of the call, into memory that queued kernels still read


class Device:
    """A device that runs queued work late and whose allocator reuses memory as soon as no tensor refers to it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        size = int(np.prod(shape))
        block = self.free.pop() if self.free else np.zeros(1 << 16, dtype=np.uint8)
        lease = np.frombuffer(memoryview(block), dtype=np.uint8, count=size)
        weakref.finalize(lease, self.free.append, block)
        return torch.from_numpy(lease).view(shape)

    def decode(self, files: Sequence[Tensor]) -> list[Tensor]:
        """Writes at the time of the call, ahead of queued work."""
        images = []
        for image in decode_on_cpu(files):
            images.append(self.empty(tuple(image.shape)))
            images[-1].copy_(image)
        return images

    def crop(self, images: Sequence[Tensor], boxes: Tensor, *, out: Tensor, **options: object) -> None:
        """Queues a crop that, like a kernel, reads its input addresses only when it runs."""
        places = [(image.data_ptr(), tuple(image.shape), image.stride()) for image in images]

        def run() -> None:
            crop_and_resize([self.at(*place) for place in places], boxes, out=out, **options)

        self.work.append(run)

    @staticmethod
    def at(address: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        memory = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (extent,))
        return torch.from_numpy(memory).as_strided(shape, stride)

    def record_event(self) -> "Device":
        return self

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


def late_batches(source: FolderSource, options: dict, monkeypatch: pytest.MonkeyPatch, *, holds: bool) -> list[Tensor]:
    device = Device()
    gpu = decoder(device.decode, record_event=device.record_event)
    if not holds:
        monkeypatch.setattr(gpu, "hold", lambda _: None)
    monkeypatch.setattr(gpu_reader, "crop_and_resize", device.crop)
    monkeypatch.setattr(gpu_reader, "_MAX_BYTES", 4 * 3 * 78 * 104)
    loader = TrainLoader(source, gpu_decoder=gpu, **options)
    images = [loader.load(range(first, first + 12), resolution=24).images for first in range(0, 48, 12)]
    device.synchronize()
    monkeypatch.undo()
    return images


def test_images_are_kept_alive_until_they_are_read_so_that_no_later_decode_overwrites_them(tmp_path, monkeypatch):
    """Without `hold`, the same decoder does overwrite images, which shows that this test detects the fault."""
    options = {"seed": 2, "augmentation": "random_resized_crop", "channels_last": True, **COLOR}
    source = write_set(tmp_path, {})
    sound = TrainLoader(source, gpu_decoder=decoder(), **options)
    expected = [sound.load(range(first, first + 12), resolution=24).images for first in range(0, 48, 12)]
    held, dropped = (late_batches(source, options, monkeypatch, holds=holds) for holds in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(dropped, expected, strict=True))


def test_images_are_released_only_after_their_event():
    numbers = itertools.count()
    log: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = next(numbers)

        def synchronize(self) -> None:
            log.append(f"waited for {self.number}")

    gpu = decoder(lambda files: [torch.zeros(3, 2, 2, dtype=torch.uint8) for _ in files], record_event=Event)
    for number in range(4):
        log.append(f"decodes {number}")
        images = gpu.decode([tensor(b"x")])
        weakref.finalize(images[0], log.append, f"released {number}")
        gpu.hold(images)
        del images
    gpu.release()
    ends = [[f"waited for {number}", f"released {number}"] for number in range(4)]
    begins = [[f"decodes {number}"] for number in range(4)]
    assert log == [*begins[0], *begins[1], *begins[2], *ends[0], *begins[3], *ends[1], *ends[2], *ends[3]]


# ---- missing GPU or torchvision


def test_without_a_gpu_or_torchvision_the_error_names_an_option_that_works(monkeypatch):
    with pytest.raises(SettingsError, match="not cpu; --decode cpu works"):
        GpuDecoder("cpu")
    monkeypatch.setattr(gpu_decode, "_torchvision_io", lambda: None)
    with pytest.raises(SettingsError, match=r"needs torchvision.*--decode cpu works"):
        nvjpeg(torch.device("cuda"), 3)
    assert not gpu_decode.has_torchvision()


def test_torchvision_receives_the_bytes_and_the_color_mode(monkeypatch):
    class Io:
        class ImageReadMode:
            RGB, GRAY = "rgb", "gray"

        @staticmethod
        def decode_jpeg(encoded, *, mode, device):
            return [(bytes(data.numpy()), mode, str(device)) for data in encoded]

    monkeypatch.setattr(gpu_decode, "_torchvision_io", lambda: Io)
    for channels, mode in ((3, "rgb"), (1, "gray")):
        assert nvjpeg(torch.device("cuda:0"), channels)([tensor(b"ab"), tensor(b"c")]) == [
            (b"ab", mode, "cuda:0"),
            (b"c", mode, "cuda:0"),
        ]
