"""Shampoo: its equations written out in float64, grafting, worker counts, cost."""

import pytest
import torch
from matrix_cases import assert_equal, assert_same_on_any_number_of_workers, resnet50_share_of_step
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.optim.groups import param_groups
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD
from megabatch.optim.shampoo import Shampoo, inverse_fourth_root

F64 = torch.float64


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def take_steps(optimizer: torch.optim.Optimizer, first: int = 0, last: int = 5) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for position, p in enumerate(parameters):
            p.grad = torch.empty_like(p).copy_(seeded(p.shape, 100 * step + position))
        optimizer.step()
    return [p.detach() for p in parameters]


def root(factor: Tensor, eps: float) -> Tensor:
    """The inverse fourth root through singular values, not eigenvalues."""
    u, s, _ = torch.linalg.svd(factor)
    return u @ torch.diag((s + eps * s.max()) ** -0.25) @ u.T


@pytest.mark.parametrize(("graft", "nesterov"), [("sgd", False), ("sgd", True), ("lars", False)])
def test_the_published_equations(graft, nesterov):
    """Two blocks of columns for a filter bank of 6 x (4 3 3); roots in steps 0, 2 and 4."""
    weight, lr, momentum, decay, beta2, eps, eta = seeded((6, 4, 3, 3), 0), 0.1, 0.9, 0.01, 0.8, 1e-4, 0.02
    parameter = nn.Parameter(weight.clone(memory_format=torch.channels_last))
    values = {"beta2": beta2, "eps": eps, "block_size": 20, "root_every": 2, "graft": graft, "trust_coefficient": eta}
    ours = Shampoo([parameter], lr, momentum=momentum, weight_decay=decay, nesterov=nesterov, **values)
    w, v = weight.view(6, 36), torch.zeros(6, 36, dtype=F64)
    blocks = [(slice(0, 18), torch.zeros(6, 6, dtype=F64), torch.zeros(18, 18, dtype=F64)) for _ in range(2)]
    blocks[1] = (slice(18, 36), blocks[1][1].clone(), blocks[1][2].clone())
    roots = [(None, None), (None, None)]
    for step in range(5):
        g = seeded((6, 4, 3, 3), 100 * step).view(6, 36)
        d = torch.zeros_like(g)
        for number, (columns, left, right) in enumerate(blocks):
            part = g[:, columns]
            left.mul_(beta2).add_((1 - beta2) * part @ part.T)
            right.mul_(beta2).add_((1 - beta2) * part.T @ part)
            if step % 2 == 0:
                roots[number] = (root(left, eps), root(right, eps))
            d[:, columns] = roots[number][0] @ part @ roots[number][1]
        d *= g.norm() / d.norm()
        ratio = eta * w.norm() / (g.norm() + decay * w.norm()) if graft == "lars" else 1.0
        u = d + decay * w
        v = momentum * v + u
        w -= lr * ratio * (u + momentum * v if nesterov else v)
    torch.testing.assert_close(take_steps(ours)[0].reshape(6, 36), w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_roots_against_float64(dtype):
    square = seeded((3, 12, 12), 0) @ torch.diag(torch.logspace(-3, 1, 12, dtype=F64))
    factors = square @ square.mT
    found = inverse_fourth_root(factors.to(dtype), eps=1e-6)
    assert found.dtype == dtype
    largest = torch.linalg.matrix_norm(factors, 2)
    ridged = factors + 1e-6 * largest[:, None, None] * torch.eye(12, dtype=F64)
    product = torch.linalg.matrix_power(found.double(), 4) @ ridged
    tolerance = 1e-8 if dtype == F64 else 0.2  # float32 rounds the smallest eigenvalues of the factor itself
    torch.testing.assert_close(product, torch.eye(12, dtype=F64).expand(3, -1, -1), rtol=0, atol=tolerance)


def test_the_root_of_zeros_is_the_identity_and_that_of_nan_is_nan():
    assert torch.equal(inverse_fourth_root(torch.zeros(1, 3, 3), 1e-6)[0], torch.eye(3))
    assert inverse_fourth_root(torch.full((1, 3, 3), float("nan")), 1e-6).isnan().all()


@pytest.mark.parametrize("form", ["outside", "inside_corrected"])
@pytest.mark.parametrize(("graft", "plain"), [("sgd", SGD), ("lars", LARS)])
def test_with_a_preconditioner_of_the_identity_it_is_sgd_or_lars(form, graft, plain):
    """A large eps makes both roots multiples of the identity; grafting removes the multiple."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).double()
    values = {"lr": 0.2, "momentum_form": form}
    grafted = Shampoo(param_groups(model, weight_decay=0.1), eps=1e12, graft=graft, **values)
    start = [p.detach().clone() for p in model.parameters()]
    found = [w.clone() for w in take_steps(grafted)]
    for p, w in zip(model.parameters(), start, strict=True):
        p.data.copy_(w)
    for p, q in zip(found, take_steps(plain(param_groups(model, weight_decay=0.1), **values)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_run_resumes_bitwise_between_two_root_computations():
    def made() -> Shampoo:
        return Shampoo([nn.Parameter(seeded((6, 8), 0).float())], lr=0.1, root_every=4)

    whole, cut, resumed = made(), made(), made()
    take_steps(whole, 0, 7)
    take_steps(cut, 0, 3)
    resumed.param_groups[0]["params"][0].data.copy_(cut.param_groups[0]["params"][0].data)
    resumed.load_state_dict(cut.state_dict())
    assert torch.equal(take_steps(resumed, 3, 7)[0], whole.param_groups[0]["params"][0])
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_factors_of_bfloat16_parameters_stay_float32_when_loaded():
    optimizers = [Shampoo([nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))], lr=0.1) for _ in range(2)]
    take_steps(optimizers[0])
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    factors = [o.state[o.param_groups[0]["params"][0]]["factors"] for o in optimizers]
    assert factors[0][0]["left"].dtype == torch.float32
    assert_equal(factors[1], factors[0])


def test_a_parameter_whose_first_gradient_comes_later_gets_its_roots_then():
    late = nn.Parameter(seeded((4, 6), 1))
    optimizer = Shampoo([nn.Parameter(seeded((4, 6), 0)), late], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = seeded((4, 6), 2)
    optimizer.step()
    assert late not in optimizer.state
    take_steps(optimizer, 1, 2)
    assert optimizer.state[late]["factors"][0]["left_root"].isfinite().all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"graft": "adam"}, "graft='sgd' works"),
        ({"block_size": 0}, "block_size=1024 works"),
        ({"root_every": 0}, "root_every=10 works"),
        ({"beta2": 1.0}, "beta2=0.95"),
    ],
)
def test_values_out_of_range_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        Shampoo([nn.Parameter(torch.ones(2, 2))], lr=0.1, **values)


def test_a_group_that_is_to_be_captured_is_refused():
    with pytest.raises(UserError, match="capturable=False works"):
        Shampoo([{"params": [nn.Parameter(torch.ones(2, 2))], "capturable": True}], lr=torch.tensor(0.1))


@pytest.mark.multiprocess
def test_weights_and_checkpoints_are_bitwise_equal_on_any_number_of_workers():
    assert_same_on_any_number_of_workers(Shampoo, {"lr": 0.1, "block_size": 40, "root_every": 2})


def test_a_resnet50_step_is_hardly_longer():
    """Batch 8,192 on 8 workers, by count."""
    share, cost = resnet50_share_of_step(Shampoo, num_workers=8, global_batch_size=8192)
    assert 0.0005 < share < 0.01
    hidden = 4 * 23_445_504  # bytes of all filter banks but the first
    assert 0.85 * hidden < cost.bytes_received < hidden
    assert cost.total_flops / 8 <= cost.flops < cost.total_flops / 6
