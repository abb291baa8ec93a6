"""Whether a fused model learns as the plain one: 200 steps of both on real images, from the same seeds.

    python benchmarks/fused_loss_curve.py --output DIR [--seeds 5] [--steps 200] [--fusion reference] [--device cpu]
        [--data cifar10]

Five bottleneck blocks behind ResNet's stem on images of 28 or 32 px (CIFAR-10 by default), batch 128 in spans of 64,
momentum SGD, bf16 autocast. A seed decides weights and samples. `--fusion auto --device cuda` takes the kernels. Prints
mean losses of the last 50 steps, their differences on equal seeds, and their spread over seeds; writes all losses as
JSON.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.data.fetching.fetch import load
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import Bottleneck, ResNet, convolution, reset_weights, stage
from megabatch.observe.environment import describe
from megabatch.optim.sgd import SGD

BATCH, SPAN, PEAK_LR, WARMUP_STEPS = 128, 64, 0.05, 20
LAST = 50


def net(seed: int, fusion: Any, device: torch.device, *, in_channels: int) -> nn.Module:
    """A ResNet with its stem and five bottlenecks of 32 to 128 channels; the same weights for the same seed."""
    torch.manual_seed(seed)
    norm = partial(SpanBatchNorm2d, span=SPAN)
    make = partial(Bottleneck, norm=norm)
    model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, norm=norm)
    model.conv1, model.bn1 = convolution(in_channels, 32, 7, 2), norm(32)
    model.layer1 = stage(make, 32, 32, 2, stride=1, expansion=4)
    model.layer2 = stage(make, 128, 64, 2, stride=2, expansion=4)
    model.layer3 = stage(make, 256, 128, 1, stride=2, expansion=4)
    model.layer4, model.fc = nn.Sequential(), nn.Linear(512, 10)
    reset_weights(model, zero_gamma=True)
    set_fusion(model, fusion)
    return model.to(device, memory_format=torch.channels_last)


def train(images: Tensor, labels: Tensor, seed: int, fusion: Any, steps: int) -> list[float]:
    """The mean loss of each step's batch."""
    model = net(seed, fusion, images.device, in_channels=images.shape[1])
    optimizer = SGD(model.parameters(), PEAK_LR, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for number in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=order).to(images.device)
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(1.0, (number + 1) / WARMUP_STEPS)
        batch = ((images[rows].float() - 120) / 64).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(batch)
        loss = cross_entropy_sum(logits, labels[rows], label_smoothing=0.1) / BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def summary(plain: list[list[float]], fused: list[list[float]]) -> dict[str, Any]:
    """Losses of the last steps, and how far apart curves are: smoothed over ten steps, on equal and on other seeds."""
    ends = {name: [statistics.mean(run[-LAST:]) for run in runs] for name, runs in (("plain", plain), ("fused", fused))}
    differences = [a - b for a, b in zip(ends["fused"], ends["plain"], strict=True)]
    curves = {name: torch.tensor(runs).unfold(1, 10, 10).mean(2) for name, runs in (("plain", plain), ("fused", fused))}
    return {
        "last_steps": ends,
        "mean_difference": statistics.mean(differences),
        "standard_error_of_mean_difference": statistics.stdev(differences) / len(differences) ** 0.5,
        "standard_deviation_over_seeds": {name: statistics.stdev(values) for name, values in ends.items()},
        "rms_between_curves_of_equal_seeds": float((curves["fused"] - curves["plain"]).square().mean().sqrt()),
        "rms_between_curves_of_other_seeds": float(
            (curves["plain"] - curves["plain"].roll(1, 0)).square().mean().sqrt()
        ),
        "largest_difference_in_the_first_ten_steps": float(
            (torch.tensor(fused) - torch.tensor(plain))[:, :10].abs().max()
        ),
    }


def main() -> None:
    """Trains every seed both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fusion", choices=("reference", "auto", "triton"), default="reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", choices=("cifar10", "fashion_mnist"), default="cifar10")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small, and the record is of losses, not of speed
    train_set, _ = load(options.data)
    images, labels = (t.to(options.device) for t in (train_set.images, train_set.labels))
    runs: dict[str, list[list[float]]] = {"plain": [], "fused": []}
    for seed in range(options.seeds):
        for name, fusion in (("plain", "plain"), ("fused", options.fusion)):
            runs[name].append(train(images, labels, seed, fusion, options.steps))
            print(f"seed {seed}, {name}: {statistics.mean(runs[name][-1][-LAST:]):.4f}", flush=True)
    found = summary(runs["plain"], runs["fused"])
    print(json.dumps(found, indent=1))
    parameters = {key: str(value) for key, value in vars(options).items() if key != "output"}
    options.output.mkdir(parents=True, exist_ok=True)
    everything = {"parameters": parameters, "environment": describe(), **found, "losses": runs}
    (options.output / "losses.json").write_text(json.dumps(everything) + "\n")


if __name__ == "__main__":
    main()
