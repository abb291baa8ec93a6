"""Wiring of one run: everything the loop calls, put together and taken down again."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megabatch import comm, optim
from megabatch import nn as models
from megabatch.build.data import Data, build_eval_loader, build_train_loader, eval_block_size
from megabatch.build.model import apply_settings, build_model, build_optimizer
from megabatch.build.schedule import count_steps, settings_at, total_samples
from megabatch.build.site import check, choose_precision
from megabatch.comm.auto import TUNING
from megabatch.comm.launch import World, from_all, from_first
from megabatch.comm.peers import PeerMonitor, host_name
from megabatch.data.loader import TrainLoader
from megabatch.data.split import micro_batches
from megabatch.errors import CheckpointError
from megabatch.observe.curve import against_curve, curve_text
from megabatch.observe.environment import describe
from megabatch.observe.events import EventLog
from megabatch.observe.progress import Progress
from megabatch.recipe import Recipe, differing_fields, fields_as_json, from_json
from megabatch.site import Site
from megabatch.train.checkpoint import CheckpointWriter, checkpoint_path, newest_intact, open_checkpoint
from megabatch.train.evaluate import evaluate
from megabatch.train.state import Evaluation, Run, StepSettings, TrainState


@dataclass
class Sinks:
    """Where a run's facts go: the event file and the screen; both silent on all workers but the first."""

    folder: Path
    progress: Progress
    events: EventLog | None
    quiet: bool = False

    def note(self, text: str) -> None:
        """Shows one line, unless the user wants quiet."""
        if not self.quiet:
            self.progress.note(text)

    def log(self, event: dict[str, Any]) -> None:
        """Writes one event and shows what a person wants of it."""
        if self.events:
            kind = event["event"]
            self.events.write(kind, **{key: value for key, value in event.items() if key != "event"})
        if event["event"] == "step":
            self.progress.step(event["step"], event["epoch"], event["loss"], event["images_per_s"])
        elif event["event"] == "evaluation":
            self.progress.evaluation(event["epoch"], event["top1"], event["top5"], event.get("remark", ""))
        elif event["event"] == "warning":
            self.progress.note(f"warning: {event['text']}")


@contextlib.contextmanager
def open_run(
    recipe: Recipe,
    site: Site,
    data: Data,
    *,
    world: World,
    folder: Path,
    stop_requested: Callable[[], bool],
    max_steps: int | None = None,
    quiet: bool = False,
) -> Iterator[Run]:
    """Everything the loop needs, on this worker; closes files, threads and the exchange at the end.

    Raises:
        RecipeError, SiteError: recipe and site do not fit together.
        CheckpointError: `site.resume` and the folder's run is another recipe's.
    """
    micro_batch_size = check(recipe, site, world_size=world.world_size, device=world.device)
    with contextlib.ExitStack() as stack:
        sinks = _open_sinks(recipe, folder, world=world, quiet=quiet, stack=stack)
        state = _build_state(recipe, site, world=world, micro_batch_size=micro_batch_size)
        resumed_from = _resume(state, recipe, folder, world=world, sinks=sinks) if site.resume else None
        _check_same_weights(state.module, world)
        model, report = _wrap(recipe, state, site, folder, world=world, stack=stack)
        if world.is_first:
            _describe_run(sinks, recipe, site, data, world, micro_batch_size, state, resumed_from)
        loader = build_train_loader(recipe, site, data.train, world=world, on_bad_sample=_warn_of(sinks))
        stack.callback(loader.close)
        split = _split(recipe, world, micro_batch_size)
        yield Run(
            world=world,
            state=state,
            model=model,
            loader=loader,
            settings_at=lambda step, first: settings_at(
                recipe,
                step,
                first,
                global_batch_size=state.batch_policy.global_batch_size if state.batch_policy else None,
            ),
            micro_batches=split,
            apply_settings=lambda settings: apply_settings(state.optimizer, settings),
            finish_statistics=lambda: models.finish_step(state.module, eval_stats=recipe.eval_stats),
            discard_statistics=lambda: models.discard_step(state.module),
            evaluate=_evaluator(recipe, site, data, world=world, state=state, sinks=sinks, loader=loader, split=split),
            save=_saver(recipe, site, folder, world=world, state=state, sinks=sinks, stack=stack),
            log=sinks.log,
            total_samples=total_samples(recipe),
            num_train_images=recipe.num_train_images,
            label_smoothing=recipe.label_smoothing,
            eval_every_epochs=recipe.eval_every_epochs,
            eval_offset_epochs=recipe.eval_offset_epochs,
            checkpoint_every_steps=site.checkpoint_every_steps,
            max_steps=max_steps,
            stop_requested=stop_requested,
            exchange_report=report,
        )


def _open_sinks(recipe: Recipe, folder: Path, *, world: World, quiet: bool, stack: contextlib.ExitStack) -> Sinks:
    progress = Progress(count_steps(recipe), recipe.total_epochs, enabled=world.is_first, quiet=quiet)
    events = None
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        events = stack.enter_context(EventLog(folder / "events.jsonl"))
    return Sinks(folder, stack.enter_context(progress), events, quiet)


