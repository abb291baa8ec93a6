"""The hooks inside DDP: the mean gradient on every rank, for every algorithm, wire, bucket size and backend."""

import os
import pickle
import subprocess
import sys
import threading
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from limits import HANG_S
from ranks import RankError, run_processes, run_threads
from slow import slow_except
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.comm import launch
from megabatch.comm.exchange.algorithms import ALGORITHMS
from megabatch.comm.exchange.grid import Grid, make_grid
from megabatch.comm.exchange.hooks import torus_hook
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.wrap import wrap
from megabatch.errors import PeerError, SettingsError


def small_net():
    model = nn.Sequential(nn.Linear(11, 37), nn.Tanh(), nn.Linear(37, 23), nn.Tanh(), nn.Linear(23, 5))
    generator = torch.Generator().manual_seed(3)  # the global one is shared by ranks that are threads
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def batch_of(rank, step):
    return torch.randn(4, 11, generator=torch.Generator().manual_seed(100 * step + rank))


def mean_gradients(world_size, step):
    model = small_net()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(world_size):
        gradients = torch.autograd.grad(model(batch_of(rank, step)).square().sum(), list(model.parameters()))
        total = [t + g / world_size for t, g in zip(total, gradients, strict=True)]
    return total


def gradients_after_steps(algorithm, shape, options):
    model = wrap(small_net(), algorithm=algorithm, shape=shape, **options)
    for step in range(3):
        model.zero_grad()
        model(batch_of(dist.get_rank(), step)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def check(results, tolerance):
    for got in results:
        for gradient, first, mean in zip(got, results[0], mean_gradients(len(results), 2), strict=True):
            assert torch.equal(gradient, first)
            assert torch.allclose(gradient, mean, atol=tolerance * mean.abs().max(), rtol=tolerance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ddp_with_a_hook_holds_the_mean_gradient_on_four_threads(algorithm):
    check(run_threads(4, gradients_after_steps, algorithm, (2, 2), {"bucket_mib": 0.001}), 1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("algorithm", slow_except(ALGORITHMS, "torus"))
def test_ddp_with_a_hook_holds_the_mean_gradient_on_four_processes(algorithm):
    check(run_processes(4, gradients_after_steps, algorithm, (2, 2), {"bucket_mib": 0.001}), 1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("wire", slow_except(["fp16", "bf16"], "fp16"))
@pytest.mark.parametrize("algorithm", slow_except(["flat", "split_torus"], "split_torus"))
def test_half_precision_wires_work_on_gloo_and_round_as_their_type_does(algorithm, wire):
    options = {"wire": wire, "bucket_mib": 0.002}
    check(run_processes(4, gradients_after_steps, algorithm, (2, 2), options), {"fp16": 2e-3, "bf16": 1.6e-2}[wire])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_eight_processes_with_many_buckets_in_flight_agree():
    check(run_processes(8, gradients_after_steps, "torus", (4, 2), {"bucket_mib": 0.0005, "static_graph": True}), 1e-5)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from megabatch import ExchangeState, make_grid, torus_hook
from megabatch.comm.launch import shutdown_process_group

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 3))
model.register_comm_hook(ExchangeState(make_grid(), wire="bf16"), torus_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
teacher = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
data = torch.Generator().manual_seed(2 + dist.get_rank())
for step in range(40):
    images = torch.randn(32, 8, generator=data)
    loss = (model(images) - images @ teacher).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
weights = [torch.empty(3, 8) for _ in range(dist.get_world_size())]
dist.all_gather(weights, model.module.weight.detach())
if dist.get_rank() == 0:
    print("loss", loss.item(), "equal", all(torch.equal(weights[0], w) for w in weights), flush=True)
shutdown_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_plain_ddp_script_under_torchrun_learns_with_the_torus_hook(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert float(words[1]) < 0.3
    assert words[3] == "True"


def hook_without_state():
    model = DistributedDataParallel(nn.Linear(2, 2))
    model.register_comm_hook(None, torus_hook)
    model(torch.ones(1, 2)).sum().backward()


def test_a_hook_without_its_state_raises_an_error_with_an_example():
    with pytest.raises(RankError, match=r"register_comm_hook\(ExchangeState\(\), torus_hook\)"):
        run_threads(2, hook_without_state)


def lose_an_exchange():
    state = ExchangeState(make_grid())
    dist.barrier()
    if dist.get_rank() == 0:
        future = state.exchange(torch.ones(4), "torus")
        state.fail(PeerError("rank 1 is gone"))
        with pytest.raises(RuntimeError, match="PeerError: rank 1 is gone"):
            future.wait()
        with pytest.raises(RuntimeError, match="rank 1 is gone"):
            state.exchange(torch.ones(4), "torus").wait()
        return str(state.failure)
    return None


def test_a_failed_exchange_fails_pending_and_later_buckets_at_once():
    assert run_threads(2, lose_an_exchange) == ["rank 1 is gone", None]


def unpack_without_memory():
    """One rank's bucket cannot be unpacked; the thread that would have completed its future ends with that."""
    state = ExchangeState(make_grid(), wire="fp16")
    if dist.get_rank() == 0:
        state._scale = Mock(side_effect=[1.0, MemoryError("no room to unpack")])
    try:
        state.exchange(torch.ones(4), "torus").wait()
    except RuntimeError as error:
        return str(error)
    return None


def test_a_bucket_that_cannot_be_unpacked_fails_and_does_not_hang():
    first, second = run_threads(2, unpack_without_memory)
    assert "no room to unpack" in first
    assert second is None


def close_and_count():
    state = ExchangeState(make_grid())
    state.exchange(torch.ones(4), "split_torus").wait()
    mine = [t for t in threading.enumerate() if getattr(t, "rank_world", 0) is threading.current_thread().rank_world]
    state.close()
    for thread in mine:
        if thread is not threading.current_thread():
            thread.join(HANG_S)
    return len(mine), sum(thread.is_alive() for thread in mine)


def test_closing_a_state_ends_its_threads():
    assert run_threads(4, close_and_count) == [(9, 1)] * 4


def test_closing_a_state_waits_until_the_threads_of_gloo_are_idle(monkeypatch):
    states = iter(["R", "S", "R", "S", "S", "S"])
    monkeypatch.setattr(launch, "_thread_states", lambda name, _: [next(states)] if "gloo" in name else [])
    run_threads(1, lambda: ExchangeState(make_grid()).close())
    assert list(states) == []


def test_a_state_cannot_be_pickled_by_accident():
    with pytest.raises(TypeError, match="build a new one"):
        pickle.dumps(ExchangeState(Grid([[0]], rank=0)))


def test_a_world_of_one_returns_the_gradient_as_it_is():
    buffer = torch.arange(5.0)
    assert ExchangeState(Grid([[0]], rank=0)).exchange(buffer, "torus").wait() is buffer


@pytest.mark.parametrize("buffer", [torch.ones(8)[::2], torch.ones(4, 2)])
def test_a_buffer_that_is_not_flat_is_refused(buffer):
    def refusal():
        with pytest.raises(SettingsError, match=r"buffer\.view\(-1\) of a contiguous tensor works"):
            ExchangeState(make_grid(shape=(1, 2))).exchange(buffer, "torus")

    run_threads(2, refusal)
