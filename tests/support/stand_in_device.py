"""Tensors, streams, events and graphs of a GPU that is not there; `stand_in_gpu` makes torch use it."""

import threading

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
_aten = torch.ops.aten
_OF_SEVERAL_DEVICES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}
_EMPTY = {_aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.is_pinned.default, _aten.equal.default}


class RefusedError(AssertionError):
    """What the device would not do, or would do wrongly."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU, around one that is not."""

    @staticmethod
    def __new__(cls, inner, memory, gpu):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )

    def __init__(self, inner, memory, gpu):
        self.inner, self.memory, self.gpu = inner, memory, gpu

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.gpu.read(self).tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, stream):
        self.memory.recorded.add(stream)

    def __repr__(self):
        return f"OnGpu({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = tensors_of((args, kwargs or {}))
        gpu = next(x.gpu for x in tensors if isinstance(x, OnGpu))
        return gpu.run(func, tensors, args, kwargs or {})


class Memory:
    """One allocation: whose it is, who wrote and read it last, and when."""

    def __init__(self, gpu):
        self.gpu, self.owner = gpu, gpu.stream()
        self.used, self.recorded, self.captured = {}, set(), gpu.capturing()
        self.written = None

    def __del__(self):
        """Its place is free for what its owner does next, when the streams that it was recorded for come past here."""
        if not self.captured:
            left = {
                other: time
                for other, time in self.used.items()
                if other is not self.owner and not any(known.knows(other, time) for known in self.recorded)
            }
            self.owner.freed.append(left)


class Stream:
    """An order of work, and what it knows to be done on others."""

    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name
        self.clock = {self: 0}
        self.device, self.freed = CUDA, []

    def reuse(self):
        """What was freed here may be overwritten by the next work here."""
        while self.freed:
            for other, time in self.freed.pop().items():
                if not self.knows(other, time):
                    self.gpu.faults.append(f"{self} may be given memory that {other} still uses")

    def knows(self, stream, time):
        """Whether that is done when this gets to its next work, which the host starts after all that it knows."""
        return max(self.clock.get(stream, 0), self.gpu.host.clock.get(stream, 0)) >= time

    def learn(self, clock):
        for stream, time in clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def wait_event(self, event):
        self.learn(event.clock)
        if event.capture is not None and event.capture is self.gpu.capture:  # this stream joins the capture
            event.capture.streams.add(self)
            event.capture.unjoined |= {self}
            event.capture.unjoined -= {event.stream, event.capture.stream}

    def record_event(self, event=None):
        event = event or Event(self.gpu)
        event.record(self)
        return event

    def synchronize(self):
        self.gpu.waits("a stream")
        self.gpu.host.learn(self.clock)

    def __repr__(self):
        return self.name


class Event:
    """A place in a stream's work."""

    def __init__(self, gpu):
        self.gpu, self.clock, self.stream, self.capture = gpu, {}, None, None

    def record(self, stream=None):
        self.stream = stream or self.gpu.stream()
        self.clock = dict(self.stream.clock)
        capture = self.gpu.capture
        self.capture = capture if capture is not None and self.stream in capture.streams else None

    def synchronize(self):
        self.gpu.waits("an event")
        self.gpu.host.learn(self.clock)

    def query(self):
        self.gpu.waits("an event")
        return True

    def elapsed_time(self, _):
        return self.gpu.elapsed_ms()


class Graph:
    """The operations of a capture."""

    def __init__(self, gpu):
        self.gpu, self.work, self.before, self.own = gpu, [], [], set()
        self.tensors, self.streams, self.unjoined = [], set(), set()

    def replay(self):
        stream = self.gpu.stream()
        for memory in {tensor.memory for tensor in self.tensors}:
            self.gpu.use(memory, stream, writes=memory in self.own)
        with torch.no_grad():
            for repeat in self.work:
                repeat()


