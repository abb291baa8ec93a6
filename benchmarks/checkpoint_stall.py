"""Stall of a checkpoint in ms, written asynchronously and synchronously, and the cost of comparing the workers.

    python benchmarks/checkpoint_stall.py --output benchmarks/out [--repeats 20] [--recipes fashion_mnist]
    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint_stall.py --output benchmarks/out

Training steps on random images, as `train` makes them. Every round times each of these once:

    step                  a training step alone
    asynchronous          the stall as `train` has it: the state is copied, and a thread starts to write it
    synchronous           the same until the checkpoint is on the disk of `--output`
    step during a write   a step that begins when the thread starts to write
    comparison            the hash of the weights and its all-reduce, as every `--compare-every-steps`

With one worker the comparison is its hash alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabatch import recipes
from megabatch.bench.synthetic_step import SyntheticStep, measured_batch_size, synthetic_step
from megabatch.bench.timing import Timing, record, table, write_lines
from megabatch.comm.launch import World, join, sum_over_workers
from megabatch.recipe import fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointWriter
from megabatch.train.health.compare import weights_hash

STEP = "step"


def seconds_of(*works: Callable[[], object]) -> list[float]:
    """Seconds from the start of the first work to the end of each."""
    started = time.perf_counter()
    return [(work(), time.perf_counter() - started)[1] for work in works]


def time_cases(step: SyntheticStep, world: World, folder: Path, *, repeats: int) -> dict[str, Timing]:
    """Times all cases; rank 0 writes the checkpoints."""
    writer, state = CheckpointWriter(folder, fields_as_json(step.run.recipe)), step.run.state
    found: dict[str, list[float]] = {}

    def write() -> None:
        content = state.state_dict()
        if world.is_first:
            writer.write(content, step=state.step, epoch=0.0, top1=None)

    def compare_workers() -> None:
        int(sum_over_workers(weights_hash(state.module, 0), world))

    def note(**seconds: float) -> None:
        for name, value in seconds.items():
            found.setdefault(name.replace("_", " "), []).append(value)

    for _ in range(1 + repeats):
        note(step=seconds_of(step.run_step)[0])
        asynchronous, synchronous = seconds_of(write, writer.wait)
        note(asynchronous=asynchronous, synchronous=synchronous)
        write()
        note(step_during_a_write=seconds_of(step.run_step)[0])
        writer.wait()
        note(comparison=seconds_of(compare_workers)[0])
    return {name: Timing(tuple(seconds[1:])) for name, seconds in found.items()}


def measure_recipe(name: str, runtime: Runtime, world: World, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns the measurements of one recipe."""
    recipe = recipes.get(name)
    batch = measured_batch_size(recipe, given.batch, images_at_224=16 * world.world_size)
    with (
        tempfile.TemporaryDirectory(dir=given.output) as folder,
        synthetic_step(recipe, runtime, world=world, global_batch_size=batch) as step,
    ):
        path = Path(folder) / "checkpoints"
        timings = time_cases(step, world, path, repeats=given.repeats)
        checkpoint_bytes = max((file.stat().st_size for file in path.glob("*.pt")), default=0)
    share = timings["comparison"].median_s / timings[STEP].median_s / runtime.compare_every_steps
    parameters = {"recipe": name, "batch": batch, "workers": world.world_size, "checkpoint_bytes": checkpoint_bytes}
    parameters |= {"comparison_share_of_training": share, "compare_every_steps": runtime.compare_every_steps}
    records = [
        record("checkpoint_stall", f"{name}: {case}", timing, parameters=parameters, baseline=(STEP, timings[STEP]))
        for case, timing in timings.items()
    ]
    if world.is_first:
        facts = f"checkpoint {checkpoint_bytes / 2**20:.1f} MiB, comparisons take {share:.2%} of training"
        sys.stdout.write(f"{table(records)}\n{name}: batch {batch}, {world.world_size} worker(s), {facts}\n")
    return records


def main() -> None:
    """Measures all recipes and writes `checkpoint_stall.jsonl`."""
    parser = argparse.ArgumentParser(description="Time checkpoints and comparisons within training.")
    parser.add_argument("--output", type=Path, required=True, help="folder on the disk to be measured")
    parser.add_argument("--recipes", nargs="+", default=["fashion_mnist", "mikami2018_54k"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, help="global batch size; default by the image size")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    runtime = Runtime(precision="fp32", track="none")
    with join(device=runtime.device) as world:
        records = [row for name in given.recipes for row in measure_recipe(name, runtime, world, given)]
        if world.is_first:
            write_lines(given.output / "checkpoint_stall.jsonl", records)


if __name__ == "__main__":
    main()
