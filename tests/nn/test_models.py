"""Shapes, parameter names and parameter counts of the models, compared with the published ones."""

import functools
import importlib.util

import pytest
import torch
from slow import slow_except
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.nn.alexnet import alexnet, alexnet_bn
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.models import create_model
from megabatch.nn.resnet import BlurConv2d, resnet18, resnet34, resnet50
from megabatch.nn.small import resnet8

MAKERS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def norm_keys(prefix: str) -> list[str]:
    return [f"{prefix}.{end}" for end in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def published_keys(name: str) -> set[str]:
    """State-dict keys by torchvision's naming rule."""
    num_convolutions = 3 if name == "resnet50" else 2
    keys = {"conv1.weight", *norm_keys("bn1"), "fc.weight", "fc.bias"}
    for stage, depth in enumerate(DEPTHS[name], start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            for number in range(1, num_convolutions + 1):
                keys |= {f"{prefix}.conv{number}.weight", *norm_keys(f"{prefix}.bn{number}")}
            if block == 0 and (stage > 1 or name == "resnet50"):
                keys |= {f"{prefix}.downsample.0.weight", *norm_keys(f"{prefix}.downsample.1")}
    return keys


@pytest.mark.parametrize("blur_pool", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_resnets_have_the_published_keys_and_parameter_counts(name: str, blur_pool: bool) -> None:
    with torch.device("meta"):
        model = MAKERS[name](blur_pool=blur_pool)
    assert set(model.state_dict()) == published_keys(name)
    assert num_parameters(model) == PARAMETERS[name]


def test_resnet50_has_161_parameter_tensors() -> None:
    model = resnet50()
    kinds = [parameter.dim() for parameter in model.parameters()]
    assert len(kinds) == 161
    assert kinds.count(4) == 53
    assert sum(buffer.numel() for name, buffer in model.named_buffers() if "running" in name) == 53_120


def test_span_layers_do_not_change_state_dict_keys() -> None:
    norm = functools.partial(SpanBatchNorm2d, span=32)
    assert resnet50(norm=norm).state_dict().keys() == resnet50().state_dict().keys()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_exchangeable_with_torchvision_and_outputs_are_equal(name: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    theirs, ours = getattr(models, name)().eval(), MAKERS[name]().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return {name: module.stride for name, module in convolutions if module.stride != (1, 1)}


def test_resnet50_has_its_strides_in_the_3x3_convolutions() -> None:
    assert set(strides(resnet50())) == {"conv1"} | {
        f"layer{stage}.0.{conv}" for stage in (2, 3, 4) for conv in ("conv2", "downsample.0")
    }


def spatial_sizes(model: nn.Module, size: int) -> list[int]:
    """Pixels per side after each stage."""
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.shape[-1])

    for name, module in model.named_children():
        if name.startswith("layer"):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.randn(1, 3, size, size))
    return sizes


@pytest.mark.parametrize("blur_pool", [False, True])
def test_stages_have_the_published_resolutions(blur_pool: bool) -> None:
    assert spatial_sizes(resnet18(blur_pool=blur_pool).eval(), 224) == [56, 28, 14, 7]
    assert spatial_sizes(resnet18(blur_pool=blur_pool, small_stem=True).eval(), 32) == [32, 16, 8, 4]
    assert spatial_sizes(resnet8(blur_pool=blur_pool).eval(), 28) == [14, 7, 4]
    assert spatial_sizes(resnet8(blur_pool=blur_pool, pooled_stem=True).eval(), 28) == [14, 7, 4]


def test_images_of_up_to_64_pixels_get_the_small_stem() -> None:
    stems = {size: create_model("resnet18", num_classes=3, image_size=size).conv1 for size in (32, 64, 65, 224)}
    assert [stem.kernel_size for stem in stems.values()] == [(3, 3), (3, 3), (7, 7), (7, 7)]
    assert [stem.stride for stem in stems.values()] == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_a_given_stem_is_made_for_any_image_size() -> None:
    options = [("small", 224), ("small", 32), ("large", 224), ("large", 32)]
    stems = [create_model("resnet18", num_classes=3, image_size=size, stem=stem).conv1 for stem, size in options]
    assert [stem.kernel_size for stem in stems] == [(3, 3), (3, 3), (7, 7), (7, 7)]


def test_a_blurred_convolution_is_the_convolution_of_the_binomially_blurred_image() -> None:
    conv = BlurConv2d(2, 3, 3, 2, padding=1, bias=False).double()
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    taps = (0.25, 0.5, 0.25)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    blurred = sum(taps[i] * taps[j] * padded[:, :, i : i + 7, j : j + 7] for i in range(3) for j in range(3))
    expected = nn.functional.conv2d(blurred, conv.weight, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-13)


def test_blur_pool_precedes_only_the_strided_convolutions_of_blocks() -> None:
    model = resnet50(blur_pool=True)
    blurred = {name for name, module in model.named_modules() if isinstance(module, BlurConv2d)}
    assert blurred == set(strides(model)) - {"conv1"}


def test_resnet8_has_eight_layers_on_its_longest_path_and_78_thousand_parameters() -> None:
    model = resnet8(num_classes=10, in_channels=1)
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert len([name for name in weights if "downsample" not in name]) == 8
    assert num_parameters(model) == 77_754


@pytest.mark.parametrize(("make", "count"), [(alexnet, 60_965_224), (alexnet_bn, 60_966_600)])
def test_alexnet_has_61_million_parameters(make: type[nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert num_parameters(make()) == count


def test_alexnet_has_the_published_sizes_at_227_pixels() -> None:
    model = alexnet(num_classes=10).eval()
    shapes = {}
    x = torch.randn(1, 3, 227, 227)
    with torch.no_grad():
        for name, module in model.features.named_children():
            x = module(x)
            shapes[name] = tuple(x.shape[1:])
    assert shapes["conv1"] == (96, 55, 55)
    assert shapes["pool1"] == (96, 27, 27)
    assert shapes["pool2"] == (256, 13, 13)
    assert shapes["conv5"] == (256, 13, 13)
    assert shapes["pool5"] == (256, 6, 6)
    assert [n for n in shapes if n.startswith("norm")] == ["norm1", "norm2"]


def test_the_adaptive_pooling_is_caffes_last_pooling_at_227_pixels() -> None:
    x = torch.randn(2, 3, 13, 13)
    assert torch.equal(nn.AdaptiveMaxPool2d(6)(x), nn.functional.max_pool2d(x, 3, 2))


def test_alexnet_bn_has_batch_norm_after_each_convolution_and_no_response_norm() -> None:
    names = [name for name, _ in alexnet_bn().features.named_children()]
    for number in range(1, 6):
        assert names[names.index(f"conv{number}") + 1] == f"bn{number}"
    assert not [name for name in names if name.startswith("norm")]


@pytest.mark.parametrize("size", slow_except([23, 32, 64, 113], 23))
def test_alexnet_accepts_other_resolutions(size: int) -> None:
    model = alexnet_bn(num_classes=4)
    output = model(torch.randn(2, 3, size, size))
    output.sum().backward()
    assert output.shape == (2, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_alexnet_uses_dropout_only_in_training() -> None:
    model = alexnet(num_classes=4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet34", "resnet50", "alexnet", "alexnet_bn"])
def test_create_model_builds_each_model_with_its_options(name: str) -> None:
    norm = functools.partial(SpanBatchNorm2d, span=4)
    model = create_model(name, num_classes=7, in_channels=1, norm=norm, width=8, image_size=32)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    spans = [module for module in model.modules() if isinstance(module, SpanBatchNorm2d)]
    assert bool(spans) == (name != "alexnet")
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not isinstance(m, SpanBatchNorm2d)]
    if name == "resnet8":
        assert model.conv1.out_channels == 8


@pytest.mark.parametrize("name", slow_except(["resnet8", "resnet18", "resnet50"], "resnet8"))
def test_channels_last_images_stay_channels_last_up_to_the_last_block(name: str) -> None:
    norm = functools.partial(SpanBatchNorm2d, span=2)
    model = create_model(name, num_classes=3, norm=norm, image_size=32).to(memory_format=torch.channels_last)
    formats = []
    last = model.layer3 if name == "resnet8" else model.layer4
    last.register_forward_hook(
        lambda _m, _i, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    model(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)).sum().backward()
    assert formats == [True]


def test_gradients_under_bfloat16_autocast_are_finite_and_float32() -> None:
    model = resnet8(num_classes=3, norm=functools.partial(SpanBatchNorm2d, span=4))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(8, 3, 28, 28))
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_an_unknown_model_raises_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="resnet50"):
        create_model("resnet51", num_classes=10)
