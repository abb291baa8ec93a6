"""The store through which the workers of a job meet, under a prefix that no earlier group of workers used.

torchrun keeps one store over all restarts. Workers that read an earlier group's keys connect to addresses of processes
that are gone, so that no restart on gloo succeeds (torch 2.13). Restart counts cannot tell the groups apart: each of
torchrun's agents has its own count, and one on a replaced host starts at 0.
"""

import datetime
import time
import uuid
from collections.abc import Collection

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # type checkers do not find them in torch.distributed
from torch.distributed.rendezvous import rendezvous

_PAUSE_S = 0.05


def open_store(*, rank: int, world_size: int, timeout_s: float) -> Store:
    """Connects to the store at MASTER_ADDR and MASTER_PORT; returns it under this group's own prefix.

    Raises:
        torch.distributed.DistError: not all workers came within `timeout_s`.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return PrefixStore(agree_on_prefix(store, rank=rank, world_size=world_size, timeout_s=timeout_s), store)


def agree_on_prefix(store: Store, *, rank: int, world_size: int, timeout_s: float) -> str:
    """Returns a random name, the same on all ranks, even if `store` holds the keys of earlier calls.

    Each rank asks a random question, and rank 0 puts the name under that question until each rank has read it.
    """
    if rank == 0:
        prefix = uuid.uuid4().hex
        _answer(store, prefix, range(1, world_size), time.monotonic() + timeout_s)
        return prefix
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    prefix = store.get(f"answer/{question}").decode()
    store.set(f"read/{prefix}/{rank}", "")
    return prefix


def _answer(store: Store, prefix: str, ranks: Collection[int], deadline: float) -> None:
    missing = list(ranks)
    while missing:
        if time.monotonic() > deadline:
            listed = ", ".join(map(str, missing[:8]))
            raise dist.DistStoreError(f"timeout: {len(missing)} worker(s) did not join, of rank {listed}")
        for rank in missing:  # the question of an earlier group may be there before this group's
            if store.check([f"question/{rank}"]):
                store.set(f"answer/{store.get(f'question/{rank}').decode()}", prefix)
        missing = [rank for rank in missing if not store.check([f"read/{prefix}/{rank}"])]
        time.sleep(_PAUSE_S if missing else 0)
