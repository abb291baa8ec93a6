"""Fused forwards, by the reference equations: outputs, gradients and statistics equal those of the plain model."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_cases import step_sums
from slow import slow_except
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.nn.alexnet import alexnet, alexnet_bn
from megabatch.nn.batch_norm.evaluation_statistics import begin_precise, collect_statistics, finish_precise, finish_step
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused import gram as fused_gram
from megabatch.nn.fused import norm_act as fused_norm_act
from megabatch.nn.fused import stem as fused_stem
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import last_norms
from megabatch.nn.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50
from megabatch.nn.small import resnet8
from megabatch.nn.vgg import VGG8


def small_alexnet_bn(**options: Any) -> nn.Module:
    """AlexNet-BN with narrow linear layers, which are not what is tested."""
    model = alexnet_bn(num_classes=10, **options)
    model.fc6, model.fc7, model.fc8 = nn.Linear(9216, 8), nn.Linear(8, 8), nn.Linear(8, 10)
    return model


NETS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(resnet8, width=8),
    "resnet8, pooled stem": functools.partial(resnet8, width=8, pooled_stem=True),
    "basic blocks": functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), num_classes=10),
    "bottlenecks": functools.partial(ResNet, Bottleneck, (2, 1, 1, 1), num_classes=10),
    "bottlenecks, blurred": functools.partial(ResNet, Bottleneck, (1, 1, 1, 1), num_classes=10, blur_pool=True),
    "vgg8": functools.partial(VGG8, width=8),
    "alexnet_bn": small_alexnet_bn,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm2d,
    "span of the batch": functools.partial(SpanBatchNorm2d, span=8, stats_momentum=0.3),
    "three spans, one short": functools.partial(SpanBatchNorm2d, span=2),
}
COUNT = 5


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of channels of each batch norm that a fused forward runs."""
    seen: list[int] = []
    sink_of = fused_norm_act.sink_of

    def counted(norm: nn.BatchNorm2d, x: Tensor) -> Any:
        seen.append(norm.num_features)
        return sink_of(norm, x)

    for module in (fused_norm_act, fused_gram, fused_stem):
        monkeypatch.setattr(module, "sink_of", counted)
    return seen


def twins(make: Callable[..., nn.Module], norm: Callable[[int], nn.Module], **options: Any) -> list[nn.Module]:
    """A plain model and its fused copy; no branch starts at 0, which would hide errors in it."""
    torch.manual_seed(0)
    plain = make(norm=norm, **options)
    with torch.no_grad():
        for layer in plain.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
        for layer in last_norms(plain):
            layer.weight.mul_(0.2)  # so that rounding does not grow from block to block
    fused = copy.deepcopy(plain)
    set_fusion(fused, "reference")
    return [plain, fused]


