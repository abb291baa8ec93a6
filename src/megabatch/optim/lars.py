"""LARS: momentum SGD with a learning rate per layer."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_choice, check_number
from megabatch.optim.engine.multi_tensor import Number, plus_scaled
from megabatch.optim.engine.trust import clip_to_rate, norms, trust_ratios
from megabatch.optim.momentum import MomentumForm, MomentumOptimizer


class LARS(MomentumOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), for batches of thousands of samples.

        u = g + beta w;   ratio = eta |w| / denominator                                   one ratio per tensor
        outside            v = m v + u                           w -= lr ratio v          tf.contrib 2018, MLPerf
        inside             v = m v + lr ratio u                  w -= v                   You et al., Caffe, nnabla
        inside_corrected   v = m lr_t/lr_(t-1) v + lr ratio u    w -= v                   NVIDIA
        denominator        sum: |g| + beta |w| + eps   update: |u| + eps   gradient: |g| + eps

    Kumar et al. (arXiv:1909.09756) call `outside` scaled and `inside` unscaled momentum. g is the mean gradient over
    the global batch. A tensor whose weight norm or denominator norm is 0 gets ratio 1. Norms, state and update are
    fp32 (float64 for float64 parameters) whatever the parameters' dtype; fp16 and bf16 parameters are rounded after
    the update, and a master copy is the caller's. No value is read back to the host.

    timm's `Lars` and pytorch_optimizer's `LARS` keep the ratio inside the buffer and the global rate outside
    (v = m v + ratio u, w -= lr v), which is `inside_corrected`; they have neither of the other two forms.

    Args:
        params: parameters or groups; `param_groups(model, weight_decay=...)` makes the usual two. A group may set any
            of the values below, and `adapt`: False means ratio 1, plain momentum SGD at the same rate.
        lr: a float or a 0-d tensor; so are momentum and weight decay. A step in a CUDA graph reads tensors anew.
        trust_coefficient: eta; 0.001 (You et al., MLPerf), 0.0025 (Fujitsu), 0.01 (Sony).
        trust_clip: min(ratio / lr, 1), so that no layer's rate exceeds `lr` (LARC).
        foreach: False takes one tensor after another, as reference. True works on all together: norms of all tensors,
            all ratios as one vector, the update in multi-tensor operations (on a CPU in parts that stay in cache).
            None does the same, but on a CPU lets torch's fused SGD kernel do the update; on a GPU see `fused`.
        fused: two kernel launches for all tensors of all groups, with equal bits from equal inputs. None: where that
            works, on a GPU with Triton, for fp32 and 16-bit parameters without gaps in memory, and rates that are
            numbers or fp32 tensors there, unless `foreach` asks for another way. True: refuse to do without.
        capturable: the step may be captured in a CUDA graph, after one step outside; `lr` must be a tensor then. No
            way reads a tensor's value on the host. `torch.amp.GradScaler` hands over its scale and whether a gradient
            overflowed, and the fused step changes nothing if one did.
        copies: a 16-bit tensor for some of the parameters, of the same shape and layout, that every step overwrites
            with the new weights (fused: in the same pass), so that a forward in 16 bit needs no casts.

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
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_form: MomentumForm = "outside",
        denominator: Literal["sum", "update", "gradient"] = "sum",
        trust_clip: bool = False,
        nesterov: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
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
            "fused": fused,
            "capturable": capturable,
            "adapt": True,
            "previous_lr": 0.0,
        }
        super().__init__(params, defaults, copies)

    def check(self, group: Group) -> None:
        """Raises UserError for a group whose values cannot work."""
        super().check(group)
        check_number(group, "trust_coefficient", low=0.0, example=0.001)
        check_number(group, "eps", low=0.0, example=0.0)
        check_choice(group, "denominator", ("sum", "update", "gradient"))

    def rates(self, group: Group, weights: list[Tensor], gradients: list[Tensor]) -> Number:
        """lr * ratio of each tensor as one vector; the group's rate where it does not adapt."""
        lr: Number = group["lr"]
        if not group["adapt"]:
            return lr
        weight_norms, other_norms = _norms(group, weights, gradients)
        ratios = trust_ratios(
            weight_norms,
            other_norms,
            trust_coefficient=group["trust_coefficient"],
            weight_decay=group["weight_decay"] if group["denominator"] == "sum" else 0.0,
            eps=group["eps"],
        )
        if group["trust_clip"]:
            ratios = clip_to_rate(ratios, weight_norms, other_norms, lr)
        return ratios * lr


def _norms(group: Group, weights: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms of the weights and of what the denominator measures."""
    others = gradients
    if group["denominator"] == "update":
        others = plus_scaled(gradients, weights, group["weight_decay"])
    return norms(weights), norms(others)
