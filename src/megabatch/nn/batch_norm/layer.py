"""Batch norm whose statistics cover a fixed number of samples, its *span*, independent of how a batch is distributed.

A span may be smaller than the micro-batch (ghost batch norm, Hoffer et al. 2017, arXiv:1705.08741), equal to it
(plain batch norm), or larger (shared by a group of ranks, Ying et al. 2018, arXiv:1811.06992).
`megabatch.nn.batch_norm.evaluation_statistics` computes evaluation statistics from those of the spans.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels.float64 import in_float64
from megabatch.nn.batch_norm.own_spans import Normalised, normalise_own_spans
from megabatch.nn.batch_norm.shared_span import normalise_shared_span

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SpanBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics over spans of `span` samples. State dicts load in both directions.

    Input and output are (N, C, ...) of one dtype; statistics have the dtype of the running buffers (float32 under
    autocast). Training normalises x by the mean m and the biased variance v of its span:

        y = weight * (x - m) / sqrt(v + eps) + bias

    With `group_size=1` a forward of N samples has N // span whole spans and one short span of the remaining samples
    (Hoffer et al. 2017, arXiv:1705.08741). With `group_size=G` the G ranks of `process_group` share one span (Ying et
    al. 2018, arXiv:1811.06992): each rank contributes its samples, possibly none, and all G ranks must call forward
    and backward together. A layer then sends one all-gather of 2C + 1 values forward and one all-reduce of 2C values
    backward. Gradients of weight and bias are those of the local samples; sum them over ranks as all other gradients.

    In averages a short span counts by its share of `span` samples. A span of one value per channel has no unbiased
    variance: it does not count, and its output is the bias. (nn.BatchNorm1d raises an error; here that could stop one
    rank while the others wait for it.)

    By default forward updates running averages as nn.BatchNorm2d does, from the mean over the forward's spans. With
    `accumulate_statistics` (set by `collect_statistics`) forward only adds to sums, and `finish_step` updates the
    averages once a step, so that they do not depend on the number of workers or micro-batches. The sums are no buffers,
    as DistributedDataParallel broadcasts buffers; they follow the layer to other devices and dtypes.

        layer = SpanBatchNorm2d(64, span=32)
        layer(torch.randn(128, 64, 56, 56))  # four spans, each with its own mean and variance

    Args:
        num_features: C.
        span: samples that share statistics; counted in rows of the input, of which LeViT has one per token.
        stats_momentum: weight of a new statistic in the running averages, in [0, 1].
        process_group, group_size: ranks that share a span; `new_span_group(group_size)` makes the group.

    Raises:
        UserError: span or group_size below 1, or a group_size without a process group of that size; in forward, more
            local samples than the span that a group shares.
    """

    momentum: float | None  # None: a cumulative average, as torch.optim.swa_utils.update_bn sets it
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    is_frozen = False  # True where `nn.levels.freeze_backbone` keeps the running averages

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
        self.pooled_moments: Tensor | None = None  # exists only while evaluation statistics are recomputed
        # Of the step: means, unbiased variances, and number of spans.
        self.span_sum, self.first_span = (self.running_mean.new_zeros(2 * num_features + 1) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        recompute = self.pooled_moments is not None
        if not (self.training or recompute):
            return self._plain_batch_norm(input)
        if self.group_size == 1 and not (self.accumulate_statistics or recompute) and self._is_one_span(input):
            momentum = self.next_momentum()
            self.num_batches_tracked.add_(1)
            return self._plain_batch_norm(input, momentum)
        normalised = self._normalise(input)
        if recompute:
            self._add_pooled(normalised)
        else:
            self.keep_spans(input, normalised)
        return normalised.output

    def keep_spans(self, input: Tensor, normalised: Normalised) -> None:
        """Adds the statistics of a training forward of `input` to the running averages or the sums of the step."""
        if normalised.statistics:
            self._add_statistics(torch.stack(normalised.statistics), self._last_weight(input, normalised))

    def last_span_weight(self, input: Tensor) -> float:
        """Weight of the last span of a forward in averages: 1 for a whole one, 0 for one value per channel."""
        samples = len(input) % self.span or min(len(input), self.span)
        return samples / self.span if samples * input.shape[2:].numel() > 1 else 0.0

    def _last_weight(self, input: Tensor, normalised: Normalised) -> float | Tensor:
        if self.group_size == 1:
            return self.last_span_weight(input)
        count = torch.as_tensor(normalised.counts)
        return torch.where(count > 1, count / (self.span * input.shape[2:].numel()), 0.0)

    def _add_statistics(self, spans: Tensor, last_weight: float | Tensor) -> None:
        """Adds statistics of spans to the sums of the step or to the running averages.

        `spans` (spans, 2C + 1): means, unbiased variances, and 1 or 0. All state is in tensors, so that a CUDA graph
        can replay it.
        """
        if isinstance(last_weight, Tensor) or last_weight != 1:
            spans[-1].mul_(last_weight)
        total = spans[0] if len(spans) == 1 else spans.sum(0)
        if not self.accumulate_statistics:
            self.move_averages(total, self.next_momentum())
        elif self._counts_for_group():
            torch.where(self.first_span[-1:] == 0, spans[0], self.first_span, out=self.first_span)
            self.span_sum.add_(total)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size > 1 else ""
        return f"{self.num_features}, span={self.span}{group}, eps={self.eps}, stats_momentum={self.momentum}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.span_sum, self.first_span = fn(self.span_sum), fn(self.first_span)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpanBatchNorm2d":
        memo[id(self.process_group)] = self.process_group  # a process group cannot be copied; the copy shares it
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _is_one_span(self, input: Tensor) -> bool:
        return len(input) <= self.span and input.numel() > self.num_features

    def next_momentum(self) -> float:
        """Weight of the next statistic: `momentum`, or 1 / (number of statistics so far + 1) if that is None."""
        return self.momentum if self.momentum is not None else 1.0 / (int(self.num_batches_tracked) + 1)

    def _plain_batch_norm(self, input: Tensor, momentum: float = 0.0) -> Tensor:
        """Batch norm as in nn.BatchNorm2d: updates the running averages in training, uses them in evaluation."""
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        )

    def _normalise(self, input: Tensor) -> Normalised:
        if self.group_size == 1:
            return normalise_own_spans(
                input, self.weight, self.bias, like=self.running_mean, span=self.span, eps=self.eps
            )
        if len(input) > self.span:
            raise UserError(
                f"a forward of {len(input)} samples was given, needed: at most the span of {self.span} that "
                f"{self.group_size} ranks share; a micro-batch of {max(1, self.span // self.group_size)} works"
            )
        shared: Normalised = normalise_shared_span(
            input, self.weight, self.bias, like=self.running_mean, eps=self.eps, group=self.process_group
        )
        return shared

    def _add_pooled(self, normalised: Normalised) -> None:
        """Adds (count * E[x], count * E[x^2], count), summed over spans; in float64, to avoid cancellation."""
        assert self.pooled_moments is not None
        if normalised.statistics and self._counts_for_group():
            mean, variance = in_float64(torch.stack(normalised.statistics)[:, :-1]).chunk(2, dim=1)
            count = torch.as_tensor(normalised.counts, dtype=torch.float64, device=mean.device)[:, None]
            squares = variance * (count - 1).clamp(min=0) + count * mean.square()
            self.pooled_moments.add_(torch.cat([count * mean, squares, count], dim=1).sum(0))

    def move_averages(self, totals: Tensor, momentum: float, overflow: Tensor | None = None) -> None:
        """running = (1 - momentum) * running + momentum * mean over spans; unchanged without spans.

        `totals` (2C + 1): sums over spans of means and of variances, and the number of spans; a short span counts less.
        If `overflow` is not 0, nothing changes.
        """
        if overflow is not None:
            totals = torch.where(overflow == 0, totals, 0.0)
        count = totals[-1]
        statistics = (totals[:-1] / torch.where(count > 0, count, 1)).view(2, -1)
        for running, new in zip((self.running_mean, self.running_var), statistics, strict=True):
            running.lerp_(torch.where(count > 0, new, running), momentum)
        self.num_batches_tracked.add_(1 if overflow is None else overflow == 0)

    def _counts_for_group(self) -> bool:
        """True on the one rank of a group that adds the shared span to its sums."""
        return self.group_size == 1 or dist.get_rank(self.process_group) == 0