def images(pixels: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(COUNT, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of a fixed function of them; dropout draws the same masks in every call."""
    torch.manual_seed(2)
    logits = model(x)
    slope = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * slope).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return logits.detach(), gradients


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """All buffers, and the sums of the step."""
    return dict(model.named_buffers()) | step_sums(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-5) -> None:
    """Relative errors within `limit`; gradients need a larger one, as one ReLU that flips by rounding changes all."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = (other[name].double() - value.double()).norm()
        assert difference <= limit * value.double().norm() + 1e-7, name


@pytest.mark.parametrize("norm", slow_except(NORMS, "three spans, one short"))
@pytest.mark.parametrize("net", slow_except(NETS, *set(NETS) - {"bottlenecks, blurred"}))
def test_a_fused_model_has_the_logits_gradients_and_statistics_of_the_plain_model(
    net: str, norm: str, calls: list[int]
) -> None:
    plain, fused = twins(NETS[net], NORMS[norm])
    for _ in range(2):  # the second forward moves the averages of the first
        expected, expected_gradients = step(plain, images())
        assert not calls
        logits, gradients = step(fused, images())
        assert calls
        calls.clear()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert_same(expected_gradients, gradients, 3e-3)
        assert_same(buffers(plain), buffers(fused))


@pytest.mark.parametrize("eval_stats", ["running", "running_all_reduced", "last_batch"])
def test_statistics_collected_for_a_step_of_micro_batches_are_those_of_the_plain_model(eval_stats: Any) -> None:
    plain, fused = twins(NETS["bottlenecks"], NORMS["three spans, one short"])
    for model in (plain, fused):
        collect_statistics(model)
        for part in (images(), images()[:2] * 2):
            model(part)
    assert_same(buffers(plain), buffers(fused))
    for model in (plain, fused):
        finish_step(model, eval_stats=eval_stats)
    assert_same(buffers(plain), buffers(fused))
    assert float(fused.bn1.running_mean.abs().max()) > 0


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_every_norm_of_a_resnet_is_fused(make: Any, calls: list[int]) -> None:
    model = make(num_classes=10)
    set_fusion(model, "reference")
    step(model, images())
    assert len(calls) == sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("net", NETS)
def test_fusing_changes_no_key_and_no_module_name_and_plain_restores_the_classes(net: str, calls: list[int]) -> None:
    model = NETS[net]()
    keys, kinds = list(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    for choice in ("reference", "auto"):
        set_fusion(model, choice)
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == list(kinds)
        assert all(isinstance(module, kinds[name]) for name, module in model.named_modules())
    set_fusion(model, "plain")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    model(images())
    assert not calls


def test_a_fused_model_can_be_copied_and_pickled(calls: list[int]) -> None:
    _, fused = twins(NETS["bottlenecks"], nn.BatchNorm2d)
    expected, _ = step(copy.deepcopy(fused), images())
    num_calls = len(calls)
    logits, _ = step(pickle.loads(pickle.dumps(fused)), images())  # noqa: S301
    assert torch.equal(logits, expected)
    assert len(calls) == 2 * num_calls


def test_a_bottleneck_with_a_hook_is_called_and_still_fuses_its_own_layers(calls: list[int]) -> None:
    plain, fused = twins(NETS["bottlenecks"], nn.BatchNorm2d)
    seen: list[Tensor] = []
    for model in (plain, fused):
        model.layer1[0].register_forward_hook(lambda *given: seen.append(given[2].detach()))
    expected, _ = step(plain, images())
    logits, _ = step(fused, images())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert len(calls) == sum(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())


def test_a_subclass_keeps_its_own_forward_and_its_blocks_are_fused(calls: list[int]) -> None:
    class Headless(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer1(self.maxpool(self.bn1(self.conv1(x))))

    model = Headless(BasicBlock, (1, 1, 1, 1), num_classes=10)
    set_fusion(model, "reference")
    model(images())
    assert type(model) is Headless
    assert calls == [64, 64]


def assert_runs_plain(plain: nn.Module, fused: nn.Module, calls: list[int], x: Tensor) -> None:
    expected = plain(x)
    assert torch.equal(fused(x), expected)
    assert not calls


def test_auto_on_a_cpu_is_the_plain_model_bit_by_bit(calls: list[int]) -> None:
    plain, fused = twins(NETS["basic blocks"], nn.BatchNorm2d)
    set_fusion(fused)
    assert_runs_plain(plain, fused, calls, images())


def test_evaluation_is_the_plain_models_bit_by_bit(calls: list[int]) -> None:
    plain, fused = twins(NETS["basic blocks"], NORMS["span of the batch"])
    assert_runs_plain(plain.eval(), fused.eval(), calls, images())


def test_float64_runs_plain(calls: list[int]) -> None:
    plain, fused = twins(NETS["basic blocks"], nn.BatchNorm2d)
    assert_runs_plain(plain.double(), fused.double(), calls, images(dtype=torch.float64))


@pytest.mark.parametrize(
    "norm",
    [
        functools.partial(nn.GroupNorm, 4),
        functools.partial(nn.BatchNorm2d, momentum=None),
        functools.partial(nn.BatchNorm2d, track_running_stats=False),
        functools.partial(nn.BatchNorm2d, dtype=torch.float64),
    ],
)
def test_other_norms_run_plain(norm: Any, calls: list[int]) -> None:
    torch.manual_seed(0)
    x = images()
    if norm.keywords.get("dtype"):
        plain = resnet8(norm=norm, zero_gamma=False).double()
        x = x.double()
    else:
        plain = resnet8(norm=norm, zero_gamma=False)
    fused = copy.deepcopy(plain)
    set_fusion(fused, "reference")
    assert_runs_plain(plain, fused, calls, x)


def test_recomputed_evaluation_statistics_are_those_of_the_plain_model() -> None:
    plain, fused = twins(NETS["basic blocks"], NORMS["three spans, one short"])
    for model in (plain, fused):
        begin_precise(model)
        with torch.no_grad():
            model(images())
        finish_precise(model)
    assert_same(buffers(plain), buffers(fused))


def test_a_hook_on_a_layer_sees_that_layers_output(calls: list[int]) -> None:
    plain, fused = twins(NETS["resnet8"], nn.BatchNorm2d)
    seen: list[list[Tensor]] = [[], []]
    for model, kept in zip((plain, fused), seen, strict=True):
        for name in ("bn1", "layer1.0.bn2", "layer2.0.downsample"):
            model.get_submodule(name).register_forward_hook(lambda *a, kept=kept: kept.append(a[2].clone()))
        step(model, images(32))
    assert len(seen[1]) == 3
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(other, one)
    assert len(calls) == 9 - 3  # a layer or shortcut with a hook is not fused


def test_one_value_per_channel_raises_batch_norms_own_error() -> None:
    model = resnet8()
    set_fusion(model, "reference")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 8, 8))


@pytest.mark.slow
def test_what_torch_compile_traces_is_the_plain_model(calls: list[int]) -> None:
    plain, fused = twins(NETS["resnet8"], NORMS["three spans, one short"])
    compiled = torch.compile(fused, backend="eager")
    expected, expected_gradients = step(plain, images(32))
    torch.testing.assert_close(compiled(images(32)), expected)
    assert not calls
    fused.zero_grad()
    _, gradients = step(compiled, images(32))
    assert_same(expected_gradients, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()})


def test_an_unknown_choice_and_a_model_without_fusable_blocks_raise_errors() -> None:
    with pytest.raises(UserError, match="fusion='fast' was given"):
        set_fusion(resnet8(), "fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Linear has no block"):
        set_fusion(nn.Linear(3, 3))
    set_fusion(nn.Linear(3, 3), "plain")
    set_fusion(alexnet(num_classes=10))


def test_triton_on_a_cpu_raises_an_error_that_names_a_valid_backend() -> None:
    model = resnet8()
    set_fusion(model, "triton")
    with pytest.raises(UserError, match="backend='reference' works"):
        model(images(32))


def test_a_subclass_of_batch_norm_keeps_its_forward_and_update_bn_works_in_a_fused_model() -> None:
    class Doubled(SpanBatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    batches = [torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    for norm in (lambda channels: Doubled(channels, span=8), lambda channels: SpanBatchNorm2d(channels, span=8)):
        outputs, averages = [], []
        for fusion in ("plain", "reference"):
            torch.manual_seed(0)
            model = resnet8(in_channels=3, norm=norm)
            set_fusion(model, fusion)
            outputs.append(model(batches[0]).detach())
            torch.optim.swa_utils.update_bn(batches, model)
            averages.append(next(layer for layer in model.modules() if isinstance(layer, SpanBatchNorm2d)).running_var)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(averages[1], averages[0], rtol=1e-4, atol=1e-5)
