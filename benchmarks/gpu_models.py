"""Training steps of ResNet-50 to compare: torchvision's with torch.compile, and ours with the kernels."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megabatch.nn.fused.fuse import Fusion, set_fusion
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import Bottleneck, ResNet, resnet50
from megabatch.optim.kernels.lars import LarsGroup, lars_step
from megabatch.optim.kernels.tables import StepTables

LOSS_SCALE = 1024.0
SMOOTHING = 0.1
MOMENTUM = 0.9
DECAY = 5e-5
RATE = 1e-3

Step = Callable[[], None]


@dataclass
class Half:
    """A model whose convolutions and last layer hold 16-bit weights; masters and batch norm's parameters in float32.

    The LARS step writes both, so nothing is cast in forward. With `fusion` the model is what
    `megabatch.nn.fused.fuse.set_fusion` makes of it.
    """

    model: nn.Module
    dtype: torch.dtype
    fusion: Fusion
    masters: dict[Tensor, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_fusion(self.model, self.fusion)
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._to_16_bit(module)

    def _to_16_bit(self, module: nn.Conv2d | nn.Linear) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            master = parameter.detach()
            small = nn.Parameter(master.to(self.dtype, memory_format=torch.preserve_format))
            module.register_parameter(name, small)
            self.masters[small] = master


def our_model(device: torch.device, *, quick: bool) -> nn.Module:
    """ResNet-50, or four bottlenecks for a quick run; the same weights each time, filters with the channels last."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (1, 1, 1, 1)) if quick else resnet50()
    return model.to(device, memory_format=torch.channels_last)


def plain_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    compiler: str | None = None,
) -> Step:
    """Autocast, cross entropy with label smoothing, backward, torch's fused SGD; `compiler` is one of torch.compile."""
    fused = images.is_cuda
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=fused)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, backend=compiler) if compiler else model

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            logits = forward(images)
        loss = cross_entropy_sum(logits, labels, label_smoothing=SMOOTHING, backend="reference") / len(labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def half_step(half: Half, images: Tensor, labels: Tensor) -> Step:
    """The model in 16 bit, the fused loss and LARS; gradients stay in 16 bit until the LARS step reads them."""
    groups = lars_groups(half, images.device)
    tables = StepTables()
    parameters = list(half.model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss = cross_entropy_sum(half.model(images), labels, label_smoothing=SMOOTHING)
        (loss * (LOSS_SCALE / len(labels))).backward()
        lars_step([with_gradients(group, own) for group, own in groups], tables=tables)

    return step


def lars_groups(half: Half, device: torch.device) -> list[tuple[LarsGroup, list[Tensor]]]:
    """Weights of two and more dimensions adapt and decay, the rest does neither; each with whose gradients it takes."""
    masters = {small: half.masters.get(small, small) for small in half.model.parameters()}
    groups = []
    for adapt in (True, False):
        owners = [small for small in masters if (small.ndim > 1) is adapt]
        weights = [masters[small].detach() for small in owners]
        copies = [small.detach() if small in half.masters else None for small in owners]
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
