"""The training loop. Read this first.

    settings(step, samples seen) -> micro-batches -> gradients -> exchange -> update -> event
    every k epochs: exact evaluation, then a checkpoint

All that can change from one machine to another is wired in build.py; here are free functions on plain state.
"""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from megabatch.comm.launch import sum_over_workers
from megabatch.data.loader import Batch
from megabatch.errors import DivergedError
from megabatch.train.state import Evaluation, Run, StepSettings
from megabatch.train.step import Objective, accumulate_and_measure, accumulate_gradients, first_not_finite


def train(run: Run) -> Evaluation | None:
    """Trains until the last sample, `max_steps`, or a request to stop; the last evaluation, None if there was none."""
    evaluation: Evaluation | None = None
    steps_before = run.state.step
    for settings, batches in _steps(run):
        started = time.perf_counter()
        loss = _step(run, settings, batches)
        stop, seconds = _agree(run, started)
        run.log(_step_event(run, settings, loss, seconds))
        ended = run.state.step - steps_before == run.max_steps
        evaluation = run.evaluate() if ended or _evaluation_is_due(run, settings) else None
        if evaluation or stop or _checkpoint_is_due(run):
            run.save(evaluation)
        if stop or ended:
            break
    return evaluation


def _steps(run: Run) -> Iterator[tuple[StepSettings, Iterator[Batch]]]:
    """Each step's settings with an iterator over its batches; batches are prepared ahead, across steps."""
    while run.state.samples_seen < run.total_samples:
        planned_batch = run.state.batch_policy and run.state.batch_policy.global_batch_size
        batches = run.loader.batches(
            (positions, settings.resolution) for settings in _plan(run) for positions in run.micro_batches(settings)
        )
        for settings in _plan(run):
            yield settings, batches
            if run.state.batch_policy and run.state.batch_policy.global_batch_size != planned_batch:
                break  # the batch grew: what was prepared ahead belongs to another cut of the stream


def _plan(run: Run) -> Iterator[StepSettings]:
    """Settings of this and all later steps, as far as they are known now."""
    first = run.state.samples_seen
    for step in itertools.count(run.state.step):
        if first >= run.total_samples:
            return
        settings = run.settings_at(step, first)
        yield settings
        first = settings.next_sample


def _step(run: Run, settings: StepSettings, batches: Iterator[Batch]) -> float:
    """One update; the global mean loss."""
    state = run.state
    state.optimizer.zero_grad(set_to_none=True)
    run.apply_settings(settings)
    num_micro_batches = len(run.micro_batches(settings))
    objective = Objective(settings.count, run.label_smoothing, state.precision)
    if state.batch_policy is None:
        loss_sum = accumulate_gradients(
            run.model, batches, num_micro_batches, objective, world_size=run.world.world_size
        )
    else:
        loss_sum, noise = accumulate_and_measure(run.model, batches, num_micro_batches, objective, world=run.world)
        state.batch_policy.observe(*noise)
    loss = float(sum_over_workers(loss_sum, run.world)) / settings.count
    _require_finite(run, settings, loss)
    state.precision.unscale(state.optimizer)
    if state.precision.step(state.optimizer):
        run.finish_statistics()
        if state.average:
            state.average.update(settings.count / run.num_train_images)
    else:
        state.skipped_steps += 1
        run.discard_statistics()
    state.step += 1
    state.samples_seen = settings.next_sample
    return loss


def _require_finite(run: Run, settings: StepSettings, loss: float) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {settings.step} (epoch {settings.epoch:.2f}, lr {settings.lr:.4g}): "
            f"{first_not_finite(run.state.module)} is not finite; a smaller peak_lr, half of it say, or more "
            "warmup_epochs may help; earlier checkpoints are kept"
        )


def _agree(run: Run, started: float) -> tuple[bool, float]:
    """Whether any worker was asked to stop, and the step's seconds; every worker gets the same answer."""
    asked = torch.tensor([float(run.stop_requested())])
    return bool(sum_over_workers(asked, run.world) > 0), time.perf_counter() - started


def _step_event(run: Run, settings: StepSettings, loss: float, seconds: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "event": "step",
        "step": run.state.step,
        "epoch": run.state.samples_seen / run.num_train_images,
        "loss": loss,
        "lr": settings.lr,
        "momentum": settings.momentum,
        "global_batch_size": settings.count,
        "resolution": settings.resolution,
        "images_per_s": settings.count / seconds,
    }
    if run.state.precision.scaler.is_enabled():
        event |= {"loss_scale": run.state.precision.scaler.get_scale(), "skipped_steps": run.state.skipped_steps}
    return event | (run.exchange_report() if run.exchange_report else {})


def _evaluation_is_due(run: Run, settings: StepSettings) -> bool:
    """At the end, and when the step crossed `offset + k * every` epochs."""
    if run.state.samples_seen >= run.total_samples:
        return True
    before = (settings.first / run.num_train_images - run.eval_offset_epochs) / run.eval_every_epochs
    after = (run.state.samples_seen / run.num_train_images - run.eval_offset_epochs) / run.eval_every_epochs
    return math.floor(after + 1e-9) > max(-1, math.floor(before + 1e-9))


def _checkpoint_is_due(run: Run) -> bool:
    return bool(run.checkpoint_every_steps) and run.state.step % run.checkpoint_every_steps == 0
