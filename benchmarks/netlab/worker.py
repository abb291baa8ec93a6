"""A rank inside the laboratory: joins gloo, then runs the measurements that the control process requests."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from lab import Host

from megabatch.comm.autotune.choose import Cell
from megabatch.comm.autotune.measure import Bench
from megabatch.comm.exchange.grid import make_grid

STEPS = 31
TIMEOUT_S = 180.0


def serve(host: Host, variables: dict[str, str], hosts: Sequence[str], control: Connection, realtime: bool) -> None:
    """Body of a rank's process. Rank 0 receives requests from `control` and broadcasts them to all ranks."""
    host.enter()
    if realtime:
        use_realtime_scheduling()
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    bench = Bench(hosts, torch.device("cpu"))
    tasks = {"measure": _measure, "calibrate": _calibrate}
    if dist.get_rank() == 0:
        control.send("ready")
    while (request := _next_request(control)) is not None:
        result = tasks[request.pop("task")](bench, hosts, **request)
        if dist.get_rank() == 0:
            control.send(result)
    os._exit(0)


def use_realtime_scheduling() -> None:
    """Gives this process priority over the machine's other programs, which would add to the latency of a hop."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _next_request(control: Connection) -> dict[str, Any] | None:
    requests: list[Any] = [control.recv() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(requests, src=0)
    return None if requests[0] is None else dict(requests[0])


def _measure(
    bench: Bench, hosts: Sequence[str], *, cells: Sequence[Cell], num_bytes: int, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Measures times, bytes that leave a host and the load of the cores by the ranks, per cell, interleaved."""
    gradient, cores = torch.zeros(max(num_bytes // 4, 1)), len(os.sched_getaffinity(0))
    found = [{"cell": asdict(cell), "seconds": [], "host_bytes": [], "busy": []} for cell in cells]
    for repeat in range(warmup + repeats):
        for cell, row in zip(cells, found, strict=True):
            bytes_before, start, work_before = _sent_bytes(), time.perf_counter(), time.process_time()
            seconds = bench.once(cell, gradient)
            sent, work = _sent_bytes() - bytes_before, time.process_time() - work_before
            busy = _sum(work) / (time.perf_counter() - start) / cores
            if repeat >= warmup:
                row["seconds"].append(seconds)
                row["host_bytes"].append(_mean_per_host(sent, len(set(hosts))))
                row["busy"].append(busy)
    return found


def _calibrate(bench: Bench, hosts: Sequence[str], *, shape: tuple[int, int]) -> dict[str, float]:
    """Measures the model's constants: seconds per hop inside and between hosts, bytes per second inside a host."""
    del bench
    grid = make_grid(shape=shape, hosts=hosts)
    found = {}
    for axis in ("row", "column"):
        found[f"{axis}_step_s"] = _step_s(grid.group(axis)) if grid.size(axis) > 1 else 0.0  # type: ignore[arg-type]
    found["row_bytes_per_s"] = _row_bytes_per_s(grid.group("row")) if shape[0] > 1 else float("inf")
    return found


def _step_s(group: dist.ProcessGroup) -> float:
    """Median seconds of a step in which every rank of every such group sends one value to its neighbour."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent, received, times = torch.zeros(1), torch.zeros(1), []
    dist.barrier()
    for _ in range(STEPS):
        start = time.perf_counter()
        works = [
            dist.irecv(received, group=group, group_src=(rank - 1) % size),
            dist.isend(sent, group=group, group_dst=(rank + 1) % size),
        ]
        for work in works:
            assert work is not None
            work.wait()
        times.append(time.perf_counter() - start)
    median = torch.tensor([sorted(times)[STEPS // 2]])
    dist.all_reduce(median, dist.ReduceOp.MAX)
    return float(median)


def _row_bytes_per_s(group: dist.ProcessGroup, num_bytes: int = 2**23) -> float:
    """Bytes per second from a rank to its row, with all rows active at once, as they share the processors."""
    size = dist.get_world_size(group)
    whole = torch.zeros(num_bytes // 4 // size * size)
    received, times = torch.empty_like(whole), []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(received, whole, group=group)
        torch.sum(received.view(size, -1), dim=0)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor([sorted(times[1:])[1]])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return (size - 1) / size * num_bytes / float(slowest)


def _sent_bytes() -> int:
    """Bytes that left this host, from the kernel's counter of its only external interface."""
    with open("/proc/self/net/dev", encoding="ascii") as table:
        return int(next(line for line in table if line.strip().startswith("eth0:")).split(":")[1].split()[8])


def _mean_per_host(sent: int, num_hosts: int) -> float:
    return _sum(float(sent) if os.environ["LOCAL_RANK"] == "0" else 0.0) / num_hosts


def _sum(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
