"""float64 for sums, counts and statistics, on the CPU where a device has none."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices whose tensors cannot be float64."""


def float64_device(device: torch.device) -> torch.device:
    """Returns `device`, or the CPU if `device` has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(values: Tensor) -> Tensor:
    """Returns `values` in float64, on `float64_device` of their device: only a device without float64 is waited for."""
    return values.to(float64_device(values.device)).double()
