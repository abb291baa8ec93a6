"""Precision of forward and backward: fp32, or bf16 / fp16 under autocast with fp32 master weights.

Weights, the optimizer's gradients, batch-norm statistics, logits and loss are fp32 in all of them. fp16 needs a loss
scale: backward multiplies gradients by it, and they are divided by it, in fp32, before the optimizer (and any trust
ratio) reads them. A step whose gradients overflow is skipped on all workers, because the exchanged gradients are equal;
the other formats have the range of fp32, and there an overflow means that the run diverged, which the loss shows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**13
LARGEST_SCALE = 2.0**24
STEPS_TO_GROW = 2000


class LossScale:
    """Loss scale for fp16, a power of two: fixed, or halved at an overflow and doubled after 2,000 steps without one.

    All of it is in 0-d tensors with fixed addresses, so that a captured graph checks for an overflow and adapts the
    scale without the host.

    Attributes:
        factor: the scale, float32.
        overflow: 1 if the last gradients overflowed, else 0, float32.
    """

    def __init__(self, device: torch.device, value: float, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.factor = torch.tensor(value, device=device)
        self.overflow = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._largest = max(value, LARGEST_SCALE)

    @property
    def value(self) -> float:
        """The present scale; waits for the device."""
        return float(self.factor)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divides `gradients` in place, sets `overflow` and adapts a dynamic scale, all on the device."""
        self.overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.overflow, self.factor.reciprocal())
        if self.dynamic:
            torch._amp_update_scale_(self.factor, self._good_steps, self.overflow, 2.0, 0.5, STEPS_TO_GROW)
            self.factor.clamp_(max=self._largest)

    def overflowed(self) -> bool:
        """True if the last gradients overflowed; waits for the device."""
        return bool(self.overflow)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.value, "good_steps": int(self._good_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a fixed scale is unchanged."""
        if self.dynamic:
            self.factor.fill_(float(state["scale"]))
            self._good_steps.fill_(int(state.get("good_steps", 0)))


class Precision:
    """Autocast and loss scale for one device; `name` is "fp32", "bf16" or "fp16".

    `loss_scale` applies to fp16: a fixed power of two, or None for a dynamic scale that starts at `init_scale`. The
    other formats have the range of fp32 and need none.
    """

    def __init__(
        self, name: str, device: torch.device, *, loss_scale: float | None = None, init_scale: float = FIRST_SCALE
    ) -> None:
        self.name = name
        self.dtype = _DTYPES[name]
        self.device_type = device.type
        self.loss_scale: LossScale | None = None
        if name == "fp16":
            self.loss_scale = LossScale(device, loss_scale or init_scale, dynamic=loss_scale is None)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context manager for every forward."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def cached_casts(self) -> AbstractContextManager[Any]:
        """Context manager for all micro-batches of a step: weights are cast once per step, not once per micro-batch.

        Autocast drops its cached casts when the outermost context ends. This outermost context is disabled, because
        backward operations must not be cast again.
        """
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale (1 unless fp16)."""
        return loss if self.loss_scale is None else loss * self.loss_scale.factor

    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; ignores the state of another precision."""
        if state and self.loss_scale is not None:
            self.loss_scale.load_state_dict(state)


class WideLinear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its weight under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def widen_logits(module: nn.Module) -> None:
    """Makes the last linear layer of `module` compute in fp32 under autocast, in place; parameters and keys are kept.

    In bf16 a logit of 16 has an error of up to 0.06, so that distinct classes can tie. The layer takes less than a
    thousandth of the arithmetic.
    """
    linear = [layer for layer in module.modules() if type(layer) is nn.Linear]
    if linear:
        linear[-1].__class__ = WideLinear


def fastest_precision(device: torch.device) -> str:
    """Fastest precision of a device: bf16 with hardware support, else fp16 on a GPU and fp32 on a CPU.

    Weights stay fp32 in all of them. On a CPU the support is oneDNN's (AVX-512 BF16 or AMX, or Arm's BF16). An Apple
    GPU gets fp32: nothing was measured there.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "mps":
        return "fp32"
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_native_bf16()
    return "bf16" if has_bf16 else "fp32"


def _has_native_bf16() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(flags()) if flags is not None else "AVX512" in capability
