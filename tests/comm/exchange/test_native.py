"""NCCL's code path on in-memory groups: the backend's own reduce-scatter and all-gather, and no helper threads."""

import contextlib
import threading

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from stages import sum_by_stages

from megabatch.comm.exchange import state as engine
from megabatch.comm.exchange.algorithms import ALGORITHMS, routes
from megabatch.comm.exchange.grid import make_grid
from megabatch.comm.exchange.primitives import is_native
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.timeline import Timeline
from megabatch.errors import PeerError


class NoStreams:
    """Mock of `Streams` for machines without a GPU."""

    def __init__(self, _device):
        self.next = contextlib.nullcontext


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr("megabatch.comm.exchange.primitives.is_native", lambda _group: True)
    monkeypatch.setattr(engine, "Streams", NoStreams)


def stages_and_sum(shape, algorithm):
    grid = make_grid(shape=shape)
    names = [[stage.name for stage in route] for route in routes(algorithm, grid)]
    value = torch.arange(37.0, dtype=torch.float64) * (dist.get_rank() + 1)
    return names, sum_by_stages(value, algorithm, grid)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4, 1)])
def test_every_algorithm_gives_the_sum_with_the_backends_own_collectives(native, algorithm, shape):
    num_ranks = shape[0] * shape[1]
    for _, total in run_threads(num_ranks, stages_and_sum, shape, algorithm):
        assert torch.equal(total, torch.arange(37.0, dtype=torch.float64) * (num_ranks * (num_ranks + 1) / 2))


def test_on_nccl_the_column_of_the_torus_is_one_all_reduce(native):
    names, _ = run_threads(4, stages_and_sum, (2, 2), "torus")[0]
    assert names == [["ReduceScatter row", "AllReduce column", "AllGather row"]]
    split, _ = run_threads(4, stages_and_sum, (2, 2), "split_torus")[0]
    assert split == [names[0], ["ReduceScatter column", "AllReduce row", "AllGather column"]]


def exchanged_on_streams(wire):
    timeline = Timeline()
    state = ExchangeState(make_grid(shape=(2, 2)), wire=wire, timeline=timeline)
    result = state.exchange(torch.full((10,), dist.get_rank() + 1.0), "torus").wait()
    own = threading.current_thread().rank_world
    helpers = [thread.name for thread in threading.enumerate() if getattr(thread, "rank_world", None) is own]
    return result, helpers, timeline.finish_step()


def exchange_after_a_failure():
    state = ExchangeState(make_grid())
    dist.barrier()
    state.fail(PeerError("rank 1 is gone"))
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        state.exchange(torch.ones(4), "torus").wait()


def test_after_a_failure_nothing_is_enqueued(native, monkeypatch):
    monkeypatch.setattr(ExchangeState, "_run_on_stream", lambda *_: pytest.fail("enqueues"))
    run_threads(2, exchange_after_a_failure)


@pytest.mark.parametrize("wire", ["fp32", "fp16", "bf16"])
def test_buckets_use_streams_and_start_no_threads(native, wire):
    for result, threads, step in run_threads(4, exchanged_on_streams, wire):
        assert torch.equal(result, torch.full((10,), 2.5))
        assert len(threads) == 1
        assert step["num_buckets"] == 1
        assert step["exposed_ms"] >= 0


def test_memory_groups_and_gloo_are_not_native():
    assert run_threads(2, lambda: is_native(dist.group.WORLD)) == [False, False]
