"""Answers: the best exchange at each number of workers, epochs at other batches, plans within limits, assumptions."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megabatch.errors import MegabatchError, SettingsError
from megabatch.plan.convergence import TARGET_TOP1, epochs_to_target
from megabatch.plan.exchange import Exchange
from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.predict import Job, Phase, Prediction, predict
from megabatch.plan.step_time import speed_of, step_jitter

LOCAL_BATCHES = (16, 32, 64, 128, 256, 512)
ALGORITHMS = ("nccl", "torus", "hierarchical", "split_torus")  # nccl: the library's own, flat in `megabatch train`
BUCKETS_MIB = (25.0, 4.0, 64.0)
TIE = 0.01  # relative difference below which the earlier of two exchanges in this order is chosen: the defaults first


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the planner may choose; None: it chooses."""

    algorithm: str | None = None
    shape: tuple[int, int] | None = None
    bucket_mib: float | None = None
    wire: str = "fp16"
    local_batch: int | None = None  # images per worker; 0: the planner chooses; None: the recipe's global batch


def best(job: Job, num_workers: int, choices: Choices, cluster: Cluster, hardware: Hardware) -> Prediction:
    """Returns the fastest prediction among the exchanges, and the batches per worker, that `choices` leave open.

    An exchange must gain `TIE` over a simpler one.

    Raises SettingsError if none is possible.
    """
    jobs, reason = _jobs(job, num_workers, choices)
    found: list[Prediction] = []
    for candidate, exchange in itertools.product(jobs, exchanges(num_workers, choices, cluster)):
        try:
            found.append(predict(dataclasses.replace(candidate, exchange=exchange), num_workers, cluster, hardware))
        except SettingsError as error:
            reason = error
    if not found:
        raise reason or SettingsError(f"{num_workers} workers: no exchange is possible")
    fastest = min(made.total_s for made in found)
    return next(made for made in found if made.total_s <= (1 + TIE) * fastest)


def exchanges(num_workers: int, choices: Choices, cluster: Cluster) -> Iterator[Exchange]:
    """Yields the exchanges to compare: algorithm x grid x bucket, each overlapping the backward pass."""
    algorithms = (choices.algorithm,) if choices.algorithm else ALGORITHMS
    buckets = (choices.bucket_mib,) if choices.bucket_mib else BUCKETS_MIB
    for algorithm in algorithms:
        shapes = [choices.shape] if choices.shape or algorithm == "nccl" else _shapes(num_workers, cluster)
        for shape, bucket in itertools.product(shapes, buckets):
            yield Exchange(
                algorithm=algorithm,
                shape=None if algorithm == "nccl" else shape,
                between_hosts="nccl",
                wire=choices.wire,
                bucket_mib=bucket,
            )


def with_global_batch(job: Job, global_batch_size: int) -> Job:
    """Returns `job` at another constant batch, with the epochs to 75.9 % of the reference convergence points.

    Raises SettingsError for other models and data than ResNet-50 on ImageNet, and above the largest published batch.
    """
    if job.model != "resnet50" or job.num_images != 1_281_167:
        raise SettingsError(
            f"epochs against batch are published for resnet50 on ImageNet, not for {job.model} on {job.num_images:,} "
            "images; without --local-batch the recipe's own batch and epochs are used"
        )
    found = epochs_to_target(global_batch_size)
    epochs = found.mean
    resolution = job.phases[-1].resolution
    evaluations = job.num_evaluations * epochs / job.total_epochs
    phases = (Phase(epochs, global_batch_size, resolution),)
    return dataclasses.replace(
        job, phases=phases, num_evaluations=evaluations, top1=TARGET_TOP1, epochs_range=(found.fewest, found.most)
    )


def within(
    plans: Sequence[Prediction], *, price: float | None, budget: float | None, deadline_s: float | None
) -> list[Prediction]:
    """Returns the plans that cost at most `budget` and take at most `deadline_s`.

    Raises SettingsError if a budget has no price.
    """
    if budget is not None and price is None:
        raise SettingsError("--budget needs the price of a device-hour; --price 2.5 works")
    return [
        plan
        for plan in plans
        if (deadline_s is None or plan.total_s <= deadline_s)
        and (budget is None or price is None or plan.cost(price) <= budget)
    ]


def assumptions(cluster: Cluster, hardware: Hardware, *, price: float | None) -> list[str]:
    """Returns the assumptions behind predictions on `cluster`, with their numbers and sources."""
    stack = hardware.stack[cluster.stack]
    speed = speed_of(cluster.stack, hardware)
    fitted = "; ".join(row.source for row in stack.rows) or f"no single-node row: share of {stack.share_of}"
    return [
        f"device: {stack.device} with {stack.precision} runs at {speed.share:.0%} of its roofline and spends "
        f"{1e6 * speed.overhead_s:.1f} us per kernel ({cluster.stack}; {fitted})",
        f"stragglers: step times of workers vary by {step_jitter(hardware):.1%} (standard deviation), independently; "
        "a step takes as long as the slowest worker (fitted to scaling inside single hosts)",
        f"network: {cluster.about or 'as given'}; no other job uses it",
        "an exchange does not slow the computation that it overlaps",
        f"input: a host decodes {cluster.input_images_per_s:,.0f} images/s"
        if cluster.input_images_per_s
        else "input is never the bottleneck (input_images_per_s of a cluster sets a rate)",
        "start, compilation and checkpoints take no time",
        "collectives of batch-norm statistics cost latency and bytes, but no kernel of their own",
        "each worker's images fit into its memory, or are cut into micro-batches of the same speed",
        "epochs to 75.9 % at another batch: MLPerf's reference convergence points (tuned LARS, ResNet-50, ImageNet)",
        f"price: {price:g} per device-hour, as given" if price is not None else "price: none given, so no cost",
    ]


def _jobs(job: Job, num_workers: int, choices: Choices) -> tuple[list[Job], MegabatchError | None]:
    """The candidates for the batch, and why others are impossible."""
    if choices.local_batch is None:
        return [job], None
    jobs: list[Job] = []
    reason: MegabatchError | None = None
    for local in (choices.local_batch,) if choices.local_batch else LOCAL_BATCHES:
        try:
            jobs.append(with_global_batch(job, local * num_workers))
        except SettingsError as error:
            reason = reason or error
    return jobs, reason


def _shapes(num_workers: int, cluster: Cluster) -> list[tuple[int, int] | None]:
    """Grids whose rows are 1, 2, 4 ... hosts; None is the default grid."""
    if cluster.torus or num_workers <= cluster.devices_per_host:
        return [None]
    sides = [cluster.devices_per_host << power for power in range(8)]
    return [(side, num_workers // side) for side in sides if num_workers % side == 0 and side <= num_workers]
