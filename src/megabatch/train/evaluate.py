"""Exact evaluation: every sample counted once, and the same count on any number of workers.

The set is cut into blocks of a fixed size by index, whatever the world size, and blocks are dealt to workers; so each
sample is computed beside the same neighbours everywhere and no rounding depends on the worker count.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from megabatch.comm.launch import World, sum_over_workers
from megabatch.data.loading.batch import Batch
from megabatch.nn.loss import correct_counts, cross_entropy_sum
from megabatch.train.precision import Precision
from megabatch.train.state import Evaluation


class EvalData(Protocol):
    """The evaluation set in index order."""

    @property
    def num_samples(self) -> int:
        """Samples in all."""
        ...

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[Batch]:
        """Samples [first, last) in batches of `batch_size`."""
        ...


def evaluate(
    module: nn.Module,
    data: EvalData,
    *,
    world: World,
    precision: Precision,
    block_size: int = 256,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Top-1, top-5 and mean loss of `module` over all of `data`, summed over workers; equal on every worker."""
    counts = torch.zeros(4, dtype=torch.float64, device=world.device)  # samples, correct at 1, correct at 5, loss sum
    was_training = module.training
    module.eval()
    first, last = share_of_blocks(data.num_samples, block_size, rank=world.rank, world_size=world.world_size)
    with torch.inference_mode():
        for batch in data.batches(first, last, block_size):
            counts += _count(module, batch, precision)
            if on_progress:
                on_progress(batch.count)
    module.train(was_training)
    num, top1, top5, loss = sum_over_workers(counts, world).tolist()
    return Evaluation(int(num), int(top1), int(top5), loss / max(1.0, num))


def share_of_blocks(num_samples: int, block_size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Index range [first, last) of this worker: a contiguous, balanced run of whole blocks."""
    blocks = -(-num_samples // block_size)
    first, last = (blocks * r // world_size * block_size for r in (rank, rank + 1))
    return min(first, num_samples), min(last, num_samples)


def _count(module: nn.Module, batch: Batch, precision: Precision) -> Tensor:
    with precision.autocast():
        logits = module(batch.images)
    top1, top5 = correct_counts(logits, batch.labels, k=(1, min(5, logits.shape[1])))
    loss = cross_entropy_sum(logits, batch.labels, label_smoothing=0.0)
    return torch.stack([part.detach().double() for part in (top1.new_tensor(batch.count), top1, top5, loss)])
