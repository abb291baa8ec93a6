"""Asynchronous collectives on one process group, for any backend; the algorithms are built from them.

Gloo's `reduce_scatter_tensor` sends as many bytes as an all-reduce, and its all-gather is a ring. Here every backend
but NCCL sends each shard directly to its owner, which sums the shards locally: the bytes sent are those of the formula,
and sums are in fp32 for every wire type. Small shards are all sent at once, in one hop. Large shards are sent in
rounds: in round k rank r sends to r + k and receives from r - k, so each rank sends and receives one message per round
and no two messages share a link while another link is idle.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two functions and warns about the older names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """Handle of a collective in flight."""

    def wait(self) -> object: ...


DIRECT_BYTES = 2**15  # largest shard that is sent directly: up to this size latency costs more than shared links
ROUNDS_AHEAD = 2  # rounds in flight per rank: one on the wire, the next one queued behind it


class _Rounds:
    """Exchange of one message with each other rank of the group, in rounds, behind the interface of one `Work`."""

    def __init__(self, send: Sequence[Tensor], receive: Sequence[Tensor], group: dist.ProcessGroup, tag: int) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._rounds = self._start_rounds(send, receive, group, tag, rank, size)
        self._in_flight = list(itertools.islice(self._rounds, ROUNDS_AHEAD))

    def _start_rounds(
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
            # The receive is posted first, so that the message finds its buffer when it arrives.
            incoming = _work(dist.irecv(receive[source], group=group, group_src=source, tag=tag))
            yield incoming, _work(dist.isend(send[to], group=group, group_dst=to, tag=tag))

    def wait(self) -> None:
        while self._in_flight:
            for work in self._in_flight.pop(0):
                work.wait()
            self._in_flight += itertools.islice(self._rounds, 1)


def is_native(group: dist.ProcessGroup) -> bool:
    """True for NCCL: its reduce-scatter sends only (n - 1) / n of the buffer, and CUDA streams order collectives."""
    return dist.get_backend(group) == "nccl"


def start_reduce_scatter(shard: Tensor, whole: Tensor, received: Tensor, group: dist.ProcessGroup, tag: int) -> Work:
    """Starts the reduce-scatter of `whole`; after `finish_reduce_scatter` this rank's shard of the sum is in `shard`.

    `whole` [n * k] holds the group's n shards in rank order, `shard` [k] is this rank's slice of it, and
    `received` [n * k] is scratch memory (unused on NCCL). `tag` must differ between the exchanges in flight in a
    group. Sends (n - 1) / n of `whole`.
    """
    if is_native(group):
        return _work(_reduce_scatter(shard, whole, group=group, async_op=True))
    if shard.nbytes <= DIRECT_BYTES:
        return _work(dist.all_to_all_single(received, whole, group=group, async_op=True))
    size = dist.get_world_size(group)
    return _Rounds(whole.chunk(size), received.chunk(size), group, tag)


def finish_reduce_scatter(shard: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
    """Local part of a reduce-scatter, after its work is complete: adds in fp32 and rounds once to the wire's type."""
    if is_native(group):
        return
    parts = received.view(-1, shard.numel())
    rank = dist.get_rank(group)
    if len(parts) == 2:
        torch.add(shard, parts[1 - rank], out=shard)
    else:
        parts[rank].copy_(shard)  # in rounds a rank sends nothing to itself
        torch.sum(parts, dim=0, out=shard)


def start_all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup, tag: int) -> Work:
    """Starts the collection of every rank's `shard` [k] in `whole` [n * k], of which `shard` is this rank's slice.

    Sends n - 1 shards.
    """
    if is_native(group):
        return _work(_all_gather(whole, shard, group=group, async_op=True))
    size = dist.get_world_size(group)
    if shard.nbytes <= DIRECT_BYTES:
        return _work(dist.all_to_all_single(whole, shard.repeat(size), group=group, async_op=True))
    return _Rounds([shard] * size, whole.chunk(size), group, tag)


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Work:
    """Starts the backend's own all-reduce, in place. Gloo's is a ring that adds in the tensor's type at every hop."""
    return _work(dist.all_reduce(tensor, group=group, async_op=True))


def start_reduce(tensor: Tensor, root: int, group: dist.ProcessGroup) -> Work:
    """Starts the sum over the group into the tensor of global rank `root`; other ranks' tensors become undefined."""
    return _work(dist.reduce(tensor, dst=root, group=group, async_op=True))


def start_broadcast(tensor: Tensor, root: int, group: dist.ProcessGroup) -> Work:
    """Starts the copy of global rank `root`'s tensor to all ranks of the group."""
    return _work(dist.broadcast(tensor, src=root, group=group, async_op=True))


def _work(work: Any) -> Work:
    """Narrows the type: torch returns None only to a rank outside the group, which never calls these functions."""
    assert work is not None
    return work  # type: ignore[no-any-return]
