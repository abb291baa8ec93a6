"""The training loop. Read this first.

    settings(step, samples seen) -> micro-batches -> gradients -> exchange -> update -> event
    every k epochs: exact evaluation, then a checkpoint

All that can change from one machine to another is wired in build/; here are free functions on plain state.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from megabatch.data.loading.batch import Batch
from megabatch.train.bad_samples import Damage
from megabatch.train.state import Evaluation, Run, StepSettings
from megabatch.train.step import PendingStep, require_finite, start_step


def train(run: Run) -> Evaluation | None:
    """Trains until the last sample, `max_steps`, or a request to stop; the last evaluation, None if there was none."""
    evaluation: Evaluation | None = None
    steps_before = run.state.step
    under_way, damage = _InFlightSteps(run), Damage(run)
    for settings, batches in _steps(run):
        under_way.add(start_step(run, settings, batches))
        ended = run.state.step - steps_before == run.max_steps
        evaluates = ended or _evaluation_is_due(run, settings)
        saves = evaluates or _checkpoint_is_due(run)
        stop = under_way.settle(all_of_them=saves)
        evaluation = run.evaluate() if evaluates else None
        if saves or stop:
            run.save(evaluation)
            damage.meet()
        if stop or ended:
            break
    return evaluation


class _InFlightSteps:
    """Steps that were started and not yet looked at: none on a CPU.

    On a GPU a step's loss is read when the next step has been started, so that the device never waits for Python; what
    keeps or judges the weights waits until all losses before are known to be finite.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._taken: deque[PendingStep] = deque()
        self._settled_at = 0.0

    def add(self, taken: PendingStep) -> None:
        self._taken.append(taken)

    def settle(self, *, all_of_them: bool) -> bool:
        """Checks and reports steps, all or all but one that is late; whether a worker was asked to stop."""
        stop = False
        while self._taken and (all_of_them or stop or len(self._taken) > self._taken[0].numbers.is_late):
            stop = self._finish(self._taken.popleft()) or stop
        return stop

    def _finish(self, taken: PendingStep) -> bool:
        require_finite(self._run, taken)
        now = time.perf_counter()
        seconds = now - max(taken.started, self._settled_at)
        self._settled_at = now
        self._run.log(_step_event(self._run, taken, seconds))
        return taken.stops()


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


def _step_event(run: Run, taken: PendingStep, seconds: float) -> dict[str, Any]:
    settings = taken.settings
    event: dict[str, Any] = {
        "event": "step",
        "step": settings.step + 1,
        "epoch": settings.next_sample / run.num_train_images,
        "loss": taken.loss(),
        "lr": settings.lr,
        "momentum": settings.momentum,
        "global_batch_size": settings.count,
        "resolution": settings.resolution,
        "images_per_s": settings.count / seconds,
    }
    if run.state.precision.loss_scale:
        event |= {"loss_scale": run.state.precision.loss_scale.value, "skipped_steps": run.state.skipped_steps}
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
