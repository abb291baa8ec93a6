"""LARS as an optimizer whose step is two kernel launches on a GPU, whatever the number of tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from megabatch.errors import UserError
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.lars import LarsGroup, LarsTables, lars_step

Group = dict[str, Any]
_FORMS = ("outside", "inside", "inside_corrected")
_DENOMINATORS = ("sum", "update", "gradient")
_VALUES = ("lr", "momentum", "weight_decay", "previous_lr")


class FusedLARS(Optimizer):
    """`megabatch.optim.LARS`, with its arguments, equations, groups and state dict, as two launches for all tensors.

    The equations are those of `lars_step_reference`, which also takes the step on a CPU and for float64. A group with
    `adapt=False` is momentum SGD. Norms, state and update are float32 (float64 for float64 parameters) whatever the
    parameters' type. Equal inputs give equal bits.

    Args:
        params: parameters or groups; `megabatch.optim.param_groups` makes the usual two.
        lr: a float or a 0-d tensor. Momentum and weight decay may be 0-d tensors too; on a GPU a tensor is float32 and
            on the parameters' device, and is read there by every step, also when a CUDA graph replays it.
        foreach: taken for likeness with LARS; all tensors go together in any case.
        capturable: the step may be captured in a CUDA graph, after one step outside; `lr` must be a tensor then.
        copies: a 16-bit tensor for some of the parameters, of the same shape and layout, that the step overwrites with
            the new weights, so that a forward in 16 bit needs no casts. They are not in the state dict.
        backend: see `megabatch.kernels.dispatch.Backend`.

    Raises:
        UserError: a value out of range, an unknown form, a sparse or complex gradient, a rate the GPU cannot read.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_form: Literal["outside", "inside", "inside_corrected"] = "outside",
        denominator: Literal["sum", "update", "gradient"] = "sum",
        trust_clip: bool = False,
        nesterov: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "momentum_form": momentum_form,
            "denominator": denominator,
            "trust_clip": trust_clip,
            "nesterov": nesterov,
            "foreach": foreach,
            "capturable": capturable,
            "adapt": True,
            "previous_lr": 0.0,
        }
        self.copies = dict(copies or {})
        self.backend: Backend = backend
        self._tables: dict[torch.device, LarsTables] = {}
        self._mirrors: dict[tuple[int, str, torch.device], _Mirror] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; UserError for values that cannot work."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        if isinstance(group["lr"], Tensor) and not isinstance(group["previous_lr"], Tensor):
            group["previous_lr"] = torch.full_like(group["lr"], group["previous_lr"], requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `.grad`; returns the closure's loss, if any. Reads nothing back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_frozen_rates()
        for (device, wide), groups in self._groups_by_device().items():
            backend: Backend = "reference" if wide == torch.float64 else self.backend
            lars_step(groups, tables=self._tables.setdefault(device, LarsTables()), backend=backend)
        self._remember_rates()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but momentum stays in float32, and a group's tensors are overwritten in place: a captured CUDA
        graph goes on reading them.
        """
        kept = [{name: group[name] for name in _VALUES} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, values in zip(self.param_groups, kept, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    group[name] = value.copy_(torch.as_tensor(group[name]))
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in saved:
                buffer = saved[number]["momentum_buffer"].detach()
                self.state[parameter]["momentum_buffer"] = torch.empty_like(parameter, dtype=_wide(parameter)).copy_(
                    buffer
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; a copy made by deepcopy or pickle starts without 16-bit copies and device tables."""
        super().__setstate__(state)
        for name, value in {"copies": {}, "backend": "auto", "_tables": {}, "_mirrors": {}}.items():
            self.__dict__.setdefault(name, value)

    def _groups_by_device(self) -> dict[tuple[torch.device, torch.dtype], list[LarsGroup]]:
        """What the step takes, per device and type of state; parameters without gradients are left out."""
        sets: dict[tuple[torch.device, torch.dtype], list[LarsGroup]] = {}
        for number, group in enumerate(self.param_groups):
            members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    members.setdefault((parameter.device, _wide(parameter)), []).append(parameter)
            for (device, wide), parameters in members.items():
                sets.setdefault((device, wide), []).append(self._group(number, parameters))
        return sets

    def _group(self, number: int, parameters: list[Tensor]) -> LarsGroup:
        group = self.param_groups[number]
        like = parameters[0]
        corrects = group["momentum_form"] == "inside_corrected"
        on_device = isinstance(group["lr"], Tensor)  # then the kernel corrects the momentum, else it is done here
        momentum = group["momentum"] if on_device or not corrects else _corrected_momentum(group)
        names = ("trust_coefficient", "eps", "denominator", "trust_clip", "nesterov", "adapt")
        return LarsGroup(
            weights=parameters,
            gradients=[_dense_gradient(parameter) for parameter in parameters],
            buffers=[self._buffer(parameter) for parameter in parameters],
            copies=[self.copies.get(parameter) for parameter in parameters],
            lr=self._value(number, "lr", group["lr"], like),
            momentum=self._value(number, "momentum", momentum, like),
            weight_decay=self._value(number, "weight_decay", group["weight_decay"], like),
            previous_lr=self._value(number, "previous_lr", group["previous_lr"], like),
            momentum_form="inside" if corrects and not on_device else group["momentum_form"],
            **{name: group[name] for name in names},
        )

    def _value(self, number: int, name: str, value: float | Tensor, parameter: Tensor) -> Tensor:
        """The value as a tensor that the step can read: itself, or a tensor of ours that follows a number."""
        if isinstance(value, Tensor):
            if use_triton(parameter, self.backend) and _wide(parameter) == torch.float32:
                _check_readable(name, value, parameter.device)
            return value
        key = (number, name, parameter.device)
        if key not in self._mirrors:
            self._mirrors[key] = _Mirror(_wide(parameter), parameter.device)
        return self._mirrors[key].follow(float(value))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, dtype=_wide(parameter), memory_format=torch.preserve_format
            )
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _remember_rates(self) -> None:
        for group in self.param_groups:
            if group["momentum_form"] == "inside_corrected" and not isinstance(group["previous_lr"], Tensor):
                group["previous_lr"] = float(group["lr"])

    def _refuse_frozen_rates(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            for group in self.param_groups:
                if not group["capturable"]:
                    raise UserError(
                        "a step inside a CUDA graph needs capturable=True and lr=torch.tensor(..., device='cuda')"
                    )


class _Mirror:
    """A 0-d tensor on the device that follows a number on the host, written only when the number changes."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._tensor = torch.zeros((), dtype=dtype, device=device)
        self._number = 0.0

    def follow(self, number: float) -> Tensor:
        if number != self._number:
            self._tensor.fill_(number)
            self._number = number
        return self._tensor


def _corrected_momentum(group: Group) -> float | Tensor:
    """m lr_t / lr_(t-1) (Goyal et al. 2017, arXiv:1706.02677, 3); m after a step at rate 0, which left no history."""
    previous = group["previous_lr"]
    corrected: float | Tensor = group["momentum"] * (group["lr"] / previous if previous > 0 else 1.0)
    return corrected


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _dense_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided or parameter.is_complex():
        raise UserError("needed dense real gradients; for a sparse embedding, nn.Embedding(..., sparse=False) works")
    return gradient


def _check_readable(name: str, value: Tensor, device: torch.device) -> None:
    if value.dtype != torch.float32 or value.device != device:
        raise UserError(
            f"{name} is a {value.dtype} tensor on {value.device}, needed: float32 on {device}, where the "
            f"kernel reads it; torch.tensor(0.1, device='{device}') works"
        )


def _check(group: Group) -> None:
    """UserError for values that cannot work. Tensors are not read: that would wait for the device."""
    limits = {
        "lr": torch.inf,
        "momentum": 1.0,
        "weight_decay": torch.inf,
        "trust_coefficient": torch.inf,
        "eps": torch.inf,
    }
    for name, limit in limits.items():
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise UserError(
                    f"{name} has {value.numel()} elements, needed a number or a 0-d tensor; {name}=0.1 works"
                )
        elif not 0 <= value < limit:
            raise UserError(f"{name}={value} was given, needed: at least 0, below {limit}; {name}=0.1 works")
    for name, choices in (("momentum_form", _FORMS), ("denominator", _DENOMINATORS)):
        if group[name] not in choices:
            raise UserError(
                f"{name}={group[name]!r} was given, needed one of {', '.join(choices)}; {choices[0]!r} works"
            )
    if group["capturable"] and not isinstance(group["lr"], Tensor):
        raise UserError(
            "capturable=True with a float rate, which a CUDA graph would freeze; lr=torch.tensor(0.1) works"
        )
    if group["nesterov"] and not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
        raise UserError("nesterov=True with momentum=0 does nothing; needed: momentum above 0; momentum=0.9 works")
