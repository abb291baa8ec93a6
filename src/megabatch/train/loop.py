"""The training loop. Read this first.

    settings(step, samples seen) -> micro-batches -> gradients -> exchange -> update -> event
    every k epochs: exact evaluation, then a checkpoint

Everything that differs between machines is wired in app/; this package holds free functions on plain state.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from megabatch.data.loading.batch import Batch
from megabatch.train.checkpoint import checkpoint_path
from megabatch.train.evaluate import evaluate_run
from megabatch.train.health.bad_samples import BadSamples
from megabatch.train.health.compare import RankComparison
from megabatch.train.health.roll_back import roll_back
from megabatch.train.measuring.observation import observation_event, step_measurements
from megabatch.train.measuring.trace import span, traced_layers, write_trace
from megabatch.train.schedule import StepSettings, total_samples
from megabatch.train.state import Evaluation, Run
from megabatch.train.step import NonFiniteStepError, PendingStep, count_skipped, require_finite, start_step


def train(run: Run) -> Evaluation | None:
    """Trains until the last sample, `max_steps` or a stop request; returns the last evaluation, None after a stop."""
    evaluation: Evaluation | None = None
    steps_before = run.state.step
    in_flight, bad_samples, workers = _InFlightSteps(run), BadSamples(run), RankComparison(run)
    for settings, batches in steps(run):
        traced = run.trace is not None and run.trace.begins(_steps_to_evaluation(run, settings, steps_before))
        try:
            with traced_layers(run, traced=traced) as layers:
                step = start_step(run, settings, batches)
        except NonFiniteStepError as error:
            roll_back(run, error)
            continue
        if run.trace is not None and traced:
            run.trace.add_step(step, layers)
        in_flight.add(step)
        ended = run.state.step - steps_before == run.max_steps
        evaluates = ended or _evaluation_is_due(run, settings)
        saves = evaluates or _checkpoint_is_due(run, settings)
        copies = run.memory_copy_every_steps > 0 and run.state.step % run.memory_copy_every_steps == 0
        stop, overdue = in_flight.settle(wait_for_all=saves or copies)
        saves = saves or stop or overdue
        workers.after_step(step.clock.own_s, before_checkpoint=saves or copies)
        with span(run, "evaluation", shown=evaluates):
            evaluation = _evaluate(run) if evaluates else None
        if saves or copies:
            with span(run, "checkpoint"):
                _save(run, evaluation, to_disk=saves, to_memory=copies)
        if saves:
            bad_samples.synchronize()
            write_trace(run)
        if ended or run.stops_early:
            break
        if stop:
            return evaluation if run.is_complete else None  # also where the stop met an evaluation
    return evaluation


class _InFlightSteps:
    """Steps that are dispatched and whose loss is not read back yet; always empty on a CPU.

    On a GPU the loss of a step is read after the next step is dispatched, so that the device never waits for Python.
    Evaluation and checkpoints wait until all earlier losses are known to be finite.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: deque[PendingStep] = deque()
        self._settled_at = 0.0

    def add(self, step: PendingStep) -> None:
        self._pending.append(step)

    def settle(self, *, wait_for_all: bool) -> tuple[bool, bool]:
        """Checks and logs pending steps: all, or all but the newest if they request nothing.

        Returns True if any worker received a stop request, and True if a checkpoint is due by rank 0's clock.
        """
        stop = overdue = False
        while self._pending and (
            wait_for_all or stop or overdue or len(self._pending) > self._pending[0].scalars.is_asynchronous
        ):
            step = self._pending.popleft()
            self._finish(step)
            stop, overdue = stop or step.stop_requested(), overdue or step.checkpoint_requested()
        return stop, overdue

    def _finish(self, step: PendingStep) -> None:
        if not step.left_out:
            require_finite(self._run, step)
        count_skipped(self._run, step)
        now = time.perf_counter()
        seconds = now - max(step.started, self._settled_at)
        self._settled_at = now
        self._run.log(step_event(self._run, step, seconds))
        if observed := observation_event(self._run, step):
            self._run.log(observed)


def steps(run: Run) -> Iterator[tuple[StepSettings, Iterator[Batch]]]:
    """Settings of each step with an iterator over its batches, which are prefetched across steps."""
    while not run.is_complete:
        planned_batch = run.state.batch_policy and run.state.batch_policy.global_batch_size
        batches = run.loader.batches(
            (positions, settings.resolution) for settings in _plan(run) for positions in run.micro_batches(settings)
        )
        for settings in _plan(run):
            yield settings, batches
            has_grown = run.state.batch_policy and run.state.batch_policy.global_batch_size != planned_batch
            if has_grown or run.state.samples_seen != settings.next_sample:
                break  # the batch grew, or the run went back: prefetched batches belong to another cut of the stream


