"""Selects plain or fused forwards for a built model."""

from typing import Literal, cast, get_args

from torch import nn

from megabatch.errors import UserError
from megabatch.nn.alexnet import AlexNet
from megabatch.nn.fused.bottleneck import FusedBottleneck
from megabatch.nn.fused.models import FusedAlexNet, FusedBasicBlock, FusedResNet, FusedResNet8, FusedVGGStage
from megabatch.nn.resnet import BasicBlock, Bottleneck, ResNet
from megabatch.nn.small import ResNet8
from megabatch.nn.vgg import VGGStage

Fusion = Literal["plain", "auto", "triton", "reference"]
Fused = FusedBasicBlock | FusedBottleneck | FusedResNet | FusedResNet8 | FusedVGGStage | FusedAlexNet

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
    ResNet8: FusedResNet8,
    VGGStage: FusedVGGStage,
    AlexNet: FusedAlexNet,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


def can_fuse(model: nn.Module) -> bool:
    """True if `model` has a block of `megabatch.nn`, whose forward can be fused."""
    return any(type(module) in _FUSED or type(module) in _PLAIN for module in model.modules())


def set_fusion(model: nn.Module, fusion: Fusion = "auto") -> None:
    """Selects which code computes the forward and backward of a model from `megabatch.nn`, in place.

    New models are plain. Call this at any time, any number of times: parameters, state dict, module names and hooks do
    not change. The network and its blocks change their class to a subclass with a fused forward (`Bottleneck` to
    `FusedBottleneck`) or back. A subclass that you derive keeps its forward; only its blocks are fused.

    - "plain": torch's operations, one after the other.
    - "auto": Triton kernels on a GPU, compiled C kernels on a CPU, else torch's operations. Both compute batch norm,
      residual sum and ReLU as one operation. On a GPU, bottlenecks compute the batch norms behind their last 1x1
      convolution and in the shortcut from statistics of the convolution's input (`megabatch.kernels.gram`), where spans
      have enough rows, also where ranks share spans; on a CPU, convolutions have compiled kernels too.
    - "triton": the Triton kernels on every device; on a CPU this needs Triton's interpreter. For tests.
    - "reference": the equations of the Triton kernels in torch's operations, on every device. For tests.

    Fused are training forwards through nn.BatchNorm2d, or SpanBatchNorm2d with `group_size=1`, of float16, bfloat16 or
    float32 images (N, C, H, W); with "auto" only images in channels_last format, and no float16 on a CPU. All else
    runs plain: evaluation, other spans shared by several ranks, other norms, float64, layers with hooks, and whatever
    torch.compile traces. Fused forwards differ from plain ones by rounding, and have no second derivatives.

    Raises:
        UserError: `fusion` is none of the four, or is not "plain" and the model has no block that can be fused.
    """
    if fusion not in get_args(Fusion):
        raise UserError(
            f"fusion={fusion!r} was given, needed one of {', '.join(get_args(Fusion))}; fusion='auto' works"
        )
    parts = [module for module in model.modules() if type(module) in _FUSED or type(module) in _PLAIN]
    if not parts and fusion != "plain":
        raise UserError(
            f"{type(model).__name__} has no block that can be fused, needed: a model of megabatch.nn; resnet50() works"
        )
    # A subclass in place of a wrapper: names, hooks and references to the module stay valid.
    for part in parts:
        plain = _PLAIN.get(type(part), type(part))
        if fusion == "plain":
            part.__class__ = plain
            vars(part).pop("backend", None)
        else:
            part.__class__ = _FUSED[plain]
            cast(Fused, part).backend = fusion
