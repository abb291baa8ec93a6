import math
import subprocess
import sys

import pytest
import torch
from limits import HANG_S
from ranks import run_threads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.errors import UserError
from megabatch.nn.alexnet import alexnet
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.initialize import Scheme, initialize, weights_digest
from megabatch.nn.models import create_model
from megabatch.nn.resnet import resnet18
from megabatch.nn.small import resnet8

SCHEMES: list[Scheme] = ["he_fan_out", "he_fan_in", "lecun_truncated", "alexnet"]


def wide_conv(**options: int) -> nn.Conv2d:
    return nn.Conv2d(64, 128, 3, **options)


@pytest.mark.parametrize(
    ("scheme", "std"),
    [
        ("he_fan_out", math.sqrt(2 / (128 * 9))),
        ("he_fan_in", math.sqrt(2 / (64 * 9))),
        ("lecun_truncated", math.sqrt(1 / (64 * 9))),
        ("alexnet", 0.01),
    ],
)
def test_convolutions_have_the_variance_of_their_scheme(scheme: Scheme, std: float) -> None:
    conv = wide_conv()
    initialize(nn.Sequential(conv), scheme, seed=3)
    num = conv.weight.numel()
    assert conv.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * num))
    assert abs(conv.weight.mean().item()) < 4 * std / math.sqrt(num)
    assert not conv.bias.any()


def test_fan_out_of_a_grouped_convolution_counts_the_channels_of_one_group() -> None:
    conv = wide_conv(groups=4)
    initialize(nn.Sequential(conv), "he_fan_out", seed=3)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.03)


def test_lecun_weights_are_truncated_at_two_standard_deviations_of_the_full_normal() -> None:
    conv = wide_conv()
    initialize(nn.Sequential(conv), "lecun_truncated", seed=3)
    # A standard normal truncated at +-2 has variance 1 - 4 phi(2) / (Phi(2) - Phi(-2)).
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    limit = 2 * math.sqrt(1 / (64 * 9)) / math.sqrt(1 - 4 * density / mass)
    assert conv.weight.abs().max().item() <= limit * (1 + 1e-6)
    assert conv.weight.abs().max().item() > 0.99 * limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_last_linear_layer_has_standard_deviation_one_hundredth_and_zero_bias(scheme: Scheme) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    initialize(model, scheme, seed=0)
    assert model[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model[0].bias.any()


def test_alexnet_has_the_standard_deviations_and_biases_of_caffes_reference_model() -> None:
    model = initialize(alexnet(num_classes=100), "alexnet", seed=0)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [round(layer.bias.unique().item(), 6) for layer in layers] == [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]
    stds = [layer.weight.std().item() for layer in layers]
    assert stds == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01], rel=0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(scheme: Scheme) -> None:
    digests = set()
    for draws in (0, 1, 17):
        torch.randn(draws)
        model = resnet8(num_classes=10, in_channels=1)
        torch.randn(draws)
        digests.add(weights_digest(initialize(model, scheme, seed=5)))
    assert len(digests) == 1


def test_a_different_seed_gives_different_weights_in_every_layer() -> None:
    one, other = (initialize(resnet8(), "he_fan_out", seed=seed) for seed in (0, 1))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if a.dim() > 1:
            assert not torch.equal(a, b), name


def test_equal_shapes_get_different_weights_under_different_names() -> None:
    model = initialize(nn.Sequential(wide_conv(), wide_conv()), "he_fan_in", seed=0)
    assert not torch.equal(model[0].weight, model[1].weight)


def test_weights_do_not_depend_on_the_order_of_modules() -> None:
    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    class Backward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)

    one, other = (initialize(model, "he_fan_out", seed=9) for model in (Forward(), Backward()))
    assert torch.equal(one.a.weight, other.a.weight)
    assert weights_digest(one) == weights_digest(other)


def test_torchs_global_generator_is_not_used() -> None:
    model = nn.Sequential(wide_conv())
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    initialize(model, "he_fan_out", seed=0)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_the_float32_values_rounded(dtype: torch.dtype) -> None:
    one, other = (initialize(wide_conv().to(kind), "he_fan_out", seed=0) for kind in (torch.float32, dtype))
    assert torch.equal(one.weight.to(dtype), other.weight)


