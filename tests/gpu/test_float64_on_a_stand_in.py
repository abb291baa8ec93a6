"""A run on a device that has no float64, as Apple's MPS: a stand-in that refuses every float64 tensor."""

import pytest
import torch
from slow import slow_except
from stand_in_gpu import CUDA, RefusedError, StandInGpu
from tiny_run import tiny_data, tiny_recipe

from megabatch.app.run import open_run
from megabatch.comm.launch import World
from megabatch.kernels import float64
from megabatch.runtime import Runtime
from megabatch.train.loop import train


class WithoutFloat64(StandInGpu):
    def wrap(self, inner, sources=()):
        if inner.dtype == torch.float64:
            raise RefusedError("the device has no float64")
        return super().wrap(inner, sources)


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    for name in ("kernels.dispatch", "optim.engine.fused", "nn.fused.norm_act"):
        monkeypatch.setattr(f"megabatch.{name}.has_triton", lambda: False)


RANDOM_CROPS = {"augmentation": "random_resized_crop", "eval_stats": "precise", "precise_batches": 2}
NOISE_SCALE = {"max_global_batch_size": 96}
SHAMPOO = {"optimizer": "shampoo", "peak_lr": 0.1, "root_every_steps": 3}


def run_on(device, folder, recipe):
    """Losses of all steps, and the evaluations."""
    events = []
    runtime = Runtime(precision="fp32", micro_batch_size=8, capture="off")
    with open_run(
        recipe,
        runtime,
        tiny_data(recipe),
        world=World(device=device),
        folder=folder,
        stop_requested=lambda: False,
        max_steps=4,
        quiet=True,
    ) as run:
        run.log = events.append
        train(run)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, [event for event in events if event["event"] == "evaluation"]


@pytest.mark.parametrize(
    "changes",
    slow_except([{}, RANDOM_CROPS, NOISE_SCALE, SHAMPOO], RANDOM_CROPS),
    ids=["lars", "crops", "noise", "shampoo"],
)
def test_a_device_without_float64_trains_and_evaluates_what_a_cpu_does(tmp_path, monkeypatch, changes):
    recipe = tiny_recipe(**changes)
    losses, evaluations = run_on(torch.device("cpu"), tmp_path / "cpu", recipe)
    monkeypatch.setattr(float64, "WITHOUT_FLOAT64", {"cuda"})
    with WithoutFloat64():
        found, counts = run_on(CUDA, tmp_path / "device", recipe)
    assert len(losses) == 4
    assert found == pytest.approx(losses, rel=1e-4)
    assert [event["num_samples"] for event in counts] == [event["num_samples"] for event in evaluations] == [100]
    assert counts[-1]["top1"] == pytest.approx(evaluations[-1]["top1"], abs=0.02)
    assert counts[-1]["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-4)


def test_the_stand_in_refuses_float64():
    with WithoutFloat64(), pytest.raises(RefusedError, match="no float64"):
        torch.ones(2, device=CUDA).double()
