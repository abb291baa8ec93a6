"""The collectives that the algorithms are made of, on any backend, each on one group and asynchronous.

Gloo's `reduce_scatter_tensor` sends as many bytes as an all-reduce; here gloo (and every backend but NCCL) exchanges
the shards with `all_to_all_single` and sums them locally, which sends what the formula says, in one hop, and adds in
fp32 whatever the wire's type is.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them and warns at the older names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """The handle of a collective that runs."""

    def wait(self) -> Any: ...


class _Works:
    """Several works as one."""

    def __init__(self, works: list[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def is_native(group: dist.ProcessGroup) -> bool:
    """Whether the backend's own reduce-scatter is a true one, ordered by CUDA streams and not by threads."""
    return dist.get_backend(group) == "nccl"


def start_reduce_scatter(shard: Tensor, whole: Tensor, received: Tensor, group: dist.ProcessGroup) -> Work:
    """Begin to sum `whole` over the group; `finish_reduce_scatter` leaves this rank's part of the sum in `shard`.

    `whole` [n * k] holds the group's n shards in rank order, `shard` [k] is this rank's slice of it, and
    `received` [n * k] is scratch memory (unused on NCCL). Sends (n - 1) / n of `whole`.
    """
    if is_native(group):
        return _work(_reduce_scatter(shard, whole, group=group, async_op=True))
    return _work(dist.all_to_all_single(received, whole, group=group, async_op=True))


def finish_reduce_scatter(shard: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
    """The local half of a reduce-scatter, once its work is complete: add in fp32, round once to the wire's type."""
    if is_native(group):
        return
    parts = received.view(-1, shard.numel())
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=shard)
    else:
        torch.sum(parts, dim=0, out=shard)


def start_all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup, tag: int) -> Work:
    """Begin to collect every rank's `shard` [k] in `whole` [n * k], of which `shard` is this rank's slice.

    Gloo's own all-gather walks a ring; here each rank sends its shard to all others at once, one hop. `tag` tells
    apart the gathers that are under way in a group. Sends (n - 1) shards.
    """
    if is_native(group):
        return _work(_all_gather(whole, shard, group=group, async_op=True))
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = whole.view(size, -1)
    peers = [(rank + step) % size for step in range(1, size)]
    receives = [dist.irecv(parts[peer], group=group, group_src=peer, tag=tag) for peer in reversed(peers)]
    sends = [dist.isend(shard, group=group, group_dst=peer, tag=tag) for peer in peers]
    return _Works([_work(work) for work in (*receives, *sends)])


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Work:
    """Begin the backend's own all-reduce (a ring on gloo), which adds in the tensor's type at every hop."""
    return _work(dist.all_reduce(tensor, group=group, async_op=True))


def start_reduce(tensor: Tensor, root: int, group: dist.ProcessGroup) -> Work:
    """Begin to sum over the group into the tensor of global rank `root`; others' tensors are undefined after it."""
    return _work(dist.reduce(tensor, dst=root, group=group, async_op=True))


def start_broadcast(tensor: Tensor, root: int, group: dist.ProcessGroup) -> Work:
    """Begin to copy the tensor of global rank `root` to the group."""
    return _work(dist.broadcast(tensor, src=root, group=group, async_op=True))


def _work(work: Any) -> Work:
    """Typed: torch returns None only to a rank outside of the group, which the algorithms never are."""
    assert work is not None
    return work  # type: ignore[no-any-return]
