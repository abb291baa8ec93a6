"""Predictions of published multi-node runs, and the papers' arguments: the tables of docs/plan.md.

`python -m megabatch.plan.validation` prints both.
All rows go through `predict`, with the hardware of the package and the facts of `published.toml`.
"""

import dataclasses
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from megabatch.comm.autotune.cost import Link, Network, cost, crossover_bytes
from megabatch.plan.convergence import epochs_to_target, num_updates
from megabatch.plan.exchange import Exchange, network_of
from megabatch.plan.hardware import Hardware, load_hardware
from megabatch.plan.layers import forward_flops, layers_of, num_parameters, scaling_ratio
from megabatch.plan.predict import Job, Phase, predict


@dataclass(frozen=True)
class Comparison:
    """A published value and its prediction, in `unit`: "s", "images/s" or "%"."""

    name: str
    unit: str
    published: float
    predicted: float
    explanation: str = ""

    @property
    def error(self) -> float:
        """Relative error of the predicted time: positive if the prediction is too slow."""
        ratio = self.predicted / self.published
        return ratio - 1 if self.unit == "s" else 1 / ratio - 1


def published_rows() -> list[dict[str, Any]]:
    """Returns the rows of `published.toml`."""
    text = resources.files("megabatch.plan").joinpath("published.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["row"]
    return rows


def compare(row: dict[str, Any], hardware: Hardware) -> Comparison:
    """Returns the comparison of one row."""
    cluster = hardware.find_cluster(row["cluster"])
    cluster = dataclasses.replace(cluster, stack=row.get("stack", cluster.stack))
    job, workers = _job(row), row["workers"]
    predicted = predict(job, workers, cluster, hardware)
    why = row.get("explanation", "")
    if "time_s" in row:
        return Comparison(row["name"], "s", row["time_s"], predicted.total_s, why)
    if "images_per_s" in row:
        return Comparison(row["name"], "images/s", row["images_per_s"], predicted.images_per_s, why)
    fewer = row["baseline_workers"]
    alone = predict(_at_equal_local_batch(job, workers, fewer), fewer, cluster, hardware)
    efficiency = predicted.images_per_s / workers / (alone.images_per_s / fewer)
    return Comparison(row["name"], "%", 100 * row["efficiency"], 100 * efficiency, why)


def _at_equal_local_batch(job: Job, workers: int, fewer: int) -> Job:
    """`job` with the images per worker that it has on `workers`, on `fewer` workers in the default grid."""
    phases = tuple(Phase(it.epochs, it.global_batch_size * fewer // workers, it.resolution) for it in job.phases)
    return dataclasses.replace(job, phases=phases, exchange=dataclasses.replace(job.exchange, shape=None))


def _job(row: dict[str, Any]) -> Job:
    options = dict(row["exchange"])
    if "shape" in options:
        options["shape"] = tuple(options["shape"])
    resolution = row.get("resolution", 224)
    phases = row.get("phases") or [(epochs_to_target(row["batch"]).mean, row["batch"])]
    return Job(
        phases=tuple(Phase(epochs, batch, resolution) for epochs, batch in phases),
        exchange=Exchange(**options),
        model=row.get("model", "resnet50"),
        bn_span=row.get("bn_span", 1),
        num_evaluations=row.get("evaluations", 0),
        eval_resolution=resolution,
    )


def table(rows: Sequence[Comparison]) -> Iterator[str]:
    """Yields the lines of the markdown table, and a summary."""
    yield "| run | published | predicted | error of the time | |"
    yield "|---|---|---|---|---|"
    for row in rows:
        digits = ",.1f" if row.unit == "s" and row.published < 200 else ",.0f"
        values = f"{row.published:{digits}} {row.unit} | {row.predicted:{digits}} {row.unit}"
        yield f"| {row.name} | {values} | {row.error:+.0%} | {row.explanation} |"
    errors = sorted(abs(row.error) for row in rows)
    within = sum(error <= 0.1 for error in errors)
    yield ""
    yield (
        f"{len(rows)} rows: median absolute error {statistics.median(errors):.1%}, largest {errors[-1]:.0%}, "
        f"within 10 %: {within}, within 35 %: {sum(error <= 0.35 for error in errors)}."
    )


STEP = Network(Link(1.0, float("inf")), Link(1.0, float("inf")), direct=False)  # counts the steps of an algorithm


def arguments() -> Iterator[str]:
    """Yields the lines of a markdown table: argument, by the model."""
    yield "| argument | by the model |"
    yield "|---|---|"
    for x, y in ((32, 32), (32, 64), (48, 72)):
        ring, torus = (cost(name, 0.0, (x, y), STEP).latency_s for name in ("flat", "torus"))
        yield f"| steps of an all-reduce, {x * y:,} workers (Mikami et al.) | ring {ring:,.0f}, torus {torus:,.0f} |"
    for name, side in (("alexnet", 227), ("resnet50", 224)):
        layers = layers_of(name, resolution=side)
        counts = f"{forward_flops(layers) / 1e9:.2f} GFLOP, {num_parameters(layers) / 1e6:.1f} M parameters"
        yield f"| scaling ratio of {name} (You et al.) | {scaling_ratio(layers):.1f} ({counts}) |"
    hardware = load_hardware()
    for workers in (64, 1024):
        shape = (4, workers // 4)
        network = network_of(Exchange(), shape, hardware.find_cluster("abci"), hardware)
        size = crossover_bytes("tree", "flat", shape, network)
        yield f"| {workers:,} V100 of ABCI: from this size a ring is faster than a tree | {size / 1e6:,.1f} MB |"
    for batch in (8_192, 32_768, 65_536):
        epochs = epochs_to_target(batch)
        updates = num_updates(epochs.mean, 1_281_167, batch)
        yield (
            f"| epochs and updates to 75.9 % at batch {batch:,} (MLPerf) | "
            f"{epochs.mean:g} ({epochs.fewest:g} to {epochs.most:g}), {updates:,.0f} |"
        )


if __name__ == "__main__":
    print("\n".join([*table([compare(row, load_hardware()) for row in published_rows()]), "", *arguments()]))  # noqa: T201
