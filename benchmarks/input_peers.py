"""One pass over the same images by other input pipelines: decode, random-resized-crop, batches of uint8.

Each function takes a `Job` and returns a callable that makes one pass and returns the number of images; it raises
ImportError where its packages are missing. All use two workers, batches of 64 and an area of 8 to 100 % with an
aspect ratio of 3/4 to 4/3. Sources: the projects' own examples of ImageNet training.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megabatch.data.augment.crops import random_resized_crop_boxes
from megabatch.data.jpeg.decode import image_size
from megabatch.data.sources.folder import FolderSource

Pass = Callable[[], int]
WORKERS, BATCH = 2, 64


@dataclass(frozen=True)
class Job:
    """The images as a folder of classes, and the same ones as shards; the side of the crops."""

    folder: Path
    shards: list[Path]
    size: int

    @property
    def files(self) -> list[str]:
        """Paths of all images."""
        source = FolderSource(self.folder)
        return [source.name(i) for i in range(len(source))]


def import_torchvision():
    """torchvision, whose wheels for CUDA do not import with a CPU build of torch unless its operators are named."""
    names = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "qroi_align")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in (*names, *(f"_{name}_backward" for name in names)):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a) -> Tensor")
    import torchvision

    torchvision._operators = library  # a library that is let go takes its operators with it
    return torchvision


def torchvision_folder(job: Job) -> Pass:
    """ImageFolder, RandomResizedCrop and DataLoader: what most training scripts use."""
    torchvision = import_torchvision()
    from torchvision import datasets, transforms

    data = datasets.ImageFolder(
        job.folder, transforms.Compose([transforms.RandomResizedCrop(job.size), transforms.PILToTensor()])
    )
    assert torchvision.get_image_backend() == "PIL"
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(len(images) for images, _ in loader)


def webdataset_shards(job: Job) -> Pass:
    """WebDataset's own pipeline on the same shards, decoding with Pillow."""
    import webdataset
    from torchvision import transforms

    crop = transforms.Compose([transforms.RandomResizedCrop(job.size), transforms.PILToTensor()])
    data = (
        webdataset.WebDataset([str(path) for path in job.shards], shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(crop, lambda label: label)
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(len(images) for images, _ in loader)


def ffcv_jpeg(job: Job) -> Pass:
    """FFCV in its JPEG mode. Its writer encodes anew, at quality 90; its crop is resized by area averages."""
    import_torchvision()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    beton = Path(tempfile.mkdtemp()) / "images.beton"
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(beton), fields, num_workers=1).from_indexed_dataset(_Decoded(job.files))
    pipelines = {"image": [RandomResizedCropRGBImageDecoder((job.size, job.size))], "label": None}
    loader = Loader(str(beton), BATCH, WORKERS, True, OrderOption.RANDOM, pipelines=pipelines, drop_last=False)
    return lambda: sum(len(batch[0]) for batch in loader)


class _Decoded:
    def __init__(self, files: list[str]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self._files[index]).convert("RGB"), 0


def dali_cpu(job: Job) -> Pass:
    """DALI on the CPU: decode of a random region, antialiased resize."""
    from nvidia.dali import fn, pipeline_def, types

    files = job.files

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=files, labels=[0] * len(files), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        return fn.resize(images, size=(job.size, job.size), interp_type=types.INTERP_LINEAR, antialias=True)

    built = pipeline()
    built.build()
    num_batches = -(-len(files) // BATCH)
    return lambda: sum(len(built.run()[0]) for _ in range(num_batches))


def spdl_threads(job: Job) -> Pass:
    """spdl: threads around FFmpeg's decoder, crop and scaler."""
    import spdl.io
    import spdl.pipeline

    files = job.files

    def load(path: str) -> np.ndarray:
        data = Path(path).read_bytes()
        top, left, height, width = _random_box(data)
        steps = f"crop={width}:{height}:{left}:{top}:exact=1,scale={job.size}:{job.size}:flags=bilinear"
        frames = spdl.io.decode_packets(spdl.io.demux_image(data), filter_desc=f"{steps},format=pix_fmts=rgb24")
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    def once() -> int:
        pipeline = (
            spdl.pipeline.PipelineBuilder()
            .add_source(files)
            .pipe(load, concurrency=WORKERS)
            .aggregate(BATCH)
            .pipe(np.stack)
            .add_sink(4)
            .build(num_threads=WORKERS + 1)
        )
        with pipeline.auto_stop():
            return sum(len(batch) for batch in pipeline)

    return once


def opencv_threads(job: Job) -> Pass:
    """OpenCV's decoder and bilinear resize (not antialiased) in threads: no loader, only its functions."""
    import cv2

    cv2.setNumThreads(0)
    files = job.files

    def load(path: str) -> np.ndarray:
        data = Path(path).read_bytes()
        top, left, height, width = _random_box(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        cut = cv2.resize(image[top : top + height, left : left + width], (job.size, job.size))
        return cv2.cvtColor(cut, cv2.COLOR_BGR2RGB)

    return _in_threads(load, files)


def pillow_threads(job: Job) -> Pass:
    """Pillow in threads: no loader, only its functions."""
    files = job.files

    def load(path: str) -> np.ndarray:
        data = Path(path).read_bytes()
        top, left, height, width = _random_box(data)
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
        return np.asarray(image.resize((job.size, job.size), Image.Resampling.BILINEAR))

    return _in_threads(load, files)


def _in_threads(load: Callable[[str], np.ndarray], files: list[str]) -> Pass:
    threads = ThreadPoolExecutor(WORKERS)

    def once() -> int:
        return sum(len(np.stack(list(threads.map(load, chunk)))) for chunk in _chunks(files))

    return once


def _chunks(files: list[str]) -> Iterator[list[str]]:
    return (files[start : start + BATCH] for start in range(0, len(files), BATCH))


_draws = iter(range(10**12))


def _random_box(data: bytes) -> tuple[int, int, int, int]:
    """A box as `RandomResizedCrop` draws it."""
    height, width = image_size(data)
    epoch, sample = np.zeros(1, dtype=np.int64), np.array([next(_draws)])
    box = random_resized_crop_boxes(np.array([height]), np.array([width]), seed=0, epochs=epoch, samples=sample)[0]
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


PEERS: dict[str, Callable[[Job], Pass]] = {
    "torchvision": torchvision_folder,
    "webdataset": webdataset_shards,
    "ffcv": ffcv_jpeg,
    "dali": dali_cpu,
    "spdl": spdl_threads,
    "opencv": opencv_threads,
    "pillow": pillow_threads,
}
