"""Choice of memory layout and kernels on a CPU, by measurement at first use on a processor."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megabatch.app.measured import tuning
from megabatch.app.measured.trial import GradientTrial, is_wanted, largest_resolution, timed
from megabatch.app.model import unsafe_convolution
from megabatch.app.resolve import choose_micro_batch
from megabatch.comm.launch import World, broadcast_from_rank0
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.model_names import is_own
from megabatch.recipe import Recipe
from megabatch.runtime import Fusion, Runtime
from megabatch.train.precision import Precision

WAYS: dict[str, tuple[bool, Fusion]] = {
    "fused kernels in channels_last": (True, "auto"),
    "torch kernels in channels_last": (True, "plain"),
    tuning.PLAIN: (False, "plain"),
}
"""`Runtime.channels_last` and `Runtime.fusion` of each way to compute a step; the first possible one is the default."""
ADVANTAGE = 0.95
"""Another way is chosen if it takes less than this share of the default's time: noise should not decide."""
SECONDS = 2.0
"""Time for repeated runs of one way, of which the shortest counts."""
LONGEST_S = 100.0
"""Time after which no further way is timed: the other workers wait, for at most `Runtime.timeout_s`."""
TOLERANCE = {"fp32": 1e-2, "bf16": 0.5}
"""Largest relative difference between a way's gradients and those of torch's kernels."""


def measured_layout(
    recipe: Recipe, runtime: Runtime, precision: Precision, *, world: World, warn: Callable[[str], None]
) -> Runtime:
    """Returns `runtime` with the fastest of `WAYS` on this processor that it allows; the same on all workers.

    On a CPU rank 0 times forward and backward of a micro-batch, once for a model, its image size and the precision; the
    choice is kept in a table (`app/measured/tuning.py`) and does not depend on the number of workers. A way whose
    gradients differ from those of torch's kernels is not used, and `warn` is called. On a GPU, and under torch.compile,
    the layout is channels_last. A convolution that is unsafe in channels_last leaves only NCHW. With
    MEGABATCH_MEASURE=0 in the environment nothing is timed, and the first possible way is taken.
    """
    ways = _possible(recipe, runtime, world.device)
    if len(ways) > 1 and is_wanted():
        name = _fastest(recipe, runtime, precision, ways, world.device, warn) if world.is_first else ""
        channels_last, fusion = ways[broadcast_from_rank0(name, world)]
    else:
        (channels_last, fusion), *_ = ways.values()
    return dataclasses.replace(runtime, channels_last=channels_last, fusion=fusion)


def _possible(recipe: Recipe, runtime: Runtime, device: torch.device) -> dict[str, tuple[bool, Fusion]]:
    """The ways that runtime and recipe allow, the default first."""
    wanted = runtime.channels_last
    if device.type == "cpu" and wanted is None and unsafe_convolution(recipe, runtime.model):
        wanted = False
    if device.type == "mps" and wanted is None:
        wanted = False  # torch's default layout; nothing was measured there
    if device.type != "cpu" or runtime.compile or wanted is False:
        return {"": (wanted is not False, runtime.fusion)}
    ways = dict(WAYS)
    if runtime.fusion == "plain" or not cpu_batch_norm.is_available() or not is_own(recipe.model):
        del ways["fused kernels in channels_last"]
    if wanted:
        del ways[tuning.PLAIN]
    return ways


def _fastest(
    recipe: Recipe,
    runtime: Runtime,
    precision: Precision,
    ways: dict[str, tuple[bool, Fusion]],
    device: torch.device,
    warn: Callable[[str], None],
) -> str:
    pixels, default = largest_resolution(recipe), next(iter(ways))
    wished = choose_micro_batch(recipe, runtime, world_size=1, device=device)
    size = min(wished, max(8, 2**20 // pixels**2))  # more images of a large size only take longer
    trials: dict[str, GradientTrial] = {}
    for name, (channels_last, fusion) in reversed(ways.items()):  # torch's kernels are first: others are held to them
        changed = dataclasses.replace(runtime, channels_last=channels_last, fusion=fusion)
        trials[name] = GradientTrial(recipe, changed, precision, device, size)
    comparison = _Comparison({trial: name for name, trial in trials.items()}, default, TOLERANCE[precision.name], warn)
    sizes = (size, recipe.bn_span, pixels, recipe.num_classes, recipe.width)
    task = f"{recipe.model}, {precision.name}: {' or '.join(ways)}"
    table = tuning.table().beside(timed(comparison.seconds))
    chosen = table.choose(task, sizes, torch.empty(0, device=device), trials)
    return default if chosen not in ways or comparison.is_overdue or comparison.all_failed() else chosen


class _Comparison:
    """Times trials and holds their gradients against those of the first one."""

    def __init__(
        self, names: dict[GradientTrial, str], default: str, tolerance: float, warn: Callable[[str], None]
    ) -> None:
        self._names, self._default, self._tolerance, self._warn = names, default, tolerance, warn
        self._expected: Tensor | None = None
        self._fastest_s = float("inf")
        self._started = time.monotonic()
        self.is_overdue = False

    def seconds(self, trial: GradientTrial) -> float:
        """Seconds of the trial, those of the default in its favour.

        Raises:
            ArithmeticError: its gradients are other ones.
            OverdueError: the trials before it took too long.
        """
        name = self._names[trial]
        if time.monotonic() - self._started > LONGEST_S:
            self.is_overdue = True
            self._warn(
                f"timing kernels took over {LONGEST_S:g} s; {self._default} will run, and the next run tries again"
            )
            raise tuning.OverdueError
        found = cpu_seconds(trial, at_most_s=1.5 * self._fastest_s)
        gradient = trial.gradient()
        self._expected = gradient if self._expected is None else self._expected
        difference = float((gradient - self._expected).norm() / self._expected.norm().clamp_min(1e-30))
        if not difference <= self._tolerance:
            self._warn(f"{name}: gradients differ by {difference:.2g} from those of torch's kernels; not used")
            raise ArithmeticError(name)
        self._fastest_s = min(self._fastest_s, found)
        return found * (ADVANTAGE if name == self._default else 1.0)

    def all_failed(self) -> bool:
        """True if trials ran and none had a result."""
        return self._expected is not None and self._fastest_s == float("inf")


def cpu_seconds(work: Callable[[], object], *, at_most_s: float = float("inf")) -> float:
    """Returns the shortest time of up to `REPEATS` runs within about `SECONDS`, after one run that warms up.

    That first run is the result if it takes longer than `at_most_s`.
    """

    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    first = run()
    if first > at_most_s:
        return first
    seconds = [run()]
    while len(seconds) < tuning.REPEATS and sum(seconds) < SECONDS:
        seconds.append(run())
    return min(seconds)
