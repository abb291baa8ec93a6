"""Training steps of ResNet-50 to compare: torchvision's and ours, plain, and with the kernels swapped in."""

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.kernels import LarsGroup, LarsTables, fused_bn_act, fused_cross_entropy_sum, lars_step
from megabatch.nn import cross_entropy_sum, resnet18, resnet50

LOSS_SCALE = 1024.0
SMOOTHING = 0.1
MOMENTUM = 0.9
DECAY = 5e-5
RATE = 1e-3

Step = Callable[[], None]


@dataclass
class Fused:
    """ResNet-50 in 16 bit with fused batch norm, ReLU and residual; masters and batch norm's parameters in float32.

    Convolutions and the last layer hold 16-bit weights that the LARS step writes with the masters, so nothing is cast
    in forward. The stem takes 4 channels, of which the last is 0.
    """

    model: nn.Module
    span: int
    dtype: torch.dtype
    masters: dict[Tensor, Tensor] = field(default_factory=dict)
    statistics: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._to_16_bit(module)
            if hasattr(module, "bn2"):
                module.forward = types.MethodType(self._block(), module)
        self.model.forward = types.MethodType(self._network(), self.model)

    def bn(self, layer: Any, x: Tensor, *, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """One layer, with its statistics noted."""
        y, mean, var = fused_bn_act(
            x, layer.weight, layer.bias, span=self.span, eps=layer.eps, residual=residual, relu=relu
        )
        self.statistics.append((layer, mean, var))
        return y

    def update_averages(self) -> None:
        """All running averages at once, from the mean over spans."""
        running = [t for layer, _, _ in self.statistics for t in (layer.running_mean, layer.running_var)]
        new = [t.mean(0) if len(t) > 1 else t[0] for _, mean, var in self.statistics for t in (mean, var)]
        torch._foreach_lerp_(running, new, 0.1)
        self.statistics.clear()

    def _to_16_bit(self, module: nn.Conv2d | nn.Linear) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            master = parameter.detach()
            small = nn.Parameter(master.to(self.dtype, memory_format=torch.preserve_format))
            module.register_parameter(name, small)
            self.masters[small] = master

    def _block(self) -> Callable[[Any, Tensor], Tensor]:
        def forward(block: Any, x: Tensor) -> Tensor:
            y = self.bn(block.bn1, block.conv1(x))
            last = "3" if hasattr(block, "bn3") else "2"
            if last == "3":
                y = self.bn(block.bn2, block.conv2(y))
            shortcut = x
            if block.downsample is not None:
                convolution, norm = block.downsample
                shortcut = self.bn(norm, convolution(x), relu=False)
            return self.bn(getattr(block, f"bn{last}"), getattr(block, f"conv{last}")(y), residual=shortcut)

        return forward

    def _network(self) -> Callable[[Any, Tensor], Tensor]:
        def forward(model: Any, x: Tensor) -> Tensor:
            stem = model.conv1
            weight = functional.pad(stem.weight, (0, 0, 0, 0, 0, x.shape[1] - stem.weight.shape[1]))
            weight = weight.contiguous(memory_format=torch.channels_last)
            y = functional.conv2d(x, weight, stride=stem.stride, padding=stem.padding)
            y = model.maxpool(self.bn(model.bn1, y))
            y = model.layer4(model.layer3(model.layer2(model.layer1(y))))
            logits: Tensor = model.fc(y.mean((2, 3)))
            return logits

        return forward


def our_model(device: torch.device, *, quick: bool, zero_gamma: bool = True) -> nn.Module:
    """ResNet-50, or ResNet-18 for a quick run; the same weights each time, filters with the channels last."""
    torch.manual_seed(0)
    make = resnet18 if quick else resnet50
    return make(zero_gamma=zero_gamma).to(device, memory_format=torch.channels_last)


def plain_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, *, compiled: bool = False) -> Step:
    """Autocast, cross entropy with label smoothing, backward, torch's fused SGD."""
    fused = images.is_cuda
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=fused)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            logits = forward(images)
        loss = cross_entropy_sum(logits, labels, label_smoothing=SMOOTHING) / len(labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def fused_step(fused: Fused, images: Tensor, labels: Tensor) -> Step:
    """The fused model, loss and LARS; gradients stay in 16 bit until the LARS step reads them."""
    groups = lars_groups(fused, images.device)
    tables = LarsTables()
    parameters = [*fused.masters, *(p for p in fused.model.parameters() if p not in fused.masters)]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss = fused_cross_entropy_sum(fused.model(images), labels, label_smoothing=SMOOTHING)
        (loss * (LOSS_SCALE / len(labels))).backward()
        lars_step([with_gradients(group, own) for group, own in groups], tables=tables)
        fused.update_averages()

    return step


def lars_groups(fused: Fused, device: torch.device) -> list[tuple[LarsGroup, list[Tensor]]]:
    """Weights of two and more dimensions adapt and decay, the rest does neither; each with whose gradients it takes."""
    masters = {small: fused.masters.get(small, small) for small in fused.model.parameters()}
    groups = []
    for adapt in (True, False):
        owners = [small for small in masters if (small.ndim > 1) is adapt]
        weights = [masters[small].detach() for small in owners]
        copies = [small.detach() if small in fused.masters else None for small in owners]
        values = {"lr": RATE, "momentum": MOMENTUM, "previous_lr": 0.0, "gradient_scale": 1 / LOSS_SCALE}
        values["weight_decay"] = DECAY if adapt else 0.0
        group = LarsGroup(
            weights=weights,
            gradients=weights,
            buffers=[torch.zeros_like(w) for w in weights],
            copies=copies,
            adapt=adapt,
            **{name: torch.tensor(value, device=device) for name, value in values.items()},
        )
        groups.append((group, owners))
    return groups


def with_gradients(group: LarsGroup, owners: list[Tensor]) -> LarsGroup:
    """The group with the gradients of now."""
    gradients = [p.grad for p in owners if p.grad is not None]
    assert len(gradients) == len(owners), "every parameter has a gradient"
    return LarsGroup(**{**vars(group), "gradients": gradients})


def has_torchvision() -> bool:
    """Whether the peer is installed and loads."""
    try:
        importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):
        return False
    return True


def torchvision_model(device: torch.device, *, quick: bool) -> nn.Module:
    """The peer's model of the same kind."""
    models = importlib.import_module("torchvision.models")
    torch.manual_seed(0)
    model: nn.Module = (models.resnet18 if quick else models.resnet50)()
    return model.to(device, memory_format=torch.channels_last)
