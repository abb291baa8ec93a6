"""The engine behind the hooks: sends a buffer through an algorithm's stages and completes a future."""

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from torch.futures import Future

from megabatch.comm.exchange import primitives
from megabatch.comm.exchange.algorithms import padded_numel, routes, sent_bytes
from megabatch.comm.exchange.grid import Grid, make_grid
from megabatch.comm.exchange.pipeline import Failure, Pipeline, Streams, run_here
from megabatch.comm.exchange.stages import Job
from megabatch.comm.exchange.timeline import BucketTimes, Timeline, stamp
from megabatch.comm.exchange.wire import FP16_SUM_MAX, WireScale, pack, unpack, wire_dtype
from megabatch.comm.launch import wait_for_gloo
from megabatch.errors import SettingsError


@dataclass
class _Parcel:
    """One buffer in flight: the data that is sent, and the future that receives the result."""

    index: int
    buffer: Tensor
    packed: Tensor
    future: Future[Tensor]
    times: BucketTimes | None
    parts_left: int
    error: BaseException | None = None


class ExchangeState:
    """State of the communication hooks: the grid, the wire type, and what is kept from step to step.

    For rank r's gradient g_r [n] of a bucket on N ranks, each hook leaves on every rank

        result = unscale( sum over r of cast( scale * share * g_r ) )       share = 1 / N, or 1 without `average`

    where cast rounds to the wire type: half precision is used for communication only (Akiba et al. 2017,
    arXiv:1711.04325; Mikami et al. 2018, arXiv:1811.05233). `wrap` lists the bytes that each algorithm sends, for
    M = n times 4 bytes (fp32) or 2 bytes (fp16, bf16).

    Memory: per bucket one buffer in the wire type (none for fp32 without padding) and, on gloo, one of the same length
    for each reduce-scatter. All ranks must construct their states in the same order. Two states that may be in flight
    at the same time need separate grids, because the collectives of a process group must start in one order.

    Args:
        grid: ranks in rows and columns; None makes a grid of all ranks.
        wire: "fp32", "fp16" or "bf16".
        error_feedback: keeps this rank's casting error per bucket [n, fp32] and adds it to the next step's gradient
            (see `pack`); not part of a checkpoint.
        average: the result is the mean over the ranks, as DDP's; False gives the sum, for losses that are already
            divided by the global batch.
        wire_scale: fixed power of two as the scale, without clipping. None: 1 for fp32 and bf16; for fp16 a power of
            two per bucket that follows the gradients, clipped so that no sum overflows (`WireScale`, in `scales`; its
            `state_dict` belongs in a checkpoint for a bitwise resume).
        timeline: records when each bucket was ready, sent and done.

    Raises:
        SettingsError: `wire` is unknown, or `wire_scale` is not a power of two.
    """

    def __init__(
        self,
        grid: Grid | None = None,
        *,
        wire: str = "fp32",
        error_feedback: bool = False,
        average: bool = True,
        wire_scale: float | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.grid = make_grid() if grid is None else grid
        self.wire = wire
        self.average = average
        self.error_feedback = error_feedback and wire != "fp32"
        self.wire_scale = _power_of_two(wire_scale) if wire_scale is not None else 1.0
        self.scales = WireScale() if wire == "fp16" and wire_scale is None else None
        self.timeline = timeline
        self._dtype = wire_dtype(wire)
        self._number = 0
        self._memory: dict[Hashable, Tensor] = {}
        self._residuals: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._pipelines: dict[str, list[Pipeline]] = {}
        self._streams: Streams | None = None
        self._failure = Failure()
        self._in_flight: set[Future[Tensor]] = set()
        self._lock = threading.Lock()

    def exchange(
        self, buffer: Tensor, algorithm: str, *, index: int = 0, parameters: Sequence[Tensor] = ()
    ) -> Future[Tensor]:
        """Starts the reduction of the flat fp32 `buffer` [n] over the grid, in place; the future's value is `buffer`.

        `index` identifies the buffer from step to step. `parameters` are those whose gradients it holds: error feedback
        starts afresh if they change. All ranks must call it in the same order. An error of a collective is set on the
        future. Raises SettingsError if `algorithm` is unknown or `buffer` is not flat.
        """
        if buffer.ndim != 1 or not buffer.is_contiguous():
            raise SettingsError(
                f"a buffer of shape {tuple(buffer.shape)} and strides {buffer.stride()} was given, needed: a "
                "contiguous vector, which is reduced in place; buffer.view(-1) of a contiguous tensor works"
            )
        device = buffer.device
        future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else [])
        if self.grid.num_ranks == 1:
            future.set_result(buffer)
            return future
        with self._lock:  # before anything is sent, so that `fail` finds the future at any time
            self._in_flight.add(future)
            failure = self._failure.error
        if failure is None:
            self._send(buffer, algorithm, index, parameters, future)
        else:
            self.fail(failure)
        return future.then(_value)

    def _send(
        self, buffer: Tensor, algorithm: str, index: int, parameters: Sequence[Tensor], future: Future[Tensor]
    ) -> None:
        pipelines = self._pipelines_of(algorithm)
        packed = self._packed(buffer, algorithm, index)
        times = self._open_times(buffer, packed, algorithm, index)
        parcel = _Parcel(index, buffer, packed, future, times, len(pipelines))
        if primitives.is_native(self.grid.group("world")):
            self._run_on_stream(parcel, algorithm, parameters)
            return
        self._pack(parcel, parameters)
        for pipeline, job in zip(pipelines, self._jobs(parcel), strict=True):
            pipeline.submit(job, partial(self._arrived, parcel, job))

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the exchange, or None; DDP reports only its text."""
        return self._failure.error

    def fail(self, error: BaseException) -> None:
        """Fails the futures of all buckets in flight now, instead of at the collectives' timeout.

        Every later exchange fails with the first error. May be called from any thread.
        """
        with self._lock:
            self._failure.error = self._failure.error or error
            waiting, self._in_flight = self._in_flight, set()
        # Outside the lock: callbacks of a future run in this call and may need it.
        for future in waiting:
            future.set_exception(error)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Resets error feedback and scales, for example after a warm-up step whose gradients are discarded."""
        self._residuals.clear()
        if self.scales is not None:
            self.scales.load_state_dict({})

    def close(self) -> None:
        """Stops the threads, and waits until gloo's are idle: call it after the last collective, at a process's end.

        The state must not be used afterwards.
        """
        for pipelines in self._pipelines.values():
            for pipeline in pipelines:
                pipeline.close()
        self._pipelines.clear()
        wait_for_gloo()

    def _pipelines_of(self, algorithm: str) -> list[Pipeline]:
        if algorithm not in self._pipelines:
            made = routes(algorithm, self.grid)
            self._pipelines[algorithm] = [
                Pipeline(route, f"{algorithm} {part}", self._failure) for part, route in enumerate(made)
            ]
        return self._pipelines[algorithm]

    def _packed(self, buffer: Tensor, algorithm: str, index: int) -> Tensor:
        """Returns the tensor to send: `buffer` itself if it needs neither a cast nor padding."""
        numel = padded_numel(buffer.numel(), algorithm, self.grid)
        if numel == buffer.numel() and buffer.dtype == self._dtype and not self.error_feedback:
            return buffer
        return self._reused(("packed", index), numel, self._dtype, buffer.device)

    def _scale(self, parcel: _Parcel) -> Tensor | float:
        return self.wire_scale if self.scales is None else self.scales.of(parcel.index, parcel.buffer.device)

    def _pack(self, parcel: _Parcel, parameters: Sequence[Tensor]) -> None:
        pack(
            parcel.buffer,
            parcel.packed,
            share=1 / self.grid.num_ranks if self.average else 1.0,
            scale=self._scale(parcel),
            limit=FP16_SUM_MAX / self.grid.num_ranks if self.scales is not None else None,
            residual=self._residual(parcel.buffer, parcel.index, parameters) if self.error_feedback else None,
        )
        if parcel.times is not None:
            parcel.times.sent = stamp(parcel.buffer.device)

    def _residual(self, buffer: Tensor, index: int, parameters: Sequence[Tensor]) -> Tensor:
        # After DDP has rebuilt its buckets, an index holds other parameters, whose error must not be mixed in.
        owners = tuple(map(id, parameters))
        kept = self._residuals.get(index)
        if kept is None or kept[0] != owners or kept[1].numel() != buffer.numel():
            kept = self._residuals[index] = (owners, torch.zeros_like(buffer, dtype=torch.float32))
        return kept[1]

    def _jobs(self, parcel: _Parcel) -> list[Job]:
        jobs = []
        for part, region in enumerate(parcel.packed.chunk(parcel.parts_left)):
            jobs.append(Job(region, partial(self._scratch, parcel.index, part), self._number))
            self._number += 1
        return jobs

    def _scratch(self, index: int, part: int, slot: int, like: Tensor) -> Tensor:
        return self._reused(("scratch", index, part, slot), like.numel(), like.dtype, like.device)

    def _reused(self, key: Hashable, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.numel() != numel:  # DDP rebuilds its buckets after the first step
            memory = self._memory[key] = torch.empty(numel, dtype=dtype, device=device)
        return memory

    def _arrived(self, parcel: _Parcel, job: Job, error: BaseException | None) -> None:
        """Called by the last thread of a part's route, with its error or None; the last part completes the future."""
        with self._lock:  # the parts of a split torus arrive in different threads
            parcel.parts_left -= 1
            parcel.error = parcel.error or error
            if parcel.times is not None:
                parcel.times.phases += job.phases
            if parcel.parts_left:
                return
        if parcel.error is None:
            try:
                self._deliver(parcel)
            except Exception as unpacking:  # noqa: BLE001  # this thread ends with it: no bucket may wait for it
                self.fail(unpacking)
        elif self._claim(parcel):
            parcel.future.set_exception(parcel.error)  # type: ignore[arg-type]

    def _deliver(self, parcel: _Parcel) -> None:
        unpack(parcel.packed, parcel.buffer, factor=1 / self._scale(parcel))
        if self.scales is not None:  # after unpacking, which needs the scale that was sent
            self.scales.learn(parcel.index, parcel.buffer)
        if parcel.times is not None:
            parcel.times.done = stamp(parcel.buffer.device)
        if self._claim(parcel):
            parcel.future.set_result(parcel.buffer)

    def _claim(self, parcel: _Parcel) -> bool:
        """True once, for the caller that may complete the future; False if `fail` has already completed it."""
        with self._lock:
            if parcel.future not in self._in_flight:
                return False
            self._in_flight.remove(parcel.future)
            return True

    def _run_on_stream(self, parcel: _Parcel, algorithm: str, parameters: Sequence[Tensor]) -> None:
        # On NCCL the host only enqueues: DDP's engine waits for the future on its own stream.
        if self._streams is None:
            self._streams = Streams(parcel.buffer.device)
        with self._streams.next():
            self._pack(parcel, parameters)
            for route, job in zip(routes(algorithm, self.grid), self._jobs(parcel), strict=True):
                run_here(route, job)
            self._deliver(parcel)

    def _open_times(self, buffer: Tensor, packed: Tensor, algorithm: str, index: int) -> BucketTimes | None:
        if self.timeline is None:
            return None
        made = routes(algorithm, self.grid)
        sent = sum(sent_bytes(route, packed.nbytes / len(made)) for route in made)
        return self.timeline.ready(index, buffer.numel(), sent, buffer.device)

    def __getstate__(self) -> NoReturn:
        raise TypeError("an ExchangeState holds process groups and threads: build a new one instead of pickling it")


def _value(future: Future[Tensor]) -> Tensor:
    """Callback that returns the value. Through it, DDP's engine raises an exception that was set in Python."""
    return future.value()


def _power_of_two(value: float) -> float:
    if value <= 0 or torch.tensor(value, dtype=torch.float64).frexp().mantissa != 0.5:
        raise SettingsError(f"wire_scale {value} must be a power of two, or it would round; for example 1024")
    return value
