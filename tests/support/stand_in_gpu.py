"""A GPU of CPU tensors: what a GPU would refuse or get wrong is refused here, and what it computes is computed.

    with StandInGpu() as gpu:
        ...                       # anything that a script does with device "cuda:0"

A tensor on it says that it is on `cuda:0`, and holds its values in an ordinary tensor. Refused are operations on both
devices, and while a graph is captured what CUDA forbids: reading a value, waiting, copies from or to pageable memory,
new pinned memory. A captured graph replays the operations themselves, on the tensors they were recorded with; recording
changes no value. Streams and events keep clocks: an operation that reads or overwrites what another stream may not have
finished is refused, and so is memory that is freed while another stream may still use it.

Not played: a device's own rounding, autograd's thread of its own, and Triton's compiler (launches go to `launch`).
"""

import contextlib
import dataclasses
import functools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
from stand_in_device import CPU, CUDA, Device, Event, Graph, OnGpu, RefusedError, Stream
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class StandInGpu(Device, TorchFunctionMode):
    """While it is entered, torch has one GPU. `launch(kernel, args, options)` is called for each launch by Triton."""

    def __init__(self, *, launch=None, elapsed_ms=lambda: 1.0):
        TorchFunctionMode.__init__(self)
        Device.__init__(self, elapsed_ms)
        self.launch = launch or (lambda *_: None)
        self.slept = lambda: None
        self.num_streams = self.num_pools = 0
        self.pools, self.used_pools = {}, set()
        self.patches = contextlib.ExitStack()

    def started(self, kernel, args, options, run):
        """One launch by Triton, done by `run`, or to be done by each replay."""
        tensors = [x.base if hasattr(x, "base") else x for x in (*args, *options.values())]
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        strange = [x for x in tensors if not isinstance(x, OnGpu)]
        if strange:
            raise RefusedError(f"{kernel} is given a tensor of the host")
        self.launch(kernel, args, options)
        for tensor in tensors:
            self.use(tensor.memory, self.stream(), writes=False)
            tensor.memory.written = (self.stream(), self.stream().clock[self.stream()])
        if self.capturing():
            self.capture.tensors += tensors
            self.capture.work.append(run)
        else:
            run()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}:
            return self._to(name, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return not isinstance(args[0], OnGpu) and self.is_pinned(args[0])
        if func in {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item} and not isinstance(args[0], OnGpu):
            self._is_there(args[0])
        pins, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if name == "new_tensor" and device is None:
            device = args[0].device
        if device is None:
            out = func(*args, **kwargs)
            return self._pin(out) if pins else out
        on_gpu, kwargs["device"] = torch.device(device).type == "cuda", CPU
        if on_gpu and name in {"tensor", "as_tensor", "new_tensor"} and self.capturing():
            raise RefusedError(f"torch.{name} copies from pageable memory while a graph is captured")
        args = tree_map_only(OnGpu, lambda x: x.inner, args)
        out = func(*args, **kwargs)
        out = self._pin(out) if pins else out
        if not on_gpu:
            return out
        if func is torch.empty:
            out.zero_()
        wrapped = self.wrap(out.detach())
        if self.capturing() and func is not torch.empty:
            self.capture.work.append(functools.partial(_refill, out, func, args, kwargs))
        return wrapped.requires_grad_(out.requires_grad)

    def _to(self, name, args, kwargs):
        tensor, *rest = args
        copy = kwargs.pop("copy", False)
        if rest and isinstance(rest[0], torch.Tensor):
            rest[:1] = [rest[0].device, rest[0].dtype]
        device, dtype, late, layout = torch._C._nn._parse_to(*rest, **kwargs) if name == "to" else _to_device(name)
        here = CUDA if isinstance(tensor, OnGpu) else CPU
        options = {"dtype": dtype or tensor.dtype, "memory_format": layout or torch.preserve_format}
        if device is None or device.type == here.type:
            return torch.Tensor.to(tensor, copy=copy, **options)
        if here is CUDA:
            return torch.Tensor.to(self.read(tensor.detach()), copy=True, **options)
        pinned = self.is_pinned(tensor)
        if self.capturing() and not pinned and tensor.ndim:
            raise RefusedError("copies from pageable memory while a graph is captured")
        moved = self.wrap(torch.Tensor.to(tensor.detach(), copy=True, **options))
        if not (pinned and late):
            self._wait_for_copy()
        return moved.requires_grad_(tensor.requires_grad)

    def _pin(self, tensor):
        if self.capturing():
            raise RefusedError("allocates pinned memory while a graph is captured")
        self.pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def _is_there(self, tensor):
        if tensor.untyped_storage()._cdata in self.pending:
            stream, time = self.pending[tensor.untyped_storage()._cdata]
            if not self.host.knows(stream, time):
                raise RefusedError(f"the host reads what {stream} may not have copied yet")

    def __enter__(self):
        self.patches.__enter__()
        for name, value in self._names().items():
            self.patches.enter_context(mock.patch.object(torch.cuda, name, value))
        self.patches.enter_context(mock.patch.object(torch.autocast, "__init__", _on_cpu(torch.autocast.__init__)))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            self.patches.enter_context(mock.patch.object(torch, name, _first_on_cpu(getattr(torch, name))))
        self.patches.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        for place, name in _launchers():
            own = functools.partialmethod(_launched, self, getattr(place, name))
            self.patches.enter_context(mock.patch.object(place, name, own))
        submit = ThreadPoolExecutor.submit
        self.patches.enter_context(
            mock.patch.object(
                ThreadPoolExecutor, "submit", lambda own, work, *args: submit(own, self.in_thread, work, *args)
            )
        )
        if torch.__future__.get_overwrite_module_params_on_conversion() is False:
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            self.patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.__exit__(*error)
        if error[0] is None and self.faults:
            raise RefusedError("; ".join(sorted(set(self.faults))))

    def in_thread(self, work, *args):
        """Work of another thread, which has the same GPU."""
        with self.same():
            return work(*args)

    @contextlib.contextmanager
    def same(self):
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _names(self):
        memory = {"max_memory_reserved": 0, "memory_reserved": 0, "memory_allocated": 0, "current_device": 0}
        answers = {name: (lambda *_, value=value: value) for name, value in memory.items()}
        return answers | {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "is_bf16_supported": lambda **_: True,
            "get_device_name": lambda *_: "stand-in",
            "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=2),
            "mem_get_info": lambda *_: (1 << 30, 1 << 30),
            "_sleep": lambda _: self.slept(),
            "reset_peak_memory_stats": lambda *_: None,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "empty_cache": lambda: self.waits("the device"),
            "synchronize": lambda *_: self._synchronize(),
            "is_current_stream_capturing": self.capturing,
            "current_stream": lambda *_: self.stream(),
            "set_stream": self._set_stream,
            "stream": self._on_stream,
            "device": lambda *_: contextlib.nullcontext(),
            "Stream": lambda *_: self._new_stream(),
            "Event": lambda **_: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "graph": self._graph,
            "graph_pool_handle": self._new_pool,
        }

    def _synchronize(self):
        self.waits("the device")
        if self.capture is not None:
            raise RefusedError("waits for the device while a graph is captured, from another thread")

    def _new_stream(self):
        self.num_streams += 1
        return Stream(self, f"stream {self.num_streams}")

    def _new_pool(self):
        self.num_pools += 1
        return (0, self.num_pools)

    def _set_stream(self, stream):
        self.local.stream = stream

    @contextlib.contextmanager
    def _on_stream(self, stream):
        before, self.local.stream = self.stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    @contextlib.contextmanager
    def _graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert self.capture is None, "one capture at a time"
        self._synchronize()
        graphs = self.pools.setdefault(pool, weakref.WeakSet())
        if pool in self.used_pools and not graphs:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the last graph of this pool is gone")
        graphs.add(graph)
        self.used_pools.add(pool)
        stream = stream or self._new_stream()
        stream.learn(self.host.clock | self.stream().clock)
        with self._on_stream(stream):
            graph.stream, graph.thread = stream, None if capture_error_mode == "global" else threading.get_ident()
            graph.streams.add(stream)
            self.capture = graph
            try:
                yield
                if graph.unjoined:
                    raise RefusedError(f"{graph.stream} ends a capture before {graph.unjoined} have joined it")
            finally:
                self.capture = None
                with torch.no_grad():
                    for now, before in reversed(graph.before):
                        now.copy_(before)


def _launchers():
    """Where Triton launches a kernel: one it would compile, or one that it interprets."""
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter, jit

        yield jit.JITFunction, "run"
        yield interpreter.InterpretedFunction, "run"


def _launched(kernel, gpu, run, *args, grid, warmup=False, **options):
    from triton.runtime.interpreter import InterpretedFunction

    def work():
        if isinstance(kernel, InterpretedFunction):
            named = {name: _inner(value) for name, value in options.items()}
            with torch._C.DisableTorchFunction():
                run(kernel, *map(_inner, args), grid=grid, warmup=warmup, **named)

    gpu.started(kernel.__name__, args, options | {"grid": grid}, work)


def _inner(argument):
    if isinstance(argument, OnGpu):
        return argument.inner
    if hasattr(argument, "base"):
        return dataclasses.replace(argument, base=argument.base.inner)
    return argument


def _on_cpu(init):
    def on_cpu(self, device_type, *args, **kwargs):
        init(self, "cpu", *args, **kwargs)

    return on_cpu


def _first_on_cpu(function):
    return lambda *_: function("cpu")


def _to_device(name):
    return torch.device(name), None, False, None


def _refill(out, func, args, kwargs):
    out.copy_(func(*args, **kwargs))
