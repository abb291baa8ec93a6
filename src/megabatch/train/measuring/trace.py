"""Trace of some updates and the evaluation and checkpoint after them, of all workers, in Chrome's trace-event format.

One process per worker. Its track "training" has updates, their phases and, within "forward", the layers; each bucket of
the gradient exchange has a track, with the stages of its all-reduce, and so has the writing of a checkpoint. Clocks of
several machines are compared by their time of day.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabatch.comm.exchange.timeline import Stamp, seconds_between, stamp
from megabatch.comm.launch import World, all_gather_objects
from megabatch.files import write_text
from megabatch.train.compiled import CompiledModel

if TYPE_CHECKING:
    from megabatch.train.state import Run
    from megabatch.train.step import PendingStep

TRACE_FILE = "trace.json"
MOST_LAYERS = 4000
"""Calls of layers that a traced update shows; its argument `layers_left_out` counts others."""
Layers = list[tuple[str, Stamp, Stamp]]


@dataclass(frozen=True)
class TraceSpan:
    """An interval on one track of a worker, in seconds of `time.perf_counter`."""

    track: str
    name: str
    start_s: float
    end_s: float
    arguments: dict[str, Any]


class Trace:
    """Collects the spans of this worker: of the last `num_steps` updates before the first evaluation, and of that.

    Writes `path` once, on rank 0.
    """

    def __init__(self, path: Path, *, num_steps: int) -> None:
        self._path, self._num_steps = path, num_steps
        self._steps: list[tuple[PendingStep, Layers]] = []
        self._spans: list[TraceSpan] = []
        self._is_written = False

    @property
    def is_recording(self) -> bool:
        """True from the first traced update until the file is written."""
        return bool(self._steps) and not self._is_written

    def begins(self, steps_to_evaluation: int) -> bool:
        """True if the coming update is traced; equal on all workers."""
        return not self._is_written and steps_to_evaluation <= self._num_steps

    def add_step(self, step: "PendingStep", layers: Layers) -> None:
        """Keeps an update, whose times are read when the file is written: on a GPU it may still be executing."""
        self._steps.append((step, layers))

    def add(self, track: str, name: str, start_s: float, end_s: float, **arguments: Any) -> None:
        """Adds a span of this worker's host."""
        self._spans.append(TraceSpan(track, name, start_s, end_s, arguments))

    def write(self, world: World) -> None:
        """Collects the spans of all workers and writes the file. A collective, in which all workers take part."""
        spans = [*(found for step, layers in self._steps for found in _spans_of(step, layers)), *self._spans]
        self._is_written, self._steps, self._spans = True, [], []
        offset_s = time.time() - time.perf_counter()
        workers = all_gather_objects([_with_time_of_day(one, offset_s) for one in spans], world)
        if world.is_first:
            write_text(self._path, json.dumps(chrome_trace(workers), separators=(",", ":")) + "\n")


def span(run: "Run", name: str, *, shown: bool = True) -> contextlib.AbstractContextManager[None]:
    """Traces the block as a span of the track "training", if `shown` and the run records a trace."""
    recording = shown and run.trace is not None and run.trace.is_recording
    return _timed(run, name) if recording else contextlib.nullcontext()


@contextlib.contextmanager
def _timed(run: "Run", name: str) -> Iterator[None]:
    assert run.trace is not None
    start = time.perf_counter()
    yield
    run.trace.add("training", name, start, time.perf_counter())


def write_trace(run: "Run") -> None:
    """Writes the run's trace, if it records one, with the checkpoint in progress. A collective."""
    if run.trace is None or not run.trace.is_recording:
        return
    if run.checkpoints is not None:
        run.checkpoints.wait()
        run.trace.add("checkpoint file", "write", *run.checkpoints.last_write_s)
    run.trace.write(run.world)


@contextlib.contextmanager
def traced_layers(run: "Run", *, traced: bool) -> Iterator[Layers]:
    """Times the calls of the model's modules within the block if `traced`; yields their spans, in order of their ends.

    The modules' `forward` is replaced for that time: hooks would keep fused kernels from being used. A captured or
    compiled model has no calls to time.
    """
    found: Layers = []
    compiled = any(isinstance(module, CompiledModel) for module in run.model.modules())
    if not traced or run.captured is not None or compiled:
        yield found
        return
    replaced = [(name, module) for name, module in run.state.module.named_modules() if name]
    own = {name: vars(module).get("forward") for name, module in replaced}
    for name, module in replaced:
        module.forward = _timed_forward(name, module.forward, found, run)
    try:
        yield found
    finally:
        for name, module in replaced:
            del module.forward
            if own[name] is not None:
                module.forward = own[name]


