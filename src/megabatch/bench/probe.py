"""Measures input, computation and exchange of a recipe's update alone on this machine, and what changes would gain.

    T = max(input, gradients + update + exposed exchange) + contention

Input is fetched ahead, so that it costs only what computation does not hide. Contention is what an update takes longer
than that: parts that compete for the cores, and workers that wait for one another. A change replaces a part by its
measured or computed time; its gain is T before over T after, per image.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megabatch.app.data import Data, Source
from megabatch.bench.input_stages import measure_reduction
from megabatch.bench.synthetic_step import SyntheticStep, run_step, synthetic_step
from megabatch.comm.autotune.choose import Cell
from megabatch.comm.autotune.measure import Bench, cells_to_measure
from megabatch.comm.exchange.wrap import ExchangingDDP
from megabatch.comm.launch import World, all_gather_objects
from megabatch.comm.peers import host_name
from megabatch.data.sources.arrays import ArraySource
from megabatch.observe.bottleneck import Cause, Change
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.loop import steps
from megabatch.train.state import Run
from megabatch.train.step import start_step

MOST_STEPS = 200
EXCHANGE_REPEATS = 5


@dataclass(frozen=True)
class Parts:
    """Seconds of an update of `num_images` on the slowest worker, each part alone.

    Attributes:
        gradients_s: forward and backward without exchange.
        exchange_s: exchange of all gradients at once, with no computation beside it.
        exposed_s: what an update on images in memory takes longer with the exchange than without.
    """

    num_images: int
    input_s: float
    gradients_s: float
    update_s: float
    exchange_s: float = 0.0
    exposed_s: float = 0.0
    contention_s: float = 0.0

    def seconds(self) -> float:
        """T of the module's docstring."""
        return max(self.input_s, self.gradients_s + self.update_s + self.exposed_s) + self.contention_s

    def bottleneck(self) -> Cause:
        """The part that takes longest."""
        parts: dict[Cause, float] = {
            "computation": self.gradients_s + self.update_s,
            "input": self.input_s,
            "exchange": self.exposed_s,
        }
        return max(parts, key=parts.__getitem__)

    def scaled(self, factor: float, num_images: int) -> "Parts":
        """Input, gradients and contention times `factor`, in an update of `num_images`."""
        scaled = {name: factor * getattr(self, name) for name in ("input_s", "gradients_s", "contention_s")}
        return replace(self, num_images=num_images, **scaled)

    def at(self, num_images: int) -> "Parts":
        """An update of `num_images`: input and gradients in proportion; update and exchange do not depend on it."""
        return self.scaled(num_images / self.num_images, num_images)

    def with_input(self, share: float) -> "Parts":
        """Input and its contention with computation times `share`."""
        return replace(self, input_s=share * self.input_s, contention_s=share * self.contention_s)

    def with_exchange(self, seconds: float) -> "Parts":
        """An exchange of `seconds`; the exposed part changes in proportion."""
        return replace(self, exchange_s=seconds, exposed_s=self.exposed_s * seconds / self.exchange_s)

    def gain(self, after: "Parts") -> float:
        """Throughput of `after` over this one's."""
        return (self.seconds() / self.num_images) / (after.seconds() / after.num_images)


def probe(
    recipe: Recipe, runtime: Runtime, data: Data, *, world: World, num_images: int, seconds: float
) -> tuple[Parts, list[Change]]:
    """Returns the parts of an update of the recipe's batch, and all changes, the most useful first.

    Measures updates of `num_images`, a multiple of the batch-norm span, each part for about `seconds`. A collective.
    """
    with synthetic_step(recipe, runtime, world=world, global_batch_size=num_images, data=data) as ready:
        own_s, exchanges = _exchanges(ready.run, world)
        parts = _measure_parts(ready, world, own_s, seconds)
        variants = list(_variants(recipe, runtime, ready, world))
    whole = parts.at(recipe.batch_at(recipe.total_epochs))
    changes = [(text, whole.with_exchange(after)) for text, after in exchanges.items()]
    for text, variant in variants:
        changes.append((text, _computed(recipe, variant, whole, world, num_images, seconds)))
    changes += [*_input_changes(recipe, data.train, whole, seconds), *_scalings(whole)]
    gains = [Change(text, all_gather_objects(whole.gain(after), world)[0]) for text, after in changes]
    return whole, sorted(gains, key=lambda one: -one.gain)


def _measure_parts(ready: SyntheticStep, world: World, exchange_s: float, seconds: float) -> Parts:
    run, images_in_memory = ready.run, ready.run.loader
    linked_s = _timed(ready.run_step, world, seconds)
    gradients_s, update_s = _computation(run, world, seconds)
    run.loader = ready.loader
    input_s = _timed(_input_alone(run).__next__, world, seconds)
    together_s = _timed(_together(run).__next__, world, seconds)
    run.loader = images_in_memory
    exposed_s = min(exchange_s, max(0.0, linked_s - gradients_s - update_s))
    parts = Parts(run.recipe.global_batch_size, input_s, gradients_s, update_s, exchange_s, exposed_s)
    return replace(parts, contention_s=max(0.0, together_s - parts.seconds()))


