"""The fused cross entropy against torch's in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabatch.errors import UserError
from megabatch.kernels import loss as module
from megabatch.kernels.loss import cross_entropy_with_gradient, fused_cross_entropy_sum
from megabatch.nn.loss import cross_entropy_sum

pytestmark = pytest.mark.usefixtures("interpreter")

ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
COUNT = 5
MIXES: dict[str, Any] = {
    "plain": None,
    "a number": 0.3,
    "one tensor": torch.tensor(0.3),
    "per sample": torch.rand(COUNT),
}


def draw(classes: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(COUNT, classes, generator=generator)
    labels, mixed = torch.randint(classes, (2, COUNT), generator=generator)
    return logits.to(dtype), labels, mixed


def options(mixed: Tensor, mix: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if mix is None:
        return {"label_smoothing": 0.1}
    weight = mix.to(dtype) if isinstance(mix, Tensor) else mix
    return {"label_smoothing": 0.1, "mixed_labels": mixed, "mix_weight": weight}


def exact(logits: Tensor, labels: Tensor, chosen: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    leaf = logits.double().requires_grad_()
    loss = cross_entropy_sum(leaf, labels, **chosen)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("classes", [2, 37, 1000])
def test_loss_and_gradient_match_float64(classes: int, mix: str, dtype: torch.dtype) -> None:
    logits, labels, mixed = draw(classes, dtype)
    loss, gradient = exact(logits, labels, options(mixed, MIXES[mix], torch.float64))
    leaf = logits.clone().requires_grad_()
    ours = fused_cross_entropy_sum(leaf, labels, backend="triton", **options(mixed, MIXES[mix]))
    ours.backward()
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(loss), rel=1e-6)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert error(leaf.grad, gradient) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_hand_written_backward_gets_the_gradient_times_its_scale(backend: Any) -> None:
    logits, labels, mixed = draw(37, torch.float16)
    chosen = options(mixed, 0.3)
    expected_loss, expected = exact(logits, labels, chosen)
    for scale in (64.0, torch.tensor(64.0)):
        loss, gradient = cross_entropy_with_gradient(logits, labels, gradient_scale=scale, backend=backend, **chosen)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
        assert gradient.dtype == torch.float16
        assert error(gradient, 64 * expected) < ROUNDING[torch.float16]


def test_a_loss_scale_is_applied_before_the_gradient_is_rounded() -> None:
    logits, labels, _ = draw(37, torch.float16)
    inverse_batch = 2.0**-20  # 1 / global batch size: float16 keeps few digits of such a gradient
    for scale, fits in ((inverse_batch, False), (1.0, True)):
        leaf = logits.clone().requires_grad_()
        (fused_cross_entropy_sum(leaf, labels, backend="triton") * scale).backward()
        assert leaf.grad is not None
        expected = exact(logits, labels, {})[1] * scale
        assert (error(leaf.grad, expected) < ROUNDING[torch.float16]) is fits


def test_large_logits_neither_overflow_nor_underflow() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e4, -3e4, -3e4]], requires_grad=True)
    loss = fused_cross_entropy_sum(logits, torch.tensor([1, 2]), backend="triton")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1e4 + float(torch.log(torch.tensor(3.0))), rel=1e-6)
    third = 1 / 3
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0], [third, third, third - 1]]))


def test_strided_logits_labels_and_weights_give_the_same_loss() -> None:
    logits, labels, mixed = draw(37, torch.float32)
    weight = torch.rand(COUNT)
    apart = torch.full((COUNT, 50), torch.nan)
    apart[:, :37] = logits
    columns = torch.stack([labels, mixed], dim=1)
    weights = torch.stack([weight, 1 - weight], dim=1)
    ours = fused_cross_entropy_sum(
        apart[:, :37], columns[:, 0], mixed_labels=columns[:, 1], mix_weight=weights[:, 0], backend="triton"
    )
    together = fused_cross_entropy_sum(logits, labels, mixed_labels=mixed, mix_weight=weight, backend="triton")
    assert torch.equal(ours, together)


@pytest.mark.parametrize("mix", MIXES)
def test_labels_that_torch_ignores_add_nothing(mix: str) -> None:
    logits, labels, mixed = draw(37, torch.float32)
    labels[1], labels[2], mixed[2], mixed[3] = -100, -100, -100, -100
    chosen = options(mixed, MIXES[mix])
    loss, gradient = exact(logits, labels, chosen)
    leaf = logits.clone().requires_grad_()
    ours = fused_cross_entropy_sum(leaf, labels, backend="triton", **chosen)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss), rel=1e-6)
    assert leaf.grad is not None
    assert error(leaf.grad, gradient) < 1e-6
    assert not leaf.grad[2].any()


@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_classes_makes_the_loss_nan(label: int) -> None:
    logits, labels, mixed = draw(37, torch.float32)
    labels[2] = label
    for chosen in ({}, {"mixed_labels": mixed, "mix_weight": 0.5}, {"mixed_labels": labels, "mix_weight": 0.5}):
        first = labels if not chosen or chosen["mixed_labels"] is mixed else mixed
        assert fused_cross_entropy_sum(logits, first, backend="triton", **chosen).isnan()


def test_torch_compile_traces_the_reference() -> None:
    logits, labels, _ = draw(37, torch.float32)
    compiled = torch.compile(fused_cross_entropy_sum, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, labels, backend="triton"), cross_entropy_sum(logits, labels))


def test_an_empty_batch_has_a_loss_of_0() -> None:
    logits, labels = torch.zeros(0, 10, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for backend in ("triton", "reference"):
        assert fused_cross_entropy_sum(logits, labels, backend=backend).detach().tolist() == 0


def test_more_classes_than_fit_into_registers_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLASSES", 36)
    logits, labels, _ = draw(37, torch.float32)
    ours = fused_cross_entropy_sum(logits, labels, backend="triton")
    assert torch.equal(ours, cross_entropy_sum(logits, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels \(4,\)"),
        ({"labels": torch.zeros(5, 10)}, r"labels \(5, 10\)"),
        ({"mixed_labels": torch.zeros(5, dtype=torch.int64)}, "go together"),
        ({"mixed_labels": torch.zeros(5, dtype=torch.int64), "mix_weight": torch.ones(3)}, r"mix_weight is \(3,\)"),
    ],
)
def test_mismatched_tensors_raise_errors_that_name_them(changes: dict[str, Any], message: str) -> None:
    logits, labels, _ = draw(10, torch.float32)
    with pytest.raises(UserError, match=message):
        fused_cross_entropy_sum(**{"logits": logits, "labels": labels, **changes})
