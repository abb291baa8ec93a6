"""Ways to get a random-resized-crop of 224 out of a JPEG, one thread, interleaved, in processor time.

    python benchmarks/jpeg_options.py --data FOLDER --output benchmarks/records/DATE_HARDWARE_input

Options whose packages are missing are left out.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from megabatch.bench.timing import Timing, record, write_lines
from megabatch.data.augment.crops import random_resized_crop_boxes
from megabatch.data.jpeg import library as jpeg_library
from megabatch.data.jpeg.decode import MAX_PIXELS, image_size
from megabatch.data.sources.folder import FolderSource

SIZE = 224
Box = tuple[int, int, int, int]
Option = Callable[[bytes, Box], np.ndarray]


def compiled(data: bytes, box: Box) -> np.ndarray:
    """Our C: only what the crop needs."""
    out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    assert jpeg_library.crop(data, box, channels=3, max_pixels=MAX_PIXELS, out=out)
    return out


def pillow(data: bytes, box: Box) -> np.ndarray:
    """Pillow for everything."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def simplejpeg_pillow(data: bytes, box: Box) -> np.ndarray:
    """libjpeg-turbo, then Pillow's antialiased resize."""
    top, left, height, width = box
    image = Image.fromarray(simplejpeg.decode_jpeg(data))
    edges = (left, top, left + width, top + height)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=edges))


def simplejpeg_torch(data: bytes, box: Box) -> np.ndarray:
    """libjpeg-turbo, then torch's antialiased resize: what runs where ours is not compiled."""
    return _torch_resize(simplejpeg.decode_jpeg(data), box)


def imagecodecs_torch(data: bytes, box: Box) -> np.ndarray:
    """imagecodecs' libjpeg-turbo, then torch's antialiased resize."""
    import imagecodecs

    return _torch_resize(imagecodecs.jpeg8_decode(data), box)


def simplejpeg_opencv(data: bytes, box: Box) -> np.ndarray:
    """libjpeg-turbo, then OpenCV's bilinear resize, which is not antialiased."""
    import cv2

    top, left, height, width = box
    return cv2.resize(simplejpeg.decode_jpeg(data)[top : top + height, left : left + width], (SIZE, SIZE))


def opencv(data: bytes, box: Box) -> np.ndarray:
    """OpenCV for everything; not antialiased."""
    import cv2

    top, left, height, width = box
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return cv2.resize(pixels[top : top + height, left : left + width], (SIZE, SIZE))


def _torch_resize(pixels: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    planes = torch.from_numpy(cut).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)
    return resized.squeeze(0).permute(1, 2, 0).numpy()


OPTIONS: list[Option] = [
    *(compiled, pillow, simplejpeg_pillow, simplejpeg_torch),
    *(imagecodecs_torch, simplejpeg_opencv, opencv),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of JPEGs per class")
    parser.add_argument("--output", type=Path, help="folder for jpeg_options.jsonl")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = FolderSource(options.data)
    files = [source.read(int(i)) for i in np.linspace(0, len(source) - 1, options.images)]
    jobs = list(zip(files, _boxes(files), strict=True))
    usable = [option for option in OPTIONS if _works(option, *jobs[0])]
    seconds: dict[str, list[float]] = {option.__name__: [] for option in usable}
    for _ in range(options.rounds):
        for option in usable:
            start = time.thread_time()
            for data, box in jobs:
                option(data, box)
            seconds[option.__name__].append((time.thread_time() - start) / len(jobs))
    timings = {name: Timing(tuple(values[1:])) for name, values in seconds.items()}
    parameters = {"size": SIZE, "num_images": len(files), "mean_bytes": float(np.mean([len(data) for data in files]))}
    records = []
    for option in sorted(usable, key=lambda option: timings[option.__name__].median_s):
        name, timing = option.__name__, timings[option.__name__]
        difference = np.mean([np.abs(option(*job) - pillow(*job).astype(float)).mean() for job in jobs])
        what = parameters | {"difference_from_pillow_of_255": float(difference), "seconds_of": "processor, per image"}
        records.append(record("jpeg_options", name, timing, parameters=what, baseline=("pillow", timings["pillow"])))
        print(f"{name:20} {1 / timing.median_s:7,.0f} images/core-s   {difference:5.2f} of 255 from Pillow")
    if options.output:
        write_lines(options.output / "jpeg_options.jsonl", records)


def _works(option: Option, data: bytes, box: Box) -> bool:
    try:
        option(data, box)
    except ImportError as error:
        print(f"left out {option.__name__}: {error}")
        return False
    return True


def _boxes(files: list[bytes]) -> list[Box]:
    heights, widths = (np.array(sides) for sides in zip(*(image_size(data) for data in files), strict=True))
    numbers = np.arange(len(files))
    boxes = random_resized_crop_boxes(heights, widths, seed=0, epochs=numbers * 0, samples=numbers)
    return [(int(top), int(left), int(height), int(width)) for top, left, height, width in boxes.tolist()]


if __name__ == "__main__":
    main()
