"""Choice of a run's precision: on a GPU bf16 or fp16, whichever is faster for the model, by measurement."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megabatch.app.model import make_model
from megabatch.app.resolve import choose_precision
from megabatch.comm.launch import World, broadcast_from_rank0
from megabatch.data.loading.batch import Batch
from megabatch.kernels import tuning
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.recipe import Recipe
from megabatch.runtime import Precision as PrecisionName
from megabatch.runtime import Runtime
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.gradients import Objective, accumulate_gradients
from megabatch.train.precision import Precision, widen_logits
from megabatch.train.weight_copies import WeightCopies


def measured_precision(recipe: Recipe, runtime: Runtime, *, world: World, micro_batch_size: int) -> Precision:
    """As `choose_precision`, but `auto` on a GPU with bf16 is bf16 or fp16, whichever computes gradients faster.

    Rank 0 times forward, backward and the loss scale's pass on one micro-batch; the choice is kept with those of
    kernels (`kernels/tuning.py`). Under torch.compile, which would take minutes, `auto` stays bf16.
    """
    usual = choose_precision(runtime, world.device)
    if runtime.precision != "auto" or runtime.compile or world.device.type != "cuda" or usual.name != "bf16":
        return usual
    name: PrecisionName = _faster(recipe, runtime, world.device, micro_batch_size) if world.is_first else "bf16"
    return choose_precision(dataclasses.replace(runtime, precision=broadcast_from_rank0(name, world)), world.device)


def _faster(recipe: Recipe, runtime: Runtime, device: torch.device, size: int) -> PrecisionName:
    kernels = tuning.table()
    # A table of its own: its lock is held while trials run, whose backward, on another thread, asks for kernels.
    table = tuning.Table(kernels.folder, timer=_seconds)
    table.on_first = kernels.announce
    layout = "channels_last" if runtime.channels_last else "contiguous"
    task = f"precision of {recipe.model}, {runtime.fusion}, {layout}"
    sizes = (size, recipe.bn_span, _pixels(recipe), recipe.num_classes, recipe.width)
    trials = {
        tuning.PLAIN: _Trial(recipe, runtime, device, "bf16", size),
        "fp16": _Trial(recipe, runtime, device, "fp16", size),
    }
    fastest = table.choose(task, sizes, torch.empty(0, device=device), trials)
    return "bf16" if fastest == tuning.PLAIN else "fp16"


class _Trial:
    """Gradients of one micro-batch of random images in one precision, captured where possible; made when first called.

    The model is the recipe's, with spans that no other worker shares.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, device: torch.device, name: str, size: int) -> None:
        self.name = name
        self._recipe, self._runtime, self._device, self._size = recipe, runtime, device, size
        self._step: CapturedStep | None = None

    def __call__(self) -> None:
        if self._step is None:
            self._step = CapturedStep(self._gradients(), warmup=2, on_failure=lambda _: None)
        pixels = _pixels(self._recipe)
        images = torch.zeros(self._size, self._recipe.image_channels, pixels, pixels, device=self._device)
        images = images.contiguous(memory_format=_layout(self._runtime))
        self._step(images, torch.zeros(self._size, dtype=torch.int64, device=self._device))

    def forget(self) -> None:
        """Releases model and graph: two of them may be too large."""
        self._step = None
        torch.cuda.empty_cache()

    def _gradients(self) -> Callable[[Tensor, Tensor], None]:
        recipe, precision = self._recipe, Precision(self.name, self._device)
        module = make_model(recipe, functools.partial(SpanBatchNorm2d, span=recipe.bn_span))
        collect_statistics(module)
        set_fusion(module, self._runtime.fusion)
        widen_logits(module)
        module.to(self._device, memory_format=_layout(self._runtime))  # type: ignore[call-overload]
        copies = WeightCopies(module if self._runtime.weight_copies else None, precision.dtype)
        objective = Objective(self._size, recipe.label_smoothing, precision, copies)

        def work(images: Tensor, labels: Tensor) -> None:
            module.zero_grad(set_to_none=True)
            accumulate_gradients(module, iter([Batch(images, labels, len(images))]), 1, objective, world_size=1)
            if precision.loss_scale is not None:
                precision.loss_scale.unscale([p.grad for p in module.parameters() if p.grad is not None])

        return work


def _seconds(trial: Callable[[], object]) -> float:
    assert isinstance(trial, _Trial)
    with torch.random.fork_rng(devices=[trial._device]):  # the run's own draws must not depend on a trial
        try:
            return tuning.gpu_seconds(trial)
        finally:
            trial.forget()


def _pixels(recipe: Recipe) -> int:
    return int(max(value for _, value in recipe.resolution))


def _layout(runtime: Runtime) -> torch.memory_format:
    return torch.channels_last if runtime.channels_last else torch.contiguous_format
