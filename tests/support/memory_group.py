"""A process group whose ranks are threads of one process: the backend "memory" of `ranks.run_threads`.

A collective is a slot that every rank fills with its tensors. The last rank to arrive computes all results and
completes the futures of all ranks, so `async_op=True` is asynchronous and several collectives may be in flight. A
collective that a rank never joins stays pending until `Wire.abort` fails it at the test's timeout. Calls that differ
between ranks (operation or length) fail at once with an error that names both.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

ReduceOp = dist.ReduceOp
_REDUCE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
}


@dataclass
class _Slot:
    name: str
    data: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    futures: list[Future[Any]] = field(default_factory=list)


class Wire:
    """State shared by the ranks: a store, the open slots and messages, and the first failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.store = dist.HashStore()
        self.failure: str | None = None
        self.cause: BaseException | None = None
        self._lock = threading.Lock()
        self._slots: dict[Any, _Slot] = {}
        self._receives: dict[Any, list[tuple[Tensor, Future[Any]]]] = {}
        self._mail: dict[Any, list[Tensor]] = {}

    def abort(self, reason: str, cause: BaseException | None = None) -> None:
        """Records the first reason and fails all pending futures."""
        with self._lock:
            if self.failure is None:
                self.failure, self.cause = reason, cause
            waiting = [future for slot in self._slots.values() for future in slot.futures]
            waiting += [future for queue in self._receives.values() for _, future in queue]
            self._slots.clear()
            self._receives.clear()
        for future in waiting:
            future.set_exception(RuntimeError(f"aborted: {self.failure}"))

    def describe_pending(self) -> str:
        with self._lock:
            slots = [
                f"{slot.name} of group {key[0]}: ranks {sorted(slot.data)} wait" for key, slot in self._slots.items()
            ]
        return "; ".join(slots) or "no collective is pending"

    def join(
        self, key: Any, size: int, rank: int, name: str, work: Callable[[list[Any]], Any], data: Any
    ) -> Future[Any]:
        """Fills a slot; the last of `size` ranks runs `work(data of every rank)` and completes all futures."""
        future: Future[Any] = Future()
        with self._lock:
            self._raise_if_failed()
            slot = self._slots.setdefault(key, _Slot(name))
            if slot.name != name:
                raise RuntimeError(f"rank {rank} of group {key[0]} called {name}, another rank {slot.name}")
            slot.data[rank] = data
            slot.futures.append(future)
            complete = len(slot.data) == size
            # The sequence number in `key` gives the next collective of the group a slot of its own.
            if complete:
                del self._slots[key]
        if complete:
            self._finish(slot, size, work, data)
        return future

    def _finish(self, slot: _Slot, size: int, work: Callable[[list[Any]], Any], data: Any) -> None:
        try:
            with torch.no_grad():
                work([slot.data[rank] for rank in range(size)])
        except Exception as error:
            for future in slot.futures:
                future.set_exception(RuntimeError(f"{slot.name}: {error}"))
            raise
        for future in slot.futures:
            future.set_result(data)

    def send(self, key: Any, tensor: Tensor) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(None)
        with self._lock:
            self._raise_if_failed()
            # A message without a posted receive is buffered, as in a socket.
            queue = self._receives.get(key)
            if not queue:
                self._mail.setdefault(key, []).append(tensor.detach().clone())
                return done
            target, waiting = queue.pop(0)
        target.detach().copy_(tensor.detach())
        waiting.set_result(None)
        return done

    def receive(self, key: Any, tensor: Tensor) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._raise_if_failed()
            mail = self._mail.get(key)
            if not mail:
                self._receives.setdefault(key, []).append((tensor, future))
                return future
            arrived = mail.pop(0)
        tensor.detach().copy_(arrived)
        future.set_result(None)
        return future

    def _raise_if_failed(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"aborted: {self.failure}")


