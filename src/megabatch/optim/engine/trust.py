"""Layer-wise trust ratios, all layers in one vector operation."""

from typing import Literal

import torch
from torch import Tensor

from megabatch.optim.engine.multi_tensor import Number, is_flat

Denominator = Literal["sum", "update", "gradient"]


ROWS = 64
"""Into how many rows a large tensor is cut for its norm: at least the cores that shall share it."""

LARGE_ELEMENTS = 2**16


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, as one vector on their device (Yamazaki et al. 2019, 1903.12650: batched).

    On a CPU torch takes the norm of one tensor on one core. So large flat tensors go as rows, which all cores share,
    each reading the part that it will update.
    """
    if not any(map(_takes_rows, tensors)):
        return torch.stack(torch._foreach_norm(tensors))
    return torch.stack([_norm_by_rows(t) if _takes_rows(t) else torch.linalg.vector_norm(t) for t in tensors])


def _takes_rows(tensor: Tensor) -> bool:
    size = tensor.numel()
    return tensor.device.type == "cpu" and size >= LARGE_ELEMENTS and size % ROWS == 0 and is_flat(tensor)


def _norm_by_rows(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(tensor.view(ROWS, -1), dim=1))
    return norm


def trust_ratios(
    weight_norms: Tensor,
    other_norms: Tensor,
    *,
    trust_coefficient: float,
    weight_decay: Number = 0.0,
    eps: float = 0.0,
) -> Tensor:
    """Step scales of LARS, one for each layer; shape and device of `weight_norms`.

        ratio = eta |w| / (|x| + beta |w| + eps)      You et al. 2017, arXiv:1708.03888, eq. 6

    x is the gradient; or, with beta = 0, the decayed gradient (MoCo v3, MAE) or LAMB's update.
    Where either norm is 0 the ratio is 1, so that a layer that starts at 0 steps as plain SGD.
    """
    ratios = trust_coefficient * weight_norms / (other_norms + weight_decay * weight_norms + eps)
    return torch.where((weight_norms > 0) & (other_norms > 0), ratios, 1.0)


def clip_to_rate(ratios: Tensor, weight_norms: Tensor, other_norms: Tensor, lr: Number) -> Tensor:
    """min(ratio / lr, 1), so that a layer's rate is at most `lr` (LARC; clip mode of NVIDIA's Caffe and apex).

    Layers with a zero norm keep their ratio of 1.
    """
    clipped = torch.clamp(ratios / lr, max=1.0)
    return torch.where((weight_norms > 0) & (other_norms > 0), clipped, ratios)