def convert(
    model: nn.Module, *, span: int, process_group: dist.ProcessGroup | None = None, group_size: int = 1
) -> nn.Module:
    """Replaces every batch norm of torch (1d, 2d, 3d, Sync) in `model` by a SpanBatchNorm2d, in place.

    Returns `model`, or the new layer if `model` itself is a batch norm. The new layers hold the same parameter and
    buffer tensors, so an optimizer made before stays valid, and the same hooks. A subclass with a dropout `drop` and an
    activation `act` behind the norm, such as timm's BatchNormAct2d, keeps both. Where a span holds the whole batch, the
    model computes what it computed before (tested on 27 networks of timm and torchvision).

        model = convert(torchvision.models.resnet50(), span=32)

    Args:
        span: samples that share statistics; see `SpanBatchNorm2d`.
        process_group, group_size: ranks that share a span; `new_span_group(group_size)` makes the group.

    Raises:
        UserError: a layer without running statistics, or with momentum=None (a cumulative average); a lazy layer before
            its first forward; a subclass whose forward differs from its norm, dropout and activation; span or
            group_size below 1, or a group_size without a process group of that size.
    """
    twins: dict[nn.Module, SpanBatchNorm2d] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            twins[layer] = _twin(layer, span, process_group, group_size)
            if type(layer).forward not in _KNOWN_FORWARDS:
                _keep_activation(twins[layer], layer, name)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    return twins.get(model, model)


