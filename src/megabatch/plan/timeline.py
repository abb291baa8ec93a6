"""Timeline of one synchronous step, by events: layers of the backward pass, buckets that leave as they fill, links.

All workers do the same, so one worker stands for all of them and the time to simulate does not depend on their number.
The slowest of N workers, which the others wait for, is added as an expected maximum (`step_time.expected_maximum`).
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megabatch.comm.autotune.cost import Cost, Network, cost
from megabatch.errors import SettingsError
from megabatch.plan.exchange import Exchange, bucket_costs, bucket_layers, grid_of, network_of
from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.layers import Layer
from megabatch.plan.step_time import Speed, backward_kernels, expected_maximum, forward_kernels, speed_of, step_jitter


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they consist of. The parts add up to `total_s`."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    norm_s: float  # collectives of batch-norm statistics
    exposed_s: float  # gradient exchange after the end of the backward pass
    straggler_s: float  # wait for the slowest worker
    input_s: float  # wait for images
    exchange_s: float  # gradient exchange alone, hidden or not
    latency_s: float  # the part of exchange_s that does not depend on bytes
    overhead_s: float  # the part of forward and backward that does not depend on the batch
    num_buckets: int
    bytes_leaving_host: float

    @property
    def total_s(self) -> float:
        """Seconds from one update to the next."""
        parts = self.forward_s + self.backward_s + self.optimizer_s + self.norm_s
        return parts + self.exposed_s + self.straggler_s + self.input_s

    @property
    def efficiency(self) -> float:
        """Images/s per worker, relative to one worker alone with the same batch per worker."""
        return (self.forward_s + self.backward_s + self.optimizer_s) / self.total_s

    @property
    def limit(self) -> str:
        """Name of the largest part; the exchange counts with what is exposed, as latency or as bandwidth."""
        exchange = "latency of the exchange" if self.latency_s > self.exchange_s / 2 else "bandwidth of the exchange"
        parts = {
            "compute": self.forward_s + self.backward_s + self.optimizer_s - self.overhead_s,
            "kernel overhead": self.overhead_s,
            exchange: self.exposed_s,
            "batch-norm collectives": self.norm_s,
            "stragglers": self.straggler_s,
            "input": self.input_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(
    layers: Sequence[Layer],
    *,
    local_batch: float,
    bn_span: int,
    num_workers: int,
    exchange: Exchange,
    cluster: Cluster,
    hardware: Hardware,
) -> StepTime:
    """Returns the timeline of a step of `local_batch` images on each of `num_workers` workers."""
    if num_workers < 1 or local_batch <= 0:
        raise SettingsError(f"{num_workers} workers with {local_batch:g} images each: needed at least 1 of both")
    speed = speed_of(cluster.stack, hardware)
    shape = grid_of(exchange, num_workers, cluster)
    network = network_of(exchange, shape, cluster, hardware)
    buckets = bucket_layers(layers, exchange)
    costs = bucket_costs(buckets, exchange, shape, network) if num_workers > 1 else []
    forward_s = sum(speed.forward_s(layer, local_batch) for layer in layers)
    ready, backward_s = _ready_times(buckets, speed, local_batch)
    end_s = exchange_end_s([at if exchange.overlap else backward_s for at in ready], costs)
    optimizer_s = speed.optimizer_s(sum(layer.num_parameters for layer in layers))
    jitter = step_jitter(hardware) * expected_maximum(num_workers)
    kernels = sum(forward_kernels(layer) + backward_kernels(layer) for layer in layers)
    made = StepTime(
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        norm_s=_norm_s(layers, local_batch, bn_span, shape, network_of(exchange, shape, cluster, hardware, small=True)),
        exposed_s=max(0.0, end_s - backward_s),
        straggler_s=jitter * (forward_s + backward_s + optimizer_s),
        input_s=0.0,
        exchange_s=exchange_end_s([0.0] * len(costs), costs),
        latency_s=sum(made.latency_s for made in costs),
        overhead_s=kernels * speed.overhead_s,
        num_buckets=len(buckets),
        bytes_leaving_host=sum(made.bytes_leaving_host for made in costs),
    )
    return replace(made, input_s=_input_wait_s(local_batch, num_workers, cluster, made.total_s))


def exchange_end_s(ready: Sequence[float], costs: Sequence[Cost]) -> float:
    """Returns the time at which the last bucket is reduced; bucket i is ready at `ready[i]`.

    A bucket passes row, column, row; or both at once, if its algorithm is concurrent. Each kind of link carries one
    stage at a time, in the order in which stages become ready, so buckets follow each other through them.
    """
    free = {"row": 0.0, "column": 0.0}
    events = [(at, index, 0) for index, (at, _) in enumerate(zip(ready, costs, strict=False))]
    heapq.heapify(events)
    end = 0.0
    while events:
        at, index, stage = heapq.heappop(events)
        stages = _stages(costs[index])
        links, seconds = stages[stage]
        done = max(at, *(free[link] for link in links)) + seconds
        free.update(dict.fromkeys(links, done))
        end = max(end, done)
        if stage + 1 < len(stages):
            heapq.heappush(events, (done, index, stage + 1))
    return end


def _stages(made: Cost) -> list[tuple[tuple[str, ...], float]]:
    if made.concurrent:
        return [(("row", "column"), made.seconds())]
    half = (made.row_latency_s + made.row_s) / 2
    column = made.column_latency_s + made.column_s + made.reduce_s
    return [(("row",), half), (("column",), column), (("row",), half)]


def _ready_times(buckets: Sequence[Sequence[Layer]], speed: Speed, local_batch: float) -> tuple[list[float], float]:
    """Returns the seconds after the start of backward at which each bucket is full, and those of the whole backward."""
    ready, now = [], 0.0
    for bucket in buckets:
        now += sum(speed.backward_s(layer, local_batch) for layer in bucket)
        ready.append(now)
    return ready, now


def _input_wait_s(local_batch: float, num_workers: int, cluster: Cluster, step_s: float) -> float:
    """Seconds by which a host decodes a step's images more slowly than its devices train on them."""
    if not cluster.input_images_per_s:
        return 0.0
    per_host = local_batch * min(cluster.devices_per_host, num_workers)
    return max(0.0, per_host / cluster.input_images_per_s - step_s)


def _norm_s(
    layers: Sequence[Layer], local_batch: float, bn_span: int, shape: tuple[int, int], network: Network
) -> float:
    """Seconds of the collectives of spans that several workers share: one per batch norm and direction.

    Each sums two fp32 numbers per channel among the ceil(span / local batch) workers of a span, which fill rows first.
    """
    group = min(math.ceil(bn_span / local_batch), shape[0] * shape[1])
    if group < 2:
        return 0.0
    tile = (min(group, shape[0]), math.ceil(group / shape[0]))
    counts = Counter(layer.norm_channels for layer in layers if layer.norm_channels)
    return sum(
        2 * count * cost("halving_doubling", 8 * channels, tile, network).seconds()
        for channels, count in counts.items()
    )
