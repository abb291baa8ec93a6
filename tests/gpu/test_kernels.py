"""The kernels on a real GPU: the mathematics that tests/kernels has in Triton's interpreter, at sizes that fill it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.data.jpeg.decode import resize_box
from megabatch.errors import UserError
from megabatch.kernels.crop_resize import crop_and_resize
from megabatch.kernels.dispatch import has_triton
from megabatch.kernels.gram import gram_conv1x1_norm
from megabatch.kernels.loss import fused_cross_entropy_sum
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.nn.loss import cross_entropy_sum
from megabatch.optim.lars import LARS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_triton(), reason="needs Triton"),
]

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FORMS = ("outside", "inside", "inside_corrected")


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def images(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cuda") * 2 + 0.5
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def batch_norm_run(x: Tensor, residual: Tensor | None, dy: Tensor, span: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(5)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(2, x.shape[1], generator=generator, device="cuda").to(wide)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y, mean, var = fused_bn_act(*leaves[:3], span=span, residual=leaves[3] if residual is not None else None, **options)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("shape", "span"), [((32, 64, 56, 56), 32), ((20, 2048, 7, 7), 8), ((64, 256, 28, 28), 16)])
def test_batch_norm_is_that_of_float64_and_no_worse_than_torchs(
    shape: tuple[int, ...], span: int, residual: bool, dtype: torch.dtype
) -> None:
    x, dy = images(*shape, dtype=dtype), images(*shape, dtype=dtype, seed=1)
    added = images(*shape, dtype=dtype, seed=2) if residual else None
    exact = batch_norm_run(x.double(), None if added is None else added.double(), dy.double(), span)
    ours = batch_norm_run(x, added, dy, span, backend="triton")
    plain = batch_norm_run(x, added, dy, span, backend="reference")
    for number, (mine, torchs, reference) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.isfinite().all()
        assert error(mine, reference) <= max(1.05 * error(torchs, reference), 1e-5), number
        assert error(mine, reference) < 4 * ROUNDING[dtype], number
    again = batch_norm_run(x, added, dy, span, backend="triton")
    assert all(map(torch.equal, ours, again))


def filled(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Ragged tensors and one larger than many chunks, in two groups."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(1,), (3,), (1023,), (64, 64, 3, 3), (1000, 2048)]
    weights = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    laid = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    return [
        {"params": [nn.Parameter(w) for w in laid], "weight_decay": 0.01},
        {"params": [nn.Parameter(torch.randn(257, generator=generator, device="cuda"))], "adapt": False},
    ]


def take_steps(optimizer: torch.optim.Optimizer, *, rates: tuple[float, ...] = (0.3, 0.6, 0.2)) -> None:
    for number, rate in enumerate(rates):
        generator = torch.Generator("cuda").manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = rate
            for p in group["params"]:
                gradient = 0.1 * torch.randn(p.shape, generator=generator, device="cuda")
                p.grad = torch.empty_like(p).copy_(gradient)
        optimizer.step()


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("denominator", ["sum", "update", "gradient"])
@pytest.mark.parametrize("form", FORMS)
def test_lars_in_two_launches_is_lars(form: Any, denominator: Any) -> None:
    values = {"momentum_form": form, "denominator": denominator, "trust_coefficient": 0.02, "eps": 1e-3}
    own = filled()
    ours, lars = LARS(copy.deepcopy(own), lr=1.0, fused=True, **values), LARS(own, lr=1.0, foreach=True, **values)
    again = LARS(filled(), lr=1.0, fused=True, **values)
    for optimizer in (ours, lars, again):
        take_steps(optimizer)
    for p, q, r in zip(parameters(ours), parameters(lars), parameters(again), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(p, r)


def test_16_bit_copies_are_the_rounded_weights() -> None:
    own = filled()
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for group in own for p in group["params"]}
    optimizer = LARS(own, lr=1.0, fused=True, copies=copies)
    take_steps(optimizer)
    for p, written in copies.items():
        assert torch.equal(written, p.detach().bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_step_reads_rates_anew_and_steps_outside_do_not_disturb_it(form: Any) -> None:
    rate = torch.tensor(0.3, device="cuda")
    values = {"momentum_form": form, "trust_coefficient": 0.02}
    own = filled()
    captured = LARS(copy.deepcopy(own), lr=rate, fused=True, capturable=True, **values)
    plain = LARS(own, lr=torch.tensor(0.3, device="cuda"), fused=True, **values)
    for optimizer in (captured, plain):
        for p in parameters(optimizer):
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in (0.6, 0.1, 0.2):
        rate.fill_(number)
        graph.replay()
        plain.param_groups[0]["lr"].fill_(number)
        plain.step()
        if number == 0.1:  # one step outside, with gradients elsewhere in memory
            kept = [p.grad for p in parameters(captured)]
            for optimizer in (captured, plain):
                for p in parameters(optimizer):
                    p.grad = torch.full_like(p, -0.02)
                optimizer.step()
            for p, q, gradient in zip(parameters(captured), parameters(plain), kept, strict=True):
                p.grad, q.grad = gradient, torch.full_like(q, 0.01)
    for p, q in zip(parameters(captured), parameters(plain), strict=True):
        assert torch.equal(p, q)


def test_a_capture_without_a_step_before_says_what_to_do() -> None:
    optimizer = LARS(filled(), lr=torch.tensor(0.3, device="cuda"), fused=True, capturable=True)
    for p in parameters(optimizer):
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    with pytest.raises(UserError, match="take one step outside"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDING])
@pytest.mark.parametrize("classes", [10, 1000, 16000])
def test_the_loss_and_its_gradient_are_those_of_float64(classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(300, classes, generator=generator, device="cuda")).to(dtype).requires_grad_()
    labels, mixed = torch.randint(classes, (2, 300), generator=generator, device="cuda")
    weight = torch.rand(300, generator=generator, device="cuda")
    exact = logits.detach().double().requires_grad_()
    chosen: dict[str, Any] = {"label_smoothing": 0.1, "mixed_labels": mixed}
    loss = fused_cross_entropy_sum(logits, labels, mix_weight=weight, **chosen)
    expected = cross_entropy_sum(exact, labels, mix_weight=weight.double(), **chosen)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert logits.grad is not None
    assert exact.grad is not None
    assert error(logits.grad, exact.grad) < ROUNDING.get(dtype, 1e-5)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_crops_are_those_of_the_cpu_path(layout: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(375, 500), (64, 48), (1200, 900), (224, 224)]
    photographs = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in sizes]
    boxes = torch.tensor([[h // 7, w // 9, h // 2, w // 3] for h, w in sizes], dtype=torch.float64)
    boxes[2] = torch.tensor([10.3, 2.6, 1100.2, 800.9])
    planes = [p.permute(2, 0, 1).contiguous() if layout == "CHW" else p for p in photographs]
    flip = torch.tensor([False, True, False, True])
    batch = crop_and_resize(
        [p.cuda() for p in planes], boxes, size=224, mean=(0, 0, 0), std=(1, 1, 1), flip=flip, layout=layout
    )
    assert not batch[:, 3].any()
    for number, (photograph, mirrored) in enumerate(zip(photographs, flip, strict=True)):
        expected = resize_box(photograph.numpy(), tuple(boxes[number].tolist()), (224, 224))
        ours = (255 * batch[number, :3].float()).permute(1, 2, 0).cpu().numpy()
        ours = ours[:, ::-1] if mirrored else ours
        assert np.abs(ours - expected).max() < 1.3
        assert np.abs(ours - expected).mean() < 0.4


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("inputs", "outputs", "pixels"), [(64, 256, 28), (256, 1024, 14), (512, 2048, 7), (48, 80, 9)])
def test_ends_of_bottlenecks_are_those_of_float64(inputs: int, outputs: int, pixels: int, dtype: torch.dtype) -> None:
    """The residual keeps all sums away from 0, where a rounding would flip ReLU's mask."""
    x, dy = images(20, inputs, pixels, pixels, dtype=dtype), images(20, inputs, pixels, pixels, dtype=dtype, seed=1)
    residual = 8 * images(20, outputs, pixels, pixels, dtype=dtype, seed=2).sign()
    dz = images(20, outputs, pixels, pixels, dtype=dtype, seed=3)
    generator = torch.Generator("cuda").manual_seed(2)
    weights = [torch.randn(outputs, inputs, 1, 1, generator=generator, device="cuda") / inputs**0.5 for _ in range(2)]
    weights[1] = weights[1].permute(1, 0, 2, 3).contiguous()
    vectors = torch.rand(2, outputs, generator=generator, device="cuda") + 0.5

    def step(wide: bool, backend: Any) -> list[Tensor]:
        given = [t.double() if wide else t for t in (x, weights[0], *vectors, residual, weights[1], dz, dy)]
        leaves = [t.detach().requires_grad_() for t in given[:6]]
        *first, added, following = leaves
        out = gram_conv1x1_norm(*first, span=8, residual=added, next_weight=following, backend=backend)
        return [out.z.detach(), *torch.autograd.grad((out.z, out.next_y), leaves, tuple(given[6:]))]

    ours, exact = step(False, "triton"), step(True, "reference")
    for number, (mine, reference) in enumerate(zip(ours, exact, strict=True)):
        assert error(mine, reference) < 4 * ROUNDING[dtype], number
    assert all(map(torch.equal, ours[:-1], step(False, "triton")[:-1]))


def test_a_fused_block_trains_inside_a_cuda_graph() -> None:
    x = images(16, 64, 28, 28, dtype=torch.float16)
    weight, bias = (torch.ones(64, device="cuda").requires_grad_() for _ in range(2))
    filters = (torch.randn(64, 64, 3, 3, device="cuda") / 24).half().requires_grad_()
    labels = torch.arange(16, device="cuda")

    def gradients() -> tuple[Tensor, ...]:
        y, _, _ = fused_bn_act(functional.conv2d(x, filters, padding=1), weight, bias, span=8, residual=x)
        loss = fused_cross_entropy_sum(y.mean((2, 3)), labels, label_smoothing=0.1)
        return torch.autograd.grad(loss, (weight, bias))

    expected = gradients()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-2, atol=1e-3)
