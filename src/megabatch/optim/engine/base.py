"""What all optimizers here share: the way each group of a step goes, state in fp32, and loading without rounding."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.layout import same_layout
from megabatch.optim.engine.fused import Kernel, KernelMemory, takes_kernel
from megabatch.optim.engine.multi_tensor import TensorLists, alike, flattened, wide_dtype
from megabatch.optim.kernels.tables import StepGroup

Group = dict[str, Any]


class MultiTensorOptimizer(Optimizer):
    """An optimizer whose step works on all tensors together, with state in fp32 whatever the parameters' dtype.

    Each group goes one of three ways, by its keys `fused` and `foreach`: through a kernel on a GPU, in multi-tensor
    operations on `TensorLists`, or by the kernel's plain reference, one tensor after another. A subclass names its
    state tensors and its kernel, checks a group in `check` and updates lists in `update`.

    Attributes:
        copies: 16-bit tensors by parameter, to which every step writes the new weights too; not in the state dict.
    """

    state_names: tuple[str, ...] = ()
    kernel: Kernel

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], copies: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        self.copies = dict(copies or {})
        self._memory = KernelMemory()
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work."""
        raise NotImplementedError

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves `tensors.weights` and the state by one step, in multi-tensor operations."""
        raise NotImplementedError

    def finish(self, group: Group) -> None:
        """What a group remembers of a step."""

    def kernel_options(self, group: Group) -> dict[str, Any]:
        """What the kernel is told besides tensors and rates."""
        return {name: group[name] for name in self.kernel.group.option_fields if name in group}

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; UserError for values that cannot work."""
        super().add_param_group(param_group)
        self.check(self.param_groups[-1])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler not to wait for the device: the kernel leaves out a step that overflowed."""
        return all(
            group["capturable"] and (not parameters or self._takes_kernel(group, parameters))
            for group in self.param_groups
            for parameters in [_with_gradients(group)]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `.grad`; returns the closure's loss, if there is a closure.

        On a GPU it reads nothing back to the host. A GradScaler's `grad_scale` and `found_inf` are heeded where a group
        is capturable and goes through its kernel: if a gradient overflowed, nothing changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: dict[tuple[Backend, torch.device], list[tuple[int, list[Tensor]]]] = {}
        for number, group in enumerate(self.param_groups):
            _refuse_capture(group)
            parameters = _with_gradients(group)
            if not parameters:
                continue
            way = self._way_of(group, parameters)
            if way is None:
                self._step_in_lists(group, parameters)
            else:
                together.setdefault(way, []).append((number, parameters))
        for way, members in together.items():
            self._step_in_kernel(*way, members)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its own dtype (torch would round fp32 state of a bf16 parameter to bf16); and a
        group keeps its way (`fused`, `foreach`, `capturable`) and numbers where it has numbers, so that a run moves
        between machines. Tensors, of state and of groups, are overwritten: a captured CUDA graph goes on using them.
        """
        own = [dict(group) for group in self.param_groups]
        own_states = {parameter: dict(state) for parameter, state in self.state.items()}
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, own, strict=True):
            for name, value in before.items():
                if name in {"fused", "foreach", "capturable"}:
                    group[name] = value
                elif isinstance(value, Tensor):
                    group[name] = value.copy_(torch.as_tensor(group.get(name, value), dtype=value.dtype))
                elif isinstance(group.get(name), Tensor):
                    group[name] = type(value)(group[name].item())
        self._load_states(state_dict, own_states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; what deepcopy or pickle makes starts without 16-bit copies."""
        super().__setstate__(state)
        self.__dict__.setdefault("copies", {})
        self.__dict__.setdefault("_memory", KernelMemory())

    def _load_states(self, state_dict: dict[str, Any], own_states: dict[Tensor, dict[str, Tensor]]) -> None:
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                if name in self.state_names:
                    own = own_states.get(parameter, {}).get(name)
                    if own is None:
                        own = torch.empty_like(parameter, dtype=wide_dtype(parameter.dtype), requires_grad=False)
                    self.state[parameter][name] = own.copy_(value.detach())

    def _way_of(self, group: Group, parameters: list[Tensor]) -> tuple[Backend, torch.device] | None:
        """The kernel or its reference, and the device whose groups go together; None for multi-tensor operations."""
        if self._takes_kernel(group, parameters):
            way: tuple[Backend, torch.device] | None = ("triton", parameters[0].device)
        else:
            way = ("reference", torch.device("cpu")) if group["foreach"] is False else None
        if way is None or not group["capturable"]:
            _refuse_loss_scale(self)
        return way

    def _takes_kernel(self, group: Group, parameters: list[Tensor]) -> bool:
        return takes_kernel(group, parameters, self.kernel.group.rates())

    def _step_in_kernel(self, backend: Backend, device: torch.device, members: list[tuple[int, list[Tensor]]]) -> None:
        """One step of whole groups. What is in tensors the kernel itself carries on to the next step."""
        scales = self._memory.scales(self, device)
        groups = [self._kernel_group(number, ps, backend, device, scales) for number, ps in members]
        self.kernel.step(groups, tables=self._memory.tables(device), backend=backend)
        for number, parameters in members:
            if backend == "reference":
                self._write_copies(parameters)
            self._finish_numbers(number)

    def _finish_numbers(self, number: int) -> None:
        group, name = self.param_groups[number], self.kernel.group.carried
        before = group.get(name)
        if not isinstance(before, Tensor):
            self.finish(group)
            if group.get(name) != before:
                self._memory.forget(number, name)  # the kernel has overwritten the tensor that follows it

    def _kernel_group(
        self, number: int, parameters: list[Tensor], backend: Backend, device: torch.device, scales: dict[str, Tensor]
    ) -> StepGroup:
        group, kind = self.param_groups[number], self.kernel.group
        weights, gradients, *states = self._columns(parameters, backend)
        lists: dict[str, Any] = dict(zip(kind.state_fields, states, strict=True))
        rates = {name: group[name] for name in (*kind.rates(), kind.carried) if name}
        given = lists | self._memory.values(number, rates, backend, device) | scales | self.kernel_options(group)
        copies = [self.copies.get(p) if backend == "triton" else None for p in parameters]
        return kind(weights=weights, gradients=gradients, copies=copies, **given)

    def _columns(self, parameters: list[Tensor], backend: Backend) -> list[list[Tensor]]:
        """Weights, gradients and each kind of state; for the reference, which is no kernel, flat where alike."""
        states = [self._state_laid_out_as(p) for p in parameters]
        columns = [parameters, [_gradient(p) for p in parameters]]
        columns += [[state[name] for state in states] for name in self.state_names]
        return columns if backend == "triton" else flattened(columns)

    def _step_in_lists(self, group: Group, parameters: list[Tensor]) -> None:
        for members, dtype in alike(parameters):
            weights = members if members[0].dtype == dtype else [p.to(dtype) for p in members]
            self.update(group, self._lists(members, weights))
            if weights is not members:
                torch._foreach_copy_(members, weights)  # rounds fp32 to the parameters' dtype
            self._write_copies(members)  # while they are in a CPU's cache
        self.finish(group)

    def _write_copies(self, parameters: list[Tensor]) -> None:
        """What the kernel does in the same pass."""
        copied = [p for p in parameters if p in self.copies] if self.copies else []
        if copied:
            torch._foreach_copy_([self.copies[p] for p in copied], copied)

    def _lists(self, parameters: list[Tensor], weights: list[Tensor]) -> TensorLists:
        states = [self._state_of(p) for p in parameters]
        columns = [weights, [_gradient(p).to(weights[0].dtype) for p in parameters]]
        columns += [[state[name] for state in states] for name in self.state_names]
        if weights[0].device.type == "cpu":
            columns = flattened(columns)
        return TensorLists(columns[0], columns[1], dict(zip(self.state_names, columns[2:], strict=True)))

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = wide_dtype(parameter.dtype)
            for name in self.state_names:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _state_laid_out_as(self, parameter: Tensor) -> dict[str, Tensor]:
        """State with its elements in memory in the order of the weight's, which may have changed since."""
        state = self._state_of(parameter)
        for name in self.state_names:
            if not same_layout(parameter, state[name]):
                state[name] = torch.empty_like(parameter, dtype=state[name].dtype).copy_(state[name])
        return state


def _refuse_capture(group: Group) -> None:
    if not group["capturable"] and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UserError("a step inside a CUDA graph needs capturable=True and lr=torch.tensor(..., device='cuda')")


def _with_gradients(group: Group) -> list[Tensor]:
    parameters = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided or p.is_complex() for p in parameters):
        raise UserError("needed dense real gradients; for a sparse embedding, nn.Embedding(..., sparse=False) works")
    return parameters


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _refuse_loss_scale(optimizer: Optimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise UserError(
            "grad_scale or found_inf was set on an optimizer that cannot leave out a step on the device; "
            "capturable=True with fused=True works, or none of the two attributes"
        )
