"""Batch norm whose statistics cover a fixed number of samples, its *span*, however the batch is cut over workers.

A span may be smaller than the micro-batch (ghost batch norm, Hoffer et al. 2017, arXiv:1705.08741), equal to it
(plain batch norm), or larger (shared by a group of ranks, Ying et al. 2018, arXiv:1811.06992). How the statistics
become those of evaluation is the matter of `megabatch.nn.batch_norm.evaluation_statistics`.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.nn.batch_norm.own_spans import Normalised, normalise_own_spans
from megabatch.nn.batch_norm.shared_span import normalise_shared_span

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SpanBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over spans of `span` samples; parameters, buffers and state dict are the same, both ways.

    Input and output are (N, C, ...) of one dtype; statistics are in the dtype of the running buffers (float32 under
    autocast). Training normalises x by the mean m and biased variance v of its own span:

        y = weight * (x - m) / sqrt(v + eps) + bias

    With `group_size=1` a forward of N samples is N // span whole spans and, if some samples remain, one short span.
    With `group_size=G` the G ranks of `process_group` share one span: each brings its samples, as many as it has and
    possibly none, and all G must call forward and backward together. A layer then sends one all-gather of
    2C + 1 values forward and one all-reduce of 2C values backward. Gradients of weight and bias are those of the
    local samples: sum them over ranks as every other gradient.

    On its own the layer keeps running averages in forward, as nn.BatchNorm2d does, from the mean over the forward's
    spans. With `accumulate_statistics` (set by `collect_statistics`) forward only adds to sums, and `finish_step`
    updates the averages once a step, so that they do not depend on the number of workers or micro-batches.

    Raises:
        UserError: span or group_size below 1, or a group without a process group of that size; in forward, more
            local samples than the span that a group shares.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    span_sum: Tensor
    first_span: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        span: int,
        eps: float = 1e-5,
        stats_momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        group_size: int = 1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_group(span, process_group, group_size)
        super().__init__(num_features, eps, stats_momentum, affine, device=device, dtype=dtype)
        self.span = span
        self.process_group = process_group
        self.group_size = group_size
        self.accumulate_statistics = False
        self.pooled_moments: Tensor | None = None  # set while evaluation statistics are recomputed
        for name in ("span_sum", "first_span"):  # of the step: means, unbiased variances, number of spans
            self.register_buffer(name, self.running_mean.new_zeros(2 * num_features + 1), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        recompute = self.pooled_moments is not None
        if not (self.training or recompute):
            return self._plain_batch_norm(input)
        if self.group_size == 1 and not (self.accumulate_statistics or recompute) and self._is_one_span(input):
            self.num_batches_tracked.add_(1)
            return self._plain_batch_norm(input)
        normalised = self._normalise(input)
        if recompute:
            self._add_pooled(normalised)
        elif normalised.statistics:
            self._take_statistics(torch.stack(normalised.statistics))
        return normalised.output

    def _take_statistics(self, spans: Tensor) -> None:
        """Adds the spans, (spans, 2C + 1): means, unbiased variances, and 1 or 0, to the step's or to the averages.

        No Python state, so that a captured graph can replay it.
        """
        total = spans[0] if len(spans) == 1 else spans.sum(0)
        if not self.accumulate_statistics:
            self.move_averages(total, self.momentum)
        elif self._speaks_for_group():
            torch.where(self.first_span[-1:] == 0, spans[0], self.first_span, out=self.first_span)
            self.span_sum.add_(total)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size > 1 else ""
        return f"{self.num_features}, span={self.span}{group}, eps={self.eps}, stats_momentum={self.momentum}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpanBatchNorm2d":
        memo[id(self.process_group)] = self.process_group  # cannot be copied, and the copy lives in the same group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _is_one_span(self, input: Tensor) -> bool:
        return len(input) <= self.span and input.numel() > self.num_features

    def _plain_batch_norm(self, input: Tensor) -> Tensor:
        """What nn.BatchNorm2d does: updates the running averages in training, uses them in evaluation."""
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _normalise(self, input: Tensor) -> Normalised:
        if self.group_size == 1:
            return normalise_own_spans(
                input, self.weight, self.bias, like=self.running_mean, span=self.span, eps=self.eps
            )
        if len(input) > self.span:
            raise UserError(
                f"a forward of {len(input)} samples does not fit into the span of {self.span} that {self.group_size} "
                f"ranks share; a micro-batch of {max(1, self.span // self.group_size)} works"
            )
        shared: Normalised = normalise_shared_span(
            input, self.weight, self.bias, like=self.running_mean, eps=self.eps, group=self.process_group
        )
        return shared

    def _add_pooled(self, normalised: Normalised) -> None:
        """Adds (count * E[x], count * E[x^2], count), summed over spans, in float64 against cancellation."""
        assert self.pooled_moments is not None
        if normalised.statistics and self._speaks_for_group():
            mean, variance = torch.stack(normalised.statistics)[:, :-1].double().chunk(2, dim=1)
            count = torch.as_tensor(normalised.counts, dtype=torch.float64, device=mean.device)[:, None]
            squares = variance * (count - 1).clamp(min=0) + count * mean.square()
            self.pooled_moments.add_(torch.cat([count * mean, squares, count], dim=1).sum(0))

    def move_averages(self, totals: Tensor, momentum: float) -> None:
        """running = (1 - momentum) * running + momentum * mean over spans; kept where there was no span.

        `totals` (2C + 1): sums over spans of means and of variances, and the number of spans.
        """
        count = totals[-1]
        statistics = (totals[:-1] / count.clamp(min=1)).view(2, -1)
        for running, new in zip((self.running_mean, self.running_var), statistics, strict=True):
            running.lerp_(torch.where(count > 0, new, running), momentum)
        self.num_batches_tracked.add_(1)

    def _speaks_for_group(self) -> bool:
        """Whether this rank is the one of its group that counts the shared span."""
        return self.group_size == 1 or dist.get_rank(self.process_group) == 0


def convert(
    model: nn.Module, *, span: int, process_group: dist.ProcessGroup | None = None, group_size: int = 1
) -> nn.Module:
    """`model` with every batch norm of torch's (1d, 2d, 3d, Sync) replaced by a SpanBatchNorm2d, in place.

    The same parameters and buffers are reused, so an optimizer made before stays valid. Returns the new layer where
    `model` itself is a batch norm.

    Raises:
        UserError: a layer without running statistics, or with momentum=None (a cumulative average).
    """
    twins: dict[nn.Module, SpanBatchNorm2d] = {}
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            twins[layer] = _twin(layer, span, process_group, group_size)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    return twins.get(model, model)


def _twin(
    layer: nn.modules.batchnorm._BatchNorm, span: int, process_group: dist.ProcessGroup | None, group_size: int
) -> SpanBatchNorm2d:
    """A span layer that holds the tensors of `layer` themselves."""
    if layer.running_mean is None or layer.momentum is None:
        raise UserError(
            f"{layer} keeps no exponential running average, which a span layer needs; "
            "track_running_stats=True, momentum=0.1 works"
        )
    twin = SpanBatchNorm2d(
        layer.num_features,
        span=span,
        eps=layer.eps,
        stats_momentum=layer.momentum,
        process_group=process_group,
        group_size=group_size,
        affine=layer.affine,
        device=layer.running_mean.device,
        dtype=layer.running_mean.dtype,
    )
    twin._parameters.update(layer._parameters)
    twin._buffers.update(
        {name: layer._buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked")}
    )
    return twin.train(layer.training)


def _check_group(span: int, process_group: dist.ProcessGroup | None, group_size: int) -> None:
    if span < 1 or group_size < 1:
        raise UserError(f"span={span}, group_size={group_size} were given, both must be 1 or more; span=32 works")
    if group_size > 1 and process_group is None:
        raise UserError(
            f"group_size={group_size} needs the process group of the ranks that share a span; "
            f"process_group=new_span_group({group_size}) works"
        )
    if process_group is not None and dist.get_world_size(process_group) != group_size:
        size = dist.get_world_size(process_group)
        raise UserError(f"group_size={group_size} was given with a process group of {size}; group_size={size} works")