class MemoryGroup(dist.ProcessGroup):
    """One rank's handle of a group of threads."""

    def __init__(self, wire: Wire, key: str, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._wire, self._key, self._rank_here, self._size_here = wire, key, rank, size
        self._sequence = 0

    def size(self) -> int:
        return self._size_here

    def rank(self) -> int:
        return self._rank_here

    def getBackendName(self) -> str:
        return "memory"

    @property
    def group_name(self) -> str:
        return str(c10d._world.pg_names[self])

    pg_name = group_name

    def _join(self, name: str, work: Callable[[list[Any]], Any], data: Any) -> Any:
        key = (self._key, self._sequence)
        self._sequence += 1
        future = self._wire.join(key, self._size_here, self._rank_here, name, work, data)
        return torch._C._distributed_c10d._create_work_from_future(future)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        op = opts.reduceOp.op if opts is not None else ReduceOp.SUM
        return self._join(f"allreduce {_shape(tensors)} {op}", lambda data: _all_reduce(data, op), tensors)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Any, opts: Any) -> Any:
        op, root = opts.reduceOp.op, opts.rootRank
        return self._join(f"reduce {_shape(tensors)} to {root}", lambda data: _reduce(data, op, root), tensors)

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        root = opts.rootRank
        return self._join(f"broadcast {_shape(tensors)} from {root}", lambda data: _broadcast(data, root), tensors)

    def allgather(self, outputs: Any, inputs: Any, _opts: Any = None) -> Any:
        return self._join(f"allgather {_shape(inputs)}", _all_gather, (outputs[0], inputs[0]))

    def all_gather_single(self, output: Tensor, input_: Tensor, _opts: Any = None) -> Any:
        return self.allgather([list(output.view(-1).chunk(self._size_here))], [input_.view(-1)])

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        op = opts.reduceOp.op if opts is not None else ReduceOp.SUM
        data = (outputs[0], inputs[0])
        return self._join(f"reduce_scatter {_shape(outputs)}", lambda every: _reduce_scatter(every, op), data)

    def reduce_scatter_single(self, output: Tensor, input_: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter([output.view(-1)], [list(input_.view(-1).chunk(self._size_here))], opts)

    def all_to_all_single(
        self, output: Tensor, input_: Tensor, output_splits: Any, input_splits: Any, _opts: Any = None
    ) -> Any:
        parts = list(output.split(output_splits or len(output) // self._size_here))
        return self.alltoall(parts, list(input_.split(input_splits or len(input_) // self._size_here)))

    def alltoall(self, outputs: Any, inputs: Any, _opts: Any = None) -> Any:
        return self._join("alltoall", _all_to_all, (outputs, inputs))

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        root = opts.rootRank
        return self._join(f"gather to {root}", lambda data: _gather(data, root), (outputs, inputs))

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        root = opts.rootRank
        return self._join(f"scatter from {root}", lambda data: _scatter(data, root), (outputs, inputs))

    def barrier(self, opts: Any = None) -> Any:  # noqa: ARG002 - torch passes it by keyword
        return self._join("barrier", lambda _: None, None)

    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        key = (self._key, self._rank_here, dst, tag)
        return torch._C._distributed_c10d._create_work_from_future(self._wire.send(key, tensors[0]))

    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        key = (self._key, src, self._rank_here, tag)
        return torch._C._distributed_c10d._create_work_from_future(self._wire.receive(key, tensors[0]))

    # Names in torch 2.11 and 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def _shape(tensors: Any) -> str:
    return " ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


def _combine(tensors: list[Tensor], op: Any) -> Tensor:
    """Reduces in rank order in the tensors' own type, as a backend does."""
    total = tensors[0].detach().clone()
    for tensor in tensors[1:]:
        total = _REDUCE[op](total, tensor.detach())
    return total / len(tensors) if op == ReduceOp.AVG else total


def _all_reduce(data: list[Any], op: Any) -> None:
    for tensors in zip(*data, strict=True):
        total = _combine(list(tensors), op)
        for tensor in tensors:
            tensor.detach().copy_(total)


def _reduce(data: list[Any], op: Any, root: int) -> None:
    for tensors in zip(*data, strict=True):
        tensors[root].detach().copy_(_combine(list(tensors), op))


def _broadcast(data: list[Any], root: int) -> None:
    for tensors in zip(*data, strict=True):
        for tensor in tensors:
            tensor.detach().copy_(tensors[root].detach())


def _all_gather(data: list[Any]) -> None:
    for outputs, _ in data:
        for output, (_, source) in zip(outputs, data, strict=True):
            output.detach().copy_(source.detach().view_as(output))


def _reduce_scatter(data: list[Any], op: Any) -> None:
    for rank, (output, _) in enumerate(data):
        output.detach().copy_(_combine([inputs[rank] for _, inputs in data], op))


def _all_to_all(data: list[Any]) -> None:
    for rank, (outputs, _) in enumerate(data):
        for output, (_, inputs) in zip(outputs, data, strict=True):
            output.detach().copy_(inputs[rank].detach())


def _gather(data: list[Any], root: int) -> None:
    for output, (_, inputs) in zip(data[root][0][0], data, strict=True):
        output.detach().copy_(inputs[0].detach())


def _scatter(data: list[Any], root: int) -> None:
    for (outputs, _), source in zip(data, data[root][1][0], strict=True):
        outputs[0].detach().copy_(source.detach())


def _create(options: Any, _backend_options: Any) -> MemoryGroup:
    wire = c10d._world.wire
    key = f"{options.group_id}{list(options.global_ranks_in_group)}"
    return MemoryGroup(wire, key, options.group_rank, options.group_size)


Backend = dist.Backend
if "MEMORY" not in Backend._plugins:
    Backend.register_backend("memory", _create, extended_api=True, devices=["cpu", "cuda"])


class Worlds:
    """Replacement of torch's registry of process groups: each rank's threads see their own registry."""

    def _mine(self) -> SimpleNamespace:
        world = getattr(threading.current_thread(), "rank_world", None)
        if world is None:
            raise RuntimeError("this thread belongs to no rank; start it from run_threads or from a rank's thread")
        return world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mine(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._mine(), name, value)

    @contextlib.contextmanager
    def enter(self, wire: Wire) -> Iterator[None]:
        """Makes the current thread, and the threads that it starts, a rank of `wire`."""
        tables = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "tags_to_pg", "pg_to_tag")
        empty: dict[str, Any] = {name: {} for name in (*tables, "pg_coalesce_state")}
        thread = threading.current_thread()
        thread.rank_world = SimpleNamespace(default_pg=None, group_count=0, comms=[], wire=wire, **empty)
        try:
            yield
        finally:
            del thread.rank_world


@contextlib.contextmanager
def install_worlds() -> Iterator[Worlds]:
    """Gives every rank's threads their own registry within the context; restores torch's registry afterwards."""
    before = c10d._world, threading.Thread.start, sys.excepthook
    worlds = c10d._world = Worlds()
    threading.Thread.start = _start_within_rank
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    try:
        yield worlds
    finally:
        isolate(False)
        c10d._world, threading.Thread.start, sys.excepthook = before


def _start_within_rank(thread: threading.Thread, _start: Any = threading.Thread.start) -> None:
    world = getattr(threading.current_thread(), "rank_world", None)
    if world is not None:
        thread.rank_world = world
    _start(thread)
