"""The hooks inside DDP: the mean gradient on every rank, whatever the algorithm, wire, buckets and backend."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megabatch.comm import wrap
from megabatch.comm.algorithms import ALGORITHMS
from ranks import run_processes, run_threads

BOTH = pytest.mark.parametrize("run", [run_threads, pytest.param(run_processes, marks=pytest.mark.multiprocess)])


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


@BOTH
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ddp_with_a_hook_holds_the_mean_gradient_on_four_ranks(run, algorithm):
    check(run(4, gradients_after_steps, algorithm, (2, 2), {"bucket_mib": 0.001}), 1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("wire", ["fp16", "bf16"])
@pytest.mark.parametrize("algorithm", ["flat", "split_torus"])
def test_half_precision_wires_work_on_gloo_and_round_as_their_type_does(algorithm, wire):
    options = {"wire": wire, "bucket_mib": 0.002}
    check(run_processes(4, gradients_after_steps, algorithm, (2, 2), options), {"fp16": 2e-3, "bf16": 1.6e-2}[wire])


@pytest.mark.multiprocess
def test_eight_processes_with_many_buckets_in_flight_agree():
    check(run_processes(8, gradients_after_steps, "torus", (4, 2), {"bucket_mib": 0.0005, "static_graph": True}), 1e-5)
