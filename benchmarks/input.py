"""Decode and random-resized-crop to 224: megabatch against other input pipelines, on the same images, interleaved.

    python benchmarks/input.py --data FOLDER --output benchmarks/records/DATE_HARDWARE_input

FOLDER holds a folder of images per class. Every pipeline makes a pass over all images in each round, in an order drawn
anew. Counted are seconds by the clock, and processor seconds of the process and its workers: the latter hardly depend
on what else the machine does. Only what is installed is compared; what is not is named.
"""

import argparse
import contextlib
import itertools
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from input_peers import BATCH, PEERS, WORKERS, Job, Pass
from megabatch.bench.timing import Timing, record, write_lines
from megabatch.data.augment.crops import random_resized_crop_boxes
from megabatch.data.jpeg import library as jpeg_library
from megabatch.data.jpeg.decode import decode, decode_crop
from megabatch.data.loading.reader import BadSamples, BatchReader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.packing.pack import pack
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.tar.shards import ShardSource

PACKAGES = [
    *("torch", "torchvision", "numpy", "pillow", "simplejpeg", "webdataset", "ffcv", "spdl-io"),
    *("nvidia-dali-cuda130", "opencv-python-headless"),
]
OURS = "megabatch"


def batches_of(source: EncodedSource, size: int) -> Pass:
    """The reader that training uses, without what follows it: uint8 batches, as the others make them."""
    reader = BatchReader(
        source,
        channels=3,
        executor=ThreadPoolExecutor(WORKERS),
        bad_samples=BadSamples(source, max_share=0.0, on_bad_sample=None),
    )
    order = np.random.default_rng(0).permutation(len(source))
    out = np.empty((BATCH, size, size, 3), dtype=np.uint8)

    def once() -> int:
        done = 0
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]

            def draw(
                chunk: slice, heights: np.ndarray, widths: np.ndarray, indices: np.ndarray = indices
            ) -> np.ndarray:
                epochs = np.full(len(indices[chunk]), random.randrange(10**6))
                return random_resized_crop_boxes(heights, widths, seed=0, epochs=epochs, samples=indices[chunk])

            reader.read(indices, size, draw, out[: len(indices)])
            done += len(indices)
        return done

    return once


def without_compiled_decoder(once: Pass) -> Pass:
    """The same pass with libjpeg-turbo and torch only, as on a machine without a C compiler."""

    def plain() -> int:
        function = jpeg_library._function
        jpeg_library._function = lambda _: None
        try:
            return once()
        finally:
            jpeg_library._function = function

    return plain


def whole_loader(source: EncodedSource, size: int) -> Pass:
    """All that training does: flips, and normalised float32 tensors."""
    loader = TrainLoader(
        source,
        seed=0,
        augmentation="random_resized_crop",
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
        channels_last=True,
        decode_threads=WORKERS,
    )
    ends = [*range(0, len(source), BATCH), len(source)]
    requests = [(range(start, end), size) for start, end in itertools.pairwise(ends)]
    return lambda: sum(batch.count for batch in loader.batches(iter(requests)))


