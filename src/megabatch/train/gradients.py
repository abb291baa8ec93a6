"""Gradient accumulation: forward and backward over micro-batches, with one gradient exchange per step.

The loss of a micro-batch is the sum over its samples divided by the global sample count, so the optimizer receives the
mean gradient over the global batch, however the batch is divided among workers and micro-batches.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megabatch.comm.launch import World, sum_over_workers
from megabatch.data.loading.batch import Batch
from megabatch.kernels.float64 import float64_device, in_float64
from megabatch.nn.loss import cross_entropy_sum
from megabatch.train.measuring.step_clock import StepClock
from megabatch.train.precision import Precision
from megabatch.train.weight_copies import WeightCopies


@dataclass(frozen=True)
class Objective:
    """Loss of a step: sum of the cross entropies, times `class_weights`, over `global_count`, computed in `precision`.

    Forward reads the 16-bit `copies` in place of their weights.
    """

    global_count: int
    label_smoothing: float
    precision: Precision
    copies: WeightCopies = field(default_factory=WeightCopies)
    class_weights: Tensor | None = None


class NoiseSample(NamedTuple):
    """Gradient norms of a step for the noise-scale estimator (McCandlish et al. 2018, arXiv:1812.06162, app. A)."""

    mean_local_sq_norm: float  # mean over micro-batches of |g_b|^2
    local_count: float  # b
    global_sq_norm: float  # |g_B|^2
    global_count: float  # B


def accumulate_gradients(
    model: nn.Module,
    batches: Iterator[Batch],
    num_micro_batches: int,
    objective: Objective,
    *,
    world_size: int,
    clock: StepClock | None = None,
) -> Tensor:
    """Leaves the global mean gradient, times the loss scale, in `.grad` on every worker.

    Returns this worker's loss sum and its number of correct predictions (a vector of 2, float64, on `float64_device`)
    without synchronising with a device that has float64. `clock` gets a mark after each phase.
    DistributedDataParallel averages over workers, hence the factor `world_size`. Gradients are exchanged during the
    backward of the last micro-batch only.
    """
    sums = []
    mark = clock.mark if clock else _ignore
    linked = world_size > 1  # the exchange is triggered by the gradients of the weights themselves
    widen = num_micro_batches > 1 or objective.precision.loss_scale is not None
    with objective.precision.cached_casts():
        for number in range(num_micro_batches):
            batch = next(batches)
            mark("input")
            exchanges = number == num_micro_batches - 1
            with contextlib.nullcontext() if exchanges else _without_exchange(model):
                with objective.copies.read(linked=linked):
                    loss, num_correct = forward_loss(model, batch, objective)
                mark("forward")
                torch.autograd.backward(objective.precision.scale(loss * (world_size / objective.global_count)))
            objective.copies.return_gradients(widen=widen)
            mark("backward")
            sums.append(torch.stack([in_float64(loss.detach()), in_float64(num_correct)]))
    return torch.stack(sums).sum(0)


def accumulate_and_measure(
    model: nn.Module,
    batches: Iterator[Batch],
    num_micro_batches: int,
    objective: Objective,
    *,
    world: World,
    clock: StepClock,
) -> tuple[Tensor, NoiseSample]:
    """As `accumulate_gradients`, and measures the gradient norm of each micro-batch; exchanges without overlap.

    The micro-batch is the estimator's small batch. It is one batch-norm span, a recipe value, so the measured noise
    scale does not depend on the number of workers. Norms exclude the loss scale.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    # loss, correct predictions, |g_b|^2, micro-batches, samples in them
    sums = torch.zeros(5, dtype=torch.float64, device=float64_device(world.device))
    scale = objective.precision.loss_scale.value if objective.precision.loss_scale else 1.0
    for _ in range(num_micro_batches):
        batch = next(batches)
        clock.mark("input")
        with _without_exchange(model):
            with objective.copies.read():
                loss, num_correct = forward_loss(model, batch, objective)
            clock.mark("forward")
            torch.autograd.backward(objective.precision.scale(loss / objective.global_count))
        objective.copies.return_gradients(widen=True)
        gradients = [_gradient(p) for p in parameters]
        torch._foreach_add_(total, gradients)
        share = objective.global_count / max(1, batch.count) / scale
        norm = _squared_norm(gradients) * share**2
        sums += sums.new_tensor([float(loss.detach()), float(num_correct), norm, 1.0, batch.count])
        for parameter in parameters:
            parameter.grad = None
        clock.mark("backward")
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = sum_over_workers(gradient, world)
    own = sums[:2].clone()
    sum_over_workers(sums, world)
    clock.mark("exchange")
    _, _, squares, count, samples = sums.tolist()
    global_sq_norm = _squared_norm(total) / scale**2
    return own, NoiseSample(squares / count, samples / count, global_sq_norm, float(objective.global_count))


def forward_loss(model: nn.Module, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the micro-batch, in fp32 or the dtype of the logits if that is wider.

    The second value is the number of samples whose largest logit is that of the label, as the augmented image has it.
    """
    with objective.precision.autocast():
        logits = model(batch.images)
    loss = cross_entropy_sum(
        logits,
        batch.labels,
        label_smoothing=objective.label_smoothing,
        mixed_labels=batch.mixed_labels,
        mix_weight=batch.mix_weight,
        class_weights=objective.class_weights,
    )
    return loss, (logits.detach().argmax(1) == batch.labels).sum()


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(model, "no_sync", None)
    return no_sync() if no_sync is not None else contextlib.nullcontext()


def _ignore(_: str) -> None:
    """A mark of no clock."""


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def _squared_norm(tensors: list[Tensor]) -> float:
    return float(in_float64(torch.stack(torch._foreach_norm(tensors))).square().sum())
