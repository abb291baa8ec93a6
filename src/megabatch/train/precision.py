"""Number formats of forward and backward: fp32, or bf16 / fp16 under autocast with fp32 master weights.

Weights, gradients as the optimizer sees them, batch-norm statistics, logits and loss are fp32 in all of them.
fp16 needs a loss scale: gradients are multiplied by it in backward and divided again, in fp32, before the optimizer
(and before any trust ratio) sees them; a step whose gradients overflowed is skipped on every worker alike, because
the exchanged gradients are the same everywhere.
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
    """A power of two for gradients in fp16: fixed, or halved at an overflow and doubled after 2,000 steps without.

    `factor` is a 0-d tensor that keeps its place in memory, so that a captured graph goes on reading it. `unscale`
    waits for the device once a step, to learn whether the step may be taken.
    """

    def __init__(self, device: torch.device, value: float, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = value
        self.factor = torch.tensor(value, device=device)
        self.good_steps = 0

    def unscale(self, gradients: list[Tensor]) -> bool:
        """Divides `gradients` in place; whether all were finite. Grows or shrinks a dynamic scale for the next step."""
        found_inf = torch.zeros((), device=self.factor.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self.factor.reciprocal())
        finite = not bool(found_inf)
        if self.dynamic:
            self._adapt(finite)
        return finite

    def _adapt(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self._set(self.value / 2)
        elif self.good_steps == STEPS_TO_GROW:
            self._set(min(2 * self.value, LARGEST_SCALE))
            self.good_steps = 0

    def _set(self, value: float) -> None:
        self.value = value
        self.factor.fill_(value)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a fixed scale stays what it is."""
        if self.dynamic:
            self._set(float(state["scale"]))
            self.good_steps = int(state.get("good_steps", 0))


class Precision:
    """Autocast and loss scale for one device; `name` is "fp32", "bf16" or "fp16".

    `loss_scale` is fp16's: a power of two that stays, or None for one that adapts (from `init_scale` on). It is None
    in the other formats, whose range is fp32's.
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
        """The context of every forward."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def kept_casts(self) -> AbstractContextManager[Any]:
        """Around all forwards and backwards of a step: weights are cast once a step, not once a micro-batch.

        Autocast forgets its casts where its outermost context ends; this is an outermost one that casts nothing, for
        operations of a backward must not be cast again.
        """
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale (1 unless fp16)."""
        return loss if self.loss_scale is None else loss * self.loss_scale.factor

    def unscale(self, gradients: list[Tensor]) -> bool:
        """Divides gradients by the loss scale, in place, once they were exchanged; False if the step must be skipped.

        Only fp16 skips: in the other formats a gradient overflows where the run has diverged, and the loss tells.
        """
        return self.loss_scale is None or self.loss_scale.unscale(gradients)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a state of another precision is left aside."""
        if state and self.loss_scale is not None:
            self.loss_scale.load_state_dict(state)


class WideLinear(nn.Linear):
    """`nn.Linear` that computes in its weight's own type under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def widen_logits(module: nn.Module) -> None:
    """Makes the last linear layer of `module` compute in fp32 under autocast, in place; no parameter or key changes.

    In bf16 a logit of 16 is off by up to 0.06 and two classes tie where they should not; the layer's share of the
    arithmetic is below one in a thousand.
    """
    linear = [layer for layer in module.modules() if type(layer) is nn.Linear]
    if linear:
        linear[-1].__class__ = WideLinear


def fastest_precision(device: torch.device) -> str:
    """bf16 where the processor multiplies it in hardware, else fp32.

    The weights stay fp32 either way. On CPU this asks oneDNN's own test (AVX-512 BF16 or AMX, Arm's BF16).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_native_bf16()
    return "bf16" if has_bf16 else "fp32"


def _has_native_bf16() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(flags()) if flags is not None else "AVX512" in capability
