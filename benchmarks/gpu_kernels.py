"""Sections of `gpu.py` about single kernels: each against torch's operations, with bytes and share of a copy's rate."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import megabatch.kernels.bottleneck.conv1x1 as conv
from gpu_session import Session, guarded
from megabatch.bench.timing import Work, compare
from megabatch.kernels.crop_resize import crop_and_resize
from megabatch.kernels.loss import cross_entropy_with_gradient
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.kernels.norm.passes import Normalisation
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.nn.loss import cross_entropy_sum
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD
from optimizer import resnet50_shapes

NORMS = ((64, 112, False), (64, 56, False), (256, 56, True), (512, 28, True), (1024, 14, True), (2048, 7, True))
"""Channels, pixels and whether a residual is added, of ResNet-50's batch norms."""
CONVOLUTIONS = (
    (64, 256, 56),
    (256, 64, 56),
    (128, 512, 28),
    (512, 128, 28),
    (256, 1024, 14),
    (1024, 256, 14),
    (512, 2048, 7),
)
"""Input channels, output channels and pixels of its 1x1 convolutions."""


def ceilings(session: Session) -> None:
    """What a plain copy and a plain matrix product reach here: what the rest is a share of."""
    size = 2**20 if session.quick else 2**30
    source = torch.randn(size // 4, device=session.device)
    target = torch.empty_like(source)
    timing = session.time("ceilings", "", {"copy": lambda: target.copy_(source)})["copy"]
    session.ceilings["copy_bytes_per_s"] = 2 * 4 * source.numel() / timing.median_s
    session.add("ceilings", "copy", timing, bytes_per_s=session.ceilings["copy_bytes_per_s"])
    side = 256 if session.quick else 8192
    a, b = torch.randn(2, side, side, device=session.device, dtype=torch.float32).bfloat16()
    timing = session.time("ceilings", "", {"product": lambda: a @ b})["product"]
    session.ceilings["flop_per_s"] = 2 * side**3 / timing.median_s
    session.add("ceilings", f"bf16 matrix product {side}", timing, flop_per_s=session.ceilings["flop_per_s"])


def optimizers(session: Session) -> None:
    """One step on ResNet-50's 161 tensors, from gradients that are there."""
    shapes = resnet50_shapes()[:9] if session.quick else resnet50_shapes()
    makers: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
        "LARS": lambda g: LARS(g, lr=_number(session, 0.01), capturable=True),
        "LARS with 16-bit copies": lambda g: LARS(
            g, lr=_number(session, 0.01), capturable=True, copies={p: p.detach().bfloat16() for p in _parameters(g)}
        ),
        "LARS foreach": lambda g: LARS(g, lr=_number(session, 0.01), capturable=True, foreach=True),
        "SGD": lambda g: SGD(g, lr=_number(session, 1e-4), capturable=True),
        "LAMB": lambda g: LAMB(g, lr=_number(session, 1e-4), capturable=True),
        "LAMB foreach": lambda g: LAMB(g, lr=_number(session, 1e-4), capturable=True, foreach=True),
        "torch SGD foreach": lambda g: torch.optim.SGD(g, lr=1e-4, momentum=0.9, foreach=True),
        "torch SGD fused": lambda g: torch.optim.SGD(g, lr=1e-4, momentum=0.9, fused=True),
    }
    works: dict[str, Work] = {}

    def prepare(name: str) -> None:
        works[name] = makers[name](_groups(session, shapes)).step

    for name in makers:
        guarded(session, "optimizers", name, functools.partial(prepare, name))
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    per_element = {"LARS": 28, "LARS with 16-bit copies": 30, "LARS foreach": 28, "LAMB": 40, "LAMB foreach": 40}
    for name, timing in session.time("optimizers", "", works).items():
        facts = session.bandwidth(per_element.get(name, 20) * elements, timing)
        session.add("optimizers", name, timing, tensors=len(shapes), **facts)


