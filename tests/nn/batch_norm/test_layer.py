"""Spans of one worker against nn.BatchNorm2d on the same samples; in float64 unless a test says otherwise."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import step_sums
from ranks import run_threads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.errors import UserError
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, finish_step
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d, convert

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def images(count: int, channels: int = 3, size: int = 4, *, seed: int = 0, offset: float = 0.5) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=stream, dtype=torch.float64) * 2 + offset


def plain(channels: int = 3, *, seed: int = 7) -> nn.BatchNorm2d:
    """A BatchNorm2d with weights and statistics that are not those of a fresh one."""
    stream = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(channels).double()
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.normal_(generator=stream)
    layer.running_var.uniform_(0.5, 2, generator=stream)
    return layer


def spanned(reference: nn.BatchNorm2d, span: int) -> SpanBatchNorm2d:
    layer = SpanBatchNorm2d(reference.num_features, span=span).double()
    layer.load_state_dict(reference.state_dict())
    return layer


def run(layers: list[nn.Module], parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, and gradients of input, weight and bias, of a loss that weights every output differently."""
    inputs = [part.clone().requires_grad_() for part in parts]
    output = torch.cat([layer(x) for layer, x in zip(layers, inputs, strict=True)])
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * slope + output.square() * slope.abs()).sum().backward()
    unique = list(dict.fromkeys(layers))
    weight, bias = (sum(getattr(layer, name).grad for layer in unique) for name in ("weight", "bias"))
    return output.detach(), torch.cat([x.grad for x in inputs]), weight, bias