class Device:
    """What operations do on it."""

    def __init__(self, elapsed_ms):
        self.elapsed_ms = elapsed_ms
        self.faults = []
        self.waited = []  # by the main thread or another, and for what
        self.capture = None
        self.host = Stream(self, "the host")
        self.default = Stream(self, "the default stream")
        self.local = threading.local()
        self.pinned, self.pending = {}, {}
        self.collectives = []  # name, bytes, and whether it was recorded instead of run

    def stream(self):
        return getattr(self.local, "stream", self.default)

    def capturing(self):
        return self.capture is not None and self.stream() in self.capture.streams

    def waits(self, what):
        """The host waits for the device."""
        self.waited.append((threading.current_thread() is threading.main_thread(), what))
        if self.capture is not None and (self.capture.thread in {None, threading.get_ident()}):
            raise RefusedError(f"waits for {what} while a graph is captured")

    def read(self, tensor):
        self.waits("a value")
        self.use(tensor.memory, self.stream(), writes=False)
        self.host.learn(self.stream().clock)
        return tensor.inner

    def use(self, memory, stream, *, writes):
        """Notes that `stream` uses memory now; refuses what is not in order. What is captured is used by a replay."""
        if self.capturing():
            self.capture.unjoined |= {stream} - {self.capture.stream}
            return
        stream.clock[stream] += 1
        if memory.written is not None and not stream.knows(*memory.written):
            raise RefusedError(f"{stream} uses what {memory.written[0]} may not have written yet")
        if writes:
            late = [other for other, time in memory.used.items() if not stream.knows(other, time)]
            if late:
                raise RefusedError(f"{stream} overwrites what {late[0]} may not have read yet")
            memory.written = (stream, stream.clock[stream])
        memory.used[stream] = stream.clock[stream]

    def run(self, func, tensors, args, kwargs):
        """One operation of torch on tensors of which one at least is on the GPU."""
        if func.namespace == "c10d":
            return self._collective(func, tensors, args, kwargs)
        others = [x for x in tensors if not isinstance(x, OnGpu)]
        crosses = func in _OF_SEVERAL_DEVICES and others
        indexed = func.overloadpacket in _INDEXED
        if any(x.ndim for x in others) and not (crosses or indexed):
            raise RefusedError(f"{func} of tensors on both devices")
        reads = func in _READS or (indexed and _reads_index(args[1]))
        if reads:
            self.waits("a value")
        mine = [x for x in tensors if isinstance(x, OnGpu)]
        written = {id(x) for x in _written(func, args, kwargs)}
        for tensor in mine:
            self.use(tensor.memory, self.stream(), writes=id(tensor) in written)
        if crosses:
            self._cross(func, args)
        if reads:
            self.host.learn(self.stream().clock)
        if self.capturing():
            self._before_a_write([x for x in mine if id(x) in written])
        inner_args, inner_kwargs = tree_map_only(OnGpu, lambda x: x.inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if func.overloadpacket in _EMPTY:
            out.zero_()  # what a kernel would write and is not run
        elif self.capturing():
            self.capture.tensors += mine
            self.capture.work.append(_again(func, inner_args, inner_kwargs, out))
        if crosses and not isinstance(args[0], OnGpu):
            return args[0]
        wrapped = tree_map_only(torch.Tensor, lambda x: self.wrap(x, mine), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def wrap(self, inner, sources=()):
        """`inner` on the GPU, in the memory of the source that it is a view of, or in its own."""
        place = inner.untyped_storage()._cdata
        for source in sources:
            if source.inner.untyped_storage()._cdata == place:
                return OnGpu(inner, source.memory, self)
        memory = Memory(self)
        if not self.capturing():
            self.stream().reuse()
        else:
            self.capture.own.add(memory)
        self.use(memory, self.stream(), writes=True)
        return OnGpu(inner, memory, self)

    def _collective(self, func, tensors, args, kwargs):
        """One collective, by the process group's own backend on the tensors of the host; again at each replay."""
        for tensor in tensors:
            self.use(tensor.memory, self.stream(), writes=True)
        inner_args, inner_kwargs = tree_map_only(OnGpu, lambda x: x.inner, (args, kwargs))
        name, size = func.overloadpacket.__name__, sum(x.inner.nbytes for x in tensors)

        def run():
            self.collectives.append((name, size, self.capturing()))
            *_, work = func(*inner_args, **inner_kwargs)
            work.wait()
            return work

        if self.capturing():  # runs now, too: the ranks record at the same time, and recording changes no value
            self._before_a_write(tensors)
            self.capture.tensors += tensors
            self.capture.work.append(run)
        return args[0], run()

    def _before_a_write(self, tensors):
        """Keeps the values of tensors from outside the graph, which recording leaves as they are."""
        for tensor in tensors:
            if tensor.memory not in self.capture.own:
                flat = torch.tensor([], dtype=tensor.dtype).set_(tensor.inner.untyped_storage())
                self.capture.before.append((flat, flat.clone()))

    def _cross(self, func, args):
        """A copy between the devices."""
        if func is not _aten.copy_.default:
            return
        target, source, *flags = args
        host = source if isinstance(target, OnGpu) else target
        pinned, late = self.is_pinned(host), bool(flags and flags[0])
        if self.capturing() and not pinned and host.ndim:
            raise RefusedError("copies from or to pageable memory while a graph is captured")
        if not (pinned and late):
            self._wait_for_copy()
        elif host is target:
            self.pending[host.untyped_storage()._cdata] = (self.stream(), self.stream().clock[self.stream()])

    def _wait_for_copy(self):
        self.waits("a copy")
        self.host.learn(self.stream().clock)

    def is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self.pinned


def _reads_index(index):
    """Whether the host must know what it says, or it comes from the host."""
    given = [x for x in index if x is not None]
    return any(x.dtype == torch.bool or not isinstance(x, OnGpu) for x in given)


def _written(func, args, kwargs):
    """The tensors that an operation overwrites."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_of(value)
    return found


def _again(func, args, kwargs, out):
    """The operation once more, into what it gave the first time."""
    results = tensors_of(out)

    def repeat():
        for old, new in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
            if new.data_ptr() != old.data_ptr():
                old.copy_(new)

    return repeat


def tensors_of(values):
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
