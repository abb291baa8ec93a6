"""The training steps that `step.py` compares, each in a process of its own: `python step_cases.py CASE MODEL`.

Says `ready` with the number of parameters once the step is warm, then takes one step for each line on its input and
answers with its seconds; the last line is its peak memory. A process of its own, because the contenders differ in how
the process is set up: ours as `megabatch train` sets itself up, the others as a script that does nothing about it.
"""

import contextlib
import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Any]

SETTINGS: dict[str, dict[str, Any]] = {
    "resnet50": {"recipe": "goyal2017_8k", "batch": 32, "pixels": 224, "classes": 1000},
    "resnet18": {"recipe": "cifar10", "batch": 128, "pixels": 32, "classes": 10},
}
SMOOTHING, RATE, MOMENTUM, DECAY = 0.1, 1e-3, 0.9, 5e-5


@contextlib.contextmanager
def ours(model: str, **runtime: Any) -> Iterator[tuple[Step, nn.Module]]:
    """`megabatch train`'s own step: joined, wired and taken as there, on random images."""
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
    net = small_images(make(num_classes=values["classes"]), values["pixels"])
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
    """timm's model, and what `timm/train.py --amp --amp-dtype bfloat16 --channels-last` does with it at each step."""
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


def torchvisions(name: str) -> Callable[..., nn.Module]:
    """torchvision's model; timm's, which is the same network, where torchvision does not load."""
    try:
        return getattr(importlib.import_module("torchvision.models"), name)
    except (ImportError, RuntimeError):
        import timm

        return lambda **options: timm.create_model(name, **options)


def small_images(net: Any, pixels: int) -> nn.Module:
    """For 32 px: a 3x3 stem of stride 1 and no pooling, in every contender alike."""
    if pixels <= 64:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def batch(model: str) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    values = SETTINGS[model]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(values["batch"], 3, values["pixels"], values["pixels"], generator=generator)
    return images, torch.randint(values["classes"], (values["batch"],), generator=generator)


def cases(model: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[tuple[Step, nn.Module]]]]:
    """Every contender by name."""

    def tv(**options: Any) -> Callable[[], contextlib.AbstractContextManager[tuple[Step, nn.Module]]]:
        return lambda: plain(torchvisions(model), model, **options)

    return {
        "megabatch train": lambda: ours(model),
        "megabatch train, memory returned": lambda: ours(model, keep_memory=False),
        "megabatch train, compiled": lambda: ours(model, compile=True),
        "megabatch train, fp32": lambda: ours(model, precision="fp32"),
        "torchvision eager fp32": tv(bf16=False, channels_last=False),
        "torchvision bf16 channels_last": tv(bf16=True, channels_last=True),
        "torchvision compiled bf16 channels_last": tv(bf16=True, channels_last=True, compiled=True),
        "timm bf16 channels_last": lambda: timms(model),
    }


def serve(case: str, model: str) -> None:
    """Answers on standard output until standard input ends."""
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
    serve(*sys.argv[1:3])
