"""Number formats: what stays fp32, and how fp16's loss scale follows the gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megabatch.data.loading.batch import Batch
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.small import resnet8
from megabatch.train.gradients import Objective, accumulate_gradients, forward_loss
from megabatch.train.precision import LossScale, Precision, WideLinear, widen_logits

CPU = torch.device("cpu")


def small_net():
    torch.manual_seed(0)
    model = resnet8(num_classes=5, width=8, norm=lambda channels: SpanBatchNorm2d(channels, span=4))
    collect_statistics(model, True)
    widen_logits(model)
    return model


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 12, 12, generator=generator)
    return Batch(images, torch.randint(5, (count,), generator=generator), count)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_logits_loss_statistics_weights_and_gradients_are_fp32_in_half_precision(name):
    model = small_net()
    precision = Precision(name, CPU)
    logits = []
    model.register_forward_hook(lambda _, __, output: logits.append(output))
    hidden = []
    model.layer2.register_forward_hook(lambda _, __, output: hidden.append(output))
    images = torch.randn(4, 3, 12, 12)
    loss, _ = forward_loss(model, Batch(images, torch.arange(4), 4), Objective(4, 0.1, precision))
    loss.backward()
    assert hidden[0].dtype == precision.dtype
    assert logits[0].dtype == torch.float32
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(b.dtype != precision.dtype for b in model.buffers())


def test_wide_logits_are_not_rounded_to_half_precision_and_change_no_key():
    plain = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    keys = list(plain.state_dict())
    wide = copy.deepcopy(plain)
    widen_logits(wide)
    assert list(wide.state_dict()) == keys
    assert type(wide[0]) is nn.Linear
    assert isinstance(wide[1], WideLinear)
    x = torch.randn(16, 8)
    with Precision("bf16", CPU).autocast():
        rounded, kept = plain(x), wide(x)
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(kept, kept.bfloat16().float())


def test_casts_kept_over_micro_batches_give_the_same_gradients():
    """Weights are cast once a step; a second step must see the weights that the first one moved."""
    precision = Precision("bf16", CPU)
    gradients = []
    for micro_batches in (1, 2):
        model = small_net()
        for _ in range(2):
            model.zero_grad()
            parts = [batch(4, seed=1), batch(4, seed=2)]
            parts = [Batch(p.images.expand(-1, 3, -1, -1), p.labels, 4) for p in parts]
            if micro_batches == 1:
                images, labels = (torch.cat(t) for t in zip(*((p.images, p.labels) for p in parts), strict=True))
                parts = [Batch(images, labels, 8)]
            accumulate_gradients(model, iter(parts), len(parts), Objective(8, 0.0, precision), world_size=1)
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.1
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_the_backward_of_a_wide_layer_is_not_cast():
    layer = nn.Sequential(nn.Linear(8, 4))
    widen_logits(layer)
    precision = Precision("bf16", CPU)
    x = torch.randn(16, 8)
    with precision.cached_casts():
        with precision.autocast():
            y = layer(x)
        y.square().sum().backward()
    exact = 2 * (x @ layer[0].weight.detach().T + layer[0].bias.detach()).T @ x
    torch.testing.assert_close(layer[0].weight.grad, exact)


@settings(max_examples=30)
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 10))
def test_a_dynamic_scale_halves_at_each_overflow_and_a_fixed_one_never_moves(overflows, log_scale):
    dynamic = LossScale(CPU, 2.0**log_scale, dynamic=True)
    fixed = LossScale(CPU, 2.0**log_scale, dynamic=False)
    for overflow in overflows:
        for scale in (dynamic, fixed):
            before = scale.value
            gradient = torch.tensor([torch.inf if overflow else 3.0 * before, before])
            scale.unscale([gradient])
            assert scale.overflowed() is overflow
            if not overflow:
                assert gradient.tolist() == [3.0, 1.0]
    assert dynamic.value == 2.0 ** (log_scale - sum(overflows)) == float(dynamic.factor)
    assert fixed.value == 2.0**log_scale == float(fixed.factor)


def test_a_dynamic_scale_doubles_after_2000_good_steps_and_no_further_than_2_to_the_24():
    scale = LossScale(CPU, 2.0**23, dynamic=True)
    seen = []
    for _ in range(4001):
        scale.unscale([torch.ones(1)])
        seen.append(scale.value)
    assert seen[1998] == 2.0**23
    assert seen[1999] == 2.0**24 == seen[-1]


def test_a_scale_keeps_its_place_in_memory_and_goes_through_a_checkpoint():
    scale = LossScale(CPU, 1024.0, dynamic=True)
    address = scale.factor.data_ptr()
    scale.unscale([torch.tensor([torch.nan])])
    assert (scale.factor.data_ptr(), float(scale.factor)) == (address, 512.0)
    other = LossScale(CPU, 2.0, dynamic=True)
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()
    fixed = LossScale(CPU, 2.0, dynamic=False)
    fixed.load_state_dict(scale.state_dict())
    assert fixed.value == 2.0


def test_other_precisions_have_no_scale():
    for name in ("fp32", "bf16"):
        precision = Precision(name, CPU)
        assert precision.loss_scale is None
        assert precision.state_dict() == {}
        precision.load_state_dict({"scale": 4.0})
        assert float(precision.scale(torch.tensor(2.0))) == 2.0
