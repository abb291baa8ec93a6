"""A gradient exchange that a CUDA graph can hold, in place of DistributedDataParallel.

DistributedDataParallel rebuilds its buckets, keeps statistics and looks for parameters on the host. Here buckets, their
memory and the order of their collectives never change, so a replay does what the recorded step did.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.comm.autotune.choose import Choice
from megabatch.comm.exchange.state import ExchangeState
from megabatch.errors import SettingsError


class CapturableExchange(nn.Module):
    """Calls `module` and replaces its gradients, during backward, by their means over the ranks of `state`.

    Buckets hold the parameters in reverse order and are closed as DistributedDataParallel's: once they have reached
    their size in MiB. A bucket is sent when its gradients and all earlier buckets are complete, so that the order of
    collectives is the same on all ranks. Gradients are views of the buckets. Every parameter must receive a gradient.

    Memory: one buffer per bucket; a copy of every gradient into it.

    Raises:
        SettingsError: in backward, if a parameter has received no gradient.
    """

    def __init__(self, module: nn.Module, state: ExchangeState, choice: Choice, caps_mib: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.exchange_state, self.exchange_choice = state, choice
        self._buckets = [_Bucket(group) for group in cut_buckets(list(module.parameters()), caps_mib)]
        self._exchanges, self._is_under_way, self._sent = True, False, 0
        self._futures: list[torch.futures.Future[Tensor]] = []
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = functools.partial(self._arrived, bucket)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any) -> Any:
        """module(*inputs)."""
        self._reset()  # also after a backward that failed
        return self.module(*inputs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block gradients are accumulated and not exchanged."""
        self._exchanges = False
        try:
            yield
        finally:
            self._exchanges = True

    def _reset(self) -> None:
        self._is_under_way, self._sent, self._futures = False, 0, []
        for bucket in self._buckets:
            bucket.num_left = len(bucket.parameters)

    def _arrived(self, bucket: "_Bucket", _: Tensor) -> None:
        """Hook: backward has computed the gradient of a parameter of this bucket."""
        if not self._exchanges:
            return
        if not self._is_under_way:
            self._is_under_way = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket.num_left -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].num_left:
            self._send(self._buckets[self._sent])
            self._sent += 1

    def _send(self, bucket: "_Bucket") -> None:
        bucket.fill()
        algorithm, parameters = self.exchange_choice.cell.algorithm, bucket.parameters
        future = self.exchange_state.exchange(bucket.buffer, algorithm, index=self._sent, parameters=parameters)
        self._futures.append(future)

    def _finish(self) -> None:
        """At the end of backward: the current stream, or on a CPU the host, waits for all buckets."""
        missing = sum(bucket.num_left for bucket in self._buckets)
        futures = self._futures
        self._reset()
        if missing:
            raise SettingsError(f"{missing} parameters received no gradient, needed: all; capture=off works")
        for future in futures:
            future.wait()


class _Bucket:
    """Parameters whose gradients are sent together, and a flat buffer [n] with a view per gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.num_left = len(parameters)
        sizes = [p.numel() for p in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        # A dense view has its parameter's strides, as optimizers' kernels need.
        pairs = zip(parameters, torch.split(self.buffer, sizes), strict=True)
        self.views = [part.as_strided(p.shape, p.stride(), part.storage_offset()) for p, part in pairs]

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the gradients to the buffer and makes them views of it."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is not view:
                assert parameter.grad is not None, "it has arrived"
                view.copy_(parameter.grad)
                parameter.grad = view


def cut_buckets(parameters: Sequence[nn.Parameter], caps_mib: Sequence[float]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, last first, in groups that end once they reach their size; the last one repeats."""
    caps = itertools.chain(caps_mib, itertools.repeat(caps_mib[-1]))
    groups: list[list[nn.Parameter]] = []
    left = 0.0
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        if left <= 0 or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            left = next(caps)
        groups[-1].append(parameter)
        left -= parameter.numel() * parameter.element_size() / 2**20
    return groups
