"""Steps of several workers with their collectives in a graph, on a stand-in device whose collectives gloo carries."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from stand_in_gpu import CUDA, StandInGpu
from tiny_run import run_tiny, tiny_data, tiny_recipe

from megabatch.app import run as composition
from megabatch.app.run import open_run
from megabatch.comm.exchange.capturable import cut_buckets
from megabatch.comm.launch import World
from megabatch.runtime import Runtime
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.loop import train

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
BUCKET_MIB = 0.01


class FutureOfStreams:
    """A torch future on a GPU: it orders the stream that waits for it behind the stream that has set its result."""

    def __init__(self, devices):
        assert devices == [CUDA]

    def set_result(self, value):
        self.result, self.event = value, torch.cuda.current_stream().record_event()

    def value(self):
        return self.result

    def then(self, callback):
        assert callback(self) is self.result
        return self

    def wait(self):
        torch.cuda.current_stream().wait_event(self.event)
        return self.result


@contextlib.contextmanager
def a_gpu_among_several():
    """This rank's device; NCCL's code path, on gloo's collectives, and torch's operations in place of kernels."""
    with contextlib.ExitStack() as stack:
        for name in ("kernels.dispatch", "nn.fused.norm_act", "optim.engine.fused"):
            stack.enter_context(mock.patch(f"megabatch.{name}.has_triton", return_value=False))
        stack.enter_context(mock.patch("megabatch.comm.exchange.primitives.is_native", return_value=True))
        stack.enter_context(mock.patch("megabatch.comm.exchange.state.Future", FutureOfStreams))
        yield stack.enter_context(StandInGpu())


def on_gpus(folder, recipe, runtime, warmup):
    """Losses, weights, and per step the graphs held and the collectives, of this rank."""
    world = World(dist.get_rank(), dist.get_world_size(), 0, 1, device=CUDA)
    found = {"losses": [], "graphs": []}
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(a_gpu_among_several())
        captured = functools.partial(CapturedStep, warmup=warmup)
        stack.enter_context(mock.patch.object(composition, "CapturedStep", captured))
        options = {"world": world, "folder": Path(folder), "stop_requested": lambda: False, "quiet": True}
        run = stack.enter_context(open_run(recipe, runtime, tiny_data(recipe), **options))
        inner = run.log

        def log(event):
            inner(event)
            if event["event"] == "step":
                found["losses"].append(event["loss"])
                found["graphs"].append(run.captured.num_graphs)

        run.log = log
        gpu.collectives.clear()  # of the rehearsal
        train(run)
        buckets = cut_buckets(list(run.state.module.parameters()), [BUCKET_MIB])
        found["buckets"] = [sum(4 * p.numel() for p in bucket) for bucket in buckets]
        found["recorded"] = [size for _, size, recorded in gpu.collectives if recorded]
        found["ran"] = [size for _, size, recorded in gpu.collectives if not recorded]
        found["weights"] = {name: tensor.cpu() for name, tensor in run.state.module.state_dict().items()}
    return found


def on_cpus(folder, recipe, runtime):
    return run_tiny(folder, recipe, runtime=runtime)


def times(part, whole):
    """How often `part` is a contiguous part of `whole`."""
    return sum(whole[first : first + len(part)] == part for first in range(len(whole)))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_captured_steps_of_several_workers_train_what_others_train(tmp_path, num_workers):
    recipe = tiny_recipe(num_train_images=230)  # the last batch is short, and shorter on some workers
    runtime = Runtime(precision="fp32", micro_batch_size=8, channels_last=True, bucket_mib=BUCKET_MIB, fusion="plain")
    on = dataclasses.replace(runtime, capture="on")
    captured = run_processes(num_workers, on_gpus, tmp_path / "captured", recipe, on, 3)
    uncaptured = run_processes(num_workers, on_gpus, tmp_path / "uncaptured", recipe, on, 99)
    cpu = run_processes(num_workers, on_cpus, tmp_path / "cpu", recipe, runtime)
    assert [max(found["graphs"]) for found in captured + uncaptured] == [1] * num_workers + [0] * num_workers
    assert captured[0]["losses"] == uncaptured[0]["losses"] == pytest.approx(cpu[0]["losses"], rel=1e-4)
    for name, tensor in captured[0]["weights"].items():
        for other in captured[1:] + uncaptured:
            assert torch.equal(other["weights"][name], tensor), name
        torch.testing.assert_close(cpu[0]["weights"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for found in captured if num_workers > 1 else ():
        buckets = found["buckets"]
        assert len(buckets) > 2
        # A graph holds the buckets and, in the update, the sums for batch norm's averages; nothing else.
        assert found["recorded"][: len(buckets)] == buckets
        assert len(found["recorded"]) == len(buckets) + 1
        # Replays and uncaptured steps have one order of collectives: a worker may do either while others do the other.
        assert times(found["recorded"], found["ran"]) == len(found["losses"])
    assert {str(found["ran"]) for found in captured} == {str(captured[0]["ran"])} == {str(uncaptured[0]["ran"])}