def _build_state(recipe: Recipe, site: Site, *, world: World, micro_batch_size: int) -> TrainState:
    module = build_model(recipe, site, world=world, micro_batch_size=micro_batch_size)
    policy = None
    if recipe.max_global_batch_size:
        policy = optim.NoiseScaleBatchPolicy(
            recipe.global_batch_size, unit=recipe.bn_span, max_batch_size=recipe.max_global_batch_size
        )
    average = optim.WeightAverage(module, recipe.ema_half_life_epochs) if recipe.ema_half_life_epochs else None
    precision = choose_precision(site, world.device)
    return TrainState(module, build_optimizer(recipe, module), precision, average, policy)


def _resume(state: TrainState, recipe: Recipe, folder: Path, *, world: World, sinks: Sinks) -> int | None:
    """Loads the newest intact checkpoint, the same one on every worker; the step it was written at."""

    def warn(text: str) -> None:
        sinks.log({"event": "warning", "text": text})

    checkpoints = folder / "checkpoints"
    found = newest_intact(checkpoints, on_damaged=warn) if world.is_first else None
    step = from_first(found[0].step if found else None, world)
    if step is None:
        warn("no checkpoint to resume from; the run starts at step 0")
        return None
    info, saved = found or open_checkpoint(checkpoint_path(checkpoints, step))
    refuse_other_recipe(recipe, from_json(info.recipe))
    state.load_state_dict(saved)
    return info.step


def refuse_other_recipe(recipe: Recipe, saved: Recipe) -> None:
    """CheckpointError with the differing fields, if the two recipes could train different weights."""
    differing = differing_fields(recipe, saved)
    if differing:
        words = "; ".join(f"{name} was {old}, now {new}" for name, (new, old) in differing.items())
        raise CheckpointError(f"the checkpoint is of another recipe: {words}; use its values, or another --output")


def _check_same_weights(module: nn.Module, world: World) -> None:
    digest = models.weights_digest(module)
    if from_first(digest, world) != digest:
        raise CheckpointError(
            f"worker {world.rank} starts with other weights than worker 0; all workers need the same torch version"
        )


def _wrap(
    recipe: Recipe, state: TrainState, site: Site, folder: Path, *, world: World, stack: contextlib.ExitStack
) -> tuple[nn.Module, Callable[[], dict[str, Any]] | None]:
    """The module as it is called in training: alone, or with gradients exchanged as they become ready."""
    if world.world_size == 1:
        return state.module, None
    hosts = from_all(host_name(), world)
    timeline = comm.Timeline()
    wrapped = comm.wrap(
        state.module,
        algorithm=site.all_reduce,
        wire=site.wire,
        hosts=hosts,
        tuning=TUNING.expanduser(),
        bucket_mib=site.bucket_mib,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        timeline=timeline,
    )
    stack.callback(wrapped.exchange_state.close)
    monitor = stack.enter_context(
        PeerMonitor.of_job(hosts=hosts, timeout_s=min(30.0, site.timeout_s), generation=world.num_restarts)
    )
    monitor.on_failure(wrapped.exchange_state.fail)
    stack.enter_context(monitor.guard())
    _rehearse(recipe, state, wrapped, world=world)
    wrapped.exchange_state.forget()
    timeline.finish_step()
    if world.is_first:
        stack.callback(timeline.to_chrome_trace, folder / "timeline.json")
    return wrapped, timeline.finish_step


def _rehearse(recipe: Recipe, state: TrainState, wrapped: nn.Module, *, world: World) -> None:
    """One backward of blank images, whose gradients are thrown away.

    DistributedDataParallel cuts its buckets anew after its first backward, and the order in which three or more
    workers' values are added depends on the cut. With a rehearsal every step of a run, resumed or not, has the same
    cut, so a resumed run is bitwise the run that was never stopped.
    """
    pixels = int(recipe.resolution[0][1])
    images = torch.zeros(2, recipe.image_channels, pixels, pixels, device=world.device)
    with state.precision.autocast():
        loss = wrapped(images).sum()
    torch.autograd.backward(loss)
    state.optimizer.zero_grad(set_to_none=True)
    models.discard_step(state.module)


def _split(recipe: Recipe, world: World, micro_batch_size: int) -> Callable[[StepSettings], list[range]]:
    def split(settings: StepSettings) -> list[range]:
        ranges = micro_batches(
            settings.first,
            settings.count,
            rank=world.rank,
            world_size=world.world_size,
            micro_batch_size=micro_batch_size,
            bn_span=recipe.bn_span,
        )
        # A worker without samples (only in the run's last, short batch) still takes part in the exchange.
        return ranges or [range(settings.first, settings.first)]

    return split


