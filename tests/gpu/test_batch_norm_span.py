"""The same equations on a GPU: one rank, so that the collectives run and sum over it alone."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.batch_norm.shared_span import normalise_shared_span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


def example(dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, nn.BatchNorm2d]:
    stream = torch.Generator("cuda").manual_seed(0)
    x, slope = (torch.randn(12, 8, 7, 7, device="cuda", generator=stream) * 2 + 1 for _ in range(2))
    layer = nn.BatchNorm2d(8).to("cuda", torch.float64)
    with torch.no_grad():
        layer.weight.normal_(generator=stream)
        layer.bias.normal_(generator=stream)
    return x.to(dtype, memory_format=memory_format), slope.to(dtype, memory_format=memory_format), layer


def exact(x: Tensor, slope: Tensor, layer: nn.BatchNorm2d, span: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = x.double().clone().requires_grad_()
    output = torch.cat([layer(part) for part in inputs.split(span)])
    output.backward(slope.double())
    return output.detach(), inputs.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "of_values", "of_sums"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-5, 1e-5),
        (torch.float16, 4e-3, 1e-5),
        (torch.bfloat16, 3e-2, 1e-5),
    ],
)
def test_a_shared_span_has_the_gradients_of_batch_norm_with_sums_in_full_precision(
    dtype: torch.dtype, of_values: float, of_sums: float, memory_format: torch.memory_format
) -> None:
    x, slope, layer = example(dtype, memory_format)
    expected = exact(x, slope, layer, span=12)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (p.detach().to(kind).requires_grad_() for p in (layer.weight, layer.bias))
    inputs = x.clone().requires_grad_()
    output = normalise_shared_span(inputs, weight, bias, like=torch.zeros_like(weight), eps=1e-5, group=None).output
    output.backward(slope)
    for actual, value, limit in zip(
        (output.detach(), inputs.grad, weight.grad, bias.grad),
        expected,
        (of_values, of_values, of_sums, of_sums),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), value, rtol=limit, atol=limit * value.abs().max().item())
    assert output.dtype == inputs.grad.dtype == dtype
    assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_ghost_spans_are_separate_batches(dtype: torch.dtype, limit: float, memory_format: torch.memory_format) -> None:
    x, slope, layer = example(dtype, memory_format)
    expected = exact(x, slope, layer, span=5)
    ghost = SpanBatchNorm2d(8, span=5).cuda()
    ghost.load_state_dict(layer.state_dict())
    ghost.accumulate_statistics = True
    inputs = x.clone().requires_grad_()
    output = ghost(inputs)
    output.backward(slope)
    for actual, value in zip((output.detach(), inputs.grad, ghost.weight.grad, ghost.bias.grad), expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=limit, atol=limit * value.abs().max().item())
    assert ghost.span_sum[-1].item() == pytest.approx(2.4)  # the last span has 2 of 5 samples
    assert output.is_contiguous(memory_format=memory_format)
