"""Base class of the optimizers: choice of a backend for each group, fp32 state, and loading without rounding."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.layout import same_layout
from megabatch.optim.engine.fused import Kernel, KernelMemory, uses_kernel
from megabatch.optim.engine.multi_tensor import TensorLists, flattened, parts_of_one_dtype, wide_dtype
from megabatch.optim.engine.shards import local, local_gradient, placement, shard_groups
from megabatch.optim.kernels.tables import StepGroup

Group = dict[str, Any]


class MultiTensorOptimizer(Optimizer):
    """Optimizer whose step updates all tensors together, with fp32 state regardless of the parameters' dtype.

    The keys `fused` and `foreach` of a group select one of three backends: the Triton kernel, multi-tensor operations
    on `TensorLists`, or the kernel's plain PyTorch reference, which loops over tensors. Sharded parameters (DTensor)
    are always updated in multi-tensor operations, on each rank's part. A subclass names its state tensors and its
    kernel, checks a group in `check` and updates lists of tensors in `update`.

    Attributes:
        copies: maps parameters to 16-bit tensors, into which every step writes the new weights; not in the state dict.
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
        """Raises UserError for a group with invalid values."""
        raise NotImplementedError

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Updates `tensors.weights` and the state in place, in multi-tensor operations."""
        raise NotImplementedError

    def finish(self, group: Group) -> None:
        """Updates values that a group keeps from step to step, such as a step count."""

    def kernel_options(self, group: Group) -> dict[str, Any]:
        """Arguments of the kernel besides tensors and rates."""
        return {name: group[name] for name in self.kernel.group.option_fields if name in group}

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; raises UserError for invalid values and leaves the optimizer's groups as they were."""
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler not to synchronise: the kernel itself skips a step that overflowed."""
        return all(
            group["capturable"] and (not parameters or self._uses_kernel(group, parameters))
            for group in self.param_groups
            for parameters in [_with_gradients(group)]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `.grad`; returns the closure's loss, if there is a closure.

        On a GPU it copies nothing back to the host. It applies a GradScaler's `grad_scale` and `found_inf` to groups
        that are capturable and use the kernel: if a gradient overflowed, nothing changes.
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
            launch = self._backend_of(group, parameters)
            if launch is None:
                self._step_in_lists(group, parameters)
            else:
                together.setdefault(launch, []).append((number, parameters))
        for (backend, device), members in together.items():
            self._step_in_kernel(backend, device, members)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with these differences, so that a run can move between machines and between backends:

        - State keeps its own dtype; torch would round the fp32 state of a bf16 parameter to bf16.
        - A group keeps its own `fused`, `foreach` and `capturable`, and its own value of a key that was not saved.
        - Numbers stay numbers and tensors stay tensors. Tensors of groups and of state that exist already are
          overwritten in place, because a captured CUDA graph holds their addresses.

        Raises:
            UserError: a state of torch.optim.SGD with dampening or maximize, or for another `momentum_form`.
        """
        _check_foreign(state_dict, self.param_groups)
        previous_groups = [dict(group) for group in self.param_groups]
        previous_states = {parameter: dict(state) for parameter, state in self.state.items()}
        super().load_state_dict(state_dict)
        for group, previous in zip(self.param_groups, previous_groups, strict=True):
            _restore_kinds(group, previous)
        self._load_states(state_dict, previous_states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; an optimizer made by deepcopy or pickle has no 16-bit copies."""
        super().__setstate__(state)
        self.__dict__.setdefault("copies", {})
        self.__dict__.setdefault("_memory", KernelMemory())

    def _load_states(self, state_dict: dict[str, Any], previous_states: dict[Tensor, dict[str, Tensor]]) -> None:
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                if name in self.state_names and value is not None:  # torch.optim.SGD saves None before its first step
                    target = previous_states.get(parameter, {}).get(name)
                    if target is None:
                        target = torch.empty_like(parameter, dtype=wide_dtype(parameter.dtype), requires_grad=False)
                    self.state[parameter][name] = target.copy_(value.detach())

    def _backend_of(self, group: Group, parameters: list[Tensor]) -> tuple[Backend, torch.device] | None:
        """Backend, and the device whose groups share one launch; None for multi-tensor operations."""
        if self._uses_kernel(group, parameters):
            backend: tuple[Backend, torch.device] | None = ("triton", parameters[0].device)
        else:
            one_by_one = group["foreach"] is False and not any(map(placement, parameters))
            backend = ("reference", torch.device("cpu")) if one_by_one else None
        if backend is None or not group["capturable"]:
            _refuse_loss_scale(self)
        return backend

    def _uses_kernel(self, group: Group, parameters: list[Tensor]) -> bool:
        return uses_kernel(group, parameters, self.kernel.group.rates())

    def _step_in_kernel(self, backend: Backend, device: torch.device, members: list[tuple[int, list[Tensor]]]) -> None:
        """One step of whole groups. The kernel updates values kept in tensors, such as a step count, by itself."""
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
                self._memory.forget(number, name)  # the kernel has overwritten this number's tensor

    def _kernel_group(
        self, number: int, parameters: list[Tensor], backend: Backend, device: torch.device, scales: dict[str, Tensor]
    ) -> StepGroup:
        """The kernel's arguments for one group: tensors, rates as 0-d tensors, options and 16-bit copies."""
        group, kind = self.param_groups[number], self.kernel.group
        weights, gradients, *states = self._columns(parameters, backend)
        lists: dict[str, Any] = dict(zip(kind.state_fields, states, strict=True))
        rates = {name: group[name] for name in (*kind.rates(), kind.carried) if name}
        given = lists | self._memory.values(number, rates, backend, device) | scales | self.kernel_options(group)
        copies = [self.copies.get(p) if backend == "triton" else None for p in parameters]
        return kind(weights=weights, gradients=gradients, copies=copies, **given)

    def _columns(self, parameters: list[Tensor], backend: Backend) -> list[list[Tensor]]:
        """Weights, gradients and each kind of state; flat views for the reference where the layouts agree."""
        states = [self._state_laid_out_as(p) for p in parameters]
        columns = [parameters, [_gradient(p) for p in parameters]]
        columns += [[state[name] for state in states] for name in self.state_names]
        return columns if backend == "triton" else flattened(columns)

    def _step_in_lists(self, group: Group, parameters: list[Tensor]) -> None:
        for members, dtype in parts_of_one_dtype(parameters):
            parts = [local(p) for p in members]
            weights = parts if parts[0].dtype == dtype else [p.to(dtype) for p in parts]
            self.update(group, self._lists(members, weights))
            if weights is not parts:
                torch._foreach_copy_(parts, weights)  # rounds fp32 to the parameters' dtype
            self._write_copies(members)  # now, while the weights are in a CPU's cache
        self.finish(group)

    def _write_copies(self, parameters: list[Tensor]) -> None:
        """Rounds new weights into their 16-bit copies; the Triton kernel does this in the same pass as the update."""
        copied = [p for p in parameters if p in self.copies] if self.copies else []
        if copied:
            torch._foreach_copy_([local(self.copies[p]) for p in copied], [local(p) for p in copied])

    def _lists(self, parameters: list[Tensor], weights: list[Tensor]) -> TensorLists:
        groups = shard_groups(parameters[0])
        states = [self._state_of(p) for p in parameters]
        columns = [weights, [local_gradient(p).to(weights[0].dtype) for p in parameters]]
        columns += [[local(state[name]) for state in states] for name in self.state_names]
        if weights[0].device.type == "cpu":
            columns = flattened(columns)
        named = dict(zip(self.state_names, columns[2:], strict=True))
        return TensorLists(columns[0], columns[1], named, groups)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a parameter; made as zeros if missing, moved if the parameter changed its device or dtype."""
        state: dict[str, Tensor] = self.state[parameter]
        dtype = wide_dtype(parameter.dtype)
        for name in self.state_names:
            value = state.get(name)
            if value is None:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            elif value.dtype != dtype or value.device != parameter.device:
                state[name] = value.to(parameter.device, dtype)
        return state

    def _state_laid_out_as(self, parameter: Tensor) -> dict[str, Tensor]:
        """State in the weight's memory layout, which may have changed since the state was made."""
        state = self._state_of(parameter)
        for name in self.state_names:
            if not same_layout(parameter, state[name]):
                state[name] = torch.empty_like(parameter, dtype=state[name].dtype).copy_(state[name])
        return state


def _check_foreign(state_dict: dict[str, Any], groups: list[Group]) -> None:
    """Raises UserError for a state of torch.optim.SGD that has another meaning here."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=False):
        for name in ("dampening", "maximize"):
            if saved.get(name):
                raise UserError(f"a state with {name}={saved[name]} was given, needed: {name}={type(saved[name])(0)}")
        form = group.get("momentum_form", "outside")
        if "momentum_form" not in saved and form != "outside":
            raise UserError(
                f"a state without momentum_form was given to an optimizer with momentum_form={form!r}; its buffers do "
                "not contain the learning rate, so momentum_form='outside' works"
            )


def _restore_kinds(group: Group, previous: Group) -> None:
    """Keeps the backend of a group that was loaded, fills in keys that were not saved, and keeps tensors tensors."""
    for name, value in previous.items():
        if name in {"fused", "foreach", "capturable"} or name not in group:
            group[name] = value
        elif isinstance(value, Tensor):
            group[name] = value.copy_(torch.as_tensor(group[name], dtype=value.dtype))
        elif isinstance(group[name], Tensor):
            group[name] = type(value)(group[name].item())


def _refuse_capture(group: Group) -> None:
    if not group["capturable"] and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UserError(
            "capturable=False was given, but a step inside a CUDA graph needs capturable=True and a tensor lr; "
            "capturable=True, lr=torch.tensor(0.1, device='cuda') work"
        )


def _with_gradients(group: Group) -> list[Tensor]:
    parameters = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided or p.is_complex() for p in parameters):
        raise UserError(
            "a sparse or complex gradient was given, needed: dense real gradients; for an embedding, "
            "nn.Embedding(..., sparse=False) works"
        )
    return parameters


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _refuse_loss_scale(optimizer: Optimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise UserError(
            "grad_scale or found_inf was set on an optimizer that cannot skip a step on the device; "
            "capturable=True with fused=True works, and so does setting neither attribute"
        )
