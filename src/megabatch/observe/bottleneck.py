"""Names the bottleneck of a run from the times in its events, with the changes that help most.

    T = median seconds of an update, without the first
    input        max over workers of the wait for data
    slow worker  slowest worker's computation - that of the median worker
    exchange     exposed exchange of rank 0 - its wait for the slowest worker's computation

Each is the time that an update would lose if that cause were gone, so removing it gains a factor of at most
T / (T - time). Below `LEAST_SHARE` of T for all three, computation is the bottleneck.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megabatch.errors import UserError
from megabatch.observe.events import Event
from megabatch.observe.panels import median_phases
from megabatch.observe.run_folder import RunRecord

Cause = Literal["input", "slow worker", "exchange", "computation"]
LEAST_SHARE = 0.1
LEAST_STEPS = 5


@dataclass(frozen=True)
class Change:
    """A change of the run, and the factor of its throughput to expect at most; 1 for a measurement."""

    text: str
    gain: float


@dataclass(frozen=True)
class Diagnosis:
    """The bottleneck of a run.

    Attributes:
        seconds: of a median update, by cause; "computation" is the rest.
        step_s: seconds of a median update.
        slowest: the rank that was slowest most often; None where the run has no times by rank.
        changes: at most three, the most useful first.
    """

    cause: Cause
    seconds: dict[Cause, float]
    step_s: float
    slowest: int | None
    changes: list[Change]


def diagnose(run: RunRecord) -> Diagnosis:
    """Returns the bottleneck of `run`.

    Raises:
        UserError: the run has fewer than `LEAST_STEPS` updates with times by phase.
    """
    steps = [event for event in run.steps[1:] if event.get("phases_s") and event.get("step_s")]
    if len(steps) < LEAST_STEPS:
        raise UserError(
            f"{run.label} has {len(steps)} updates with times after the first, needed {LEAST_STEPS}; a run with "
            f"--steps {LEAST_STEPS + 1} works"
        )
    step_s = sum(median_phases(run).values())
    seconds: dict[Cause, float] = {
        "input": _median(steps, _input_s),
        "slow worker": _median(steps, _straggling_s),
        "exchange": _median(steps, _exchange_s),
    }
    largest = max(seconds, key=seconds.__getitem__)
    cause: Cause = largest if seconds[largest] >= LEAST_SHARE * step_s else "computation"
    seconds["computation"] = max(0.0, step_s - sum(seconds.values()))
    slowest = Counter(event["ranks_compute_s"]["slowest"] for event in steps if event.get("ranks_compute_s"))
    rank = slowest.most_common(1)[0][0] if slowest else None
    return Diagnosis(cause, seconds, step_s, rank, _changes(run, cause, seconds[cause], step_s, rank)[:3])


def _median(steps: list[Event], value: Callable[[Event], float]) -> float:
    return statistics.median(map(value, steps))


def _input_s(event: Event) -> float:
    waits = event.get("ranks_input_s") or {}
    return float(waits.get("max", event["phases_s"].get("input", 0.0)))


def _straggling_s(event: Event) -> float:
    ranks = event.get("ranks_compute_s")
    return float(ranks["max"] - ranks["median"]) if ranks else 0.0


def _exchange_s(event: Event) -> float:
    phases, ranks = event["phases_s"], event.get("ranks_compute_s")
    own = phases.get("forward", 0.0) + phases.get("backward", 0.0)
    waits = max(0.0, float(ranks["max"]) - own) if ranks else 0.0
    return max(0.0, float(phases.get("exchange", 0.0)) - waits)


def _changes(run: RunRecord, cause: Cause, seconds: float, step_s: float, rank: int | None) -> list[Change]:
    def gain(share: float) -> float:
        return step_s / max(step_s - share * seconds, 1e-9)

    make = {"input": _input_changes, "slow worker": _worker_changes, "exchange": _exchange_changes}
    texts = make.get(cause, _computation_changes)(run, rank)
    changes = [Change(text, gain(share)) for text, share in texts]
    return sorted(changes, key=lambda change: -change.gain)


def _input_changes(run: RunRecord, _: int | None) -> list[tuple[str, float]]:
    limited = re.search(r"--decode-threads[ =](\d+)", str(run.start.get("command") or ""))
    texts = [(f"leave out {limited[0]}: by default each core decodes", 1.0)] if limited else []
    texts.append(("`megabatch data pack --max-side` reduces images to about twice the resolution, and packs them", 1.0))
    if run.environment.get("device") == "cuda":
        texts.append(("`--decode gpu` decodes on the GPU", 1.0))
    return [*texts, ("`megabatch bench input --data ...` names the slowest stage of the input", 0.0)]


def _worker_changes(_: RunRecord, rank: int | None) -> list[tuple[str, float]]:
    return [
        (f"free the cores of rank {rank} from other programs (`top` on its machine names them)", 1.0),
        (f"compare clock and temperature of the machine of rank {rank} with others, or exchange the machine", 1.0),
    ]


def _exchange_changes(run: RunRecord, _: int | None) -> list[tuple[str, float]]:
    texts = [("`megabatch bench allreduce --tune` finds the fastest all-reduce here; the next run takes it", 1.0)]
    if run.environment.get("wire") == "fp32":
        texts.append(("`--wire bf16` sends half the bytes", 0.5))
    return [*texts, ("twice the `--set global_batch_size=...` exchanges half as often for an image", 0.5)]


def _computation_changes(run: RunRecord, _: int | None) -> list[tuple[str, float]]:
    texts = [("twice the workers, on further cores or GPUs, at the same global batch", 0.5)]
    if run.environment.get("device") == "cuda" and run.environment.get("precision") == "fp32":
        texts.append(("`--precision auto` takes a 16-bit precision where it is faster", 0.5))
    return texts
