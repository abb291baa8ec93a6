"""Muon: its equations written out, published implementations, worker counts, cost."""

import math
from typing import Any

import pytest
import torch
from matrix_cases import assert_same_on_any_number_of_workers, resnet50_share_of_step
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.optim.engine.newton_schulz import JORDAN, minimax_coefficients
from megabatch.optim.groups import param_groups
from megabatch.optim.muon import Muon

F64 = torch.float64


def newton_schulz(matrix: Tensor, coefficients: Any) -> Tensor:
    """One matrix, as Jordan et al. write it."""
    x = matrix / matrix.norm()
    x = x.T if len(x) > x.shape[1] else x
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def take_steps(optimizer: torch.optim.Optimizer, number: int = 4) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(number):
        for position, p in enumerate(parameters):
            p.grad = torch.empty_like(p).copy_(seeded(p.shape, 100 * step + position))
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_airbenchs_equations_for_filter_banks(memory_format):
    """airbench94_muon: each bank is scaled to norm sqrt(out), then moves by lr O; momentum 0.6, Nesterov, 3 steps."""
    shapes = [(8, 3, 3, 3), (12, 8, 3, 3), (24, 2, 1, 1)]
    weights = [seeded(shape, seed) for seed, shape in enumerate(shapes)]
    parameters = [nn.Parameter(w.clone(memory_format=memory_format)) for w in weights]
    ours = Muon(parameters, lr=0.24, momentum=0.6, scale="none", steps=3, normalize_weights=True)
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        for position, (w, v) in enumerate(zip(weights, buffers, strict=True)):
            g = seeded(w.shape, 100 * step + position)
            v.mul_(0.6).add_(g)
            u = g + 0.6 * v
            w.mul_(len(w) ** 0.5 / w.norm())
            w.sub_(0.24 * newton_schulz(u.reshape(len(u), -1), [JORDAN] * 3).view(w.shape))
    for w, p in zip(weights, take_steps(ours), strict=True):
        torch.testing.assert_close(p, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("scale", "published"), [("spectral", "original"), ("rms", "match_rms_adamw")], ids=["spectral", "rms"]
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_torchs_muon_on_matrices(monkeypatch, scale, published, nesterov):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())  # compare in float64, not in bfloat16
    shapes = [(6, 20), (20, 6), (9, 9)]
    values = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    ours = Muon([nn.Parameter(seeded(s, i)) for i, s in enumerate(shapes)], scale=scale, **values)
    theirs = torch.optim.Muon(
        [nn.Parameter(seeded(s, i)) for i, s in enumerate(shapes)], adjust_lr_fn=published, **values
    )
    for p, q in zip(take_steps(ours), take_steps(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_in_bfloat16_the_update_is_that_of_float32_to_its_digits():
    steps = {}
    for dtype in (None, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(16, 8, 3, 3))
        take_steps(Muon([parameter], lr=1.0, iteration_dtype=dtype), 1)
        steps[dtype] = parameter.detach()
    assert 0 < (steps[torch.bfloat16] - steps[None]).norm() < 0.02 * steps[None].norm()


def test_the_update_is_orthogonal():
    for shape in ((16, 4, 3, 3), (72, 2, 3, 3)):
        parameter = nn.Parameter(torch.zeros(shape))
        take_steps(Muon([parameter], lr=0.5, scale="none", coefficients="minimax", steps=6), 1)
        values = torch.linalg.svdvals(parameter.detach().flatten(1))
        torch.testing.assert_close(values, torch.full_like(values, 0.5), rtol=0.01, atol=0)


def test_minimax_coefficients_are_those_of_the_steps():
    given = seeded((4, 9), 0)
    parameter = nn.Parameter(torch.zeros_like(given))
    optimizer = Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, coefficients="minimax", steps=4)
    parameter.grad = given
    optimizer.step()
    torch.testing.assert_close(-parameter.detach(), newton_schulz(given, minimax_coefficients(4)))


def test_vectors_and_ends_step_as_sgd_at_their_own_rate():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1)).double()
    groups = param_groups(model, weight_decay=0.1, separate_ends=True)
    start = [p.detach().clone() for group in groups for p in group["params"]]
    found = take_steps(Muon(groups, lr=0.02, momentum=0.9, sgd_lr_factor=5.0))
    others = [nn.Parameter(w) for w in start]
    sgd = torch.optim.SGD(
        [
            {"params": others[:1], "weight_decay": 0.0},  # stands for the hidden matrix
            {"params": others[1:3], "weight_decay": 0.1},
            {"params": others[3:], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    for p, q in zip(found[1:], take_steps(sgd)[1:], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_a_gradient_stays():
    parameters = [nn.Parameter(seeded((4, 6), seed)) for seed in range(3)]
    before = parameters[1].detach().clone()
    optimizer = Muon(parameters, lr=0.1)
    parameters[0].grad, parameters[2].grad = seeded((4, 6), 7), seeded((4, 6), 8)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state
    alone = nn.Parameter(seeded((4, 6), 2))
    alone.grad = seeded((4, 6), 8)
    Muon([alone], lr=0.1).step()
    torch.testing.assert_close(parameters[2].detach(), alone.detach())


def test_bfloat16_parameters_have_float32_momentum_and_copies_are_written():
    parameter = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    copy = torch.zeros(4, 6, dtype=torch.float16)
    optimizer = Muon([parameter], lr=0.1, copies={parameter: copy})
    take_steps(optimizer, 1)
    assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(copy, parameter.detach().half())
    assert not (parameter == 1).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": "other"}, "scale='spectral' works"),
        ({"coefficients": "other"}, "coefficients='jordan' works"),
        ({"steps": 0}, "steps=5 works"),
        ({"sgd_lr_factor": -1.0}, "sgd_lr_factor=1.0"),
    ],
)
def test_values_out_of_range_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1, **values)


def test_a_vector_among_the_matrices_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"shape \(3,\).*param_groups"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1)


@pytest.mark.parametrize("backend", [{"fused": True}, {"foreach": False}])
def test_a_group_for_the_kernels_of_lars_is_refused(backend):
    with pytest.raises(UserError, match="fused=False with foreach=None works"):
        Muon([{"params": [nn.Parameter(torch.ones(3, 2))], **backend}], lr=0.1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("values", [{}, {"iteration_dtype": torch.bfloat16, "normalize_weights": True}])
def test_weights_are_bitwise_equal_on_any_number_of_workers(values):
    assert_same_on_any_number_of_workers(Muon, {"lr": 0.1, **values})


def test_a_resnet50_step_is_hardly_longer():
    """Batch 8,192 on 8 workers, by count."""
    share, cost = resnet50_share_of_step(Muon, num_workers=8, global_batch_size=8192)
    assert 0.001 < share < 0.01
    hidden = 4 * 23_445_504  # bytes of all filter banks but the first
    assert 0.85 * hidden < cost.bytes_received < hidden
    assert cost.total_flops / 8 <= cost.flops < cost.total_flops / 2


def test_the_flops_counted_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    optimizer = Muon(
        [nn.Parameter(torch.ones(6, 10)), nn.Parameter(torch.ones(10, 6)), nn.Parameter(torch.ones(5, 2, 3, 3))], lr=0.1
    )
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer.cost().flops == counter.get_total_flops()
    assert math.isclose(optimizer.cost(3).total_flops, counter.get_total_flops())
