"""How micro-batches are fitted to memory: tried from below, in whole spans, the same on every worker."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_processes
from tiny_run import tiny_recipe
from torch import nn

from megabatch.app.measured import micro_batch
from megabatch.app.measured.micro_batch import activation_bytes, fit_micro_batch, largest_that_fits
from megabatch.comm.launch import World
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 5000))
def test_the_largest_doubling_that_fits_is_found_with_one_failure_at_most(unit, multiple, memory):
    limit, tried = unit * multiple, []

    def try_size(size):
        tried.append(size)
        return size <= memory

    found = largest_that_fits(try_size, unit=unit, limit=limit)
    candidates = {limit, *(unit * 2**k for k in range(7) if unit * 2**k <= limit)}
    assert found == max((size for size in candidates if size <= memory), default=0)
    assert sum(size > memory for size in tried) <= 1
    assert tried == sorted(set(tried))
    assert all(size % unit == 0 for size in tried)


def small_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def fit(recipe, runtime, wished, *, world=None, available=None, monkeypatch=None):
    module = small_net()
    module(torch.zeros(2, 1, 12, 12))
    if monkeypatch:
        monkeypatch.setattr(micro_batch, "available_bytes", lambda: available)
    return fit_micro_batch(recipe, runtime, wished, module, FP32, world=world or World())


def test_enough_memory_leaves_what_suits_the_caches(monkeypatch):
    monkeypatch.setattr(micro_batch, "CACHED_BYTES", 0)
    found = fit(tiny_recipe(), Runtime(), 24, available=2**40, monkeypatch=monkeypatch)
    assert (found.size, found.reason) == (24, "suits the caches")


@pytest.mark.parametrize(
    ("cached", "share", "compiled", "expected"),
    [(2**30, 96, True, 96), (2**30, 95, True, 48), (30, 96, True, 24), (60, 96, True, 48), (2**30, 96, False, 24)],
)
def test_a_small_net_takes_more_samples_a_call_while_they_stay_in_the_caches(
    monkeypatch, cached, share, compiled, expected
):
    """`cached` counts samples here."""
    monkeypatch.setattr(micro_batch, "activation_bytes", lambda *_: 1.0)
    monkeypatch.setattr(micro_batch, "CACHED_BYTES", cached)
    monkeypatch.setattr(micro_batch.cpu_batch_norm, "is_available", lambda: compiled)
    recipe = dataclasses.replace(tiny_recipe(), global_batch_size=share, bn_span=1)
    assert fit(recipe, Runtime(), 24, available=2**40, monkeypatch=monkeypatch).size == expected


def test_the_sites_own_word_is_not_questioned(monkeypatch):
    assert fit(tiny_recipe(), Runtime(micro_batch_size=48), 48, available=1, monkeypatch=monkeypatch).size == 48


def test_the_span_on_which_the_noise_scale_is_measured_stays(monkeypatch):
    recipe = tiny_recipe(max_global_batch_size=96)
    assert fit(recipe, Runtime(), recipe.bn_span, available=1, monkeypatch=monkeypatch).size == recipe.bn_span


def test_short_memory_takes_fewer_spans_and_never_less_than_one(monkeypatch):
    module = small_net()
    module(torch.zeros(2, 1, 12, 12))
    per_sample = activation_bytes(module, FP32, torch.zeros(1, 1, 12, 12))
    recipe = tiny_recipe()
    room_for_20 = int(20 * per_sample / (1 - micro_batch.MARGIN)) + 1
    found = fit(recipe, Runtime(), 24, available=room_for_20, monkeypatch=monkeypatch)
    assert (found.size, found.reason) == (16, "limited by memory")
    none = fit(recipe, Runtime(), 24, available=0, monkeypatch=monkeypatch)
    assert none.size == recipe.bn_span
    assert "too small" in none.reason


def test_an_estimate_counts_every_layers_output_once_and_leaves_the_module_as_it_was():
    module = small_net()
    module(torch.zeros(2, 1, 12, 12))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    outputs = (3 * 4 * 144 + 4 * 144 + 3) * 4  # convolution, norm and ReLU, flattened, logits; fp32
    assert activation_bytes(module, FP32, torch.zeros(1, 1, 12, 12)) == 1.5 * outputs
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def fit_on_rank(rooms):
    """Each rank is a process with memory of its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch._estimate = lambda *_: lambda size: size <= rooms[rank]
    recipe = dataclasses.replace(tiny_recipe(), global_batch_size=96)
    return fit(recipe, Runtime(), 32, world=World(rank, world_size, rank, world_size)).size


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_workers_take_what_the_one_with_least_memory_can():
    assert run_processes(2, fit_on_rank, [16, 32]) == [16, 16]