def assert_same_results(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_span_of_the_whole_batch_is_batch_norm_bit_by_bit() -> None:
    reference = plain()
    layer = spanned(reference, span=6)
    for step in range(3):
        pairs = zip(run([layer], [images(6, seed=step)]), run([reference], [images(6, seed=step)]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        layer.zero_grad()
        reference.zero_grad()
    for name, value in reference.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("accumulate", [False, True])
@settings(max_examples=25, deadline=None)
@given(span=st.integers(1, 7), count=st.integers(1, 15), channels=st.integers(1, 4), size=st.integers(2, 4))
def test_each_span_and_the_short_remainder_are_normalised_as_separate_batches(
    accumulate: bool, span: int, count: int, channels: int, size: int
) -> None:
    reference = plain(channels)
    layer = spanned(reference, span)
    layer.accumulate_statistics = accumulate
    batch = images(count, channels, size)
    parts = list(batch.split(span))
    assert_same_results(run([layer], [batch]), run([reference] * len(parts), parts))


def test_ghost_spans_update_running_averages_once_with_the_mean_of_their_statistics_by_size() -> None:
    layer = spanned(plain(), span=4)
    before = layer.running_mean.clone(), layer.running_var.clone()
    batch = images(10)
    layer(batch)
    spans, shares = batch.split(4), torch.tensor([[4.0], [4.0], [2.0]], dtype=torch.float64) / 10
    mean = (torch.stack([s.mean((0, 2, 3)) for s in spans]) * shares).sum(0)
    variance = (torch.stack([s.var((0, 2, 3), correction=1) for s in spans]) * shares).sum(0)
    torch.testing.assert_close(layer.running_mean, 0.9 * before[0] + 0.1 * mean, **EXACT)
    torch.testing.assert_close(layer.running_var, 0.9 * before[1] + 0.1 * variance, **EXACT)
    assert layer.num_batches_tracked == 1


def test_ghost_gradients_pass_the_numerical_check() -> None:
    layer = SpanBatchNorm2d(2, span=3).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    arguments = (images(7, 2, 2).requires_grad_(), torch.rand(2).double().requires_grad_(), torch.rand(2).double())
    assert torch.autograd.gradcheck(function, arguments)


def test_evaluation_uses_the_running_statistics_as_batch_norm_does() -> None:
    reference = plain().eval()
    layer = spanned(reference, span=2).eval()
    assert torch.equal(layer(images(5)), reference(images(5)))


def test_state_dicts_load_both_ways_and_hold_the_same_keys() -> None:
    reference = plain()
    layer = SpanBatchNorm2d(3, span=4).double()
    assert layer.state_dict().keys() == reference.state_dict().keys()
    assert not layer.load_state_dict(reference.state_dict()).missing_keys
    other = nn.BatchNorm2d(3).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_var, reference.running_var)


def test_without_affine_there_are_no_parameters_and_outputs_are_standardised() -> None:
    layer = SpanBatchNorm2d(3, span=4, affine=False).double()
    assert not list(layer.parameters())
    output = layer(images(8))
    for span in output.split(4):
        torch.testing.assert_close(span.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(span.var((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-4, atol=0)
    assert layer(images(0)).shape == (0, 3, 4, 4)


def test_one_value_per_channel_becomes_the_bias_with_no_gradient_to_the_input() -> None:
    layer = spanned(plain(), span=4)
    x = torch.tensor([[[[5.0]], [[-2.0]], [[1e9]]]], dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert torch.equal(output.flatten(), layer.bias)
    output.sum().backward()
    assert not x.grad.any()
    assert torch.equal(layer.bias.grad, torch.ones(3).double())


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("group_size", [1, 2])
def test_a_span_of_one_value_per_channel_does_not_count_in_averages(group_size: int, accumulate: bool) -> None:
    def averages() -> tuple[Tensor, Tensor]:
        group = torch.distributed.new_group([0, 1]) if group_size == 2 else None
        layer = SpanBatchNorm2d(4, span=32, stats_momentum=1.0, process_group=group, group_size=group_size).double()
        collect_statistics(layer, accumulate)
        x = images(33, 4, 1).flatten(1) * 3 + 5
        for part in x.split(32) if group_size == 2 else [x]:
            layer(part.tensor_split(group_size)[torch.distributed.get_rank()])
        if accumulate:
            finish_step(layer, eval_stats="running_all_reduced")
        return layer.running_var, x[:32].var(0)

    for running, exact in run_threads(group_size, averages):
        torch.testing.assert_close(running, exact, **EXACT)


def test_no_sample_gives_no_output_no_statistics_and_zero_gradients() -> None:
    layer = spanned(plain(), span=4)
    before = copy.deepcopy(layer.state_dict())
    layer(images(0)).sum().backward()
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("count", [4, 8, 11])
@pytest.mark.parametrize("accumulate", [False, True])
def test_channels_last_stays_channels_last_forward_and_backward(count: int, accumulate: bool) -> None:
    layer = SpanBatchNorm2d(3, span=4).double()
    layer.accumulate_statistics = accumulate
    x = images(count).to(memory_format=torch.channels_last).requires_grad_()
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [8, 20])
def test_bfloat16_inputs_keep_their_dtype_and_float32_statistics(count: int) -> None:
    exact = images(count, offset=3.0).bfloat16()
    layer = SpanBatchNorm2d(3, span=8, stats_momentum=1.0)
    x = exact.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32
    mean = exact.double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(10, 2000), seed=st.integers(0, 1000))
def test_a_mean_of_a_thousand_deviations_keeps_its_variance_in_float32(ratio: float, seed: int) -> None:
    x = (images(16, 2, 8, seed=seed, offset=0.0) + 2 * ratio).float()
    layer = SpanBatchNorm2d(2, span=8, stats_momentum=1.0)
    layer(x)
    exact = torch.stack([s.var((0, 2, 3), correction=1) for s in x.double().split(8)]).mean(0)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_compiled_layer_gives_the_same_without_a_graph_break(accumulate: bool) -> None:
    eager = spanned(plain(), span=4)
    eager.accumulate_statistics = accumulate
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same_results(run_compiled(compiled, layer, images(10)), run([eager], [images(10)]))
        layer.zero_grad()
        eager.zero_grad()
    statistics = dict(layer.named_buffers()) | step_sums(layer)
    for name, value in (dict(eager.named_buffers()) | step_sums(eager)).items():
        torch.testing.assert_close(statistics[name], value, **EXACT)


def run_compiled(compiled: nn.Module, layer: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = batch.clone().requires_grad_()
    output = compiled(x)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * slope + output.square() * slope.abs()).sum().backward()
    return output.detach(), x.grad, layer.weight.grad, layer.bias.grad


def test_convert_keeps_tensors_mode_and_shared_layers() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared, nn.BatchNorm2d(4, affine=False))).eval()
    weight, mean = shared.weight, shared.running_mean
    keys = model.state_dict().keys()
    converted = convert(model, span=8)
    assert converted is model
    assert isinstance(model[1], SpanBatchNorm2d)
    assert model[1] is model[2][0]
    assert model[1].weight is weight
    assert model[1].running_mean is mean
    assert not model[2][1].affine
    assert not model[1].training
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(3), (8, 3)), (nn.BatchNorm1d(3), (8, 3, 5)), (nn.BatchNorm3d(3), (8, 3, 2, 2, 2))],
)
def test_convert_replaces_one_and_three_dimensional_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    reference = copy.deepcopy(layer).double()
    converted = convert(layer.double(), span=4)
    expected = torch.cat([reference(part) for part in x.split(4)])
    torch.testing.assert_close(converted(x), expected, **EXACT)


