"""One optimizer step of a run: set the rates, compute gradients, update; executed directly or replayed from a graph."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megabatch.comm.launch import sum_over_workers
from megabatch.data.loading.batch import Batch
from megabatch.errors import DivergedError
from megabatch.nn.batch_norm.evaluation_statistics import discard_step, finish_step
from megabatch.train.cuda_graph import Readback
from megabatch.train.gradients import Objective, accumulate_and_measure, accumulate_gradients
from megabatch.train.health.diagnose import describe_non_finite
from megabatch.train.measuring.observation import rank_slots, start_observation
from megabatch.train.measuring.step_clock import StepClock
from megabatch.train.schedule import StepSettings, apply_settings
from megabatch.train.state import Run

MOST_CAPTURED = 8
"""Most micro-batches of a captured step: a graph holds the inputs of all of them at once."""
MOST_SKIPPED = 25
"""Most overflowing steps in a row: a dynamic scale has fallen by 2^25 by then, and a fixed one never falls."""


@dataclass(frozen=True)
class PendingStep:
    """A dispatched step; on a GPU it may still be executing."""

    settings: StepSettings
    started: float  # time.perf_counter
    clock: StepClock
    scalars: Readback  # over all workers: loss sum, correct, stop requests, checkpoint due, bad gradients, slots
    left_out: bool = False  # not finite, and its gradient was dropped
    scale: Readback | None = None  # fp16: 1 if gradients overflowed, so that the step changed nothing; loss scale after
    norms: Readback | None = None  # of weights and gradients, in a step that is observed
    exchange: dict[str, Any] = field(default_factory=dict)  # this worker's gradient exchange

    def loss(self) -> float:
        """The global mean loss."""
        return self.scalars.read()[0] / self.settings.count

    def is_finite(self) -> bool:
        """True if the loss and, where they were examined, all gradients are finite; equal on all workers."""
        return math.isfinite(self.loss()) and not self.scalars.read()[4]

    def train_top1(self) -> float:
        """Share of the global batch whose most likely class is the label, in [0, 1], before the update."""
        return self.scalars.read()[1] / self.settings.count

    def stop_requested(self) -> bool:
        """True if any worker received a stop request; equal on all workers."""
        return self.scalars.read()[2] > 0

    def checkpoint_requested(self) -> bool:
        """True if a checkpoint is due by rank 0's clock; equal on all workers."""
        return self.scalars.read()[3] > 0

    def rank_slots(self) -> list[float]:
        """Numbers of each worker, by `observation.rank_slots`; empty on a GPU."""
        return self.scalars.read()[5:]


def start_step(run: Run, settings: StepSettings, batches: Iterator[Batch]) -> PendingStep:
    """Runs one step. Its loss and gradients must be finite before the update, except on a GPU under on_non_finite=stop,
    where the loss is read asynchronously.

    Raises:
        DivergedError: a value is not finite, or too many steps in a row were left out; NonFiniteStepError if the recipe
            asks for a rollback.
    """
    started = time.perf_counter()
    state, clock = run.state, StepClock(run.world.device)
    apply_settings(state.optimizer.param_groups, settings)
    state.copies.refresh()
    captured = _captures(run, settings)
    sums = (_replay if captured else _gradients)(run, settings, batches, clock)
    exchange = run.exchange_report() if run.exchange_report else {}
    scalars = Readback(_sum_over_workers(run, sums, clock, exchange))
    pending = PendingStep(settings, started, clock, scalars, exchange=exchange)
    clock.mark("exchange")
    has_updated = captured and _never_waits(run)
    norms = start_observation(run, settings, unscaled=has_updated)
    if _waits_for_finite(run) and not pending.is_finite():
        pending = replace(pending, left_out=_leave_out(run, pending))
    elif not has_updated:
        _update(run)
        clock.mark("update")
    if state.average:
        state.average.update(settings.count / run.recipe.num_train_images)
    state.step += 1
    state.samples_seen = settings.next_sample
    scale = state.precision.loss_scale
    scaled = Readback(torch.stack([scale.overflow, scale.factor])) if scale else None
    return replace(pending, scale=scaled, norms=norms)


class NonFiniteStepError(DivergedError):
    """A step was not finite and changed nothing, and the recipe asks to go back to an earlier checkpoint."""


