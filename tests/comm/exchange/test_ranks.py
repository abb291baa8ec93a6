"""The test tools themselves: a rank's failure, death or hang is reported, and the collectives are correct."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_processes, run_threads
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

BOTH = pytest.mark.parametrize("run", [run_threads, pytest.param(run_processes, marks=pytest.mark.multiprocess)])


def every_collective(scale):
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(6.0) + scale * rank
    total = mine.clone()
    dist.all_reduce(total)
    gathered = torch.empty(size * 6)
    dist.all_gather(list(gathered.view(size, 6)), mine)
    exchanged = torch.empty(6)
    splits = [6 // size] * size
    dist.all_to_all_single(exchanged, mine, splits, splits)
    work = dist.all_reduce(mine, async_op=True)
    shared = torch.full((1,), float(rank))
    dist.broadcast(shared, src=1)
    work.wait()
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    dist.barrier()
    return total, gathered, exchanged, mine, shared, [o["rank"] for o in objects]


@BOTH
def test_the_collectives_of_two_ranks_give_the_expected_sums_and_copies(run):
    for rank, (total, gathered, exchanged, later, shared, objects) in enumerate(run(2, every_collective, 10)):
        assert torch.equal(total, 2 * torch.arange(6.0) + 10)
        assert torch.equal(later, total)
        assert torch.equal(gathered, torch.cat([torch.arange(6.0), torch.arange(6.0) + 10]))
        half = torch.arange(6.0)[3 * rank : 3 * rank + 3]
        assert torch.equal(exchanged, torch.cat([half, half + 10]))
        assert shared.item() == 1
        assert objects == [0, 1]


def gradient_through_ddp():
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    model(torch.ones(1, 3) * (dist.get_rank() + 1)).sum().backward()
    return model.module.weight.grad


@BOTH
def test_ddp_averages_gradients_over_the_ranks(run):
    for gradient in run(2, gradient_through_ddp):
        assert torch.allclose(gradient, torch.full((2, 3), 1.5))


def sums_on_a_mesh():
    mesh = init_device_mesh("cpu", (4, 4), mesh_dim_names=("column", "row"))
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value, group=mesh.get_group("row"))
    dist.all_reduce(value, group=mesh.get_group("column"))
    return value.item()


def test_sixteen_threads_form_the_groups_of_a_device_mesh():
    assert run_threads(16, sums_on_a_mesh) == [120.0] * 16


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("broken here")
    dist.barrier()


@BOTH
def test_a_failing_rank_is_named_and_releases_the_others(run):
    with pytest.raises(RankError, match=r"(?s)rank 1.*broken here"):
        run(2, fail_on_rank_one)


def wait_forever_on_rank_zero():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(3))


def test_a_thread_that_waits_for_an_absent_peer_ends_at_the_timeout():
    with pytest.raises(RankError, match=r"allreduce float32\[3\].*ranks \[0\] wait"):
        run_threads(2, wait_forever_on_rank_zero, timeout_s=0.5)


def kill_rank_one():
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.3)  # the other rank must be out of the barrier
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@pytest.mark.multiprocess
def test_a_dead_process_is_named_unless_it_is_in_may_die():
    with pytest.raises(RankError, match="rank 1 died"):
        run_processes(2, kill_rank_one)
    assert run_processes(2, kill_rank_one, may_die=[1]) == ["alive", None]


def test_threads_that_call_different_collectives_fail_at_once():
    with pytest.raises(RankError, match="another rank"):
        run_threads(2, unequal_lengths)


def unequal_lengths():
    dist.all_reduce(torch.zeros(2 + dist.get_rank()))


def leave_a_model_active():
    DistributedDataParallel._active_ddp_module = "as when two forwards cross"


def test_threads_leave_no_model_active_for_the_compiler():
    run_threads(2, leave_a_model_active)
    assert DistributedDataParallel._active_ddp_module is None
