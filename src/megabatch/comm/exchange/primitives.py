"""The collectives that the algorithms are made of, on any backend, each on one group and asynchronous.

Gloo's `reduce_scatter_tensor` sends as many bytes as an all-reduce, and its all-gather walks a ring. Here gloo (and
every backend but NCCL) exchanges the shards from each to each and sums them locally: what the formula says is sent,
and sums are in fp32 whatever the wire's type is. Small shards all leave at once, one hop. Large ones leave in rounds;
in round k rank r sends to r + k and receives from r - k, so every link carries one message at a time and none is
shared by two while another idles.
"""

import itertools
from collections.abc import Iterator, Sequence
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


DIRECT_BYTES = 2**15  # a message up to which latency outweighs the sharing of links
ROUNDS_AHEAD = 2  # messages under way per rank in rounds: one on the wire, the next one ready behind it


class _Rounds:
    """Messages between a rank and each other rank of its group, in rounds, as one work."""

    def __init__(self, send: Sequence[Tensor], receive: Sequence[Tensor], group: dist.ProcessGroup, tag: int) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._rounds = self._make(send, receive, group, tag, rank, size)
        self._under_way = list(itertools.islice(self._rounds, ROUNDS_AHEAD))

    def _make(
        self,
        send: Sequence[Tensor],
        receive: Sequence[Tensor],
        group: dist.ProcessGroup,
        tag: int,
        rank: int,
        size: int,
    ) -> Iterator[tuple[Work, Work]]:
        for step in range(1, size):
            to, source = (rank + step) % size, (rank - step) % size
            incoming = _work(dist.irecv(receive[source], group=group, group_src=source, tag=tag))
            yield incoming, _work(dist.isend(send[to], group=group, group_dst=to, tag=tag))

    def wait(self) -> None:
        while self._under_way:
            for work in self._under_way.pop(0):
                work.wait()
            self._under_way += itertools.islice(self._rounds, 1)


def is_native(group: dist.ProcessGroup) -> bool:
    """Whether the backend's own reduce-scatter is a true one, ordered by CUDA streams and not by threads."""
    return dist.get_backend(group) == "nccl"


def start_reduce_scatter(shard: Tensor, whole: Tensor, received: Tensor, group: dist.ProcessGroup, tag: int) -> Work:
    """Begin to sum `whole` over the group; `finish_reduce_scatter` leaves this rank's part of the sum in `shard`.

    `whole` [n * k] holds the group's n shards in rank order, `shard` [k] is this rank's slice of it, and
    `received` [n * k] is scratch memory (unused on NCCL). `tag` tells apart the exchanges that are under way in a
    group. Sends (n - 1) / n of `whole`.
    """
    if is_native(group):
        return _work(_reduce_scatter(shard, whole, group=group, async_op=True))
    if shard.nbytes <= DIRECT_BYTES:
        return _work(dist.all_to_all_single(received, whole, group=group, async_op=True))
    size = dist.get_world_size(group)
    return _Rounds(whole.chunk(size), received.chunk(size), group, tag)


def finish_reduce_scatter(shard: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
    """The local half of a reduce-scatter, once its work is complete: add in fp32, round once to the wire's type."""
    if is_native(group):
        return
    parts = received.view(-1, shard.numel())
    rank = dist.get_rank(group)
    if len(parts) == 2:
        torch.add(shard, parts[1 - rank], out=shard)
    else:
        parts[rank].copy_(shard)  # rounds leave out what a rank sends to itself
        torch.sum(parts, dim=0, out=shard)


def start_all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup, tag: int) -> Work:
    """Begin to collect every rank's `shard` [k] in `whole` [n * k], of which `shard` is this rank's slice.

    Sends (n - 1) shards.
    """
    if is_native(group):
        return _work(_all_gather(whole, shard, group=group, async_op=True))
    size = dist.get_world_size(group)
    if shard.nbytes <= DIRECT_BYTES:
        return _work(dist.all_to_all_single(whole, shard.repeat(size), group=group, async_op=True))
    return _Rounds([shard] * size, whole.chunk(size), group, tag)


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