def pipelines(job: Job) -> tuple[dict[str, Pass], dict[str, str]]:
    """What can be run here, and why the rest cannot."""
    folder, shards = FolderSource(job.folder), ShardSource(job.shards)
    works = {
        OURS: batches_of(folder, job.size),
        "megabatch, shards": batches_of(shards, job.size),
        "megabatch, not compiled": without_compiled_decoder(batches_of(folder, job.size)),
        "megabatch, whole loader": whole_loader(folder, job.size),
    }
    missing = {}
    for name, make in PEERS.items():
        try:
            works[name] = make(job)
        except (ImportError, RuntimeError, OSError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return works, missing


def processor_s() -> float:
    """Processor seconds of this process, of its workers, and of those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(_ticks_of_children(thread) for thread in Path("/proc/self/task").iterdir())
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / os.sysconf("SC_CLK_TCK")


def _ticks_of_children(thread: Path) -> int:
    """Clock ticks that the living children of a thread have run; 0 for a thread that ends meanwhile."""
    ticks = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for number in (thread / "children").read_text().split():
            fields = Path("/proc", number, "stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks


def compare(works: Mapping[str, Pass], rounds: int, say: Callable[[str], None]) -> dict[str, dict[str, Timing]]:
    """Seconds an image takes, by the clock and of processor time, for each pipeline and round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in works}
    generator = random.Random(0)
    for number in range(-1, rounds):
        for name in generator.sample(sorted(works), len(works)):
            clock, processor = time.perf_counter(), processor_s()
            count = works[name]()
            if number >= 0:  # the round before the first starts workers and fills caches
                seconds[name]["clock"].append((time.perf_counter() - clock) / count)
                seconds[name]["processor"].append((processor_s() - processor) / count)
        say(f"round {number + 1} of {rounds}")
    return {name: {kind: Timing(tuple(values)) for kind, values in both.items()} for name, both in seconds.items()}


def difference_from_pillow(folder: Path, size: int) -> dict[str, float]:
    """Mean absolute difference of our crops from Pillow's antialiased ones, of 255: mean and worst image."""
    source = FolderSource(folder)
    differences = []
    for i in range(len(source)):
        data = source.read(i)
        whole = decode(data)
        height, width = (np.array([side]) for side in whole.shape[:2])
        index = np.array([i])
        top, left, rows, columns = random_resized_crop_boxes(height, width, seed=1, epochs=index * 0, samples=index)[0]
        ours = decode_crop(data, box=(int(top), int(left), int(rows), int(columns)), size=size)
        cut = Image.fromarray(whole[top : top + rows, left : left + columns])
        theirs = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)
        differences.append(float(np.abs(ours - theirs).mean()))
    return {"mean": float(np.mean(differences)), "worst_image": max(differences), "num_images": len(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of images per class")
    parser.add_argument("--output", type=Path, help="folder for input.jsonl")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--only", default="", help="comma-separated names of pipelines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        pack(options.data, Path(scratch) / "shards", shard_bytes=3 << 20)
        job = Job(options.data, sorted(Path(scratch, "shards").glob("*.tar")), options.size)
        works, missing = pipelines(job)
        if options.only:
            works = {name: works[name] for name in (OURS, *options.only.split(",")) if name in works}
        timings = compare(works, options.rounds, lambda line: print(line, flush=True))
    pixels = difference_from_pillow(options.data, options.size)
    _report(timings, missing, pixels, options)


def _report(
    timings: dict[str, dict[str, Timing]],
    missing: dict[str, str],
    pixels: dict[str, float],
    options: argparse.Namespace,
) -> None:
    parameters = {
        "size": options.size,
        "batch": BATCH,
        "workers": WORKERS,
        "rounds": options.rounds,
        "num_images": pixels["num_images"],
        "compiled_decoder": jpeg_library.is_available(),
        "difference_from_pillow_of_255": pixels,
        "missing": missing,
        "seconds_are": "per image",
    }
    records = []
    for kind in ("processor", "clock"):
        baseline = timings[OURS][kind]
        for name, both in sorted(timings.items(), key=lambda item: item[1]["processor"].median_s):
            what = parameters | {"seconds_of": kind}
            records.append(
                record("input", name, both[kind], parameters=what, baseline=(OURS, baseline), packages=PACKAGES)
            )
            rate = 1 / both[kind].median_s
            unit = "images/core-s" if kind == "processor" else "images/s"
            print(
                f"{name:26} {rate:8,.0f} {unit:14} {both[kind].median_s / baseline.median_s:6.2f} x the time of {OURS}"
            )
    print(f"difference from Pillow, of 255: {pixels['mean']:.2f} on average, {pixels['worst_image']:.2f} at worst")
    for name, reason in missing.items():
        print(f"not compared: {name}: {reason.splitlines()[0][:150]}")
    if options.output:
        write_lines(options.output / "input.jsonl", records)


if __name__ == "__main__":
    main()
