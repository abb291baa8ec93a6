"""The wire: the type, bytes, rounding and range of what is sent."""

import contextlib
import itertools
import os
import socket
import struct

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from memory_group import MemoryGroup
from ranks import run_processes, run_threads
from slow import slow_except

from megabatch.comm.exchange.algorithms import ALGORITHMS, padded_numel, routes, sent_bytes
from megabatch.comm.exchange.grid import Grid, make_grid
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.exchange.wire import WIRE_DTYPES, pack, unpack, wire_dtype
from megabatch.errors import SettingsError

HALF = ["fp16", "bf16"]


@given(numel=st.integers(1, 50), extra=st.integers(0, 9), wire=st.sampled_from(["fp32", *HALF]))
def test_packing_scales_casts_and_pads_with_zeros(numel, extra, wire):
    source = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    packed = torch.full((numel + extra,), 7.0, dtype=wire_dtype(wire))
    pack(source.clone(), packed, share=0.25)
    assert torch.equal(packed[:numel], (source * 0.25).to(wire_dtype(wire)))
    assert not packed[numel:].any()
    target = torch.empty(numel)
    unpack(packed, target, factor=4.0)
    assert torch.allclose(target, source, rtol=2**-8)


@pytest.mark.parametrize("wire", HALF)
def test_error_feedback_removes_the_bias_of_the_cast(wire):
    gradient = torch.tensor([1.0 + 2.0**-13, 3e-9, -0.3], dtype=torch.float32)
    residual, plain, fed = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    packed = torch.empty(3, dtype=wire_dtype(wire))
    for _ in range(4096):
        pack(gradient.clone(), packed)
        plain += packed.float()
        pack(gradient.clone(), packed, residual=residual)
        fed += packed.float()
    exact = 4096 * gradient.double()
    assert ((plain - exact).abs() / exact.abs())[0] > 1e-4
    assert ((fed + residual - exact).abs() <= 1e-4 * exact.abs()).all()


def test_an_overflow_is_not_kept_in_the_residual():
    residual, packed = torch.zeros(2), torch.empty(2, dtype=torch.float16)
    pack(torch.tensor([1e6, 1.0]), packed, residual=residual)
    assert packed[0].isinf()
    assert residual.isfinite().all()


def means_of_steps(values, options):
    """The exchanged mean of each step; rank r holds the step's value times 1, 3 or 2 for r modulo 3 = 0, 1 or 2."""
    state = ExchangeState(make_grid(shape=(2, 3)), **options)
    held = [1.0, 3.0, 2.0][dist.get_rank() % 3]
    return [float(state.exchange(torch.full((5,), held * value), "torus").wait()[0]) for value in values]


def test_fp16_does_not_overflow_where_the_sum_would_because_it_divides_first():
    assert torch.finfo(torch.float16).max < 6 * 60000
    for value, options in ((30000.0, {"wire_scale": 1.0}), (15000.0, {})):
        for (mean,) in run_threads(6, means_of_steps, [value], {"wire": "fp16"} | options):
            assert mean == pytest.approx(2 * value, rel=2e-3)


def test_a_fixed_scale_lifts_gradients_that_fp16_would_lose():
    assert run_threads(6, means_of_steps, [5e-9], {"wire": "fp16", "wire_scale": 1.0})[0] == [0.0]
    lifted = run_threads(6, means_of_steps, [5e-9], {"wire": "fp16", "wire_scale": 2.0**16})[0]
    assert lifted == pytest.approx([1e-8], rel=2e-3)


@pytest.mark.parametrize("exponent", slow_except(range(-20, 13), -20, 12))
def test_the_scale_follows_small_and_large_gradients_without_overflow(exponent):
    value = 2.0**exponent
    results = run_threads(6, means_of_steps, [value] * 14 + [1000 * value, value], {"wire": "fp16"})
    assert all(result == results[0] for result in results)
    steady, jump, after = results[0][13], results[0][14], results[0][15]
    assert steady == pytest.approx(2 * value, rel=2e-3)
    assert value < jump <= 2001 * value  # clipped, perhaps, but never infinite
    assert after == pytest.approx(2 * value, rel=2e-3)