def test_a_copy_of_a_layer_with_a_group_stays_in_that_group() -> None:
    def copies() -> bool:
        group = torch.distributed.new_group([0, 1])
        layer = SpanBatchNorm2d(2, span=4, process_group=group, group_size=2)
        twin = copy.deepcopy(layer)
        return twin.process_group is group and twin.weight is not layer.weight

    assert run_threads(2, copies) == [True, True]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"span": 0}, "span=32, group_size=1 work"),
        ({"span": 8, "group_size": 0}, "span=32, group_size=1 work"),
        ({"span": 8, "group_size": 2}, r"process_group=new_span_group\(2\) works"),
    ],
)
def test_an_impossible_span_or_group_is_refused_with_one_that_works(options: dict[str, int], advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        SpanBatchNorm2d(3, **options)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, momentum=None)])
def test_convert_refuses_layers_without_a_running_average(layer: nn.Module) -> None:
    with pytest.raises(UserError, match=r"momentum=0\.1 works"):
        convert(nn.Sequential(layer), span=8)


def test_layers_are_found_through_ddp_and_collecting_can_be_switched_off() -> None:
    def updates() -> tuple[bool, bool]:
        model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), SpanBatchNorm2d(3, span=2)))
        collect_statistics(model, True)
        model(torch.randn(4, 3, 2, 2))
        waits = not model.module[1].running_mean.any()
        collect_statistics(model, False)
        model(torch.randn(4, 3, 2, 2))
        return waits, bool(model.module[1].running_mean.any())

    assert run_threads(2, updates) == [(True, True)] * 2


class BatchNormAct(nn.BatchNorm2d):
    """Made as timm's BatchNormAct2d is."""

    def __init__(self, num_features: int, act: nn.Module, scale: float = 1.0) -> None:
        super().__init__(num_features)
        self.drop, self.act, self.scale = nn.Identity(), act, scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * self.act(self.drop(super().forward(input)))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(4), nn.Identity()])
@pytest.mark.parametrize("training", [False, True])
def test_convert_keeps_the_activation_of_a_subclass(act: nn.Module, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4, act), nn.Conv2d(4, 2, 1)).train(training)
    images = torch.randn(8, 3, 6, 6)
    converted = convert(copy.deepcopy(model), span=8)
    assert isinstance(converted[1], SpanBatchNorm2d)
    assert converted.state_dict().keys() == model.state_dict().keys()
    outputs = []
    for net in (model, converted, convert(copy.deepcopy(converted), span=100)):
        output = net(images)
        output.square().sum().backward()
        outputs.append((output.detach(), net[0].weight.grad, net[1].running_var))
        net.zero_grad()
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def test_convert_refuses_a_subclass_whose_forward_it_would_lose_by_name() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    for layer in (Shifted(4), BatchNormAct(4, nn.ReLU(), scale=2.0)):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer))
        with pytest.raises(
            UserError, match=rf"^1\.0 is a {type(layer).__name__}, whose forward is more than batch norm"
        ):
            convert(model, span=8)
        assert model[1][0] is layer


def test_convert_takes_a_subclass_that_inherits_forward_and_refuses_a_lazy_layer_without_features() -> None:
    class Named(nn.BatchNorm2d):
        pass

    assert isinstance(convert(Named(4), span=8), SpanBatchNorm2d)
    lazy = nn.LazyBatchNorm2d()
    with pytest.raises(UserError, match="one forward before convert"):
        convert(lazy, span=8)
    lazy(torch.randn(2, 3, 4, 4))
    assert isinstance(convert(lazy, span=8), SpanBatchNorm2d)


def test_convert_keeps_hooks_and_their_handles() -> None:
    layer, seen = nn.BatchNorm2d(4), []
    handle = layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    converted = convert(layer, span=8)
    converted(torch.randn(8, 4, 2, 2))
    handle.remove()
    converted(torch.randn(8, 4, 2, 2))
    assert seen == ["before", "after", "before"]


@pytest.mark.parametrize("span", [8, 4])
def test_update_bn_of_torch_averages_batches_with_equal_weights(span: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 4, 5, 5), 2 * torch.randn(8, 4, 5, 5) + 1, torch.randn(8, 4, 5, 5) - 2]
    model = nn.Sequential(nn.BatchNorm2d(4))
    twin = convert(copy.deepcopy(model), span=span)
    for net in (model, twin):
        torch.optim.swa_utils.update_bn(batches, net)
    torch.testing.assert_close(twin[0].running_mean, model[0].running_mean, rtol=1e-5, atol=1e-5)
    assert twin[0].momentum == 0.1
    if span == 8:
        torch.testing.assert_close(twin[0].running_var, model[0].running_var, rtol=1e-4, atol=1e-5)
