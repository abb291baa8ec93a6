"""Memory of several workers that read large shards at random: what each of them holds, in private and in all.

    python benchmarks/input_memory.py --output benchmarks/records/DATE_HARDWARE_input_memory

Writes synthetic shards (5 GiB by default) to a temporary folder, and deletes them. Each worker is a process of its own
with a training loader over all shards. Private memory is what ends with the process; the rest of the resident memory
is shared: libraries, and no shard, as these are read and not mapped.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megabatch.bench.timing import write_lines
from megabatch.observe.environment import describe

_MIB = 1 << 20


def write_shards(folder: Path, num_shards: int, shard_bytes: int) -> int:
    """Shards of noisy JPEGs of about 110 KB, as ImageNet's are; returns the number of samples."""
    rng = np.random.default_rng(0)
    images = [_image(rng) for _ in range(64)]
    number = 0
    for shard in range(num_shards):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            while tar.offset < shard_bytes:
                _add(tar, f"{number:08d}.jpg", images[number % len(images)])
                _add(tar, f"{number:08d}.cls", str(number % 1000).encode())
                number += 1
    return number


def _image(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, size=(24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(pixels + rng.normal(0, 14, size=pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def memory() -> dict[str, float]:
    """MiB of this process: all that is resident, what is its own, its share of the rest."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"resident": kib["Rss"] / 1024, "private": private / 1024, "proportional": kib["Pss"] / 1024}


def work(folder: Path, rank: int, batches: int, batch: int, prefetch: int) -> dict[str, dict[str, float]]:
    """Memory of one worker before, with its source open, and the most during its batches."""
    import torch

    from megabatch.data.loading.train_loader import TrainLoader
    from megabatch.data.sources.tar.shards import ShardSource

    torch.set_num_threads(1)
    seen = {"torch imported": memory()}
    source = ShardSource(folder)
    seen["shards open"] = memory()
    loader = TrainLoader(
        source,
        seed=0,
        augmentation="random_resized_crop",
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
        decode_threads=1,
        prefetch_batches=prefetch,
    )
    starts = range(rank * len(source) // 4, rank * len(source) // 4 + batches * batch, batch)
    most: dict[str, float] = {}
    for _ in loader.batches((range(start, start + batch), 224) for start in starts):
        most = {name: max(value, most.get(name, 0.0)) for name, value in memory().items()}
    loader.close()
    return seen | {"most while reading": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for memory.jsonl")
    parser.add_argument("--gib", type=float, default=5.0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--worker", nargs=2, metavar=("RANK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, folder = options.worker
        print(json.dumps(work(Path(folder), int(rank), options.batches, options.batch, options.prefetch)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        num_samples = write_shards(Path(scratch), options.shards, int(options.gib * 1024 / options.shards) * _MIB)
        print(f"{num_samples} samples written", flush=True)
        results = _run(options.workers, lambda rank: [__file__, *sys.argv[1:], "--worker", str(rank), scratch])
    for result in results:
        print({stage: {name: round(value) for name, value in values.items()} for stage, values in result.items()})
    parameters = {name: value for name, value in vars(options).items() if name not in {"output", "worker"}}
    values = {"benchmark": "input_memory", "parameters": parameters | {"num_samples": num_samples}, "unit": "MiB"}
    if options.output:
        write_lines(options.output / "memory.jsonl", [values | {"workers": results, "environment": describe()}])


def _run(workers: int, command: Callable[[int], list[str]]) -> list[dict[str, dict[str, float]]]:
    processes = [
        subprocess.Popen([sys.executable, *command(rank)], stdout=subprocess.PIPE, text=True) for rank in range(workers)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    return [json.loads(output) for output in outputs]


if __name__ == "__main__":
    main()
