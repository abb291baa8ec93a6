"""Set-up of the gradient exchange between the workers of a run."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.app.measured.trial import largest_resolution
from megabatch.app.model import memory_format
from megabatch.app.resolve import choose_micro_batch
from megabatch.comm.autotune.choose import tuning_file
from megabatch.comm.exchange.timeline import Timeline
from megabatch.comm.exchange.wrap import wrap, wrap_capturable
from megabatch.comm.launch import World, all_gather_objects
from megabatch.comm.peers import PeerMonitor, host_name
from megabatch.comm.worker_errors import end_process
from megabatch.kernels.checked import agreed
from megabatch.nn.batch_norm.evaluation_statistics import discard_step
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.compiled import CompiledModel
from megabatch.train.state import TrainState


def build_exchange(
    recipe: Recipe, state: TrainState, runtime: Runtime, *, world: World, capture: bool, stack: contextlib.ExitStack
) -> tuple[nn.Module, Callable[[], dict[str, Any]] | None, list[str]]:
    """Returns the module to call in training, a step's exchange report or None, and the chosen exchange for the log.

    The module is compiled if `runtime.compile`. With several workers it is wrapped in DistributedDataParallel, or for
    `capture` in `CapturableExchange`; either exchanges gradients during backward. With one worker there is no choice to
    log. `stack` stops the threads.
    """
    module = CompiledModel(state.module) if runtime.compile else state.module
    if world.world_size == 1:
        return module, None, []
    hosts = all_gather_objects(host_name(), world)
    timeline = Timeline() if world.device.type == "cpu" else None  # on a GPU it would synchronize every step
    options: dict[str, Any] = {
        "algorithm": runtime.all_reduce,
        "wire": runtime.wire,
        "hosts": hosts,
        "tuning": tuning_file(),
        "bucket_mib": runtime.bucket_mib,
        "bucket_plan": runtime.bucket_plan,
    }
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = (
        wrap_capturable(module, **options)
        if capture
        else wrap(module, **options, device_ids=device_ids, timeline=timeline)
    )
    stack.callback(wrapped.exchange_state.close)
    monitor = stack.enter_context(
        PeerMonitor.of_job(hosts=hosts, timeout_s=min(runtime.peer_timeout_s, runtime.timeout_s), on_stuck=end_process)
    )
    monitor.on_failure(wrapped.exchange_state.fail)
    stack.enter_context(monitor.guard())
    with agreed(lambda verdicts: all_gather_objects(verdicts, world)):
        _rehearse(recipe, state, runtime, wrapped, world=world)
    wrapped.exchange_state.forget()
    if wrapped.exchange_state.scales is not None:
        state.keep_wire_scales(wrapped.exchange_state.scales)
    choice = [str(wrapped.exchange_choice)]
    if timeline is None:
        return wrapped, None, choice
    timeline.finish_step()  # drops the rehearsal's buckets
    return wrapped, lambda: {**timeline.finish_step()}, choice


def _rehearse(recipe: Recipe, state: TrainState, runtime: Runtime, wrapped: nn.Module, *, world: World) -> None:
    """Runs one backward and discards the gradients: on two blank images, on a GPU on a span of the largest images.

    On a GPU each kernel is compared with torch's operations, which takes images and weights that are not blank.

    DistributedDataParallel rebuilds its buckets after the first backward, and the order in which the values of three
    or more workers are added depends on the bucket boundaries. After a rehearsal all steps of a run, resumed or not,
    have the same boundaries, so that a resumed run is bitwise equal to an uninterrupted one.
    """
    pixels = int(recipe.resolution[0][1])
    images = torch.zeros(2, recipe.image_channels, pixels, pixels, device=world.device)
    zeros: list[Tensor] = []
    if world.device.type == "cuda":
        size = choose_micro_batch(recipe, runtime, world_size=world.world_size, device=world.device)
        shape = (min(size, recipe.bn_span), recipe.image_channels, *[largest_resolution(recipe)] * 2)
        images = torch.linspace(-1, 1, math.prod(shape), device=world.device).view(shape)
        images = images.contiguous(memory_format=memory_format(runtime))
        zeros = [p.data for p in state.module.parameters() if p.ndim == 1 and not p.any()]
    for vector in zeros:  # before a batch norm with a weight of zero gradients are zero
        vector.fill_(1)
    with state.precision.autocast():
        loss = wrapped(images).sum()
    torch.autograd.backward(loss)
    for vector in zeros:
        vector.zero_()
    state.optimizer.zero_grad(set_to_none=True)
    discard_step(state.module)