def _twin(
    layer: nn.modules.batchnorm._BatchNorm, span: int, process_group: dist.ProcessGroup | None, group_size: int
) -> SpanBatchNorm2d:
    """A span layer that holds the parameter and buffer tensors of `layer`."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise UserError(f"{layer} was given, needed: a number of features; one forward before convert() works")
    if layer.running_mean is None or layer.momentum is None:
        raise UserError(
            f"{layer} was given, needed: a layer with an exponential running average; "
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
    for attribute in _HOOKS & vars(layer).keys():
        vars(twin)[attribute] = vars(layer)[attribute]  # the same dictionaries, so that handles can remove the hooks
    return twin.train(layer.training)


class _SpanBatchNormAct2d(SpanBatchNorm2d):
    """act(drop(batch norm(x))), as timm's BatchNormAct2d."""

    act: nn.Module
    drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}
_KNOWN_FORWARDS = {kind.forward for kind in (*BATCH_NORMS, SpanBatchNorm2d)}


def _keep_activation(twin: SpanBatchNorm2d, layer: nn.Module, name: str) -> None:
    """Adds the dropout and activation of a subclass to its twin; UserError if the subclass does more.

    The twin is compared with the layer in evaluation mode, on random values.
    """
    parts = {part: getattr(layer, part, None) for part in ("drop", "act")}
    if all(isinstance(part, nn.Module) for part in parts.values()):
        twin._modules.update(layer._modules)
        twin.__class__ = _SpanBatchNormAct2d
        if _equal_in_evaluation(twin, layer):
            return
    raise UserError(
        f"{name or 'the model'} is a {type(layer).__name__}, whose forward is more than batch norm; convert() would "
        "lose that. Needed: torch's batch norms, or a norm followed by modules named drop and act; make the model with "
        "norm_layer=torch.nn.BatchNorm2d, or replace this layer"
    )


def _equal_in_evaluation(one: nn.Module, other: nn.Module) -> bool:
    one, other = (copy.deepcopy(layer).eval() for layer in (one, other))
    weight = next(other.buffers())
    sides = 0 if isinstance(other, nn.BatchNorm1d) else 3 if isinstance(other, nn.BatchNorm3d) else 2
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = 3 * torch.randn(4, len(weight), *[3] * sides, dtype=weight.dtype).to(weight.device)
        return torch.allclose(one(images.clone()), other(images.clone()), rtol=1e-4, atol=1e-5)


def _check_group(span: int, process_group: dist.ProcessGroup | None, group_size: int) -> None:
    if span < 1 or group_size < 1:
        raise UserError(
            f"span={span}, group_size={group_size} were given, needed: 1 or more for both; span=32, group_size=1 work"
        )
    if group_size > 1 and process_group is None:
        raise UserError(
            f"group_size={group_size} was given without a process group, needed: that of the ranks that share a span; "
            f"process_group=new_span_group({group_size}) works"
        )
    if process_group is not None and dist.get_world_size(process_group) != group_size:
        size = dist.get_world_size(process_group)
        raise UserError(
            f"group_size={group_size} was given with a process group of {size} ranks; group_size={size} works"
        )
