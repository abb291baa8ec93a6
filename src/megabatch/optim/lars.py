"""LARS: momentum SGD with one learning rate for each layer.

    u = g + beta w                           gradient plus weight decay
    ratio = eta |w| / (|g| + beta |w|)       trust ratio, one number per tensor: `trust_ratios` below
    v = m v + u                              momentum
    w -= lr ratio v

`LARS.rates` gives lr * ratio. The momentum step is that of SGD, in `megabatch.optim.momentum`. The same rule is written
as a loop over tensors in `lars_step_reference` and as two GPU kernels in `megabatch.optim.kernels.lars`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.optim.engine.base import Group
from megabatch.optim.engine.checks import check_choice, check_number
from megabatch.optim.engine.multi_tensor import Number, TensorLists, plus_scaled
from megabatch.optim.engine.shards import refuse_flattened
from megabatch.optim.engine.trust import one_where_a_norm_is_zero, whole_norms
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
    fp32 (float64 for float64 parameters) regardless of the parameters' dtype. fp16 and bf16 parameters are rounded
    after the update; LARS keeps no fp32 master copy of them. A step copies no value back to the host. A norm above
    1.8e19 overflows float32: an infinite gradient norm makes that step's rate 0.

    Parameters may be sharded (DTensor, as FSDP2's `fully_shard` makes them): each rank updates its part, and norms of
    whole tensors take one all-reduce of a number per tensor. This holds for all optimizers here.

    timm's `Lars` and pytorch_optimizer's `LARS` keep the ratio inside the buffer and the global rate outside
    (v = m v + ratio u, w -= lr v), which equals `inside_corrected`; they offer neither of the other two forms.

    Large rates need a warm-up: a run that starts at lr=32 diverges.

        optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.0, momentum=0.9)
        for step in range(num_steps):
            epoch = step * global_batch_size / num_train_images
            lr = learning_rate(
                epoch, peak_lr=32.0, total_epochs=90, warmup="linear", warmup_epochs=5, decay="poly"
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()

    Args:
        params: parameters or parameter groups; `param_groups(model, weight_decay=...)` makes the usual two. A group
            may override any argument below except `copies`, and may set `adapt`: False means ratio 1, which is
            momentum SGD at the same rate.
        lr: a float or a 0-d tensor, as are momentum and weight decay. A CUDA graph reads tensors at every replay.
        trust_coefficient: eta; 0.001 (You et al., MLPerf), 0.0025 (Fujitsu), 0.01 (Sony).
        eps: added to the denominator.
        trust_clip: replaces the ratio by min(ratio / lr, 1), so that no layer's rate exceeds `lr` (LARC).
        nesterov: replaces v in the update of w by u + m v (`outside`, as in torch.optim.SGD) or lr ratio u + m v.
        foreach: False updates one tensor after another (the reference). True updates all tensors together: their
            norms, all ratios as one vector, then multi-tensor operations (on a CPU in parts that fit in cache). None
            does the same, except that torch's fused SGD kernel does the update on a CPU; on a GPU see `fused`.
        fused: two Triton launches for all tensors of all groups; equal inputs give equal bits. None uses the kernels
            where they can run and `foreach` is None: on a GPU with Triton, for fp32 and 16-bit parameters without
            gaps in memory, and rates that are numbers or fp32 tensors on that GPU. True raises where they cannot run.
        capturable: allow capture of the step in a CUDA graph, after one step outside of it; `lr` must be a tensor.
            No backend then reads a tensor's value on the host. `torch.amp.GradScaler` passes its scale and its
            overflow flag to the optimizer, and a fused step changes nothing if a gradient overflowed.
        copies: maps parameters to 16-bit tensors of the same shape and memory layout. Every step writes the new
            weights into them (fused: in the same pass), so that a 16-bit forward needs no casts.

    Raises:
        UserError: a value out of range, an unknown form or denominator, a sparse or complex gradient, parameters that
            FullyShardedDataParallel (FSDP1) has flattened, or fused=True where the kernels cannot run.
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
        """Raises UserError for a group with invalid values."""
        super().check(group)
        check_number(group, "trust_coefficient", low=0.0, example=0.001)
        check_number(group, "eps", low=0.0, example=0.0)
        check_choice(group, "denominator", ("sum", "update", "gradient"))
        refuse_flattened(group["params"])

    def rates(self, group: Group, tensors: TensorLists) -> Number:
        """lr * ratio, one for each tensor, as a vector; lr itself if the group does not adapt."""
        lr: Number = group["lr"]
        if not group["adapt"]:
            return lr
        measured = tensors.gradients
        if group["denominator"] == "update":
            measured = plus_scaled(measured, tensors.weights, group["weight_decay"])
        ratios = trust_ratios(
            *whole_norms(tensors.weights, measured, groups=tensors.shard_groups),
            trust_coefficient=group["trust_coefficient"],
            weight_decay=group["weight_decay"] if group["denominator"] == "sum" else 0.0,
            eps=group["eps"],
            max_rate=lr if group["trust_clip"] else None,
        )
        return ratios * lr


def trust_ratios(
    weight_norms: Tensor,
    other_norms: Tensor,
    *,
    trust_coefficient: float,
    weight_decay: Number = 0.0,
    eps: float = 0.0,
    max_rate: Number | None = None,
) -> Tensor:
    """Trust ratios of LARS, one for each layer; shape and device of `weight_norms`.

        ratio = eta |w| / (|x| + beta |w| + eps)      You et al. 2017, arXiv:1708.03888, eq. 6

    x is the gradient or, with beta = 0, the gradient plus weight decay (MoCo v3, MAE). If either norm is 0 the ratio is
    1, so that a layer initialised to 0 steps as in plain SGD.

    Args:
        max_rate: the learning rate lr. It changes the ratio to min(ratio / lr, 1), so that lr * ratio is at most lr
            (LARC; clip mode of NVIDIA's Caffe and apex), except where the ratio is 1 because a norm is 0.
    """
    ratios = trust_coefficient * weight_norms / (other_norms + weight_decay * weight_norms + eps)
    if max_rate is not None:
        clipped = torch.clamp(ratios / max_rate, max=1.0)
        ratios = torch.where(ratios > 0, clipped, ratios)  # a ratio of 0 stays 0: at lr = 0 it would become 0 / 0
    return one_where_a_norm_is_zero(ratios, weight_norms, other_norms)
