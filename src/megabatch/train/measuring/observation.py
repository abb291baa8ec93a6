"""Measurements of a step for its events: phases, slowest worker, norms and trust ratios of layers, memory."""

import math
import resource
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch

from megabatch.comm.launch import World
from megabatch.optim.engine.trust import norms
from megabatch.optim.lars import LARS, trust_ratios
from megabatch.train.cuda_graph import Readback
from megabatch.train.measuring.step_clock import PhaseSpan, StepClock
from megabatch.train.schedule import StepSettings, count_steps
from megabatch.train.state import Run

if TYPE_CHECKING:
    from megabatch.train.step import PendingStep

EVERY_STEPS = 10
MOST_OBSERVATIONS = 200
"""Norms of all layers are read every `EVERY_STEPS` steps or more rarely, so that a long run's log stays small."""
MOST_SPANS = 60


def rank_slots(world: World, clock: StepClock, exchange: dict[str, Any]) -> list[float]:
    """Two numbers per rank, zero but for this rank's: seconds of waiting for input, and of its own computation.

    Their sum over workers has every rank's times, in the all-reduce that the loss needs anyway. Empty with one worker,
    and on a GPU, whose times are not known when the all-reduce starts.
    """
    if world.world_size == 1 or world.device.type != "cpu":
        return []
    slots, seconds = [0.0] * (2 * world.world_size), clock.seconds()
    slots[2 * world.rank] = seconds.get("input", 0.0)
    own = seconds.get("forward", 0.0) + seconds.get("backward", 0.0)
    slots[2 * world.rank + 1] = max(0.0, own - 1e-3 * exchange.get("exposed_ms", 0.0))
    return slots


