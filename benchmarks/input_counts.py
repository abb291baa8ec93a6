"""Calls and copies per image of the input pipeline, by thread: counts only, no times.

    python benchmarks/input_counts.py --data FOLDER --output benchmarks/records/DATE_HARDWARE_input_counts

Packs FOLDER into shards and loads every image once, after one pass that starts the threads: with the CPU's decoder, and
as on a GPU. There a stand-in decodes in place of torchvision's `decode_jpeg` and another stands for the crop kernel, so
that what Python does around them is counted and they are not.

Counted are calls of Python functions and of C functions by the interpreter (`sys.setprofile`, which does not see C code
that calls C code), copies of a file's bytes, and the bytes that torch's operations and the crop kernel read and write.
"""

import argparse
import collections
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabatch.data.jpeg import gpu
from megabatch.data.jpeg.decode import decode
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.packing.pack import pack
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.kernels import crop_resize
from megabatch.nn.fused import stem
from megabatch.observe.environment import describe

COLOR = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
SIZE, BATCH = 224, 128
GPU_DTYPE = torch.float16
Counts = dict[str, float]


class Calls:
    """Counts calls by (thread, kind), and the copies of files' bytes."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def __call__(self, _: object, event: str, argument: Any) -> None:
        thread = threading.current_thread().name.rpartition("_")[0] or "main"
        if event == "call":
            self.counts[thread, "Python"] += 1
        elif event == "c_call":
            self.counts[thread, "C"] += 1
            if argument.__name__ in {"pread", "preadv"} or _copies(argument):
                self.counts["all", "file copies"] += 1


def _copies(function: Any) -> bool:
    """True for `copy` of an array of bytes."""
    owner = getattr(function, "__self__", None)
    return function.__name__ == "copy" and isinstance(owner, np.ndarray) and owner.dtype == np.uint8


class Bytes(TorchDispatchMode):
    """Counts the bytes that operations with an image-sized result of `batch` images read and write."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.total = batch, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 4 and len(result) == self.batch:
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim == 4]
            is_view = any(value.untyped_storage()._cdata == result.untyped_storage()._cdata for value in inputs)
            if func._schema.name.endswith("_") or not (is_view or "empty" in func._schema.name):
                self.total += result.nbytes + sum(value.nbytes for value in inputs if value is not result)
        return result


@contextmanager
def as_on_a_gpu() -> Iterator[Callable[[], int]]:
    """Decoder and crop kernel are stand-ins that are not counted; yields the bytes that the kernel wrote."""
    written: list[int] = []

    def decode_jpeg(files: Sequence[Tensor], **_: object) -> list[Tensor]:
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return [torch.from_numpy(decode(file.numpy().tobytes()).transpose(2, 0, 1)) for file in files]
        finally:
            sys.setprofile(profile)

    def launch(out: Tensor, *_: object, **__: object) -> None:
        written.append(out.nbytes)

    def torchvision_io() -> SimpleNamespace:
        return io

    def use_triton(*_: object) -> bool:
        return True

    def load(_: str) -> SimpleNamespace:
        return kernel

    io = SimpleNamespace(decode_jpeg=decode_jpeg, ImageReadMode=SimpleNamespace(RGB="rgb", GRAY="gray"))
    kernel = SimpleNamespace(crop_resize_kernel=collections.defaultdict(lambda: launch))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "_torchvision_io", torchvision_io))
        stack.enter_context(mock.patch.object(crop_resize, "use_triton", use_triton))
        stack.enter_context(mock.patch.object(crop_resize, "load", load))
        yield lambda: sum(written)


def loader_of(source: ShardSource, *, on_gpu: bool) -> TrainLoader:
    """The loader of training: with the CPU's decoder, or as `--decode gpu` builds it for a fused ResNet."""
    decoder = gpu.GpuDecoder("cpu", decode=gpu.nvjpeg(torch.device("cuda:0"), 3)) if on_gpu else None
    more = {"dtype": GPU_DTYPE, "padded_channels": stem.WIDTH} if on_gpu else {}
    return TrainLoader(
        source,
        seed=0,
        augmentation="random_resized_crop",
        channels_last=True,
        decode_threads=2,
        gpu_decoder=decoder,
        **COLOR,
        **more,
    )


def load_all(loader: TrainLoader) -> list[Batch]:
    """Every sample once, in whole batches."""
    starts = range(0, len(loader.source) - BATCH + 1, BATCH)
    return list(loader.batches((range(start, start + BATCH), SIZE) for start in starts))


def count_calls(source: ShardSource, *, on_gpu: bool) -> Counts:
    """Calls per image by thread, and how often the bytes of a file are copied."""
    calls = Calls()
    threading.setprofile(calls)
    try:
        loader = loader_of(source, on_gpu=on_gpu)
        load_all(loader)
        calls.counts.clear()
        sys.setprofile(calls)
        num_images = sum(batch.count for batch in load_all(loader))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    loader.close()
    return {f"{thread}: {kind}": count / num_images for (thread, kind), count in sorted(calls.counts.items())}


def count_bytes(source: ShardSource, *, on_gpu: bool) -> Counts:
    """Bytes per image that operations on whole batches move: in the loader, and before the step's first convolution."""
    moved = Bytes(BATCH)
    submit = ThreadPoolExecutor.submit

    def in_thread(work: Callable[..., object], *args: object) -> object:
        with moved:
            return work(*args)

    with (
        mock.patch.object(ThreadPoolExecutor, "submit", lambda own, work, *args: submit(own, in_thread, work, *args)),
        as_on_a_gpu() as written,
    ):
        loader = loader_of(source, on_gpu=on_gpu)
        batches = load_all(loader)
        loader.close()
    num_images = sum(batch.count for batch in batches)
    step = Bytes(BATCH)
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    with mock.patch.object(conv, "_conv_forward"), mock.patch.object(stem, "supports"), step:
        stem.stem_convolution(conv, batches[0].images.to(GPU_DTYPE), "auto")
    return {
        "crop kernel: bytes written": written() / num_images,
        "loader: bytes moved by other operations": moved.total / num_images,
        "step before the convolution: bytes moved": step.total / BATCH if on_gpu else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of images per class, or a tar of one")
    parser.add_argument("--output", type=Path, help="folder for counts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory() as scratch, as_on_a_gpu():
        pack(options.data, Path(scratch) / "shards", shard_bytes=3 << 20)
        source = ShardSource(sorted(Path(scratch, "shards").glob("train-*.tar")))
        for name, on_gpu in (("decoded by the CPU", False), ("decoded by the GPU", True)):
            results[name] = count_calls(source, on_gpu=on_gpu) | count_bytes(source, on_gpu=on_gpu)
            print(f"{name}, per image, batches of {BATCH} at {SIZE}:")
            for what, count in results[name].items():
                print(f"  {what:45} {count:12,.2f}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        facts = {"batch": BATCH, "size": SIZE, "num_images": len(source), "counts": results, "environment": describe()}
        (options.output / "counts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