def require_finite(run: Run, step: PendingStep) -> None:
    """Raises DivergedError, which names step, layer, samples and remedy, if the step is not finite. A collective."""
    if not step.is_finite():
        raise DivergedError(_describe(run, step))


def _describe(run: Run, step: PendingStep) -> str:
    settings = step.settings
    what = "a gradient is not finite" if math.isfinite(step.loss()) else f"the loss is {step.loss()}"
    fp16 = "; precision=bf16 has the range that fp16 lacks" if run.state.precision.name == "fp16" else ""
    after = "" if _waits_for_finite(run) else ", examined after the update"
    return (
        f"{what} at step {settings.step} (epoch {settings.epoch:.2f}, lr {settings.lr:.4g}): "
        f"{describe_non_finite(run, settings)}{after}; a smaller peak_lr, half of it say, or more warmup_epochs may "
        f"help{fp16}; earlier checkpoints are kept"
    )


def _waits_for_finite(run: Run) -> bool:
    """True if the update waits until loss and gradients are known to be finite."""
    return run.world.device.type == "cpu" or run.recipe.on_non_finite != "stop"


def _leave_out(run: Run, step: PendingStep) -> bool:
    """Drops the step's gradients and batch-norm statistics and warns, or raises, as the recipe says; returns True."""
    state, text = run.state, _describe(run, step)
    if run.recipe.on_non_finite == "stop":
        raise DivergedError(text)
    discard_step(state.module)
    if run.recipe.on_non_finite == "rollback":
        raise NonFiniteStepError(text)
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= MOST_SKIPPED:
        raise DivergedError(f"{MOST_SKIPPED} steps in a row were not finite; {text}")
    run.log({"event": "warning", "text": f"step {step.settings.step} changed nothing: {text}"})
    return True


def count_skipped(run: Run, step: PendingStep) -> None:
    """Counts steps that an overflow skipped. Their samples count as seen: the schedule depends on samples only.

    Raises:
        DivergedError: MOST_SKIPPED steps in a row.
    """
    if step.left_out:  # counted by `_leave_out`
        return
    if step.scale is None:
        run.state.skipped_in_a_row = 0
        return
    state, (overflow, scale) = run.state, step.scale.read()
    state.skipped_steps += int(overflow)
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if overflow else 0
    if state.skipped_in_a_row >= MOST_SKIPPED:
        raise DivergedError(
            f"{MOST_SKIPPED} steps in a row overflowed fp16, the last at step {step.settings.step} with loss scale "
            f"{scale:g}; precision=bf16 works without a scale, and a fixed loss scale may "
            "be too large; earlier checkpoints are kept"
        )


def captured_work(run: Run, *tensors: Tensor, count: int, num_micro_batches: int) -> tuple[Tensor, list[Tensor]]:
    """The part of a step that a CUDA graph holds: gradients and, where it never waits for the device, the update.

    `tensors` are those of the micro-batches one after another, all with the same parts. Returns the loss sum with the
    number of correct predictions, and the gradients.
    """
    size = len(tensors) // num_micro_batches
    batches = [_joined(tensors[first : first + size]) for first in range(0, len(tensors), size)]
    sums = _accumulate(run, count, iter(batches), num_micro_batches)
    if _never_waits(run):
        _update(run)
    return sums, [parameter.grad for parameter in _parameters(run) if parameter.grad is not None]


def _captures(run: Run, settings: StepSettings) -> bool:
    """True if the step goes through `run.captured`; equal on all workers, as it changes the order of collectives."""
    # Stream rank 0 has most micro-batches.
    return run.captured is not None and len(run.micro_batches(settings, stream_rank=0)) <= MOST_CAPTURED


def _replay(run: Run, settings: StepSettings, batches: Iterator[Batch], clock: StepClock) -> Tensor:
    """As `_gradients`; includes the update if it never waits."""
    assert run.captured is not None
    inputs = [next(batches) for _ in run.micro_batches(settings)]
    clock.mark("input")
    tensors = [tensor for batch in inputs for tensor in _parts(batch)]
    sums, gradients = run.captured(*tensors, count=settings.count, num_micro_batches=len(inputs))
    for parameter, gradient in zip(_parameters(run), gradients, strict=True):
        parameter.grad = gradient  # each graph has its own gradient tensors
    clock.mark("graph")
    result: Tensor = sums
    return result


