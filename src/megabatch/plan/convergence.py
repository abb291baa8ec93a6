"""Epochs to 75.9 % top-1 of ResNet-50 on ImageNet against the global batch, from MLPerf's reference convergence points.

Source: mlcommons/logging, training_4.0.0, rcps_resnet.json: tuned LARS, 10 to 28 runs per batch size; mean and range.
Also the models of You et al. 2017 (arXiv:1709.05011) for the number of updates and the time of a run.
"""

import math
from dataclasses import dataclass

from megabatch.errors import SettingsError

TARGET_TOP1 = 0.759
REFERENCE_POINTS = (  # batch, mean epochs, fewest, most
    (1_632, 35.0, 33, 37),
    (3_264, 35.2, 34, 37),
    (4_096, 40.0, 39, 42),
    (8_192, 42.0, 41, 44),
    (13_056, 45.4, 44, 46),
    (32_768, 56.0, 55, 57),
    (49_152, 68.0, 67, 69),
    (58_880, 79.9, 78, 81),
    (65_536, 84.5, 83, 86),
    (67_840, 85.9, 85, 87),
)


@dataclass(frozen=True)
class Epochs:
    """Epochs to the target: mean and range over the published runs, linear in log(batch) between table rows."""

    mean: float
    fewest: float
    most: float


def epochs_to_target(global_batch_size: int) -> Epochs:
    """Returns the epochs to 75.9 % at `global_batch_size`; batches below the table's smallest need as many as it.

    Raises SettingsError above 67,840, the largest batch with published runs.
    """
    smallest, largest = REFERENCE_POINTS[0], REFERENCE_POINTS[-1]
    if global_batch_size > largest[0]:
        raise SettingsError(
            f"global batch {global_batch_size:,}: no published run reached 75.9 % with more than {largest[0]:,}; "
            f"{largest[0]:,} works"
        )
    if global_batch_size <= smallest[0]:
        return Epochs(*smallest[1:])
    above = next(index for index, point in enumerate(REFERENCE_POINTS) if point[0] >= global_batch_size)
    low, high = REFERENCE_POINTS[above - 1], REFERENCE_POINTS[above]
    share = math.log(global_batch_size / low[0]) / math.log(high[0] / low[0])
    return Epochs(*(a + share * (b - a) for a, b in zip(low[1:], high[1:], strict=True)))


def num_updates(epochs: float, num_images: int, global_batch_size: float) -> float:
    """Updates of a run, I = E n / B (You et al. 2017)."""
    return epochs * num_images / global_batch_size


def tree_time_s(
    *, updates: float, compute_s: float, num_workers: int, latency_s: float, num_bytes: float, bytes_per_s: float
) -> float:
    """Seconds of a run by You et al. 2017: I (t_comp + log2 P (alpha + |W| beta)), an all-reduce by a tree."""
    return updates * (compute_s + math.log2(num_workers) * (latency_s + num_bytes / bytes_per_s))
