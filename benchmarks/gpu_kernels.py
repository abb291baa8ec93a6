"""Jobs of `gpu.py` about single kernels: each beside torch's operations, with bytes and share of a copy's rate."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpu_session import Session
from megabatch.bench.timing import Work
from megabatch.kernels.bottleneck import products
from megabatch.kernels.bottleneck.products import Epilogue, Term
from megabatch.kernels.dispatch import has_triton
from megabatch.kernels.norm.batch_norm import fused_bn_act
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.observe.environment import describe
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.sgd import SGD
from optimizer import resnet50_shapes

NORMS = ((64, 112, False), (64, 56, False), (256, 56, True), (512, 28, True), (1024, 14, True), (2048, 7, True))
"""Channels, pixels and whether a residual is added, of ResNet-50's batch norms."""
BOTTLENECKS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Input channels, a quarter of the output channels, and pixels of the last 1x1 convolutions of its blocks."""


def ceilings(session: Session) -> None:
    """The machine, and the rates of a plain copy and a plain matrix product, of which other results are shares."""
    session.add("machine", triton=version("triton") if has_triton() else None, **describe())
    size = 2**20 if session.quick else 2**30
    source = torch.randn(size // 4, device=session.device)
    target = torch.empty_like(source)
    timing = session.time({"copy": lambda: target.copy_(source)})["copy"]
    rate = 2 * 4 * source.numel() / timing.median_s
    session.add("copy", timing, bytes_per_s=rate, copy_bytes_per_s=rate)
    side = 256 if session.quick else 8192
    a, b = torch.randn(2, side, side, device=session.device, dtype=torch.float32).to(session.dtype)
    timing = session.time({"product": lambda: a @ b})["product"]
    session.add(f"{session.dtype} matrix product {side}", timing, flop_per_s=2 * side**3 / timing.median_s)


def optimizers(session: Session) -> None:
    """One step on ResNet-50's 161 tensors, with gradients in place."""
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
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    per_element = {"LARS": 28, "LARS with 16-bit copies": 30, "LARS foreach": 28, "LAMB": 40, "LAMB foreach": 40}

    def measure(name: str) -> None:
        for timing in session.time({name: makers[name](_groups(session, shapes)).step}).values():
            facts = session.bandwidth(per_element.get(name, 20) * elements, timing)
            session.add(name, timing, tensors=len(shapes), **facts)

    for name in makers:
        session.guarded(name, functools.partial(measure, name))


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
        session.guarded(case, functools.partial(_norm, session, channels, pixels, residual, case))


def _norm(session: Session, channels: int, pixels: int, residual: bool, case: str) -> None:
    count, dtype = 2 if session.quick else 256, session.dtype
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
        works[f"{case}, {name}, forward"] = forward
        works[f"{case}, {name}, both ways"] = lambda forward=forward: torch.autograd.grad(forward(), leaves, dy)
    passes = {"forward": 4 if residual else 3, "both ways": 11 if residual else 8}
    for name, timing in session.time(works).items():
        moved = passes[name.split(", ")[-1]] * x.numel() * x.element_size()
        session.add(name, timing, **session.bandwidth(moved, timing))


def stem(session: Session) -> None:
    """What stands first in a ResNet: its convolution with 3, 4 and 8 channels; batch norm, ReLU and pooling."""
    session.guarded("convolution", functools.partial(_stem_convolution, session))
    session.guarded("batch norm, ReLU, pooling", functools.partial(_stem_pooling, session))


def _stem_convolution(session: Session) -> None:
    (count, pixels), dtype = (2, 32) if session.quick else (256, 224), session.dtype
    x = session.images(count, 3, pixels, dtype)
    weight = (torch.randn(64, 3, 7, 7, device=session.device) / 12).to(dtype).requires_grad_()
    dy = session.images(count, 64, pixels // 2, dtype, seed=1)

    def both_ways(width: int) -> Tensor:
        images, filters = (
            functional.pad(t, (0, 0, 0, 0, 0, width - 3)).contiguous(memory_format=torch.channels_last)
            for t in (x, weight)
        )
        return torch.autograd.grad(functional.conv2d(images, filters, stride=2, padding=3), weight, dy)[0]

    works: dict[str, Work] = {
        f"convolution both ways, {width} channels": functools.partial(both_ways, width) for width in (3, 4, 8)
    }
    for name, timing in session.time(works).items():
        session.add(name, timing)


def _stem_pooling(session: Session) -> None:
    (count, pixels), dtype = (2, 16) if session.quick else (256, 112), session.dtype
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
    for name, timing in session.time(works).items():
        moved = passes[name.split(", ")[1]] * x.numel() * x.element_size()
        session.add(f"batch norm, ReLU, pooling, {name}", timing, **session.bandwidth(moved, timing))


def gram_products(session: Session) -> None:
    """Products of batch norm from the Gram matrix (kernels/gram.py) by our kernels and by the library."""
    for inputs, pixels in BOTTLENECKS[: 1 if session.quick else None]:
        case = f"{inputs} -> {4 * inputs}, {pixels}^2"
        session.guarded(case, functools.partial(_gram, session, inputs, pixels, case))


def _gram(session: Session, inputs: int, pixels: int, case: str) -> None:
    (count, pixels), outputs = (2, 8) if session.quick else (256, pixels), 4 * inputs
    channels = (inputs, outputs, outputs, inputs)
    h, g, r, dy = (session.images(count, n, pixels, session.dtype).permute(0, 2, 3, 1).flatten(0, 2) for n in channels)
    filters = (torch.randn(1, outputs, inputs, device=session.device) / inputs**0.5).to(session.dtype)
    small = torch.randn(1, inputs, inputs, device=session.device).to(session.dtype)
    bias, options = torch.zeros(1, outputs, device=session.device), {"span_rows": len(h)}
    mask = torch.full((len(h), outputs // 8), 255, dtype=torch.uint8, device=session.device)
    makers: dict[str, tuple[Callable[[bool], object], int]] = {
        "h^T h": (lambda ours: products.gram(h, h, triton=ours, **options), inputs),
        "g^T h": (lambda ours: products.gram(g, h, triton=ours, **options), inputs + outputs),
        "relu(h V^T + b + r)": (
            lambda ours: products.product(Term(h, filters.mT), Epilogue(bias, r, True), triton=ours, **options),
            inputs + 2 * outputs,
        ),
        "masked dy A + dr": (
            lambda ours: products.product(
                Term(dy, filters.mT), Epilogue(addend=r, relu_mask=mask), triton=ours, **options
            ),
            inputs + 2 * outputs,
        ),
        "g V + h M + c": (
            lambda ours: products.product(
                Term(g, filters), Epilogue(bias[:, :inputs]), other=Term(h, small), triton=ours, **options
            ),
            2 * inputs + outputs,
        ),
    }
    works, columns = {}, {}
    for name, (make, number) in makers.items():
        for way, ours in (("ours", True), ("library", False))[0 if session.is_cuda else 1 :]:
            works[f"{case}, {name}, {way}"] = functools.partial(make, ours)
            columns[f"{case}, {name}, {way}"] = number
    for name, timing in session.time(works).items():
        session.add(name, timing, **session.bandwidth(len(h) * columns[name] * h.element_size(), timing))
