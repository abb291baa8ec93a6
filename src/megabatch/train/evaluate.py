"""Exact evaluation: every sample counts once, and the result is the same on any number of workers.

The set is cut into blocks of a fixed size by index and blocks are dealt to workers, so a sample always has the same
neighbours in its forward pass and no rounding depends on the number of workers.
"""

import contextlib
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.comm.launch import World, all_gather_objects, sum_over_workers
from megabatch.data.loading.batch import Batch
from megabatch.kernels.float64 import float64_device, in_float64
from megabatch.nn.batch_norm.evaluation_statistics import begin_precise, finish_precise
from megabatch.nn.loss import correct_counts, cross_entropy_sum
from megabatch.recipe import Recipe
from megabatch.train.precision import Precision
from megabatch.train.state import EvalData, Evaluation, Run

MOST_CONFUSION_CLASSES = 20
"""Most classes of a run whose evaluations count every pair of label and prediction."""
MOST_MISTAKES = 12


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A sample whose most likely class, of softmax `probability`, is not its label; `index` in the evaluation set."""

    index: int
    label: int
    predicted: int
    probability: float


def evaluate(
    module: nn.Module,
    data: EvalData,
    *,
    world: World,
    precision: Precision,
    block_size: int = 256,
    flip: bool = False,
    confusion: Tensor | None = None,
    mistakes: list[Mistake] | None = None,
) -> Evaluation:
    """Top-1, top-5 and mean loss of `module` over all of `data`, summed over workers; equal on every worker.

    With `flip`, logits are averaged over each image and its mirror image.

    `confusion`, [classes, classes] int64 on the device, receives the number of samples by label and predicted class.
    `mistakes` receives the `MOST_MISTAKES` wrong predictions of the highest probability, most probable first.
    """
    # samples, correct at 1, correct at 5, loss sum
    counts = torch.zeros(4, dtype=torch.float64, device=float64_device(world.device))
    was_training = module.training
    module.eval()
    first, last = share_of_blocks(data.num_samples, block_size, rank=world.rank, world_size=world.world_size)
    with torch.inference_mode():
        surest = []
        for batch in data.batches(first, last, block_size):
            logits = logits_of(module, batch.images, precision, flip=flip)
            counts += _count(logits, batch, confusion)
            if mistakes is not None:
                surest.append(_surest_mistakes(logits, batch.labels, first))
            first += batch.count
    module.train(was_training)
    if mistakes is not None:
        mistakes += _merged(surest, world)
    if confusion is not None:
        sum_over_workers(confusion, world)
    num, top1, top5, loss = sum_over_workers(counts, world).tolist()
    return Evaluation(int(num), int(top1), int(top5), loss / max(1.0, num))


def share_of_blocks(num_samples: int, block_size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Index range [first, last) of this worker: a contiguous, balanced run of whole blocks."""
    blocks = -(-num_samples // block_size)
    first, last = (blocks * r // world_size * block_size for r in (rank, rank + 1))
    return min(first, num_samples), min(last, num_samples)


def logits_of(module: nn.Module, images: Tensor, precision: Precision, *, flip: bool) -> Tensor:
    """Logits [N, K] of images [N, C, H, W], the mean of those of the images and their mirror images with `flip`."""
    with precision.autocast():
        logits: Tensor = module(images)
        return (logits + module(images.flip(3))) / 2 if flip else logits


def _surest_mistakes(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """At most `MOST_MISTAKES` rows of index, label, predicted class and probability, which is -1 where it is right."""
    probability, predicted = in_float64(logits).softmax(1).max(1)
    labels = labels.to(predicted.device)
    surest = torch.where(predicted == labels, -1.0, probability).topk(min(MOST_MISTAKES, len(labels)))
    kept = surest.indices
    return torch.stack([first + kept, labels[kept], predicted[kept], surest.values], dim=1)


def _merged(rows: list[Tensor], world: World) -> list[Mistake]:
    own = [row for row in torch.cat(rows).tolist() if row[3] >= 0] if rows else []
    found = [_mistake(*row) for part in all_gather_objects(own, world) for row in part]
    return sorted(found, key=lambda mistake: (-mistake.probability, mistake.index))[:MOST_MISTAKES]


def _mistake(index: float, label: float, predicted: float, probability: float) -> Mistake:
    return Mistake(int(index), int(label), int(predicted), probability)


def _count(logits: Tensor, batch: Batch, confusion: Tensor | None) -> Tensor:
    if confusion is not None:
        cells = batch.labels * len(confusion) + logits.argmax(1)
        confusion += torch.bincount(cells, minlength=confusion.numel()).view_as(confusion)
    top1, top5 = correct_counts(logits, batch.labels, k=(1, min(5, logits.shape[1])))
    loss = cross_entropy_sum(logits, batch.labels, label_smoothing=0.0)
    return torch.stack([in_float64(part.detach()) for part in (top1.new_tensor(batch.count), top1, top5, loss)])


def evaluate_run(run: Run) -> Evaluation:
    """Evaluates the run's weights, or their average where it keeps one, and logs the result."""
    started = time.perf_counter()
    state = run.state
    with state.average.swapped() if state.average else contextlib.nullcontext():
        if run.recipe.eval_stats == "precise":
            _recompute_statistics(run)
        block_size = eval_block_size(run.recipe)
        classes = run.recipe.num_classes
        confusion: Tensor | None = None
        mistakes: list[Mistake] | None = None
        if classes <= MOST_CONFUSION_CLASSES:
            mistakes = []
            confusion = torch.zeros(classes, classes, dtype=torch.int64, device=run.world.device)
        result = evaluate(
            state.module,
            run.eval_data,
            world=run.world,
            precision=state.precision,
            block_size=block_size,
            flip=run.recipe.eval_flip,
            confusion=confusion,
            mistakes=mistakes,
        )
    state.module.train()
    counts: dict[str, Any] = {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "num_samples": result.num_samples,
    }
    where: dict[str, Any] = {"step": state.step, "epoch": state.samples_seen / run.recipe.num_train_images}
    if confusion is not None:
        counts["confusion"] = confusion.tolist()
    if mistakes is not None and run.show_mistakes:
        run.show_mistakes(mistakes, where)
    run.log({"event": "evaluation"} | where | counts | {"seconds": time.perf_counter() - started})
    return result


def eval_block_size(recipe: Recipe) -> int:
    """Samples per evaluation forward: a function of the recipe alone, so a sample always has the same neighbours."""
    return max(8, min(512, int(512 * (32 / recipe.eval_resolution) ** 2)))


def _recompute_statistics(run: Run) -> None:
    """Batch-norm statistics of the present weights over the last `precise_batches` global batches."""
    state, recipe = run.state, run.recipe
    num_samples = recipe.precise_batches * recipe.batch_at(state.samples_seen / recipe.num_train_images)
    first = max(0, state.samples_seen - num_samples)
    settings = dataclasses.replace(run.settings_at(state.step, first), count=state.samples_seen - first)
    begin_precise(state.module)
    for batch in run.loader.batches((positions, settings.resolution) for positions in run.micro_batches(settings)):
        with torch.no_grad(), state.precision.autocast():
            state.module(batch.images)
    finish_precise(state.module)
