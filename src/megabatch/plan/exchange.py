"""The gradient exchange of a plan: algorithm, buckets, and the network that a grid of workers has on a cluster."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megabatch.comm.autotune.cost import BetweenHosts, Cost, Link, Network, cost
from megabatch.errors import SettingsError
from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.layers import Layer

WIRE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
REDUCE_PASSES = 3  # a sum reads two values and writes one


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Options of the gradient exchange, as in `megabatch train`."""

    algorithm: str = "torus"  # flat, hierarchical, torus, split_torus, tree, halving_doubling, nccl
    shape: tuple[int, int] | None = None  # ranks per row, per column; None: hosts are rows
    between_hosts: BetweenHosts = "ring"
    wire: str = "fp16"
    bucket: Literal["size", "cubic", "one"] = "size"
    bucket_mib: float = 25.0  # of fp32 gradients
    overlap: bool = True  # buckets leave during the backward pass; otherwise after it

    def __str__(self) -> str:
        """For example "torus 8 x 128, fp16, buckets of 25 MiB"."""
        grid = f" {self.shape[0]} x {self.shape[1]}" if self.shape and self.algorithm in _GRIDS else ""
        buckets = {"cubic": "cubic buckets", "one": "one bucket"}.get(self.bucket, f"{self.bucket_mib:g} MiB buckets")
        return f"{self.algorithm}{grid}, {self.wire}, {buckets}"


_GRIDS = {"hierarchical", "torus", "split_torus"}


def grid_of(exchange: Exchange, num_workers: int, cluster: Cluster) -> tuple[int, int]:
    """Returns ranks per row and per column; rows are hosts unless the exchange names a shape.

    Raises SettingsError if the workers do not fill whole hosts or the shape.
    """
    per_host = min(cluster.devices_per_host, num_workers)
    if num_workers % per_host:
        good = max(1, num_workers // per_host) * per_host
        raise SettingsError(f"{num_workers} workers do not fill hosts of {per_host} devices; {good} do")
    if exchange.shape is None:
        return _near_square(num_workers) if cluster.torus else (per_host, num_workers // per_host)
    x, y = exchange.shape
    whole_hosts = x % per_host == 0 or cluster.torus
    if x * y != num_workers or not whole_hosts:
        raise SettingsError(
            f"a grid of {x} x {y} for {num_workers} workers: needed whole hosts of {per_host} per row; "
            f"{per_host} x {num_workers // per_host} works"
        )
    return exchange.shape


def network_of(
    exchange: Exchange, shape: tuple[int, int], cluster: Cluster, hardware: Hardware, *, small: bool = False
) -> Network:
    """Returns the links that a grid of `shape` has on the cluster, in the terms of the cost model.

    `small`: with the latencies of small messages.

    A row that spans k hosts enters and leaves each of them once; its columns share the links of k hosts. Where rows or
    halving-doubling spread the traffic over the hosts of a leaf switch, its tapered uplinks may limit the columns.
    """
    x, y = shape
    device = hardware.device[hardware.stack[cluster.stack].device]
    made = functools.partial(
        Network,
        direct=False,
        between_hosts=exchange.between_hosts,
        reduce_bytes_per_s=device.memory_bytes_per_s / REDUCE_PASSES,
    )
    inside = _link(cluster.row, hardware, small=small) if cluster.row else Link(0.0, float("inf"))
    per_host = min(cluster.devices_per_host, x * y)
    if cluster.torus or x * y <= cluster.devices_per_host:
        return made(inside, replace(inside, bytes_per_s=x * inside.bytes_per_s))
    if cluster.host_link is None:
        raise SettingsError("the cluster has no host_link, so it has one host; host_link = 'infiniband_edr' adds more")
    outside = _link(cluster.host_link, hardware, cluster.host_links, small=small)
    hosts_per_row = x // per_host
    columns_bytes_per_s = outside.bytes_per_s * hosts_per_row
    if exchange.algorithm == "hierarchical":  # only leaders send between hosts, each over the links next to it
        columns_bytes_per_s = outside.bytes_per_s * max(1, cluster.host_links // per_host) / cluster.host_links
    column = replace(outside, bytes_per_s=columns_bytes_per_s / _taper(exchange, shape, cluster))
    if hosts_per_row > 1:
        latency = ((per_host - 1) * inside.latency_s + outside.latency_s) / per_host
        inside = Link(latency, min(inside.bytes_per_s, outside.bytes_per_s))
    return made(inside, column)


def bucket_layers(layers: Sequence[Layer], exchange: Exchange) -> list[list[Layer]]:
    """Returns the layers of each bucket, in the order in which the backward pass fills them.

    A layer's tensors stay together. "cubic": group k ends when 3 (k + 1)^3 tensors are in (Fujitsu, MLPerf v0.6).
    """
    if exchange.bucket == "one":
        return [list(reversed(layers))]
    buckets: list[list[Layer]] = [[]]
    num_bytes, num_tensors = 0, 0
    for layer in reversed(layers):
        buckets[-1].append(layer)
        num_bytes += 4 * layer.num_parameters
        num_tensors += layer.num_tensors
        full = num_tensors >= 3 * len(buckets) ** 3
        if exchange.bucket == "size":
            full = num_bytes >= exchange.bucket_mib * 2**20
        if full:
            buckets.append([])
            num_bytes = 0
    return [bucket for bucket in buckets if bucket]


def bucket_costs(
    buckets: Sequence[Sequence[Layer]], exchange: Exchange, shape: tuple[int, int], network: Network
) -> list[Cost]:
    """Returns the cost of each bucket's all-reduce."""
    size = WIRE_BYTES[exchange.wire]
    sizes = [size * sum(layer.num_parameters for layer in bucket) for bucket in buckets]
    return [cost(exchange.algorithm, num_bytes, shape, network) for num_bytes in sizes]


def _link(name: str, hardware: Hardware, count: int = 1, *, small: bool) -> Link:
    link = hardware.link[name]
    latency_us = link.small_latency_us if small and link.small_latency_us is not None else link.latency_us
    return Link(latency_us / 1e6, link.bytes_per_s * count)


def _taper(exchange: Exchange, shape: tuple[int, int], cluster: Cluster) -> float:
    """Factor by which the uplinks of leaf switches slow the traffic between hosts; 1 for none."""
    leaf = cluster.hosts_per_leaf
    num_hosts = shape[0] * shape[1] // cluster.devices_per_host
    if not leaf or num_hosts <= leaf:
        return 1.0
    crossing = leaf if exchange.algorithm == "halving_doubling" else shape[0] // cluster.devices_per_host
    return max(1.0, min(crossing, leaf) * cluster.taper / leaf)


@functools.cache
def _near_square(num_workers: int) -> tuple[int, int]:
    x = int(num_workers**0.5)
    while num_workers % x:
        x -= 1
    return num_workers // x, x
