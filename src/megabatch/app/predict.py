"""Predictions of a trained model on images without labels, preprocessed as in evaluation."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megabatch.app.data import build_eval_loader
from megabatch.app.load import load_for_evaluation
from megabatch.app.resolve import choose_precision
from megabatch.comm.launch import World
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.sources.images import UnlabelledImages
from megabatch.errors import DataError, SettingsError
from megabatch.kernels.float64 import in_float64
from megabatch.recipe import from_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo
from megabatch.train.evaluate import eval_block_size, logits_of


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image with their probabilities, descending; `error` if it cannot be read."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    info: CheckpointInfo,
    state: dict[str, Any],
    source: UnlabelledImages,
    runtime: Runtime,
    *,
    world: World,
    num_classes: int = 1,
) -> Iterator[Prediction]:
    """Yields a prediction per image, in order, with the `num_classes` most likely classes.

    Images are resized, cropped and normalised, and batches are cut, as in `megabatch evaluate`; the probability is the
    softmax of the logits. An unreadable image gives a prediction with `error`.

    Raises:
        SettingsError: the model has fewer than `num_classes` classes.
        DataError: no image can be read.
    """
    recipe, names = from_json(info.recipe), info.names()
    if num_classes > len(names):
        raise SettingsError(f"--top {num_classes}: the model has {len(names)} classes; --top {len(names)} works")
    precision = choose_precision(runtime, world.device)
    model = load_for_evaluation(recipe, runtime, state, world=world).eval()
    tolerant = dataclasses.replace(runtime, max_bad_share=1.0)
    with contextlib.closing(build_eval_loader(recipe, tolerant, source, world=world)) as loader:
        first = 0
        with torch.inference_mode(), _none_readable(loader, source):
            for batch in loader.batches(0, len(source), eval_block_size(recipe)):
                logits = logits_of(model, batch.images, precision, flip=recipe.eval_flip)
                top = in_float64(logits).softmax(1).topk(num_classes)
                yield from _rows(source, names, loader, first, top.values, top.indices)
                first += batch.count


def _rows(
    source: UnlabelledImages, names: tuple[str, ...], loader: EvalLoader, first: int, values: Tensor, classes: Tensor
) -> Iterator[Prediction]:
    bad = loader.bad_samples
    for index, (row, numbers) in enumerate(zip(values.tolist(), classes.tolist(), strict=True), first):
        if index in bad:
            yield Prediction(source.name(index), error=bad[index])
        else:
            yield Prediction(source.name(index), tuple((names[k], p) for k, p in zip(numbers, row, strict=True)))


@contextlib.contextmanager
def _none_readable(loader: EvalLoader, source: UnlabelledImages) -> Iterator[None]:
    """The loader replaces unreadable images by others, which fails if there are none: says so in terms of images."""
    try:
        yield
    except DataError:
        if len(loader.bad_samples) < len(source):
            raise
        reason = loader.bad_samples[0]
        raise DataError(
            f"none of the {len(source)} images can be read; {source.name(0)}: {reason}; a JPEG or PNG file works"
        ) from None
