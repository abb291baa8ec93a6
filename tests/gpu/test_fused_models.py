"""Whole fused networks on a real GPU: gradients, statistics, choices, CUDA graphs, and data-parallel training."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_cases import step_sums
from torch import Tensor, nn

from megabatch.kernels.dispatch import has_triton
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import last_norms
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import resnet18, resnet50

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_triton(), reason="needs Triton"),
]

COUNT, SPAN = 16, 8
SLACK = 1.1


def build(make: Any, *, fusion: Any = "plain") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make(num_classes=16, norm=functools.partial(SpanBatchNorm2d, span=SPAN))
    for norm in last_norms(model):
        nn.init.constant_(norm.weight, 0.2)
    collect_statistics(model)
    set_fusion(model, fusion)
    return model.to("cuda", memory_format=torch.channels_last)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(COUNT, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    return values.to("cuda", dtype).contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of 256 times the mean loss, and collected statistics."""
    model.zero_grad()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype.itemsize == 2):
        logits = model(images(torch.float64 if dtype == torch.float64 else torch.float32))
    (256 * cross_entropy_sum(logits, torch.arange(COUNT, device="cuda"), label_smoothing=0.1) / COUNT).backward()
    sums = {name: values.double() for name, values in step_sums(model).items()}
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}, sums


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    one, other = (torch.cat([tensors[name].flatten() for name in exact]) for tensors in (found, exact))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [resnet50, resnet18])
def test_gradients_and_statistics_are_no_further_from_float64_than_plain_autocasts(
    make: Any, dtype: torch.dtype
) -> None:
    exact = step(build(make).double(), torch.float64)
    plain, fused = step(build(make), dtype), step(build(make, fusion="auto"), dtype)
    for found, torchs, right in zip(fused, plain, exact, strict=True):
        assert error(torchs, right) < 0.6
        assert error(found, right) < SLACK * error(torchs, right)
    again = step(build(make, fusion="auto"), dtype)
    assert all(torch.equal(again[0][name], gradient) for name, gradient in fused[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pooled_stem_has_the_gradients_of_torchs_operations(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(12, 64, 56, 56, generator=generator, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, generator=generator, device="cuda")
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y, mean, var = fused_bn_relu_pool(*leaves, span=5, backend=backend)  # type: ignore[arg-type]
        slope = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
        results.append([y.detach(), mean, var, *torch.autograd.grad(y, leaves, slope)])
    for mine, torchs in zip(*results, strict=True):
        difference = float((mine.double() - torchs.double()).norm() / torchs.double().norm())
        assert difference < 0.02  # where rounding makes another value the maximum, its gradient goes elsewhere


def test_a_captured_step_computes_what_a_step_outside_does() -> None:
    model = build(resnet50, fusion="auto")
    eager = copy.deepcopy(model)
    labels = torch.arange(COUNT, device="cuda")
    batch = images()

    def backward(own: nn.Module) -> None:
        with torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
            logits = own(batch)
        (256 * cross_entropy_sum(logits, labels) / COUNT).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            backward(model)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(model)
    graph.replay()
    backward(eager)
    torch.cuda.synchronize()
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad), name
    count = float(model.bn1.span_sum[-1])  # type: ignore[union-attr,index,arg-type]
    assert count == 4 * float(eager.bn1.span_sum[-1])  # type: ignore[union-attr,index,arg-type]


def test_data_parallel_training_has_the_gradients_of_one_process() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        alone = build(resnet50, fusion="auto")
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        expected, found = step(alone, torch.float16)[0], step(wrapped, torch.float16)[0]
        for name, gradient in expected.items():
            assert torch.equal(found[f"module.{name}"], gradient), name
    finally:
        dist.destroy_process_group()


def test_a_model_in_another_layout_runs_plain() -> None:
    model = build(resnet18, fusion="auto").to(memory_format=torch.contiguous_format)
    plain = copy.deepcopy(model)
    set_fusion(plain, "plain")
    x = images().contiguous()
    torch.testing.assert_close(model(x), plain(x))
