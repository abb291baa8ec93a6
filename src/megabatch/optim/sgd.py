"""Momentum SGD, with the learning rate outside or inside the momentum buffer."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from megabatch.optim.engine.base import Group
from megabatch.optim.momentum import MomentumForm, MomentumOptimizer


class SGD(MomentumOptimizer):
    """Momentum SGD; `momentum_form` chooses where the learning rate multiplies (see `megabatch.optim.momentum`).

        outside            v = m v + g + beta w                        w -= lr v     torch.optim.SGD
        inside             v = m v + lr (g + beta w)                   w -= v        Caffe
        inside_corrected   v = m lr_t/lr_(t-1) v + lr (g + beta w)     w -= v        Goyal et al. 2017, 1706.02677, 3

    g is the mean gradient over the global batch and beta the weight decay. In exact arithmetic `inside_corrected`
    equals `outside`, with and without `nesterov`. `inside` keeps the history at the old rate, which can make a warm-up
    unstable. State is fp32 (float64 for float64 parameters) regardless of the parameters' dtype. With `foreach=True`,
    `outside` gives the bits of torch's SGD with foreach=True; on a CPU with `foreach=None`, those of its fused=True.

        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        loss(model).backward()
        optimizer.step()

    `load_state_dict` also takes the state of torch.optim.SGD, under the form `outside`.

    Args:
        params: parameters or parameter groups; their key `adapt`, as set by `param_groups`, is ignored.
        lr: a float or a 0-d tensor, as are momentum and weight decay. A CUDA graph reads tensors at every replay.
        nesterov: replaces v in the update of w by u + m v (`outside`) or lr u + m v, with u = g + beta w.
        fused: as in `LARS`, in one kernel launch for all tensors; two launches under `inside_corrected`.
        foreach, capturable, copies: as in `LARS`.

    Raises:
        UserError: a value out of range, an unknown form, a sparse or complex gradient, or fused=True where the kernel
            cannot run.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        momentum_form: MomentumForm = "outside",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "previous_lr": 0.0,
        }
        super().__init__(params, defaults, copies)

    def kernel_options(self, group: Group) -> dict[str, Any]:
        """Options of the LARS kernel, with trust ratios off."""
        return super().kernel_options(group) | {"adapt": False}
