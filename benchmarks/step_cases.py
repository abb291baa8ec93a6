"""The training steps that `step.py` compares, one process each: `python step_cases.py CASE MODEL [BATCH]`.

Prints `ready` with the number of parameters after warm-up, then runs one step per line of standard input and prints its
seconds; the last line is the peak memory. Each contender has its own process because they differ in process-wide
settings: ours is set up as `megabatch train` does it, the others as a script without special settings.
"""

import contextlib
import functools
import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megabatch import create_model

Step = Callable[[], Any]

SETTINGS: dict[str, dict[str, Any]] = {
    "resnet50": {"recipe": "goyal2017_8k", "batch": 32, "pixels": 224, "channels": 3, "classes": 1000},
    "resnet18": {"recipe": "cifar10", "batch": 128, "pixels": 32, "channels": 3, "classes": 10},
    "resnet8": {"recipe": "fashion_mnist", "batch": 512, "pixels": 28, "channels": 1, "classes": 10},
}
SMOOTHING, RATE, MOMENTUM, DECAY = 0.1, 1e-3, 0.9, 5e-5


@contextlib.contextmanager
def ours(model: str, **runtime: Any) -> Iterator[tuple[Step, nn.Module]]:
    """The step of `megabatch train`, built by the same code, on random images."""
    from megabatch import recipes
    from megabatch.bench.synthetic_step import synthetic_step
    from megabatch.comm.launch import join
    from megabatch.recipe import override
    from megabatch.runtime import Runtime

    values = SETTINGS[model]
    changes = {"model": model, "bn_span": values["batch"], "global_batch_size": values["batch"]}
    changes |= {"label_smoothing": SMOOTHING, "optimizer": "sgd", "weight_decay": DECAY}
    recipe = override(recipes.get(values["recipe"]), {key: str(value) for key, value in changes.items()})
    with (
        join(device="cpu") as world,
        synthetic_step(recipe, Runtime(**runtime), world=world, global_batch_size=values["batch"]) as step,
    ):
        yield step.run_step, step.run.state.module


@contextlib.contextmanager
def plain(
    make: Callable[..., nn.Module], model: str, *, bf16: bool, channels_last: bool, compiled: bool = False
) -> Iterator[tuple[Step, nn.Module]]:
    """A plain script: cross entropy with label smoothing, autocast, torch's SGD with its defaults."""
    values = SETTINGS[model]
    torch.manual_seed(0)
    net = make(num_classes=values["classes"])
    images, labels = batch(model)
    if channels_last:
        net, images = net.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    loss_of = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    forward = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(forward(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    yield step, net


@contextlib.contextmanager
def timms(model: str) -> Iterator[tuple[Step, nn.Module]]:
    """timm's model and the step of `timm/train.py --amp --amp-dtype bfloat16 --channels-last`."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    values = SETTINGS[model]
    torch.manual_seed(0)
    net = small_images(timm.create_model(model, num_classes=values["classes"]), values["pixels"])
    net = net.to(memory_format=torch.channels_last)
    images, labels = batch(model)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, opt="sgd", lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    loss_of = LabelSmoothingCrossEntropy(SMOOTHING)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    yield step, net


def torchvisions(model: str) -> Callable[..., nn.Module]:
    """Constructor of torchvision's model."""
    make = getattr(importlib.import_module("torchvision.models"), model)
    return lambda **options: small_images(make(**options), SETTINGS[model]["pixels"])


def ours_plain(model: str) -> Callable[..., nn.Module]:
    """Constructor of megabatch's model with torch's operations: the same network and arithmetic as torchvision's."""
    values = SETTINGS[model]
    return functools.partial(create_model, model, image_size=values["pixels"], in_channels=values["channels"])


def small_images(net: Any, pixels: int) -> nn.Module:
    """For 32 px: replaces the stem by a 3x3 convolution of stride 1 without pooling, as megabatch's models have."""
    if pixels <= 64:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def batch(model: str) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    values = SETTINGS[model]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(values["batch"], values["channels"], values["pixels"], values["pixels"], generator=generator)
    return images, torch.randint(values["classes"], (values["batch"],), generator=generator)


def cases(model: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[tuple[Step, nn.Module]]]]:
    """Every contender by name; the first word names the package that `missing` checks."""

    def tv(**options: Any) -> Callable[[], contextlib.AbstractContextManager[tuple[Step, nn.Module]]]:
        return lambda: plain(torchvisions(model), model, **options)

    def script(**options: Any) -> Callable[[], contextlib.AbstractContextManager[tuple[Step, nn.Module]]]:
        return lambda: plain(ours_plain(model), model, **options)

    return {
        "megabatch train": lambda: ours(model),
        "megabatch train, memory returned": lambda: ours(model, keep_memory=False),
        "megabatch train, compiled": lambda: ours(model, compile=True),
        "megabatch train, fp32": lambda: ours(model, precision="fp32"),
        "megabatch train, fp32 NCHW": lambda: ours(model, precision="fp32", channels_last=False),
        "plain eager fp32": script(bf16=False, channels_last=False),
        "plain eager fp32 channels_last": script(bf16=False, channels_last=True),
        "plain compiled fp32": script(bf16=False, channels_last=False, compiled=True),
        "plain compiled fp32 channels_last": script(bf16=False, channels_last=True, compiled=True),
        "plain bf16 channels_last": script(bf16=True, channels_last=True),
        "torchvision eager fp32": tv(bf16=False, channels_last=False),
        "torchvision bf16 channels_last": tv(bf16=True, channels_last=True),
        "torchvision compiled bf16 channels_last": tv(bf16=True, channels_last=True, compiled=True),
        "timm bf16 channels_last": lambda: timms(model),
    }


def missing(case: str, model: str) -> str | None:
    """Reason why `case` cannot run here, or None."""
    package = case.split(maxsplit=1)[0]
    if package not in {"torchvision", "timm"}:
        return None
    if model == "resnet8":
        return f"{package} has no {model}"
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision's CUDA wheels raise RuntimeError on a CPU torch
        return f"{package} cannot be imported: {error}"
    return None


def serve(case: str, model: str) -> None:
    """Runs one step per line of standard input, until it ends."""
    with cases(model)[case]() as (step, net):
        for _ in range(3):
            step()
        print("ready", sum(p.numel() for p in net.parameters()), torch.get_num_threads(), flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            step()
            print(time.perf_counter() - started, flush=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # torch.compile writes wrong code if it finds more (torch 2.13)
        importlib.import_module("torch._inductor.config").cpp.simdlen = 256
    if len(sys.argv) > 3:
        SETTINGS[sys.argv[2]]["batch"] = int(sys.argv[3])
    serve(*sys.argv[1:3])
