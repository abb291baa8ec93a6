"""A training step as one CUDA graph: recorded once, then replayed with a single launch.

    step = CapturedStep(train_step)                 # train_step(images, labels) -> loss
    for images, labels in batches:
        loss = step(images, labels)

A kernel launch from Python takes about 5 us and a ResNet-50 step has 1,500 of them, so below a batch of 128 launches,
not the GPU, determine the step time. A replay repeats the device work only, on the recorded addresses: rates must be
tensors, the function must not read values back to the host, and Python side effects happen during recording only.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megabatch.cores import DEVICE_WAITS
from megabatch.errors import UserError

T = TypeVar("T")
Replay = Callable[[], None]


class Recorder(Protocol):
    """Records device work for replay."""

    def run(self, work: Callable[[], T]) -> T:
        """Runs `work` under the conditions of a recording, without recording it."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Returns the result of `work` and a function that replays its device work into the same tensors.

        Recording does not execute the work, so the result holds values only after the first replay.
        """
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool, recorded on a separate stream.

    Graphs of a pool may share memory, so only the results of the latest replay are valid. A pool is gone once its last
    graph is deleted; torch then refuses it to new graphs. Other threads (loaders) keep using the device meanwhile.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # of that pool

    def run(self, work: Callable[[], T]) -> T:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with DEVICE_WAITS, torch.cuda.graph(graph, **options):
                result = work()
        except BaseException:
            torch.cuda.set_stream(before)
            _end_recording(self._pool)
            raise
        self._graphs.add(graph)
        return result, graph.replay


def _end_recording(pool: Any) -> None:
    """Ends a failed capture: otherwise torch 2.11 treats it as active for ever and frees no memory of a loader."""
    with contextlib.suppress(RuntimeError):  # already ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@dataclass
class _Signature:
    """State of calls with one signature: shapes, dtypes and layouts of the inputs, and the constants."""

    calls: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    result: Any = None
    replay: Replay | None = None

    def forget(self) -> None:
        """Releases the graph and its memory."""
        self.inputs, self.result, self.replay = [], None, None


class CapturedStep:
    """Calls `function` a few times, then replays its device work as a CUDA graph.

    Calls with equal shapes, dtypes, layouts and constants share a graph. The first `warmup` calls of a signature run
    uncaptured (libraries choose algorithms, optimizers create their state), the next call is recorded. So a new batch
    size or resolution is recorded anew, and one that occurs once, such as a run's last short batch, is never recorded.
    Inputs are copied into the graph's own tensors before each replay. A graph holds the memory of a whole step and an
    uncaptured call needs as much again: all graphs are released before one, and recorded again later.

    Args:
        function: called with tensors and hashable keyword constants. It must not read values back to the host. Each
            call returns the recorded result; its tensors are overwritten by the next call.
        warmup: uncaptured calls per signature.
        max_graphs: number of graphs kept; the least recently used is released first.
        recorder: records and replays; None: `CudaRecorder`.
        on_failure: receives an error raised while recording, after which all calls run uncaptured; None: it is raised.

    Raises:
        RuntimeError, UserError: recording failed and `on_failure` is None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        warmup: int = 3,
        max_graphs: int = 8,
        recorder: Recorder | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self._function = function
        self._warmup = warmup
        self._max_graphs = max_graphs
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._on_failure = on_failure
        self._failed = False
        self._known: OrderedDict[Hashable, _Signature] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        """Number of graphs held at present."""
        return sum(known.replay is not None for known in self._known.values())

    def __call__(self, *inputs: Tensor, **constants: Hashable) -> Any:
        key = (tuple(map(_layout, inputs)), tuple(sorted(constants.items())))
        known = self._known.setdefault(key, _Signature())
        self._known.move_to_end(key)
        known.calls += 1
        if known.calls <= self._warmup or self._failed:
            return self._run(inputs, constants)
        if known.replay is None and not self._record(known, inputs, constants):
            return self._run(inputs, constants)
        assert known.replay is not None
        self._fill(known, inputs)
        known.replay()
        return known.result

    def _run(self, inputs: tuple[Tensor, ...], constants: dict[str, Hashable]) -> Any:
        for known in self._known.values():
            known.forget()
        return self._recorder.run(lambda: self._function(*inputs, **constants))

    def _record(self, known: _Signature, inputs: tuple[Tensor, ...], constants: dict[str, Hashable]) -> bool:
        self._forget_oldest()
        known.inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._fill(known, inputs)
        try:
            known.result, known.replay = self._recorder.record(lambda: self._function(*known.inputs, **constants))
        except (RuntimeError, UserError) as error:  # of CUDA or Triton; of an optimizer's tables
            if self._on_failure is None:
                raise
            self._failed = True
            self._on_failure(error)
        return not self._failed

    def _fill(self, known: _Signature, inputs: tuple[Tensor, ...]) -> None:
        for recorded, given in zip(known.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)

    def _forget_oldest(self) -> None:
        recorded = [key for key, known in self._known.items() if known.replay is not None]
        for key in recorded[: max(0, len(recorded) - self._max_graphs + 1)]:
            del self._known[key]


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


class Readback:
    """A few scalars: available at once on a CPU, copied asynchronously on a GPU."""

    def __init__(self, values: Tensor) -> None:
        """`values` (n,): may be overwritten by the device's later work."""
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_asynchronous(self) -> bool:
        """True if `read` may wait for the device."""
        return self._event is not None

    def read(self) -> list[float]:
        """Returns the values, once the device has computed them."""
        return [float(value) for value in self.read_exactly()]

    def read_exactly(self) -> list[Any]:
        """As `read`, in the tensor's shape and with whole numbers of an integer tensor."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._host.tolist()
        return values
