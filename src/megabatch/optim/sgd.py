"""SGD with momentum, and with the rate where Caffe, PyTorch or Goyal et al. put it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from megabatch.optim.engine.base import Group
from megabatch.optim.momentum import MomentumForm, MomentumOptimizer


class SGD(MomentumOptimizer):
    """Momentum SGD; `momentum_form` says where the learning rate is (see `megabatch.optim.momentum`).

        outside            v = m v + g + beta w                        w -= lr v     torch.optim.SGD, to the bit
        inside             v = m v + lr (g + beta w)                   w -= v        Caffe
        inside_corrected   v = m lr_t/lr_(t-1) v + lr (g + beta w)     w -= v        Goyal et al. 2017, 1706.02677, 3

    In exact arithmetic `inside_corrected` equals `outside`; `inside` without correction keeps the old rate's history,
    which can make a warm-up unstable. State is fp32 whatever the parameters' dtype. The group key `adapt` of
    `param_groups` has no meaning here and is ignored. `lr`, `momentum`, `weight_decay`, `foreach`, `fused` (one kernel
    launch for all tensors; two under `inside_corrected`), `capturable` and `copies` are as in `LARS`.

    Raises:
        UserError: a value out of range, an unknown form, a sparse or complex gradient; fused=True where it cannot be.
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
        """LARS's kernel without trust ratios."""
        return super().kernel_options(group) | {"adapt": False}
