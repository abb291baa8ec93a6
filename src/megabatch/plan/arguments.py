"""The papers' arguments, computed by the model. `python -m megabatch.plan.arguments` prints those of docs/plan.md."""

from collections.abc import Iterator

from megabatch.comm.autotune.cost import Link, Network, cost, crossover_bytes
from megabatch.plan.convergence import epochs_to_target, num_updates
from megabatch.plan.exchange import Exchange, network_of
from megabatch.plan.hardware import load_hardware
from megabatch.plan.layers import forward_flops, layers_of, num_parameters, scaling_ratio

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
    print("\n".join(arguments()))  # noqa: T201