def _computation(run: Run, world: World, seconds: float) -> tuple[float, float]:
    """Seconds of gradients and of the update, on images in memory and without exchange."""
    captured = run.captured if world.world_size == 1 else None
    alone = replace(run, model=run.state.module, exchange_report=None, captured=captured)
    updates: list[float] = []

    def step() -> None:
        updates.append(run_step(alone).clock.seconds().get("update", 0.0))

    whole_s = _timed(step, world, seconds)
    update_s = statistics.median(_slowest(updates, world))
    return max(whole_s - update_s, 1e-9), update_s


def _input_alone(run: Run) -> Iterator[None]:
    for settings, batches in steps(run):
        for batch in itertools.islice(batches, len(run.micro_batches(settings))):
            batch.labels.sum().item()  # waits for a GPU
        run.state.step, run.state.samples_seen = run.state.step + 1, settings.next_sample
        yield


def _together(run: Run) -> Iterator[None]:
    for settings, batches in steps(run):
        start_step(run, settings, batches).loss()
        yield


def _timed(work: Callable[[], object], world: World, seconds: float) -> float:
    """Mean seconds of a call on the slowest worker, after warm-up calls that also use up what was fetched ahead."""
    trial = _slowest([_seconds_of(work) for _ in range(6)], world)
    count = max(3, min(MOST_STEPS, round(seconds / max(trial[-1], 1e-6))))
    return statistics.fmean(_slowest([_seconds_of(work) for _ in range(count)], world))


def _seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _slowest(seconds: Sequence[float], world: World) -> list[float]:
    """The longest time of any worker, by call."""
    return [max(times) for times in zip(*all_gather_objects(list(seconds), world), strict=True)]


def _exchanges(run: Run, world: World) -> tuple[float, dict[str, float]]:
    """Seconds of the exchange of all gradients, and of other exchanges by their options; 0 and none for one worker."""
    if not isinstance(run.model, ExchangingDDP):
        return 0.0, {}
    own = run.model.exchange_choice.cell
    num_bytes = 4 * sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    cells = [own, *cells_to_measure(own.shape, buckets_mib=(own.bucket_mib,), wires=("fp32", "bf16"))]
    cells = [cell for cell in dict.fromkeys(cells) if cell.shape == own.shape]
    bench = Bench(all_gather_objects(host_name(), world), world.device)
    measured = bench.measure(cells, num_bytes, repeats=EXCHANGE_REPEATS)
    bench.close()
    times = {found.cell: found.median_s for found in measured}
    return times.pop(own), {_exchange_options(cell, own): seconds for cell, seconds in times.items()}


def _exchange_options(cell: Cell, own: Cell) -> str:
    algorithm = f"--all-reduce {cell.algorithm}" if cell.algorithm != own.algorithm else ""
    wire = f"--wire {cell.wire}" if cell.wire != own.wire else ""
    return f"`{' '.join(filter(None, (algorithm, wire)))}`"


def _variants(recipe: Recipe, runtime: Runtime, ready: SyntheticStep, world: World) -> Iterator[tuple[str, Runtime]]:
    """Other settings of the computation, with their options."""
    for name in ("fp32", "bf16", "fp16") if world.device.type == "cuda" else ("fp32", "bf16"):
        if name != ready.run.state.precision.name:
            yield f"`--precision {name}`", replace(runtime, precision=name)
    half = ready.micro_batch_size // 2
    if half >= recipe.bn_span and half % recipe.bn_span == 0:
        yield f"`--micro-batch-size {half}`", replace(runtime, micro_batch_size=half)


def _computed(recipe: Recipe, runtime: Runtime, whole: Parts, world: World, num_images: int, seconds: float) -> Parts:
    with synthetic_step(recipe, runtime, world=world, global_batch_size=num_images) as ready:
        gradients_s, update_s = _computation(ready.run, world, seconds)
    return replace(whole, gradients_s=gradients_s * whole.num_images / num_images, update_s=update_s)


def _input_changes(recipe: Recipe, source: Source, whole: Parts, seconds: float) -> Iterator[tuple[str, Parts]]:
    if isinstance(source, ArraySource):
        return
    pixels = int(max(value for _, value in recipe.resolution))
    if reduced := measure_reduction(source, resolution=pixels, seconds=seconds):
        side, share = reduced
        yield f"`megabatch data pack --max-side {side}` reduces the images once", whole.with_input(share)
    yield "input that costs nothing (at most); `megabatch bench input` names its slowest stage", whole.with_input(0.0)


def _scalings(whole: Parts) -> Iterator[tuple[str, Parts]]:
    yield "twice the workers, on further cores or GPUs (at most)", whole.scaled(0.5, whole.num_images)
    batch = 2 * whole.num_images
    yield f"`--set global_batch_size={batch}`, if its accuracy suffices: half as many updates", whole.at(batch)
