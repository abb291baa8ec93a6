"""Workers agree on a prefix of the store that no earlier group of workers used."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from limits import HANG_S

from megabatch.comm.rendezvous import agree_on_prefix


def agree(store, world_size):
    """The prefix of each rank of a group of threads."""
    found = {}

    def join(rank):
        found[rank] = agree_on_prefix(store, rank=rank, world_size=world_size, timeout_s=HANG_S)

    threads = [threading.Thread(target=join, args=[rank]) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    return found


def test_all_ranks_agree_and_each_group_has_another_prefix_whatever_the_store_holds():
    store, used = dist.HashStore(), set()
    for world_size in (4, 4, 1, 3, 5):
        found = agree(store, world_size)
        assert sorted(found) == list(range(world_size))
        (prefix,) = set(found.values())
        assert prefix not in used
        used.add(prefix)


def test_the_question_of_a_rank_that_died_while_it_waited_does_not_hold_up_the_next_group():
    store = dist.HashStore()
    store.set("question/1", "of a process that is gone")
    assert len(set(agree(store, 2).values())) == 1


def test_rank_0_names_the_workers_that_did_not_come():
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match=r"timeout: 2 worker\(s\) did not join, of rank 1, 2"):
        agree_on_prefix(store, rank=0, world_size=3, timeout_s=0.1)


def test_a_rank_does_not_wait_longer_than_the_timeout_for_rank_0():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match="timeout"):
        agree_on_prefix(store, rank=1, world_size=2, timeout_s=0.1)
