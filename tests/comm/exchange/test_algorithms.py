"""Every algorithm is an all-reduce: equal to the sum of all ranks' tensors, the same bits on every rank."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_threads
from slow import slow_except
from stages import sum_by_stages

from megabatch.comm.exchange.algorithms import ALGORITHMS
from megabatch.comm.exchange.grid import make_grid

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def value_of(rank, numel, dtype):
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def reduced(shape, numel, dtype, algorithm):
    return sum_by_stages(value_of(dist.get_rank(), numel, dtype), algorithm, make_grid(shape=shape))


def check_against_the_sum(results, numel, dtype, unit):
    exact = torch.stack([value_of(rank, numel, dtype).double() for rank in range(len(results))])
    bound = 4 * unit * exact.abs().sum(0) + 1e-7
    for result in results:
        assert torch.equal(result, results[0])
        assert ((result.double() - exact.sum(0)).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, numel=st.integers(1, 300), algorithm=st.sampled_from(ALGORITHMS), data=st.data())
def test_any_length_type_and_grid_gives_the_sum_with_equal_bits_on_all_ranks(shape, numel, algorithm, data):
    units = [(torch.float32, 2**-23), (torch.float64, 2**-52), (torch.bfloat16, 2**-7)]
    dtype, unit = data.draw(st.sampled_from(units))
    results = run_threads(shape[0] * shape[1], reduced, shape, numel, dtype, algorithm)
    check_against_the_sum(results, numel, dtype, unit * len(results))


@pytest.mark.parametrize("algorithm", slow_except(ALGORITHMS, "torus"))
def test_sixteen_by_sixteen_ranks_sum_without_losing_the_remainder(algorithm):
    results = run_threads(256, reduced, (16, 16), 1021, torch.float32, algorithm)
    check_against_the_sum(results, 1021, torch.float32, 256 * 2**-23)
