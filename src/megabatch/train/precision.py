"""Number formats of forward and backward: fp32, or bf16 / fp16 under autocast with fp32 master weights.

fp16 needs a loss scale: gradients are multiplied by it in backward and divided again, in fp32, before the optimizer
(and before any trust ratio) sees them; a step whose gradients overflowed is skipped on every worker alike, because
the exchanged gradients are the same everywhere.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast and loss scale for one device; `name` is "fp32", "bf16" or "fp16"."""

    def __init__(self, name: str, device: torch.device, *, init_scale: float = 2.0**13) -> None:
        self.name = name
        self.dtype = _DTYPES[name]
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale (1 unless fp16)."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the loss scale; call once, after they were exchanged."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Updates the weights unless a gradient overflowed; whether it did update."""
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a state of another precision is left aside."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def fastest_precision(device: torch.device) -> str:
    """bf16 where the processor multiplies it in hardware, else fp32.

    The weights stay fp32 either way. On CPU this asks oneDNN's own test (AVX-512 BF16 or AMX, Arm's BF16).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_native_bf16()
    return "bf16" if has_bf16 else "fp32"


def _has_native_bf16() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(flags()) if flags is not None else "AVX512" in capability
