"""Lists of tensors on which one operation works at once, and the optimizer class that keeps them.

torch's multi-tensor operations (`torch._foreach_*`) spare a GPU thousands of launches. On a CPU they read all tensors
from memory again for each operation, so there the lists are cut into parts that stay in cache from one operation
to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megabatch.errors import UserError

Number = float | Tensor
"""A rate or factor: a float, or a 0-d tensor that may change between replays of a CUDA graph."""

Group = dict[str, Any]

PART_ELEMENTS = 2**18
"""On a CPU, tensors of up to 1 MiB of fp32 go through a whole step, norms and update, before the next ones. Chosen by
timing ResNet-50's tensors on two EPYC cores, where four times more or less made little difference."""


@dataclass(frozen=True)
class TensorLists:
    """Tensors of one parameter group on one device, index by index, all in `wide_dtype`.

    On a CPU they are flat views where weight, gradient and state lie in memory alike, as they do as a rule.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    states: dict[str, list[Tensor]]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which norms, state and the update are computed: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class MultiTensorOptimizer(Optimizer):
    """An optimizer whose step works on `TensorLists`, with state in fp32 whatever the parameters' dtype.

    A subclass names its state tensors in `state_names`, checks a group in `check` and updates lists in `update`.
    """

    state_names: tuple[str, ...] = ()

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work."""
        raise NotImplementedError

    def update(self, group: Group, tensors: TensorLists) -> None:
        """Moves `tensors.weights` and the state by one step."""
        raise NotImplementedError

    def finish(self, group: Group) -> None:
        """What a group remembers of a step."""

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; UserError for values that cannot work."""
        super().add_param_group(param_group)
        self.check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `.grad`; returns the closure's loss, if there is a closure.

        Reads nothing back to the host.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _refuse_capture(group)
            for parameters, dtype in _alike(_with_gradients(group)):
                weights = parameters if parameters[0].dtype == dtype else [p.to(dtype) for p in parameters]
                self.update(group, self._lists(parameters, weights))
                if weights is not parameters:
                    torch._foreach_copy_(parameters, weights)  # rounds fp32 to the parameters' dtype
            self.finish(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its own dtype (torch would round fp32 state of a bf16 parameter to bf16), and a
        group's tensors, such as the rate, are overwritten in place: a captured CUDA graph goes on reading them.
        """
        own_tensors = [_tensor_values(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, values in zip(self.param_groups, own_tensors, strict=True):
            for name, tensor in values.items():
                group[name] = tensor.copy_(torch.as_tensor(group.get(name, tensor)))
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                if name in self.state_names:
                    own = torch.empty_like(parameter, dtype=wide_dtype(parameter.dtype), requires_grad=False)
                    self.state[parameter][name] = own.copy_(value.detach())

    def _lists(self, parameters: list[Tensor], weights: list[Tensor]) -> TensorLists:
        dtype = weights[0].dtype
        states = [self._state_of(p, dtype) for p in parameters]
        columns = [weights, [_gradient(p, dtype) for p in parameters]]
        columns += [[state[name] for state in states] for name in self.state_names]
        if weights[0].device.type == "cpu":
            columns = _flattened(columns)
        return TensorLists(columns[0], columns[1], dict(zip(self.state_names, columns[2:], strict=True)))

    def _state_of(self, parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            for name in self.state_names:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state


def _alike(parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], torch.dtype]]:
    """Lists of parameters of one device and dtype, with the wide dtype; on a CPU no longer than stays in cache."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for (device, dtype), alike in lists.items():
        for part in _parts(alike) if device.type == "cpu" else [alike]:
            yield part, wide_dtype(dtype)


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Whole tensors, in order, of at most `PART_ELEMENTS` elements together, or one larger tensor alone."""
    part: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if part and filled + tensor.numel() > PART_ELEMENTS:
            yield part
            part, filled = [], 0
        part.append(tensor)
        filled += tensor.numel()
    if part:
        yield part


def is_flat(tensor: Tensor) -> bool:
    """One dimension, no gaps."""
    return tensor.ndim == 1 and tensor.is_contiguous()


def add_scaled_(targets: list[Tensor], others: list[Tensor], scale: Number | list[Tensor]) -> None:
    """target += scale * other, with one scale for all or one 0-d tensor for each."""
    if isinstance(scale, list):
        torch._foreach_addcmul_(targets, others, scale)
    elif isinstance(scale, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(others, scale))
    else:
        torch._foreach_add_(targets, others, alpha=scale)


def scaled(tensors: list[Tensor], scale: Number | list[Tensor]) -> list[Tensor]:
    """scale * tensor, with one scale for all or one 0-d tensor for each."""
    return list(torch._foreach_mul(tensors, scale))


def plus_scaled(tensors: list[Tensor], others: list[Tensor], scale: Number) -> list[Tensor]:
    """tensor + scale * other; the tensors themselves where the scale is the float 0."""
    if isinstance(scale, Tensor):
        return list(torch._foreach_add(tensors, torch._foreach_mul(others, scale)))
    return list(torch._foreach_add(tensors, others, alpha=scale)) if scale else tensors


def check_number(group: Group, name: str, *, low: float, below: float = float("inf"), example: float) -> None:
    """UserError unless low <= group[name] < below. Tensors are not read: that would wait for the device."""
    value = group[name]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(
                f"{name} has {value.numel()} elements, needed: a number or a 0-d tensor; {name}={example} works"
            )
        return
    if not low <= value < below:
        raise UserError(
            f"{name}={value} was given, needed: at least {low}, below {below}; for example {name}={example}"
        )


def check_choice(group: Group, name: str, choices: tuple[str, ...]) -> None:
    """UserError unless group[name] is one of `choices`."""
    if group[name] not in choices:
        raise UserError(
            f"{name}={group[name]!r} was given, needed one of {', '.join(choices)}; {name}={choices[0]!r} works"
        )


def check_capturable(group: Group) -> None:
    """UserError where a CUDA graph would freeze the rate."""
    if group["capturable"] and not isinstance(group["lr"], Tensor):
        raise UserError(
            "capturable=True with a float rate, which a CUDA graph would freeze; needed: a tensor on the parameters' "
            "device, for example lr=torch.tensor(0.1, device='cuda')"
        )


def _tensor_values(group: Group) -> dict[str, Tensor]:
    return {name: value for name, value in group.items() if isinstance(value, Tensor)}


def _refuse_capture(group: Group) -> None:
    if not group["capturable"] and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UserError("a step inside a CUDA graph needs capturable=True and lr=torch.tensor(..., device='cuda')")


def _with_gradients(group: Group) -> list[Tensor]:
    parameters = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided or p.is_complex() for p in parameters):
        raise UserError("needed dense real gradients; for a sparse embedding, nn.Embedding(..., sparse=False) works")
    return parameters


def _gradient(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to(dtype)


def _flattened(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    """Flat views of the tensors at each index, where element i in memory is the same element of all of them.

    torch's CPU kernels take up to twice as long on tensors in channels_last as on the same memory seen flat.
    """
    rows = [[_flat(t) for t in row] if _laid_out_alike(row) else list(row) for row in zip(*columns, strict=True)]
    return [list(column) for column in zip(*rows, strict=True)]


def _laid_out_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    if not (channels_last or first.is_contiguous()):
        return False
    return all(_same_strides(first, other) for other in tensors[1:])


def _same_strides(one: Tensor, other: Tensor) -> bool:
    """Where it matters: the stride of a dimension of size 1, as 1 x 1 filters have two, means nothing."""
    if one.stride() == other.stride():
        return True
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).view(-1)