def _plan(run: Run) -> Iterator[StepSettings]:
    """Settings of this and all later steps, as far as they are known now."""
    first = run.state.samples_seen
    for step in itertools.count(run.state.step):
        if first >= total_samples(run.recipe):
            return
        settings = run.settings_at(step, first)
        yield settings
        first = settings.next_sample


def step_event(run: Run, step: PendingStep, seconds: float) -> dict[str, Any]:
    """The event of a step that took `seconds`."""
    settings = step.settings
    event: dict[str, Any] = {
        "event": "step",
        "step": settings.step + 1,
        "epoch": settings.next_sample / run.recipe.num_train_images,
        "loss": step.loss(),
        "train_top1": step.train_top1(),
        "lr": settings.lr,
        "momentum": settings.momentum,
        "global_batch_size": settings.count,
        "resolution": settings.resolution,
        "images_per_s": settings.count / seconds,
        "step_s": seconds,
    }
    if step.scale:
        event |= {"loss_scale": step.scale.read()[1]}
    if step.scale or run.state.skipped_steps:
        event |= {"skipped_steps": run.state.skipped_steps}
    return event | step_measurements(step)


def _evaluate(run: Run) -> Evaluation:
    """Evaluates, and records the result for the recipe's rule of early stopping; equal on every worker."""
    evaluation, state, recipe = evaluate_run(run), run.state, run.recipe
    state.evaluated(evaluation.top1, min_rise=recipe.early_stop_min_rise)
    if run.stops_early:
        best = state.best_at / recipe.num_train_images
        text = f"stopped early: no better top1 in {recipe.early_stop_epochs:g} epochs than {state.best_top1:.4f} "
        text += f"at epoch {best:.2f}; the best checkpoint is kept"
        run.log(
            {"event": "early_stop", "step": state.step, "best_top1": state.best_top1, "best_epoch": best, "text": text}
        )
    return evaluation


def _save(run: Run, evaluation: Evaluation | None, *, to_disk: bool, to_memory: bool) -> None:
    """Writes the state in the background, to rank 0's disk and to the memory of each host.

    All workers take part: an optimizer may gather its state.
    """
    state, top1 = run.state, evaluation.top1 if evaluation else None
    content, epoch = state.state_dict(), state.samples_seen / run.recipe.num_train_images
    if to_memory and run.memory_copies is not None:
        run.memory_copies.write(content, step=state.step, epoch=epoch, top1=top1)
    if not to_disk:
        return
    run.last_checkpoint_at = time.monotonic()
    if run.checkpoints is None:
        return
    run.checkpoints.write(content, step=state.step, epoch=epoch, top1=top1)
    name = checkpoint_path(run.checkpoints.folder, state.step).name
    run.log({"event": "checkpoint", "step": state.step, "path": f"checkpoints/{name}"})


def _evaluation_is_due(run: Run, settings: StepSettings) -> bool:
    """True at the end, and when the step crossed `offset + k * every` epochs."""
    if run.is_complete:
        return True
    recipe = run.recipe
    before = (settings.first / recipe.num_train_images - recipe.eval_offset_epochs) / recipe.eval_every_epochs
    after = (run.state.samples_seen / recipe.num_train_images - recipe.eval_offset_epochs) / recipe.eval_every_epochs
    return math.floor(after + 1e-9) > max(-1, math.floor(before + 1e-9))


def _steps_to_evaluation(run: Run, settings: StepSettings, steps_before: int) -> int:
    """Steps from this one to the next evaluation, both included; as planned, if the batch grows."""
    recipe, images = run.recipe, run.recipe.num_train_images
    passed = math.floor((settings.first / images - recipe.eval_offset_epochs) / recipe.eval_every_epochs + 1e-9)
    due = recipe.eval_offset_epochs + max(0, passed + 1) * recipe.eval_every_epochs
    left = math.ceil((min(due * images, total_samples(recipe)) - settings.first) / settings.count - 1e-9)
    return left if run.max_steps is None else min(left, run.max_steps - (settings.step - steps_before))


def _checkpoint_is_due(run: Run, settings: StepSettings) -> bool:
    """True when the step crossed a multiple of the interval in steps or epochs."""
    every, state = run.checkpoint_every, run.state
    if every.steps:
        return every.crossed(state.step - 1, state.step)
    images = run.recipe.num_train_images
    return every.crossed(settings.first / images, state.samples_seen / images)