def non_finite_then_finite(bad):
    state = ExchangeState(make_grid(shape=(1, 2)), wire="fp16")
    first = state.exchange(torch.tensor([bad if dist.get_rank() == 0 else 1.0, 1.0]), "torus").wait().clone()
    return first, state.exchange(torch.ones(2), "torus").wait()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_not_hidden_by_clipping(bad):
    for first, second in run_threads(2, non_finite_then_finite, bad):
        assert not first.isfinite().any()
        assert torch.allclose(second, torch.ones(2), rtol=2e-3)


def resumed(saved_after):
    """True if 6 steps of one state equal those of two states, the second of which loads the first one's scales."""
    values = [torch.randn(7, generator=torch.Generator().manual_seed(step)) * 10.0**-step for step in range(6)]
    one, first, second = (ExchangeState(make_grid(shape=(1, 2)), wire="fp16") for _ in range(3))
    through = [one.exchange(value.clone(), "torus").wait() for value in values]
    parts = [first.exchange(value.clone(), "torus").wait() for value in values[:saved_after]]
    second.scales.load_state_dict(first.scales.state_dict())
    parts += [second.exchange(value.clone(), "torus").wait() for value in values[saved_after:]]
    return all(torch.equal(a, b) for a, b in zip(through, parts, strict=True))


def test_saved_scales_resume_bitwise():
    assert run_threads(2, resumed, 3) == [True, True]


@pytest.mark.parametrize("wire", HALF)
def test_error_feedback_is_independent_of_the_scale(wire):
    residual, packed = torch.zeros(1), torch.empty(1, dtype=wire_dtype(wire))
    gradient, total = torch.tensor([1.0 + 2.0**-12]), 0.0
    for step in range(64):
        scale = 2.0 ** (step % 7)
        pack(gradient.clone(), packed, scale=scale, residual=residual)
        total += packed.item() / scale
    assert total + residual.item() == pytest.approx(64 * gradient.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0])
def test_a_wire_scale_that_would_round_is_refused(scale):
    with pytest.raises(SettingsError, match="power of two"):
        ExchangeState(Grid([[0]], rank=0), wire_scale=scale)


def test_an_unknown_wire_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="fp32, fp16, bf16"):
        wire_dtype("fp8")


def sums(average):
    state = ExchangeState(make_grid(shape=(2, 2)), average=average)
    return state.exchange(torch.ones(3) * (dist.get_rank() + 1), "split_torus").wait()


def test_the_result_is_the_mean_or_without_average_the_sum():
    assert run_threads(4, sums, True)[0].tolist() == [2.5] * 3
    assert run_threads(4, sums, False)[0].tolist() == [10.0] * 3


class Counted:
    """Counts the bytes that each rank sends in a memory group's collectives."""

    def __init__(self, monkeypatch):
        self.sent = {}
        for name in ("all_to_all_single", "send", "allreduce"):
            monkeypatch.setattr(MemoryGroup, name, self._counting(name, getattr(MemoryGroup, name)))
        monkeypatch.setattr(MemoryGroup, "alltoall_base", MemoryGroup.all_to_all_single)  # its name before torch 2.13

    def _counting(self, name, original):
        def call(group, *arguments):
            rank = dist.get_rank()
            self.sent[rank] = self.sent.get(rank, 0) + getattr(self, name)(group, *arguments)
            return original(group, *arguments)

        return call

    def all_to_all_single(self, group, _output, whole, *_):
        return whole.nbytes * (group.size() - 1) / group.size()

    def send(self, _group, tensors, *_):
        return tensors[0].nbytes

    def allreduce(self, group, tensors, *_):
        return 2 * tensors[0].nbytes * (group.size() - 1) / group.size()


def exchange_and_formula(shape, numel, algorithm, wire):
    grid = make_grid(shape=shape)
    ExchangeState(grid, wire=wire).exchange(torch.ones(numel), algorithm).wait()
    return formula_bytes(grid, numel, algorithm, wire)


def formula_bytes(grid, numel, algorithm, wire):
    made = routes(algorithm, grid)
    length = padded_numel(numel, algorithm, grid) * wire_dtype(wire).itemsize
    return sum(sent_bytes(route, length / len(made)) for route in made)


