"""A step as one CUDA graph: what the device does is recorded once and started as a whole ever after.

    step = CapturedStep(train_step)                 # train_step(images, labels) -> loss
    for images, labels in batches:
        loss = step(images, labels)

A launch from Python takes some 5 us and ResNet-50 makes 1,500 of them a step: below a batch of 128 that, and not the
GPU, is what a step takes. What a graph replays is the device's work alone, with the addresses it was recorded with:
rates must be tensors, nothing may be read back inside, and Python's own side effects happen at the recording only.
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
    """What records work of a device, for replay."""

    def run(self, work: Callable[[], T]) -> T:
        """Does `work` as it would be done while it is recorded, and records nothing."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """What `work` returns, and a function that does its device part, into the same tensors each time.

        Recording itself leaves every tensor's values as they were: a replay comes first.
        """
        ...


class CudaRecorder:
    """CUDA graphs with one memory pool, recorded on one stream of their own.

    Graphs of one pool may use the same memory, so only the latest replay's results hold. A pool ends with the last of
    its graphs: torch refuses it to later ones. Other threads (loaders) go on using the device meanwhile.
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
    """After a capture that failed: torch 2.11 would believe it under way for ever, and free no batch of a loader."""
    with contextlib.suppress(RuntimeError):  # it had been ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@dataclass
class _Signature:
    """What is known of calls of one kind."""

    calls: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    result: Any = None
    replay: Replay | None = None

    def forget(self) -> None:
        """Gives the graph and its memory up."""
        self.inputs, self.result, self.replay = [], None, None


class CapturedStep:
    """Calls `function` as it is at first, and from then on replays what it did on the device.

    Calls of one kind have inputs of the same shapes, types and layouts, and the same constants. The first `warmup`
    calls of a kind are ordinary ones (libraries choose their algorithms, optimizers make their state), the next
    is recorded; so a batch or resolution that changes is recorded anew, and one that comes once, such as a run's last
    short batch, never is. Inputs are copied to tensors of the graph's own before a replay. A graph keeps the memory of
    a whole step, and an ordinary call needs as much: before one all graphs are given up, and recorded again later.

    Args:
        function: of tensors, and of hashable keyword constants, which are recorded as they are. It must not read
            values back to the host. What it returns is returned by each call, tensors and all; a tensor in it is
            overwritten by the next call.
        max_graphs: kept at a time; the one not used for longest goes first.
        recorder: None for `CudaRecorder`.
        on_failure: told of an error while recording, after which all calls are ordinary ones; None: it is raised.
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
        """Recorded kinds of calls that are kept."""
        return sum(known.replay is not None for known in self._known.values())

    def __call__(self, *inputs: Tensor, **constants: Hashable) -> Any:
        key = (tuple(map(_kind, inputs)), tuple(sorted(constants.items())))
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
        for own, given in zip(known.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)

    def _forget_oldest(self) -> None:
        recorded = [key for key, known in self._known.items() if known.replay is not None]
        for key in recorded[: max(0, len(recorded) - self._max_graphs + 1)]:
            del self._known[key]


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device
