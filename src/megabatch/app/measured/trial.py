"""A trial of a run's settings: gradients of one micro-batch of random images, to time and to compare."""

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import Tensor

from megabatch.app.measured import tuning
from megabatch.app.model import make_model, memory_format, with_spans
from megabatch.data.loading.batch import Batch
from megabatch.model_names import is_own
from megabatch.nn.fused.fuse import can_fuse, set_fusion
from megabatch.nn.initialize import initialize
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.gradients import Objective, accumulate_gradients
from megabatch.train.precision import Precision, widen_logits
from megabatch.train.weight_copies import WeightCopies


class GradientTrial:
    """Computes the gradients of `size` random images when called; the model is made at the first call.

    The model is the recipe's, with its initial weights and with spans that no other worker shares, the last one of
    fewer images if `size` is no multiple. On a GPU calls are captured where possible.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, precision: Precision, device: torch.device, size: int) -> None:
        self._recipe, self._runtime, self._size = recipe, runtime, size
        self.precision, self.device = precision, device
        self._step: Callable[[Tensor, Tensor], object] | None = None
        self._module: torch.nn.Module | None = None

    def __call__(self) -> None:
        if self._step is None:
            work = self._work()
            captured = self.device.type == "cuda"
            self._step = CapturedStep(work, warmup=2, on_failure=lambda _: None) if captured else work
        pixels, generator = largest_resolution(self._recipe), torch.Generator().manual_seed(0)
        images = torch.randn(self._size, self._recipe.image_channels, pixels, pixels, generator=generator)
        labels = torch.randint(self._recipe.num_classes, (self._size,), generator=generator)
        self._step(images.to(self.device, memory_format=memory_format(self._runtime)), labels.to(self.device))

    def gradient(self) -> Tensor:
        """The gradients of the last call as one float32 vector, without a loss scale's factor."""
        assert self._module is not None, "called before"
        parts = [p.grad.contiguous().flatten().float() for p in self._module.parameters() if p.grad is not None]
        return torch.cat(parts)

    def forget(self) -> None:
        """Releases model and graph: two of them may be too large."""
        self._step = self._module = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _work(self) -> Callable[[Tensor, Tensor], None]:
        recipe, precision = self._recipe, self.precision
        module = make_model(recipe, self._runtime.model)
        if is_own(recipe.model):
            initialize(module, recipe.initialization, seed=recipe.seed, zero_gamma=recipe.zero_gamma)
        with_spans(dataclasses.replace(recipe, bn_span=min(recipe.bn_span, self._size)), module)
        if can_fuse(module):
            set_fusion(module, self._runtime.fusion)
        widen_logits(module)
        module.to(self.device, memory_format=memory_format(self._runtime))  # type: ignore[call-overload]
        has_copies = self._runtime.weight_copies and precision.name != "fp32"
        copies = WeightCopies(module if has_copies else None, precision.dtype)
        objective = Objective(self._size, recipe.label_smoothing, precision, copies)
        self._module = module

        def work(images: Tensor, labels: Tensor) -> None:
            module.zero_grad(set_to_none=True)
            accumulate_gradients(module, iter([Batch(images, labels, len(images))]), 1, objective, world_size=1)
            if precision.loss_scale is not None:
                precision.loss_scale.unscale([p.grad for p in module.parameters() if p.grad is not None])

        return work


def is_wanted() -> bool:
    """False with MEGABATCH_MEASURE=0 in the environment: settings are then chosen by rule, not by timing trials."""
    return os.environ.get("MEGABATCH_MEASURE", "1") != "0"


def timed(seconds: Callable[["GradientTrial"], float]) -> tuning.Timer:
    """`seconds` as the timer of a table of choices: a trial draws no numbers of the run and leaves no memory behind."""

    def timer(trial: Callable[[], object]) -> float:
        assert isinstance(trial, GradientTrial)
        with torch.random.fork_rng(devices=[trial.device] if trial.device.type == "cuda" else []):
            try:
                return seconds(trial)
            finally:
                trial.forget()

    return timer


def largest_resolution(recipe: Recipe) -> int:
    """Height and width in pixels of the recipe's largest training images."""
    return int(max(value for _, value in recipe.resolution))
