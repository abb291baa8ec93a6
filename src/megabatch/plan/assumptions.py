"""What a prediction assumes, as text for people and for JSON output."""

from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.step_time import speed_of, step_jitter


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