def start_observation(run: Run, settings: StepSettings, *, unscaled: bool) -> Readback | None:
    """Norms of weights, then of gradients, on rank 0 in a step that is observed; None in other steps.

    `unscaled`: the gradients no longer hold the loss scale, as the update has run.
    """
    if settings.step % observation_interval(run) or not run.world.is_first:
        return None
    parameters = [parameter for _, parameter in _trained(run)]
    with torch.no_grad():
        weight_norms = norms([parameter.detach() for parameter in parameters])
        grad_norms = norms([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
        if run.state.precision.loss_scale is not None and not unscaled:
            grad_norms = grad_norms / run.state.precision.loss_scale.factor
        return Readback(torch.cat([weight_norms, grad_norms]))


def observation_interval(run: Run) -> int:
    """Steps from one observation to the next."""
    if run.observe_every_steps == 0:
        run.observe_every_steps = max(EVERY_STEPS, math.ceil(count_steps(run.recipe) / MOST_OBSERVATIONS))
    return run.observe_every_steps


def step_measurements(step: "PendingStep") -> dict[str, Any]:
    """Fields of a step's event: seconds by phase, the exchange, and the times of the slowest worker."""
    phases = step.clock.seconds()
    exposed_s = min(1e-3 * step.exchange.get("exposed_ms", 0.0), phases.get("backward", 0.0))
    if exposed_s:  # DDP's backward ends when the exchange does
        phases["backward"] -= exposed_s
        phases["exchange"] = phases.get("exchange", 0.0) + exposed_s
    event: dict[str, Any] = {"phases_s": {phase: round(seconds, 6) for phase, seconds in phases.items()}}
    event |= {key: value for key, value in step.exchange.items() if key not in {"buckets", "stages", "first_ready_s"}}
    slots = step.rank_slots()
    if slots:
        event |= {"ranks_input_s": _spread(slots[::2]), "ranks_compute_s": _spread(slots[1::2])}
    return event


def observation_event(run: Run, step: "PendingStep") -> dict[str, Any] | None:
    """The event of an observed step; None for other steps."""
    if step.norms is None:
        return None
    values = step.norms.read()
    half = len(values) // 2
    weight_norms, grad_norms = values[:half], values[half:]
    event: dict[str, Any] = {
        "event": "observation",
        "step": step.settings.step + 1,
        "epoch": step.settings.next_sample / run.recipe.num_train_images,
        "grad_norm": math.hypot(*grad_norms),
        "layers": _layers(run, step.settings, weight_norms, grad_norms),
        "spans": _spans(step),
        "buckets": step.exchange.get("buckets", []),
    }
    if run.state.batch_policy is not None and (noise := getattr(run.state.batch_policy, "noise_scale", None)):
        event["noise_scale"] = noise.value
    return event | _memory(run) | (run.device_use() if run.device_use else {})


def _layers(
    run: Run, settings: StepSettings, weight_norms: list[float], grad_norms: list[float]
) -> dict[str, dict[str, float]]:
    """Norms of each matrix and filter, with the trust ratio where LARS adapts its rate."""
    ratios = _lars_ratios(run, settings, weight_norms, grad_norms)
    found = {}
    for (name, parameter), weight, grad, ratio in zip(_trained(run), weight_norms, grad_norms, ratios, strict=True):
        if parameter.ndim > 1:
            layer = {"weight_norm": _short(weight), "grad_norm": _short(grad)}
            found[name] = layer | ({} if ratio is None else {"trust_ratio": _short(ratio)})
    return found


def _lars_ratios(
    run: Run, settings: StepSettings, weight_norms: list[float], grad_norms: list[float]
) -> list[float | None]:
    """Trust ratio of each parameter; None where the optimizer has none, or needs |g + beta w| for it."""
    groups = {parameter: group for group in run.state.optimizer.param_groups for parameter in group["params"]}
    ratios: list[float | None] = []
    for (_, parameter), weight, grad in zip(_trained(run), weight_norms, grad_norms, strict=True):
        group = groups.get(parameter, {})
        if not isinstance(run.state.optimizer, LARS) or not group.get("adapt") or group["denominator"] == "update":
            ratios.append(None)
            continue
        ratio = trust_ratios(
            torch.tensor(weight, dtype=torch.float64),
            torch.tensor(grad, dtype=torch.float64),
            trust_coefficient=group["trust_coefficient"],
            weight_decay=float(group["weight_decay"]) if group["denominator"] == "sum" else 0.0,
            eps=group["eps"],
            max_rate=settings.lr if group["trust_clip"] else None,
        )
        ratios.append(float(ratio))
    return ratios


def _spans(step: "PendingStep") -> list[list[Any]]:
    """Last `MOST_SPANS` intervals of the step: lane, name, start and length in ms; one lane per bucket."""
    phases: list[PhaseSpan] = step.clock.spans()
    spans: list[tuple[str, str, float, float]] = [
        ("step", s.phase, 1e3 * s.start_s, 1e3 * s.length_s) for s in phases[-MOST_SPANS:]
    ]
    if step.exchange.get("buckets") and isinstance(step.clock.start, float):
        base_ms = 1e3 * (step.exchange["first_ready_s"] - step.clock.start)
        for bucket in step.exchange["buckets"]:
            lane, ready, sent, done = (bucket[key] for key in ("index", "ready_ms", "sent_ms", "done_ms"))
            spans.append((f"bucket {lane}", "queued", base_ms + ready, sent - ready))
            spans.append((f"bucket {lane}", "exchange", base_ms + sent, done - sent))
    return [[lane, name, round(start, 3), round(length, 3)] for lane, name, start, length in spans]


def _memory(run: Run) -> dict[str, int]:
    """Peak memory so far, in bytes: of this process, and of the tensors on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_host_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if run.world.device.type == "cuda":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(run.world.device)
    return peak


def _spread(seconds: list[float]) -> dict[str, float]:
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {"median": round(statistics.median_low(seconds), 6), "max": round(seconds[slowest], 6), "slowest": slowest}


def _trained(run: Run) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in run.state.module.named_parameters() if parameter.requires_grad]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