@pytest.mark.parametrize("algorithm", ["flat", "torus", "split_torus"])  # reduce and broadcast: see the kernel's count
@pytest.mark.parametrize("shape", [(2, 3), (4, 2)])
def test_every_rank_sends_the_bytes_of_the_formula_and_half_of_them_in_half_precision(monkeypatch, shape, algorithm):
    counted = {}
    for wire in ("fp32", "fp16", "bf16"):
        with monkeypatch.context() as patch:
            counter = Counted(patch)
            formula = run_threads(shape[0] * shape[1], exchange_and_formula, shape, 1001, algorithm, wire)
        counted[wire] = counter.sent
        for rank, expected in enumerate(formula):
            assert counter.sent[rank] == pytest.approx(expected)
    assert all(counted["fp32"][rank] == 2 * counted[wire][rank] for wire in HALF for rank in counted["fp32"])


def test_the_torus_sends_as_little_as_a_ring():
    numel = 960
    sent = run_threads(6, exchange_and_formula, (2, 3), numel, "torus", "fp32")
    assert sent == pytest.approx([2 * (6 - 1) / 6 * 4 * numel] * 6)


def bytes_of_exchanges(shape, numel, repeats):
    """(bytes that this rank's sockets sent, by the kernel's count; bytes by the formula) per algorithm and wire."""
    counted = {}
    buffer = torch.ones(numel)
    for algorithm, wire in itertools.product(ALGORITHMS, WIRE_DTYPES):
        state = ExchangeState(make_grid(shape=shape), wire=wire)
        state.exchange(buffer, algorithm).wait()
        dist.barrier()
        before = bytes_sent()
        for _ in range(repeats):
            state.exchange(buffer, algorithm).wait()
        dist.barrier()
        counted[algorithm, wire] = bytes_sent() - before, repeats * formula_bytes(state.grid, numel, algorithm, wire)
    return counted


def bytes_sent():
    """tcpi_bytes_sent - tcpi_bytes_retrans (struct tcp_info, offset 200) over this process's connections."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not a TCP connection
            information = tcp_information(int(name))
            sent, again = struct.unpack_from("QQ", information, 200)
            total += sent - again
    return total


def tcp_information(number):
    copy = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        os.dup2(number, copy.fileno())
        return copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
    finally:
        copy.close()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (3, 1)])
@pytest.mark.parametrize(
    "numel", [2**18, 2**21]
)  # 8 MiB of fp32: gloo's reduce then sends more than 2 segments a chunk
def test_the_kernel_counts_the_bytes_of_the_formula_on_every_rank(shape, numel):
    for counted in run_processes(shape[0] * shape[1], bytes_of_exchanges, shape, numel, 4):
        for case, (sent, formula) in counted.items():
            assert sent == pytest.approx(formula, rel=0.01, abs=4000), case  # messages of barriers


@pytest.mark.multiprocess
def test_the_kernel_counts_the_bytes_of_a_ring_for_flat_and_torus_and_half_of_them_in_half_precision():
    numel, repeats = 2**18, 4
    for counted in run_processes(4, bytes_of_exchanges, (2, 2), numel, repeats):
        for (algorithm, wire), (sent, _) in counted.items():
            if algorithm != "hierarchical":
                ring = 2 * (3 / 4) * wire_dtype(wire).itemsize * numel
                assert sent == pytest.approx(repeats * ring, rel=0.01)


def hierarchical_bytes(shape, numel):
    return formula_bytes(make_grid(shape=shape), numel, "hierarchical", "fp16")


@pytest.mark.parametrize(
    ("shape", "megabytes"), [((2, 2), 64.1), ((4, 1), 54.1), ((2, 3), 75.1), ((3, 2), 68.2), ((6, 1), 65.1)]
)
def test_the_hierarchical_algorithm_sends_the_bytes_that_were_measured_over_all_ranks(shape, megabytes):
    num_ranks = shape[0] * shape[1]
    numel = {4: 4_000_000, 6: 3_000_000}[num_ranks]
    assert sum(run_threads(num_ranks, hierarchical_bytes, shape, numel)) / 1e6 == pytest.approx(megabytes, rel=0.005)
