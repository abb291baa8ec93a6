import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabatch.errors import UserError
from megabatch.nn.loss import correct_counts, cross_entropy_sum, inverse_frequency_weights


def example(count: int, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=stream, dtype=torch.float64) * 3
    labels, mixed = (torch.randint(classes, (count,), generator=stream) for _ in range(2))
    return logits, labels, mixed, torch.rand(count, generator=stream, dtype=torch.float64)


def by_hand(logits: Tensor, labels: Tensor, smoothing: float) -> list[float]:
    """-sum_k q_k log softmax_k with q = (1 - s) onehot + s / K, sample by sample."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_total = math.log(math.fsum(math.exp(value) for value in row))
        target = [smoothing / len(row) + (1 - smoothing) * (k == label) for k in range(len(row))]
        losses.append(-math.fsum(q * (value - log_total) for q, value in zip(target, row, strict=True)))
    return losses


@settings(deadline=None)
@given(count=st.integers(1, 9), classes=st.integers(2, 12), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
def test_the_loss_is_the_sum_of_the_smoothed_cross_entropies(count: int, classes: int, smoothing: float) -> None:
    logits, labels, _, _ = example(count, classes)
    loss = cross_entropy_sum(logits, labels, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(math.fsum(by_hand(logits, labels, smoothing)), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_give_the_weighted_sum_of_two_losses_per_sample(smoothing: float) -> None:
    logits, labels, mixed, weight = example(8)
    pairs = zip(weight.tolist(), by_hand(logits, labels, smoothing), by_hand(logits, mixed, smoothing), strict=True)
    expected = math.fsum(w * first + (1 - w) * second for w, first, second in pairs)
    loss = cross_entropy_sum(logits, labels, label_smoothing=smoothing, mixed_labels=mixed, mix_weight=weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_scalar_mix_weight_applies_to_all_samples() -> None:
    logits, labels, mixed, _ = example(8)
    one = cross_entropy_sum(logits, labels, mixed_labels=mixed, mix_weight=0.3)
    each = cross_entropy_sum(logits, labels, mixed_labels=mixed, mix_weight=torch.full((8,), 0.3))
    assert one.item() == pytest.approx(each.item(), rel=1e-7)


@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_losses_and_gradients_of_parts_add_up_to_the_whole(cut: int) -> None:
    logits, labels, mixed, weight = example(8)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = {"label_smoothing": 0.1}
    total = cross_entropy_sum(whole, labels, mixed_labels=mixed, mix_weight=weight, **options)
    total.backward()
    sums = 0.0
    for part in (slice(0, cut), slice(cut, 8)):
        loss = cross_entropy_sum(
            parts[part], labels[part], mixed_labels=mixed[part], mix_weight=weight[part], **options
        )
        loss.backward()
        sums += loss.item()
    assert sums == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels, _, _ = example(300)
    loss = cross_entropy_sum(logits.to(dtype), labels, label_smoothing=0.1)
    exact = cross_entropy_sum(logits.to(dtype).double(), labels, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_an_empty_batch_has_loss_zero_and_can_run_backward() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.zeros(0, dtype=torch.long), label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 5)
    assert correct_counts(logits, torch.zeros(0, dtype=torch.long)).tolist() == [0, 0]


@settings(deadline=None)
@given(count=st.integers(1, 40), classes=st.integers(1, 12), levels=st.integers(1, 5), seed=st.integers(0, 99))
def test_counts_are_those_of_a_stable_sort(count: int, classes: int, levels: int, seed: int) -> None:
    """Logits of few levels, so that most samples have ties, which go to the lower class."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (count, classes), generator=stream).float()
    labels = torch.randint(classes, (count,), generator=stream)
    order = [sorted(range(classes), key=lambda k, row=row: (-row[k], k)) for row in logits.tolist()]
    expected = [sum(label in row[:k] for row, label in zip(order, labels.tolist(), strict=True)) for k in (1, 3, 20)]
    assert correct_counts(logits, labels, (1, 3, 20)).tolist() == expected


def test_counts_agree_with_topk_where_there_are_no_ties() -> None:
    logits, labels, _, _ = example(500, 10)
    top = logits.topk(5).indices
    expected = [(top[:, :k] == labels[:, None]).any(1).sum().item() for k in (1, 5)]
    assert correct_counts(logits, labels).tolist() == expected


def test_a_model_that_returns_nan_or_constants_gets_no_credit() -> None:
    labels = torch.arange(10)
    assert correct_counts(torch.full((10, 10), float("nan")), labels).tolist() == [0, 0]
    assert correct_counts(torch.zeros(10, 10), labels).tolist() == [1, 5]


def test_class_weights_multiply_the_loss_of_each_label() -> None:
    logits, labels, mixed, mix = example(8)
    v = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    firsts, seconds = by_hand(logits, labels, 0.1), by_hand(logits, mixed, 0.1)
    weighted = math.fsum(v[label].item() * loss for label, loss in zip(labels.tolist(), firsts, strict=True))
    options = {"label_smoothing": 0.1, "class_weights": v}
    assert cross_entropy_sum(logits, labels, **options).item() == pytest.approx(weighted, rel=1e-12)
    expected = math.fsum(
        (mix[i] * v[labels[i]] * firsts[i] + (1 - mix[i]) * v[mixed[i]] * seconds[i]).item() for i in range(8)
    )
    loss = cross_entropy_sum(logits, labels, mixed_labels=mixed, mix_weight=mix, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    ignored = torch.full_like(labels, -100)
    assert cross_entropy_sum(logits, ignored, **options).item() == 0


def test_class_weights_without_smoothing_are_those_of_torch() -> None:
    logits, labels, _, _ = example(8)
    v = torch.arange(1.0, 8, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=v, reduction="sum")
    assert cross_entropy_sum(logits, labels, class_weights=v).item() == pytest.approx(expected.item(), rel=1e-12)


def test_parts_with_class_weights_add_up_to_the_whole() -> None:
    logits, labels, _, _ = example(9)
    v = inverse_frequency_weights(labels, 7, 1.0).double()
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (cross_entropy_sum(whole, labels, class_weights=v) / 9).backward()
    for rows in ([0], [1, 2, 3, 4], [5, 6], [7, 8]):
        (cross_entropy_sum(parts[rows], labels[rows], class_weights=v) / 9).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_inverse_frequency_weights_have_mean_1_over_the_samples(power: float) -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])  # nothing of class 2
    weights = inverse_frequency_weights(labels, 4, power)
    assert weights[labels].mean().item() == pytest.approx(1, rel=1e-6)
    assert weights[2] == 0
    assert (weights[3] / weights[0]).item() == pytest.approx(6**power, rel=1e-6)
    if power == 1:
        assert weights.tolist() == pytest.approx([10 / (3 * 6), 10 / (3 * 3), 0, 10 / 3], rel=1e-6)


def test_class_weights_that_cannot_be_used_are_refused() -> None:
    logits, labels, _, _ = example(4)
    with pytest.raises(UserError, match="one weight per class"):
        cross_entropy_sum(logits, labels, class_weights=torch.ones(6))
    with pytest.raises(UserError, match="backend=auto"):
        cross_entropy_sum(logits, labels, class_weights=torch.ones(7), backend="triton")
