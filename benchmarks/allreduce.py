"""The gradient exchange between workers of this machine, compared with torch's all-reduce and its fp16 DDP hook.

    python benchmarks/allreduce.py --output benchmarks/out --workers 4

Repeats are interleaved in a random order per round. A time is measured on rank 0 from one barrier to the next, so it is
that of the slowest rank. The default length is that of ResNet-50's gradient (`--mib`). The backend is gloo; for several
hosts see `megabatch bench allreduce` under torchrun, and `netlab/`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megabatch.bench.timing import Work, compare, record, table, write_lines
from megabatch.comm.exchange.algorithms import ALGORITHMS
from megabatch.comm.exchange.grid import make_grid
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.launch import shutdown_process_group

RESNET50_MIB = 25_557_032 * 4 / 2**20
BASELINE = "torch all_reduce"


def main() -> None:
    """Restarts itself under torchrun; every rank measures, rank 0 prints and writes `allreduce.jsonl`."""
    options = _options()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        sys.exit(subprocess.run([*command, *sys.argv], env=environment, check=False).returncode)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    timings = compare(_works(options), warmup=1, repeats=options.repeats)
    if dist.get_rank() == 0:
        parameters = {"workers": options.workers, "mib": options.mib, "bucket_mib": options.bucket_mib}
        records = [
            record("gradient exchange", name, timing, parameters=parameters, baseline=(BASELINE, timings[BASELINE]))
            for name, timing in timings.items()
        ]
        write_lines(options.output / "allreduce.jsonl", records)
        print(table(records), flush=True)
    dist.barrier()
    shutdown_process_group()


def _works(options: argparse.Namespace) -> dict[str, Work]:
    gradient = torch.zeros(int(options.mib * 2**20) // 4)
    buckets = list(torch.split(gradient, int(options.bucket_mib * 2**20) // 4))
    works: dict[str, Work] = {
        BASELINE: _between_barriers(lambda: _wait_all(dist.all_reduce(bucket, async_op=True) for bucket in buckets)),
        "torch all_reduce, fp16 cast": _between_barriers(lambda: _half(buckets)),
    }
    column = ExchangeState(make_grid(shape=(1, options.workers)))
    works["torus, one column"] = _exchange(column, "torus", buckets)
    for wire in ("fp32", "bf16", "fp16"):
        state = ExchangeState(make_grid(), wire=wire)
        for algorithm in ALGORITHMS:
            works[f"{algorithm}, {wire}"] = _exchange(state, algorithm, buckets)
    return works


def _exchange(state: ExchangeState, algorithm: str, buckets: list[torch.Tensor]) -> Work:
    def work() -> None:
        _wait_all(state.exchange(bucket, algorithm, index=index) for index, bucket in enumerate(buckets))

    return _between_barriers(work)


def _half(buckets: list[torch.Tensor]) -> None:
    """The steps of torch's fp16 hook: divide, cast, all-reduce, cast back."""
    halves = [bucket.div(dist.get_world_size()).half() for bucket in buckets]
    _wait_all(dist.all_reduce(half, async_op=True) for half in halves)
    for bucket, half in zip(buckets, halves, strict=True):
        bucket.copy_(half)


def _wait_all(works: object) -> None:
    for work in list(works):  # type: ignore[call-overload]
        work.wait()


def _between_barriers(work: Callable[[], None]) -> Work:
    def timed() -> None:
        dist.barrier()
        work()
        dist.barrier()

    return timed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for allreduce.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mib", type=float, default=RESNET50_MIB)
    parser.add_argument("--bucket-mib", type=float, default=25.0)
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
