# mypy: ignore-errors
"""Triton kernel of the softmax cross entropy. Imported only by `loss`, when it runs on a GPU."""

import triton
import triton.language as tl

IGNORED = tl.constexpr(-100)  # torch's default ignore_index


@triton.jit
def _label_weight(label, weight, classes: tl.constexpr):
    """Returns `weight` for a valid label, 0 for one that torch ignores, and NaN for one that is no class."""
    exists = (label >= 0) & (label < classes)
    return tl.where(exists, weight, tl.where(label == IGNORED, 0.0, float("nan")))


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    mixed_labels,
    mix_weight,
    losses,
    gradient,
    row_stride,
    smoothing,
    scale,
    mixed: tl.constexpr,
    weight_per_row: tl.constexpr,
    classes: tl.constexpr,
    block: tl.constexpr,
):
    """Loss and gradient of one sample from one read of its logits; program i handles row i.

        q    = (1 - smoothing) (w onehot(label) + (1 - w) onehot(mixed_label)) + smoothing / K
        loss = -sum_k q_k log softmax(logits)_k;    gradient = (softmax(logits) - q) scale

    Inputs: logits (N, K) with `row_stride` values between rows, labels and mixed_labels (N,), mix_weight w (N,) or
    0-d, scale 0-d. Outputs: losses (N,), gradient (N, K) contiguous. `block` is K rounded up to a power of two.
    """
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < classes
    # Lanes beyond the last class load -inf, so that they add exp(-inf) = 0 to the softmax's denominator.
    values = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    # The row's maximum is subtracted before exp, so that the largest term is exp(0) = 1 and nothing overflows.
    largest = tl.max(values, axis=0)
    exponentials = tl.exp(values - largest)
    total = tl.sum(exponentials, axis=0)
    label = tl.load(labels + row)
    weight = 1.0
    if mixed:
        weight = tl.load(mix_weight + row) if weight_per_row else tl.load(mix_weight)
    # target is q; target_sum, its sum, is 1 unless a label is ignored.
    target_sum = _label_weight(label, weight, classes)
    target = tl.where(column == label, target_sum, 0.0)
    if mixed:
        other = tl.load(mixed_labels + row)
        other_weight = _label_weight(other, 1.0 - weight, classes)
        target += tl.where(column == other, other_weight, 0.0)
        target_sum += other_weight
    target = (1.0 - smoothing) * target + smoothing / classes * target_sum
    # -sum_k q_k (v_k - largest - log total). Lanes beyond the last class are masked, as values is -inf there.
    shifted = tl.where(inside, values - largest, 0.0)
    loss = target_sum * tl.log(total) - tl.sum(tl.where(inside, target * shifted, 0.0), axis=0)
    tl.store(losses + row, loss)
    result = (exponentials / total * target_sum - target) * tl.load(scale)
    tl.store(gradient + row.to(tl.int64) * classes + column, result.to(gradient.dtype.element_ty), mask=inside)