def _timed_forward(name: str, forward: Callable[..., Any], found: Layers, run: "Run") -> Callable[..., Any]:
    @functools.wraps(forward)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = stamp(run.world.device)
        try:
            return forward(*args, **kwargs)
        finally:
            found.append((name, start, stamp(run.world.device)))

    return timed


def _spans_of(step: "PendingStep", layers: Layers) -> Iterator[TraceSpan]:
    """Spans of an update; those of a GPU start at the time at which the host dispatched it."""
    phases, start = step.clock.spans(), step.clock.start
    base_s = start if isinstance(start, float) else step.started
    end_s = max((phase.start_s + phase.length_s for phase in phases), default=0.0)
    shown = layers[:MOST_LAYERS]
    facts = {"images": step.settings.count, "loss": step.loss(), "layers_left_out": len(layers) - len(shown)}
    yield TraceSpan("training", f"update {step.settings.step + 1}", base_s, base_s + end_s, facts)
    for phase in phases:
        first_s = base_s + phase.start_s
        yield TraceSpan("training", phase.phase, first_s, first_s + phase.length_s, {})
    for name, first, last in shown:
        first_s, last_s = (base_s + seconds_between(start, at) for at in (first, last))
        yield TraceSpan("training", name, first_s, last_s, {})
    yield from _exchange_spans(step.exchange)


def _exchange_spans(exchange: dict[str, Any]) -> Iterator[TraceSpan]:
    for bucket in exchange.get("buckets", []):
        ready_s, sent_s, done_s = (exchange["first_ready_s"] + 1e-3 * bucket[f"{at}_ms"] for at in _BUCKET_TIMES)
        track, facts = f"bucket {bucket['index']}", {"numel": bucket["numel"], "queued_ms": 1e3 * (sent_s - ready_s)}
        yield TraceSpan(track, track, ready_s, done_s, facts)
    for index, name, first_s, last_s in exchange.get("stages", []):
        yield TraceSpan(f"bucket {index}", name, first_s, last_s, {})


_BUCKET_TIMES = ("ready", "sent", "done")


def _with_time_of_day(one: TraceSpan, offset_s: float) -> TraceSpan:
    return TraceSpan(one.track, one.name, one.start_s + offset_s, one.end_s + offset_s, one.arguments)


def chrome_trace(workers: list[list[TraceSpan]]) -> dict[str, Any]:
    """Returns the trace as JSON values: complete events ("X") by process and thread, times in microseconds.

    Events of a track are in order of their starts, an enclosing one before those in it.
    """
    zero_s = min((one.start_s for spans in workers for one in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(workers):
        events += _metadata("process", rank, None, f"rank {rank}", rank)
        tracks = sorted({one.track for one in spans}, key=lambda track: (track != "training", len(track), track))
        for thread, track in enumerate(tracks):
            events += _metadata("thread", rank, thread, track, thread)
            own = sorted((one for one in spans if one.track == track), key=lambda one: (one.start_s, -one.end_s))
            events += [_complete(one, rank, thread, zero_s) for one in own]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _metadata(kind: str, rank: int, thread: int | None, name: str, order: int) -> list[dict[str, Any]]:
    place = {"ph": "M", "pid": rank} | ({} if thread is None else {"tid": thread})
    return [
        {**place, "name": f"{kind}_name", "args": {"name": name}},
        {**place, "name": f"{kind}_sort_index", "args": {"sort_index": order}},
    ]


def _complete(one: TraceSpan, rank: int, thread: int, zero_s: float) -> dict[str, Any]:
    times = {"ts": round(1e6 * (one.start_s - zero_s), 3), "dur": round(1e6 * max(0.0, one.end_s - one.start_s), 3)}
    return {"ph": "X", "pid": rank, "tid": thread, "name": one.name, "args": one.arguments} | times
