"""Loss and accuracy as sums over samples, which add up over micro-batches and ranks to those of the global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend
from megabatch.kernels.loss import fused_cross_entropy_sum


def cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mixed_labels: Tensor | None = None,
    mix_weight: Tensor | float | None = None,
    class_weights: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns the cross entropy summed over the samples, in nats; 0 for no samples. Differentiable.

        loss = -sum_i sum_k q_ik log softmax(logits_i)_k,    q_i = (1 - s) onehot(label_i) + s / K

    with s = `label_smoothing` (Szegedy et al. 2016, arXiv:1512.00567, section 7). For the mean loss of a step, divide
    by the size of the *global* batch, not of this call: then the gradients of all micro-batches and ranks add up to
    that of the global batch.

    With `mixed_labels`, for mixup (Zhang et al. 2018, arXiv:1710.09412) and cutmix (Yun et al. 2019, arXiv:1905.04899),
    the loss of sample i is w_i loss(label_i) + (1 - w_i) loss(mixed_label_i), where w is `mix_weight`.

    With `class_weights` v, each loss(label) is multiplied by v_label. Divide by the number of samples all the same, not
    by the sum of their weights as torch's CrossEntropyLoss does: only then do parts of a batch add up to the whole.

    Args:
        logits: (N, K), any floating-point dtype.
        labels: (N,), class indices in [0, K); -100 leaves a sample out.
        label_smoothing: s, in [0, 1].
        mixed_labels: (N,), class indices in [0, K), or None.
        mix_weight: w, a number or (N,), in [0, 1]; needed with `mixed_labels`.
        class_weights: v, (K,), or None for 1; as `inverse_frequency_weights` returns.
        backend: "auto" computes loss and gradient in one Triton kernel on a GPU where Triton is installed, and by
            torch's operations elsewhere; "triton" and "reference" force one of the two. The kernel has no factor for a
            row's loss, so with `class_weights` "auto" is "reference".

    Returns:
        0-d tensor, float32 (float64 for float64 logits).

    Raises:
        UserError: the shapes do not agree, `mixed_labels` comes without `mix_weight`, or `backend` is unknown or
            cannot run on this device or with `class_weights`.
    """
    return fused_cross_entropy_sum(
        logits,
        labels,
        label_smoothing=label_smoothing,
        mixed_labels=mixed_labels,
        mix_weight=mix_weight,
        class_weights=class_weights,
        backend=backend,
    )


def inverse_frequency_weights(labels: Tensor, num_classes: int, power: float) -> Tensor:
    """Weights of the classes in a loss, (K,), float32, that lessen the effect of unequal class sizes.

        v_c = n_c^(-power) n / sum_k n_k^(1 - power)

    over the classes with n_c > 0 samples of n; 0 for the others. The mean over the n samples is 1, so that a learning
    rate keeps its meaning. power=1 gives n / (K n_c): all classes count equally. power=0 gives 1.

    Shapes: labels (n,), class indices in [0, K).
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -power, 0.0)
    return (weights * (counts.sum() / (weights * counts).sum())).float()


@torch.no_grad()
def correct_counts(logits: Tensor, labels: Tensor, k: Sequence[int] = (1, 5)) -> Tensor:
    """Number of samples whose label is among the k largest logits: one int64 for each k.

    Ties go to the lower class index, and NaN ranks above every label's logit. So counts are equal on every device, and
    a model that returns NaN or a constant gets no credit.

    Shapes: logits (N, K), labels (N,), result (len(k),).
    """
    label_logits = logits.gather(1, labels[:, None])
    has_lower_index = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    # ~(a <= b) and not a > b: the former is True for NaN.
    ranks_higher = ~(logits <= label_logits) | ((logits == label_logits) & has_lower_index)
    rank = ranks_higher.sum(1)
    return torch.stack([(rank < limit).sum() for limit in k])
