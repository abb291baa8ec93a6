"""Exposed communication with and without overlap, in one run: a rank's script for `run.py launch`.

    sudo python benchmarks/netlab/run.py launch --hosts 4 --ranks 1 --rate-mbit 200 -- \\
        python benchmarks/netlab/overlap.py --algorithm torus --output FILE.jsonl

The same model is wrapped twice: with buckets that are exchanged during backward, and with one bucket that is exchanged
after backward. Steps of the two are interleaved. Rank 0 writes a line per step: step time, exposed communication,
buckets.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megabatch.comm.exchange.timeline import Timeline
from megabatch.comm.exchange.wrap import wrap
from megabatch.comm.launch import shutdown_process_group
from megabatch.comm.peers import host_name


def main() -> None:
    """Runs one rank."""
    options = _options()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, host_name())
    wrapped = {}
    for name, bucket_mib in (("overlap", options.bucket_mib), ("one bucket", 1e4)):
        timeline = Timeline()
        model = wrap(
            _model(options.layers),
            algorithm=options.algorithm,
            hosts=names,
            bucket_mib=bucket_mib,
            first_bucket_mib=bucket_mib,
            timeline=timeline,
        )
        wrapped[name] = (model, timeline)
    images = torch.randn(options.images, 64, 16, 16)
    rows = [
        {"way": name, "repeat": repeat} | _step(model, timeline, images)
        for repeat in range(-2, options.steps)
        for name, (model, timeline) in wrapped.items()
    ]
    if dist.get_rank() == 0:
        _report([row for row in rows if row["repeat"] >= 0], options)
    dist.barrier()
    shutdown_process_group()


def _step(model: nn.Module, timeline: Timeline, images: torch.Tensor) -> dict[str, float]:
    dist.barrier()
    start = time.perf_counter()
    torch.autograd.backward(model(images).square().mean())
    seconds = time.perf_counter() - start
    report = timeline.finish_step()
    return {"step_ms": 1e3 * seconds, "exposed_ms": report["exposed_ms"], "num_buckets": report["num_buckets"],
            "bytes_on_wire": report["bytes_on_wire"]}  # fmt: skip


def _model(num_layers: int) -> nn.Module:
    """Convolutions of 590 KB of gradients each, with enough arithmetic per byte to hide their exchange."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(64 if i == 0 else 128, 128, 3, padding=1), nn.ReLU()) for i in range(num_layers)]
    return nn.Sequential(*layers)


def _report(rows: list[dict[str, float]], options: argparse.Namespace) -> None:
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        medians = {
            name: statistics.median(row[name] for row in mine) for name in ("step_ms", "exposed_ms", "num_buckets")
        }
        print(f"{way:11} {options.algorithm}", *(f"{name} {value:.1f}" for name, value in medians.items()), flush=True)
    if options.output is not None:
        with options.output.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"algorithm": options.algorithm} | row) + "\n" for row in rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="torus")
    parser.add_argument("--bucket-mib", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