def _groups(session: Session, shapes: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    generator = torch.Generator(session.device).manual_seed(0)
    parameters = []
    for shape in shapes:
        weight, gradient = (0.01 * torch.randn(2, *shape, generator=generator, device=session.device)).unbind()
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        parameters.append(nn.Parameter(weight.contiguous(memory_format=layout)))
        parameters[-1].grad = gradient.contiguous(memory_format=layout)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-5, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _number(session: Session, value: float) -> Tensor:
    return torch.tensor(value, device=session.device)


def batch_norm(session: Session) -> None:
    """Batch norm, residual and ReLU: forward, and forward with backward."""
    for channels, pixels, residual in NORMS[:1] if session.quick else NORMS:
        case = f"{channels} x {pixels}^2{' + residual' if residual else ''}"
        guarded(
            session, "batch_norm", case, lambda c=channels, p=pixels, r=residual, k=case: _norm(session, c, p, r, k)
        )


def _norm(session: Session, channels: int, pixels: int, residual: bool, case: str) -> None:
    count, dtype = (2, torch.bfloat16) if session.quick else (256, torch.float16)
    pixels = 8 if session.quick else pixels
    x = session.images(count, channels, pixels, dtype).requires_grad_()
    r = session.images(count, channels, pixels, dtype, seed=1).requires_grad_() if residual else None
    dy = session.images(count, channels, pixels, dtype, seed=2)
    weight, bias = (torch.ones(channels, device=session.device).requires_grad_() for _ in range(2))
    leaves = [t for t in (x, r, weight, bias) if t is not None]
    averages = torch.zeros(2, channels, device=session.device)

    def ours() -> Tensor:
        return fused_bn_act(x, weight, bias, span=count, residual=r)[0]

    def torchs() -> Tensor:
        y = functional.batch_norm(x, *averages, weight, bias, training=True)
        return functional.relu(y if r is None else y + r)

    works: dict[str, Work] = {}
    for name, forward in (("fused", ours), ("torch", torchs)):
        works[f"{name}, forward"] = forward
        works[f"{name}, both ways"] = lambda forward=forward: torch.autograd.grad(forward(), leaves, dy)
    passes = {"forward": 4 if residual else 3, "both ways": 11 if residual else 8}
    for name, timing in session.time("batch_norm", case, works).items():
        moved = passes[name.split(", ")[1]] * x.numel() * x.element_size()
        session.add("batch_norm", f"{case}, {name}", timing, **session.bandwidth(moved, timing))


def stem(session: Session) -> None:
    """What stands first in a ResNet: its convolution with 3, 4 and 8 channels; batch norm, ReLU and pooling."""
    guarded(session, "stem", "convolution", lambda: _stem_convolution(session))
    guarded(session, "stem", "batch norm, ReLU, pooling", lambda: _stem_pooling(session))


def _stem_convolution(session: Session) -> None:
    count, pixels, dtype = (2, 32, torch.bfloat16) if session.quick else (256, 224, torch.float16)
    x = session.images(count, 3, pixels, dtype)
    weight = (torch.randn(64, 3, 7, 7, device=session.device) / 12).to(dtype).requires_grad_()
    dy = session.images(count, 64, pixels // 2, dtype, seed=1)

    def both_ways(width: int) -> Tensor:
        images, filters = (
            functional.pad(t, (0, 0, 0, 0, 0, width - 3)).contiguous(memory_format=torch.channels_last)
            for t in (x, weight)
        )
        return torch.autograd.grad(functional.conv2d(images, filters, stride=2, padding=3), weight, dy)[0]

    works: dict[str, Work] = {f"{width} channels": lambda width=width: both_ways(width) for width in (3, 4, 8)}
    for name, timing in session.time("stem", "convolution both ways", works).items():
        session.add("stem", f"convolution both ways, {name}", timing)


def _stem_pooling(session: Session) -> None:
    count, pixels, dtype = (2, 16, torch.bfloat16) if session.quick else (256, 112, torch.float16)
    x = session.images(count, 64, pixels, dtype).requires_grad_()
    dy = session.images(count, 64, pixels // 2, dtype, seed=1)
    weight, bias = (torch.ones(64, device=session.device).requires_grad_() for _ in range(2))
    averages = torch.zeros(2, 64, device=session.device)

    def ours() -> Tensor:
        return fused_bn_relu_pool(x, weight, bias, span=count)[0]

    def torchs() -> Tensor:
        y = functional.relu(functional.batch_norm(x, *averages, weight, bias, training=True))
        return functional.max_pool2d(y, 3, 2, 1)

    works: dict[str, Work] = {}
    for name, forward in (("fused", ours), ("torch", torchs)):
        works[f"{name}, forward"] = forward
        works[f"{name}, both ways"] = lambda forward=forward: torch.autograd.grad(forward(), (x, weight, bias), dy)
    passes = {"forward": 2.375, "both ways": 6.125}  # full-size images, and quarter-size ones with their places
    for name, timing in session.time("stem", "batch norm, ReLU, pooling", works).items():
        moved = passes[name.split(", ")[1]] * x.numel() * x.element_size()
        session.add("stem", f"batch norm, ReLU, pooling, {name}", timing, **session.bandwidth(moved, timing))


def loss(session: Session) -> None:
    """Cross entropy of a thousand classes with label smoothing, and its gradient."""
    count, dtype = (8, torch.bfloat16) if session.quick else (1024, torch.float16)
    logits = torch.randn(count, 1000, device=session.device).to(dtype).requires_grad_()
    labels = torch.randint(1000, (count,), device=session.device)

    def torchs() -> Tensor:
        return torch.autograd.grad(cross_entropy_sum(logits, labels, label_smoothing=0.1, backend="reference"), logits)[
            0
        ]

    works: dict[str, Work] = {
        "fused": lambda: cross_entropy_with_gradient(logits.detach(), labels, label_smoothing=0.1),
        "torch": torchs,
    }
    for name, timing in session.time("loss", f"{count} x 1000", works, replays=20).items():
        moved = 2 * logits.numel() * logits.element_size()
        session.add("loss", f"{count} x 1000, {name}", timing, **session.bandwidth(moved, timing))


def convolutions(session: Session) -> None:
    """1x1 convolutions: forward, data gradient and weight gradient, the best tiling of each, against torch's steps."""
    for inputs, outputs, pixels in CONVOLUTIONS[:1] if session.quick else CONVOLUTIONS:
        case = f"{inputs} -> {outputs}, {pixels}^2"
        if session.has_time_for("conv1x1", case, 0 if session.quick else 12):
            guarded(session, "conv1x1", case, lambda i=inputs, o=outputs, p=pixels, k=case: _conv(session, i, o, p, k))


def _conv(session: Session, inputs: int, outputs: int, pixels: int, case: str) -> None:
    count, dtype = (2, torch.bfloat16) if session.quick else (256, torch.float16)
    pixels = 8 if session.quick else pixels
    x = session.images(count, inputs, pixels, dtype)
    dy = session.images(count, outputs, pixels, dtype, seed=1)
    weight = (torch.randn(outputs, inputs, device=session.device) / inputs**0.5).to(dtype)
    filters = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    ones = torch.ones(1, inputs, device=session.device)
    given = Normalisation(torch.zeros_like(ones), ones, ones[0], torch.zeros(inputs, device=session.device))
    h = functional.relu(x)
    size, rows = x.element_size(), x.numel() // inputs
    kinds = {
        "forward": (conv.FORWARD_TILINGS, rows * (inputs + outputs) * size),
        "data gradient": (conv.DATA_GRADIENT_TILINGS, rows * (2 * inputs + outputs) * size),
        "weight gradient": (conv.WEIGHT_GRADIENT_TILINGS, rows * (inputs + outputs) * size),
    }

    def work(kind: str, tiling: conv.Tiling) -> Work:
        options: dict[str, Any] = {"span": count, "tiling": tiling}
        if kind == "forward":
            return lambda: conv.conv1x1_forward(x, weight, normalisation=given, **options)
        if kind == "data gradient":
            return lambda: conv.conv1x1_data_gradient(dy, weight, x, given, **options)
        return lambda: conv.conv1x1_weight_gradient(dy, x, normalisation=given, **options)

    backward = (dy, h, filters, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    plain: dict[str, Work] = {
        "forward": lambda: functional.conv2d(h, filters),
        "data gradient": lambda: torch.ops.aten.convolution_backward(*backward, [True, False, False]),
        "weight gradient": lambda: torch.ops.aten.convolution_backward(*backward, [False, True, False]),
    }
    for kind, (tilings, moved) in kinds.items():
        works = {"torch, convolution alone": plain[kind]}
        for tiling in tilings[:1] if session.quick else tilings:
            works["fused " + " ".join(map(str, tiling))] = work(kind, tiling)  # may need more shared memory than exists
        for name, timing in session.time("conv1x1", f"{case}, {kind}", works).items():
            session.add("conv1x1", f"{case}, {kind}, {name}", timing, **session.bandwidth(moved, timing))


def input_images(session: Session) -> None:
    """Cut, resize, flip, normalise, pad and round a decoded batch; and the decoding itself where torchvision can."""
    count, size = (2, 16) if session.quick else (256, 224)
    height, width = (30, 40) if session.quick else (375, 500)
    images = list(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, device=session.device).unbind())
    box = torch.tensor([[height // 8, width // 8, height // 2, width // 2]]).expand(count, 4)
    options: dict[str, Any] = {"size": size, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "layout": "CHW"}

    def cut() -> Tensor:
        return crop_and_resize(images, box, flip=torch.zeros(count, dtype=torch.bool), **options)

    timing = compare({"cut": cut}, warmup=2, repeats=3 if session.quick else 20)["cut"]
    moved = count * (3 * height * width // 4 + 8 * size * size)
    facts = session.bandwidth(moved, timing)
    session.add("input", f"crop_and_resize to {size}", timing, images_per_s=count / timing.median_s, **facts)
    guarded(session, "input", "decode_jpeg", lambda: _decode(session, images, count))


def _decode(session: Session, images: list[Tensor], count: int) -> None:
    from torchvision.io import decode_jpeg, encode_jpeg

    files = [encode_jpeg(image.cpu(), quality=90) for image in images]
    device = session.device
    timing = compare({"decode": lambda: decode_jpeg(files, device=device)}, warmup=2, repeats=10)["decode"]
    session.add("input", "torchvision decode_jpeg", timing, images_per_s=count / timing.median_s)
