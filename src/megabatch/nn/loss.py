"""Sums over samples, so that micro-batches and ranks add up to the global batch exactly."""

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
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy summed over the samples, 0-d, in float32 (float64 for float64 logits); 0 for no sample.

        loss = -sum_i sum_k q_ik log softmax(logits_i)_k,    q_i = (1 - s) onehot(label_i) + s / K

    (Szegedy et al. 2016, arXiv:1512.00567, section 7). Divide by the count of the *global* batch, not of this call.
    With `mixed_labels` (mixup, cutmix) the loss is w * loss(labels) + (1 - w) * loss(mixed_labels), where
    `mix_weight` is w: a number, or one value per sample. On a GPU with Triton one kernel reads the logits once for loss
    and gradient (`backend="reference"` runs torch's operations there too).

    Shapes: logits (N, K); labels and mixed_labels (N,) class indices; mix_weight scalar or (N,).

    Raises:
        UserError: other shapes, or mixed_labels without mix_weight.
    """
    return fused_cross_entropy_sum(
        logits,
        labels,
        label_smoothing=label_smoothing,
        mixed_labels=mixed_labels,
        mix_weight=mix_weight,
        backend=backend,
    )


@torch.no_grad()
def correct_counts(logits: Tensor, labels: Tensor, k: Sequence[int] = (1, 5)) -> Tensor:
    """How many samples have their label among the k largest logits, one int64 per k.

    Among equal logits the lower class index comes first, and NaN counts as larger than any label's logit, so the
    counts are exact and the same on every device, and a model of NaNs or constants is not called right.
    """
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead = ~(logits <= own) | ((logits == own) & before)
    place = ahead.sum(1)
    return torch.stack([(place < limit).sum() for limit in k])