def _gradients(run: Run, settings: StepSettings, batches: Iterator[Batch], clock: StepClock) -> Tensor:
    """Leaves the step's mean gradient in `.grad`; returns this worker's loss sum and correct predictions."""
    state, num_micro_batches = run.state, len(run.micro_batches(settings))
    if state.batch_policy is None:
        return _accumulate(run, settings.count, batches, num_micro_batches, clock)
    state.optimizer.zero_grad(set_to_none=True)
    sums, noise = accumulate_and_measure(
        run.model, batches, num_micro_batches, _objective(run, settings.count), world=run.world, clock=clock
    )
    state.batch_policy.observe(*noise)
    return sums


def _accumulate(
    run: Run, count: int, batches: Iterator[Batch], num_micro_batches: int, clock: StepClock | None = None
) -> Tensor:
    run.state.optimizer.zero_grad(set_to_none=True)
    return accumulate_gradients(
        run.model, batches, num_micro_batches, _objective(run, count), world_size=run.world.world_size, clock=clock
    )


def _objective(run: Run, count: int) -> Objective:
    state = run.state
    return Objective(count, run.recipe.label_smoothing, state.precision, state.copies, run.class_weights)


def _update(run: Run) -> None:
    """Updates weights and batch-norm statistics; changes neither, and drops the step's, if a gradient overflowed."""
    state, scale, overflow = run.state, run.state.precision.loss_scale, None
    if scale is not None:
        scale.unscale([p.grad for p in _parameters(run) if p.grad is not None])
        if _never_waits(run):
            overflow = scale.overflow
        elif scale.overflowed():
            discard_step(state.module)
            return
    with _skipping(state.optimizer, overflow):
        state.optimizer.step()
    state.copies.written_by(state.optimizer)
    finish_step(state.module, eval_stats=run.recipe.eval_stats, overflow=overflow)


def _never_waits(run: Run) -> bool:
    """True if an update reads nothing back: without a loss scale, and where the optimizer's kernel reads its flag."""
    return run.state.precision.loss_scale is None or getattr(run.state.optimizer, "_step_supports_amp_scaling", False)


@contextlib.contextmanager
def _skipping(optimizer: torch.optim.Optimizer, overflow: Tensor | None) -> Iterator[None]:
    """Within the block a step of `optimizer` changes nothing if `overflow` is not 0; in torch.amp's protocol."""
    optimizer.found_inf = overflow  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _sum_over_workers(run: Run, sums: Tensor, clock: StepClock, exchange: dict[str, Any]) -> Tensor:
    """Over all workers, float64: the fields of `PendingStep.scalars`, then those of `rank_slots`."""
    is_overdue = run.world.is_first and run.checkpoint_is_overdue()
    flags = [torch.full_like(sums[:1], float(flag)) for flag in (run.stop_requested(), is_overdue)]
    parts = [sums, *flags, _has_bad_gradient(run, sums[:1])]
    if slots := rank_slots(run.world, clock, exchange):  # on a CPU: to a GPU, the copy would wait for the device
        parts.append(sums.new_tensor(slots))
    return sum_over_workers(torch.cat(parts), run.world)


def _has_bad_gradient(run: Run, like: Tensor) -> Tensor:
    """1 if a gradient is not finite, else 0; also 0 if the update does not wait, or fp16's loss scale checks."""
    gradients = [p.grad for p in _parameters(run) if p.grad is not None]
    if not gradients or not _waits_for_finite(run) or run.state.precision.loss_scale is not None:
        return torch.zeros_like(like)
    peaks = torch.stack([peak.float() for peak in torch._foreach_norm(gradients, torch.inf)])
    return (~peaks.isfinite().all()).to(like).view(1)


def _parameters(run: Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.state.module.parameters() if parameter.requires_grad]


def _parts(batch: Batch) -> list[Tensor]:
    mixed = (batch.mixed_labels, batch.mix_weight)
    return [batch.images, batch.labels, *(tensor for tensor in mixed if tensor is not None)]


def _joined(parts: tuple[Tensor, ...]) -> Batch:
    images, labels, *mixed = parts
    mixed_labels, mix_weight = mixed or (None, None)
    return Batch(images, labels, len(images), mixed_labels, mix_weight)
