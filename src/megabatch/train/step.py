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
from megabatch.train.health.diagnose import first_not_finite
from megabatch.train.observation import rank_slots, start_observation
from megabatch.train.schedule import StepSettings, apply_settings
from megabatch.train.state import Run
from megabatch.train.step_clock import StepClock

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
    scalars: Readback  # over all workers: loss sum, correct predictions, stop requests, 1 if a checkpoint is due, slots
    images: Tensor  # this worker's last micro-batch, to locate a non-finite value
    scale: Readback | None = None  # fp16: 1 if gradients overflowed, so that the step changed nothing; loss scale after
    norms: Readback | None = None  # of weights and gradients, in a step that is observed
    exchange: dict[str, Any] = field(default_factory=dict)  # this worker's gradient exchange

    def loss(self) -> float:
        """The global mean loss."""
        return self.scalars.read()[0] / self.settings.count

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
        return self.scalars.read()[4:]


def start_step(run: Run, settings: StepSettings, batches: Iterator[Batch]) -> PendingStep:
    """Runs one step; on a CPU the loss must be finite before the update (on a GPU it is read asynchronously)."""
    started = time.perf_counter()
    run.own_time.start()
    state, clock = run.state, StepClock(run.world.device)
    apply_settings(state.optimizer.param_groups, settings)
    state.copies.refresh()
    latest = _Latest(batches)
    captured = _captures(run, settings)
    sums = (_replay if captured else _gradients)(run, settings, latest, clock)
    run.own_time.finish()
    exchange = run.exchange_report() if run.exchange_report else {}
    scalars = Readback(_sum_over_workers(run, sums, clock, exchange))
    pending = PendingStep(settings, started, clock, scalars, latest.batch.images, exchange=exchange)
    clock.mark("exchange")
    if not pending.scalars.is_asynchronous:
        require_finite(run, pending)
    has_updated = captured and _never_waits(run)
    norms = start_observation(run, settings, unscaled=has_updated)
    if not has_updated:
        _update(run)
        clock.mark("update")
    if state.average:
        state.average.update(settings.count / run.recipe.num_train_images)
    state.step += 1
    state.samples_seen = settings.next_sample
    scale = state.precision.loss_scale
    scaled = Readback(torch.stack([scale.overflow, scale.factor])) if scale else None
    return replace(pending, scale=scaled, norms=norms)


def require_finite(run: Run, step: PendingStep) -> None:
    """Raises DivergedError, which names step, layer and remedy, if the step's loss is not finite."""
    loss, settings = step.loss(), step.settings
    if math.isfinite(loss):
        return
    where = first_not_finite(run.state.module, step.images, run.state.precision)
    fp16 = "; precision=bf16 has the range that fp16 lacks" if run.state.precision.name == "fp16" else ""
    raise DivergedError(
        f"the loss is {loss} at step {settings.step} (epoch {settings.epoch:.2f}, lr {settings.lr:.4g}): {where} is "
        "not finite"
        + (", examined after the update" if step.scalars.is_asynchronous else "")
        + "; a smaller peak_lr, half "
        f"of it say, or more warmup_epochs may help{fp16}; earlier checkpoints are kept"
    )


def count_skipped(run: Run, step: PendingStep) -> None:
    """Counts steps that an overflow skipped. Their samples count as seen: the schedule depends on samples only.

    Raises:
        DivergedError: MOST_SKIPPED steps in a row.
    """
    if step.scale is None:
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


class _Latest:
    """An iterator that remembers the batch it returned last."""

    batch: Batch

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.batch = next(self._batches)
        return self.batch


def _captures(run: Run, settings: StepSettings) -> bool:
    return run.captured is not None and len(run.micro_batches(settings)) <= MOST_CAPTURED


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
    after_forward = run.own_time.mark
    return Objective(count, run.recipe.label_smoothing, run.state.precision, run.state.copies, after_forward)


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
    """Over all workers, float64: the fields of `PendingStep.scalars`, the last ones of `rank_slots`."""
    is_overdue = run.world.is_first and run.checkpoint_is_overdue()
    own = [float(run.stop_requested()), float(is_overdue), *rank_slots(run.world, clock, exchange)]
    return sum_over_workers(torch.cat([sums, sums.new_tensor(own)]), run.world)


def _parameters(run: Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.state.module.parameters() if parameter.requires_grad]


def _parts(batch: Batch) -> list[Tensor]:
    mixed = (batch.mixed_labels, batch.mix_weight)
    return [batch.images, batch.labels, *(tensor for tensor in mixed if tensor is not None)]


def _joined(parts: tuple[Tensor, ...]) -> Batch:
    images, labels, *mixed = parts
    mixed_labels, mix_weight = mixed or (None, None)
    return Batch(images, labels, len(images), mixed_labels, mix_weight)