def _describe_run(
    sinks: Sinks,
    recipe: Recipe,
    site: Site,
    data: Data,
    world: World,
    micro_batch_size: int,
    state: TrainState,
    resumed_from: int | None,
) -> None:
    """Writes what is trained and where it runs beside the events, and says it in two lines."""
    environment = describe()
    _write_json(sinks.folder / "recipe.json", fields_as_json(recipe))
    _write_json(sinks.folder / "environment.json", environment)
    where = {
        "workers": world.world_size,
        "device": world.device.type,
        "precision": state.precision.name,
        "micro_batch_size": micro_batch_size,
        "all_reduce": site.all_reduce,
        "wire": site.wire,
        "data": data.origin,
    }
    sinks.log({"event": "run_start", "recipe": recipe.name, "resumed_from_step": resumed_from} | where | environment)
    batch = f"{recipe.global_batch_size:,}"
    accumulated = recipe.global_batch_size // (micro_batch_size * world.world_size) or 1
    sinks.note(
        f"{recipe.name}: {recipe.model}, {recipe.num_train_images:,} images from {data.origin}, "
        f"{recipe.total_epochs:g} epochs at global batch {batch}"
    )
    sinks.note(
        f"{world.world_size} worker(s) on {world.device.type}, {state.precision.name}, micro-batch {micro_batch_size} "
        f"x {accumulated} accumulated, batch-norm span {recipe.bn_span}; run folder {sinks.folder}"
    )
    if resumed_from is not None:
        sinks.note(f"resumed at step {resumed_from:,}, epoch {state.samples_seen / len(data.train):.2f}")


def _evaluator(
    recipe: Recipe,
    site: Site,
    data: Data,
    *,
    world: World,
    state: TrainState,
    sinks: Sinks,
    loader: TrainLoader,
    split: Callable[[StepSettings], list[range]],
) -> Callable[[], Evaluation]:
    eval_loader = build_eval_loader(recipe, site, data.evaluation, world=world)

    def evaluate_now() -> Evaluation:
        started = time.perf_counter()
        with state.average.swapped() if state.average else contextlib.nullcontext():
            if recipe.eval_stats == "precise":
                _recompute_statistics(recipe, state, loader, split)
            result = evaluate(
                state.module,
                eval_loader,
                world=world,
                precision=state.precision,
                block_size=eval_block_size(recipe),
            )
        state.module.train()
        state.best_top1 = max(state.best_top1, result.top1)
        sinks.log(_evaluation_event(recipe, state, result, time.perf_counter() - started))
        return result

    return evaluate_now


def _recompute_statistics(
    recipe: Recipe, state: TrainState, loader: TrainLoader, split: Callable[[StepSettings], list[range]]
) -> None:
    """Batch-norm statistics of the present weights over the last `precise_batches` global batches."""
    wanted = recipe.precise_batches * recipe.global_batch_size
    first = max(0, state.samples_seen - wanted)
    epoch = first / recipe.num_train_images
    batch = settings_at(recipe, state.step, first)
    settings = dataclasses.replace(batch, first=first, count=state.samples_seen - first, epoch=epoch)
    models.begin_precise(state.module)
    for batch_of_images in loader.batches((positions, settings.resolution) for positions in split(settings)):
        with torch.no_grad(), state.precision.autocast():
            state.module(batch_of_images.images)
    models.finish_precise(state.module)


def _evaluation_event(recipe: Recipe, state: TrainState, result: Evaluation, seconds: float) -> dict[str, Any]:
    epoch = state.samples_seen / recipe.num_train_images
    event: dict[str, Any] = {"event": "evaluation", "step": state.step, "epoch": epoch, "top1": result.top1}
    event |= {"top5": result.top5, "loss": result.loss, "num_samples": result.num_samples, "seconds": seconds}
    place = against_curve(recipe.published_curve, epoch, result.top1)
    if place is not None:
        event |= {"against_curve": place, "remark": curve_text(recipe.published_curve, epoch, result.top1)}
    return event


def _saver(
    recipe: Recipe,
    site: Site,
    folder: Path,
    *,
    world: World,
    state: TrainState,
    sinks: Sinks,
    stack: contextlib.ExitStack,
) -> Callable[[Evaluation | None], None]:
    if not world.is_first:
        return lambda _: None
    writer = CheckpointWriter(folder / "checkpoints", fields_as_json(recipe), keep=site.keep_checkpoints)
    stack.callback(writer.wait)

    def save(evaluation: Evaluation | None) -> None:
        epoch = state.samples_seen / recipe.num_train_images
        top1 = evaluation.top1 if evaluation else None
        writer.write(state.state_dict(), step=state.step, epoch=epoch, top1=top1)
        sinks.log(
            {
                "event": "checkpoint",
                "step": state.step,
                "path": f"checkpoints/{checkpoint_path(folder, state.step).name}",
            }
        )

    return save


def _warn_of(sinks: Sinks) -> Callable[[str, str], None]:
    return lambda name, reason: sinks.log({"event": "warning", "text": f"{name} was replaced: {reason}"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def load_for_evaluation(recipe: Recipe, site: Site, state: dict[str, Any], *, world: World) -> nn.Module:
    """The checkpoint's model, with its averaged weights where the recipe averages them."""
    single = World(device=world.device)
    module = build_model(recipe, site, world=single, micro_batch_size=recipe.bn_span)
    module.load_state_dict(state["module"])
    if state["average"]:
        average = optim.WeightAverage(module, recipe.ema_half_life_epochs)
        average.load_state_dict(state["average"])
        with average.swapped():
            averaged = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(averaged)
    return module