def test_wrappers_change_neither_weights_nor_digest() -> None:
    def digests() -> int:
        bare, wrapped = resnet8(), DistributedDataParallel(resnet8())
        compiled = torch.compile(resnet8(), backend="eager")
        nested = torch.compile(DistributedDataParallel(resnet8()), backend="eager")
        models = (bare, wrapped, compiled, nested)
        return len({weights_digest(initialize(model, "he_fan_out", seed=2)) for model in models})

    assert run_threads(2, digests) == [1, 1]


@pytest.mark.slow
def test_a_new_process_draws_the_same_weights() -> None:
    code = (
        "from megabatch.nn.initialize import *; from megabatch.nn.models import *; import torch; torch.randn(5);"
        "print(weights_digest(initialize(resnet8(), 'lecun_truncated', seed=4)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert answer.stdout.strip() == weights_digest(initialize(resnet8(), "lecun_truncated", seed=4))


def test_the_digest_changes_with_one_bit_one_name_and_one_shape() -> None:
    model = nn.Linear(3, 4, bias=False)
    digest = weights_digest(model)
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
    assert weights_digest(model) != digest
    reshaped = nn.Linear(4, 3, bias=False)
    reshaped.weight.data = model.weight.data.reshape(3, 4)
    assert weights_digest(reshaped) != weights_digest(model)
    assert weights_digest(nn.Sequential(model)) != weights_digest(model)


def test_norms_are_reset_and_zero_gamma_zeroes_only_the_last_of_each_block() -> None:
    model = resnet18(num_classes=10, norm=lambda channels: SpanBatchNorm2d(channels, span=4), small_stem=True)
    for module in model.modules():
        if isinstance(module, SpanBatchNorm2d):
            module.running_mean.fill_(3)
    initialize(model, "he_fan_out", seed=0, zero_gamma=True)
    zeroed = {name for name, p in model.named_parameters() if p.dim() == 1 and "bias" not in name and not p.any()}
    assert zeroed == {f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1)}
    assert not model.bn1.running_mean.any()
    initialize(model, "he_fan_out", seed=0, zero_gamma=False)
    assert all(p.all() for name, p in model.named_parameters() if "bn2.weight" in name)


def test_zero_gamma_makes_every_block_the_identity_or_its_shortcut() -> None:
    model = initialize(resnet18(num_classes=10, small_stem=True), "he_fan_out", seed=0, zero_gamma=True)
    x = torch.rand(2, 64, 4, 4)
    assert torch.equal(model.layer1(x), x)
    assert torch.equal(model.layer2[0](x), model.layer2[0].downsample(x).relu())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("resnet8", "he_fan_out"),
        ("resnet8", "he_fan_in"),
        ("resnet8", "lecun_truncated"),
        ("resnet18", "he_fan_in"),
        pytest.param("resnet50", "lecun_truncated", marks=pytest.mark.slow),
    ],
)
def test_initial_logits_are_near_zero_and_the_initial_loss_is_log_of_the_number_of_classes(
    name: str, scheme: Scheme
) -> None:
    model = initialize(create_model(name, num_classes=10, image_size=32), scheme, seed=1, zero_gamma=True)
    logits = model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0 < logits.abs().max() < 1
    loss = nn.functional.cross_entropy(logits, torch.arange(8))
    assert loss.item() == pytest.approx(math.log(10), abs=0.25)


@pytest.mark.parametrize("scheme", ["he_fan_out", "he_fan_in"])
def test_he_weights_preserve_the_second_moment_of_activations_through_relu_layers(scheme: Scheme) -> None:
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular", bias=False), nn.ReLU()]
    model = initialize(nn.Sequential(*layers[:-1]), scheme, seed=0)
    x: Tensor = torch.randn(4, 256, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        second_moment = model(x).square().mean().item() / 2  # no ReLU precedes the first layer
    assert 0.6 < second_moment < 1.6


def test_an_unknown_scheme_raises_an_error_that_names_a_valid_one() -> None:
    with pytest.raises(UserError, match="he_fan_out works"):
        initialize(nn.Linear(1, 1), "xavier", seed=0)  # type: ignore[arg-type]
