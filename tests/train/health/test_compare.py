"""Workers that are slow or differ are named, and the run stops before it saves weights that differ."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from tiny_run import run_tiny, tiny_recipe
from torch import nn

from megabatch.errors import DesyncError
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train.health import compare
from megabatch.train.health.compare import refuse_different, weights_hash
from megabatch.train.measuring import step_clock
from megabatch.train.measuring.step_clock import StepClock


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 300))


@pytest.mark.parametrize("name", [name for name, _ in net().named_parameters()])
def test_every_bit_of_a_small_tensor_and_some_offset_of_a_large_one_changes_the_hash(name):
    model, changed = net(), net()
    flat = changed.get_parameter(name).data.view(-1)
    place = len(flat) // 2
    flat[place : place + 1].view(torch.int32).bitwise_xor_(1)
    stride = -(-len(flat) // compare.SAMPLES_PER_TENSOR)
    assert sum(bool(weights_hash(model, n) != weights_hash(changed, n)) for n in range(stride)) == 1


def test_two_changes_do_not_cancel():
    changed = net()
    changed[1].bias.data += 1.0
    changed[1].weight.data -= 1.0
    assert weights_hash(net(), 0) != weights_hash(changed, 0)


def test_channels_last_weights_are_sampled_without_a_copy():
    model = net().to(memory_format=torch.channels_last)
    assert weights_hash(model, 0).dtype == torch.int64


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([5, 5, 7, 5], "worker 2 has no longer the weights of the other 3 after step 40"),
        ([1, 5, 5, 5, 9], "workers 0, 4 have no longer the weights of the other 3"),
        ([5, 7], "no majority of the 2 workers has the same weights: worker 1 has not that of worker 0"),
    ],
)
def test_the_ranks_that_differ_are_named(values, said):
    with pytest.raises(DesyncError, match=said):
        refuse_different("weights", values, 40)


def test_equal_values_are_accepted():
    refuse_different("weights", [3, 3, 3], 1)


def test_own_time_ends_with_the_last_forward(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(step_clock, "stamp", lambda _: 0.0)
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    for phase in ("input", "forward", "backward", "forward", "backward", "exchange", "update"):
        clock.mark(phase)
    assert clock.own_s == 10.0


RUNTIME = Runtime(precision="fp32", micro_batch_size=8, compare_every_steps=2)


def diverging_run(folder, rank, broken):
    """On `rank` one bit of the weights flips, or the position moves, in step 4, after which workers are compared."""
    from megabatch.train import loop

    def damaged(run, settings, batches):
        step = start_step(run, settings, batches)
        if settings.step == 3 and dist.get_rank() == rank:
            if broken == "weights":
                weight = next(run.state.module.parameters()).data
                weight.as_strided((1,), (1,)).view(torch.int32).bitwise_xor_(1)
            else:
                run.state.samples_seen += 1
        return step

    start_step, loop.start_step = loop.start_step, damaged
    try:
        run_tiny(folder, tiny_recipe(), runtime=RUNTIME)
    except DesyncError as error:
        return str(error)
    finally:
        loop.start_step = start_step
    return "no error"


@pytest.mark.multiprocess
def test_a_flipped_bit_stops_the_run_with_the_number_of_its_worker(tmp_path):
    said = run_processes(3, diverging_run, tmp_path / "run", 1, "weights")
    assert len(set(said)) == 1
    assert "worker 1 has no longer the weights of the other 2 after step 4" in said[0]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def slow_run(folder):
    from megabatch.train import gradients

    def slow(model, batch, objective):
        if dist.get_rank() == 2:
            time.sleep(0.1)
        return forward_loss(model, batch, objective)

    forward_loss, gradients.forward_loss = gradients.forward_loss, slow
    try:
        run_tiny(folder, tiny_recipe(total_epochs=5.0, eval_every_epochs=1e3), runtime=RUNTIME, max_steps=20)
    finally:
        gradients.forward_loss = forward_loss


@pytest.mark.multiprocess
def test_a_slow_worker_is_named_once_and_workers_with_equal_weights_go_on(tmp_path):
    run_processes(3, slow_run, tmp_path / "run")
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "workers"] == list(range(2, 21, 2))
    assert {event["slowest_rank"] for event in events if event["event"] == "workers"} == {2}
    warnings = [event["text"] for event in events if event["event"] == "warning" and "is slow" in event["text"]]
    assert len(warnings) == 1
    assert warnings[0].startswith("worker 2 is slow")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_worker_at_another_position_is_named(tmp_path):
    said = run_processes(3, diverging_run, tmp_path / "run", 0, "position")
    assert "worker 0 has no longer the position in the data of the other 2 after step 4" in said[0]
