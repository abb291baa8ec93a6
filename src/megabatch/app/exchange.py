"""Set-up of the gradient exchange between the workers of a run."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megabatch.comm.autotune.choose import tuning_file
from megabatch.comm.exchange.timeline import Timeline
from megabatch.comm.exchange.wrap import wrap
from megabatch.comm.launch import World, all_gather_objects
from megabatch.comm.peers import PeerMonitor, host_name
from megabatch.comm.worker_errors import end_process
from megabatch.nn.batch_norm.evaluation_statistics import discard_step
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.compiled import CompiledModel
from megabatch.train.state import TrainState


def build_exchange(
    recipe: Recipe, state: TrainState, runtime: Runtime, *, world: World, stack: contextlib.ExitStack
) -> tuple[nn.Module, Callable[[], dict[str, Any]] | None, list[str]]:
    """Returns the module to call in training, a step's exchange report or None, and the chosen exchange for the log.

    The module is compiled if `runtime.compile`. With several workers it is wrapped in DistributedDataParallel, which
    exchanges gradients during backward; with one worker there is no choice to log. `stack` stops the threads.
    """
    module = CompiledModel(state.module) if runtime.compile else state.module
    if world.world_size == 1:
        return module, None, []
    hosts = all_gather_objects(host_name(), world)
    timeline = Timeline() if world.device.type == "cpu" else None  # on a GPU it would synchronize every step
    wrapped = wrap(
        module,
        algorithm=runtime.all_reduce,
        wire=runtime.wire,
        hosts=hosts,
        tuning=tuning_file(),
        bucket_mib=runtime.bucket_mib,
        bucket_plan=runtime.bucket_plan,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        timeline=timeline,
    )
    stack.callback(wrapped.exchange_state.close)
    monitor = stack.enter_context(
        PeerMonitor.of_job(hosts=hosts, timeout_s=min(runtime.peer_timeout_s, runtime.timeout_s), on_stuck=end_process)
    )
    monitor.on_failure(wrapped.exchange_state.fail)
    stack.enter_context(monitor.guard())
    _rehearse(recipe, state, wrapped, world=world)
    wrapped.exchange_state.forget()
    if wrapped.exchange_state.scales is not None:
        state.keep_wire_scales(wrapped.exchange_state.scales)
    choice = [str(wrapped.exchange_choice)]
    if timeline is None:
        return wrapped, None, choice
    timeline.finish_step()  # drops the rehearsal's buckets
    return wrapped, lambda: {**timeline.finish_step()}, choice


def _rehearse(recipe: Recipe, state: TrainState, wrapped: nn.Module, *, world: World) -> None:
    """Runs one backward on blank images and discards the gradients.

    DistributedDataParallel rebuilds its buckets after the first backward, and the order in which the values of three
    or more workers are added depends on the bucket boundaries. After a rehearsal all steps of a run, resumed or not,
    have the same boundaries, so that a resumed run is bitwise equal to an uninterrupted one.
    """
    pixels = int(recipe.resolution[0][1])
    images = torch.zeros(2, recipe.image_channels, pixels, pixels, device=world.device)
    with state.precision.autocast():
        loss = wrapped(images).sum()
    torch.autograd.backward(loss)
    state.optimizer.zero_grad(set_to_none=True)
    discard_step(state.module)
