"""Evaluation statistics of batch norm, computed from those of the training spans; independent of the world size."""

import weakref
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.float64 import float64_device
from megabatch.kernels.step_averages import LayerStatistics, StepAverages, supports
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

EvalStats = Literal["running", "running_all_reduced", "last_batch", "precise"]

_KERNELS: weakref.WeakKeyDictionary[nn.Module, StepAverages] = weakref.WeakKeyDictionary()
"""Device memory of the kernels, by the first layer of a model."""


def span_layers(model: nn.Module) -> Iterator[SpanBatchNorm2d]:
    """Span layers of `model` that are not frozen, each once, in the order of its modules."""
    return (layer for layer in model.modules() if isinstance(layer, SpanBatchNorm2d) and not layer.is_frozen)


def collect_statistics(model: nn.Module, enabled: bool = True) -> None:
    """Makes the span layers of `model` accumulate their spans' statistics, for `finish_step` to use.

    Afterwards a training forward only adds the statistics of its spans (mean and unbiased variance, C values each) to
    sums that start at 0, and leaves the running averages alone. DistributedDataParallel needs no option for this. Call
    it once before training, and `finish_step` after every step:

        collect_statistics(model)
        for images, labels in loader:
            train_step(model, images, labels)
            finish_step(model, eval_stats="running_all_reduced")

    Args:
        enabled: False restores running averages that every training forward updates, as in nn.BatchNorm2d.
    """
    for layer in span_layers(model):
        layer.accumulate_statistics = enabled
    discard_step(model)


def discard_step(model: nn.Module) -> None:
    """Discards the statistics that forwards added since the last `finish_step`: for a skipped or repeated step."""
    for layer in span_layers(model):
        layer.span_sum.zero_()
        layer.first_span.zero_()


@torch.no_grad()
def finish_step(
    model: nn.Module,
    *,
    eval_stats: EvalStats,
    group: dist.ProcessGroup | None = None,
    overflow: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Updates running averages from the statistics of the step's spans. Call it once a step, on all ranks of `group`.

        running = (1 - stats_momentum) * running + stats_momentum * statistic

    for the mean and the unbiased variance, C values each. Layers that update their averages in forward are skipped (see
    `collect_statistics`, which also has an example). The statistic is chosen by `eval_stats`:

    - "running": the first span of rank 0 (Yamazaki et al. 2019, arXiv:1903.12650, did not synchronise the averages).
    - "running_all_reduced": the mean over all spans of the step; a short span counts by its share of a whole one. By
      linearity this equals the average over workers of each worker's own running average.
    - "last_batch": the same mean with stats_momentum 1, so that evaluation uses only the last step (Akiba et al. 2017,
      arXiv:1711.04325).
    - "precise": as "running_all_reduced", until `finish_precise` replaces the averages.

    Sends one all-reduce of 2C + 1 values per layer, with all layers in one message; none without torch.distributed.
    On a GPU with Triton all layers are updated in two launches, if their stats_momentum is the same. If `overflow`, a
    0-d float32 tensor, is not 0, the step's statistics are discarded, as by `discard_step`, without the host.

    Raises:
        UserError: an unknown `eval_stats`.
    """
    _check_kind(eval_stats)
    layers = [layer for layer in span_layers(model) if layer.accumulate_statistics]
    if not layers:
        return
    momentum = _common_momentum(layers, eval_stats)
    tensors = [_tensors(layer) for layer in layers]
    if momentum is not None and supports(tensors, backend):
        kernels = _KERNELS.setdefault(layers[0], StepAverages())
        totals = kernels.take(tensors, first=eval_stats == "running")
        _sum_over_ranks(totals, eval_stats, group)
        kernels.move(tensors, totals, momentum, overflow)
        return
    totals = torch.cat([layer.first_span if eval_stats == "running" else layer.span_sum for layer in layers])
    _sum_over_ranks(totals, eval_stats, group)
    for layer, total in zip(layers, torch.split(totals, [_num_totals(layer) for layer in layers]), strict=True):
        layer.move_averages(total, 1.0 if eval_stats == "last_batch" else layer.next_momentum(), overflow)
    discard_step(model)


def begin_precise(model: nn.Module) -> None:
    """Starts recomputing evaluation statistics (Wu and Johnson 2021, arXiv:2105.07576, section 3).

    Puts the model into evaluation mode, except that span layers normalise by the statistics of their own spans, as in
    training, and accumulate them. Next, run forwards over some batches under torch.no_grad, then call `finish_precise`.
    """
    model.eval()
    for layer in span_layers(model):
        device = float64_device(layer.running_mean.device)
        layer.pooled_moments = torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=device)


@torch.no_grad()
def finish_precise(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> None:
    """Sets evaluation statistics to the mean and unbiased variance of all samples since `begin_precise`.

        m = sum(n_s E_s[x]) / n,    v = (sum(n_s E_s[x^2]) / n - m^2) * n / (n - 1)

    over all spans s of all ranks of `group`, in float64, with one all-reduce. These are the statistics of the
    population, not an average of variances. The model stays in evaluation mode.

    Raises:
        UserError: `begin_precise` was not called, or no sample passed since.
    """
    layers = list(span_layers(model))
    pooled = [layer.pooled_moments for layer in layers if layer.pooled_moments is not None]
    if len(pooled) != len(layers):
        raise UserError("finish_precise was called without begin_precise; begin_precise(model), then forwards, works")
    for layer in layers:
        layer.pooled_moments = None
    if not pooled:
        return
    totals = torch.cat(pooled)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, group=group)
    for layer, moments in zip(layers, torch.split(totals, [_num_totals(layer) for layer in layers]), strict=True):
        _set_pooled(layer, moments)


def _common_momentum(layers: list[SpanBatchNorm2d], eval_stats: EvalStats) -> float | None:
    """Weight of the new statistics, or None if it differs between layers or must be read from them."""
    if eval_stats == "last_batch":
        return 1.0
    return layers[0].momentum if len({layer.momentum for layer in layers}) == 1 else None


def _tensors(layer: SpanBatchNorm2d) -> LayerStatistics:
    return LayerStatistics(
        layer.first_span, layer.span_sum, layer.running_mean, layer.running_var, layer.num_batches_tracked
    )


def _sum_over_ranks(totals: Tensor, eval_stats: EvalStats, group: dist.ProcessGroup | None) -> None:
    if dist.is_available() and dist.is_initialized():
        if eval_stats == "running" and dist.get_rank(group) != 0:
            totals.zero_()
        dist.all_reduce(totals, group=group)


def _check_kind(eval_stats: str) -> None:
    if eval_stats not in EvalStats.__args__:  # type: ignore[attr-defined]
        kinds = ", ".join(EvalStats.__args__)  # type: ignore[attr-defined]
        raise UserError(f"eval_stats={eval_stats} was given, needed one of {kinds}; eval_stats=running works")


def _num_totals(layer: SpanBatchNorm2d) -> int:
    return 2 * layer.num_features + 1


def _set_pooled(layer: SpanBatchNorm2d, moments: Tensor) -> None:
    count = moments[-1]
    if count == 0:
        raise UserError("no sample passed between begin_precise and finish_precise; needed: 1 or more; one batch works")
    mean, mean_square = (moments[:-1] / count).view(2, -1)
    layer.running_mean.copy_(mean)
    variance = (mean_square - mean.square()).clamp(min=0)
    layer.running_var.copy_(variance * count / (count - 1).clamp(min=1))
