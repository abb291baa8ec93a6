"""A loss or gradient that is not finite: the run names it, and stops, leaves the step out, or goes back."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from slow import slow_except
from tiny_run import run_tiny, tiny_data, tiny_recipe

from megabatch.data.augment import ops
from megabatch.errors import DivergedError
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train import step as step_module

RUNTIME = Runtime(precision="fp32", micro_batch_size=8, checkpoint_every="1steps")
BAD_STEP = 4


def spoil(monkeypatch, where, *, times=10**6, first_step=BAD_STEP):
    """From `first_step` on, `times` steps have a NaN in their loss sum or, on this rank, in a gradient."""
    compute, left = step_module._gradients, [times]

    def spoiled(run, settings, *rest):
        loss_sum = compute(run, settings, *rest)
        if settings.step >= first_step and left[0]:
            left[0] -= 1
            if where == "loss":
                return loss_sum * torch.nan
            list(run.state.module.parameters())[2].grad.view(-1)[0] = torch.inf
        return loss_sum

    monkeypatch.setattr(step_module, "_gradients", spoiled)


def events_of(folder, kind):
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(("where", "said"), [("loss", "the loss is nan"), ("gradient", "a gradient is not finite")])
def test_the_run_stops_before_the_update_and_says_where(where, said, tmp_path, monkeypatch):
    spoil(monkeypatch, where)
    with pytest.raises(DivergedError, match=rf"{said} at step {BAD_STEP} .*is not finite; a smaller peak_lr"):
        run_tiny(tmp_path, tiny_recipe(), runtime=RUNTIME)
    assert [event["step"] for event in events_of(tmp_path, "step")] == list(range(1, BAD_STEP + 1))
    assert (tmp_path / "checkpoints" / f"step-{BAD_STEP:08d}.json").is_file()


def test_layer_and_samples_are_named(tmp_path, monkeypatch):
    """Image 17 is white everywhere, in any crop, and becomes NaN when it is normalised."""
    normalize, data = ops.normalize, tiny_data(tiny_recipe())
    data.train.images[17] = 255

    def spoiled(images, *arguments):
        is_white = (images == 255).flatten(1).all(1)
        result = normalize(images, *arguments)
        result[is_white] = torch.nan
        return result

    monkeypatch.setattr(ops, "normalize", spoiled)
    with pytest.raises(DivergedError, match=r"loss is nan at step \d .*: an input image is not finite, from image 17;"):
        run_tiny(tmp_path, tiny_recipe(crop_padding=0), runtime=RUNTIME, data=data)


def test_a_step_that_is_left_out_changes_no_weight_and_no_statistic(tmp_path, monkeypatch):
    spoil(monkeypatch, "gradient", times=1)
    result = run_tiny(
        tmp_path, tiny_recipe(on_non_finite="skip"), runtime=Runtime(**vars(RUNTIME) | {"keep_checkpoints": 99})
    )
    before, after = (
        torch.load(tmp_path / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
        for step in (BAD_STEP, BAD_STEP + 1)
    )
    assert all(torch.equal(before["module"][name], after["module"][name]) for name in before["module"])
    assert after["samples_seen"] == before["samples_seen"] + 48
    assert after["skipped_steps"] == 1
    assert result["step"] == 10
    assert all(torch.isfinite(weight).all() for weight in result["weights"].values())
    assert f"step {BAD_STEP} changed nothing: a gradient is not finite" in events_of(tmp_path, "warning")[-1]["text"]


def test_a_run_that_only_skips_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "MOST_SKIPPED", 3)
    spoil(monkeypatch, "loss")
    with pytest.raises(DivergedError, match="3 steps in a row were not finite"):
        run_tiny(tmp_path, tiny_recipe(on_non_finite="skip"), runtime=RUNTIME)


@pytest.mark.parametrize("back", slow_except([1, 2, 99], 2))
def test_a_rollback_repeats_the_steps_from_an_earlier_checkpoint_at_a_lower_rate(back, tmp_path, monkeypatch):
    step = BAD_STEP if back == 1 else BAD_STEP - 1  # two are kept
    spoil(monkeypatch, "loss", times=1)
    recipe = tiny_recipe(on_non_finite="rollback", rollback_checkpoints=back, rollback_lr_factor=0.25)
    result = run_tiny(tmp_path / "run", recipe, runtime=RUNTIME)
    (event,) = events_of(tmp_path / "run", "rollback")
    assert (event["step"], event["from_step"], event["lr_factor"]) == (step, BAD_STEP, 0.25)
    steps = events_of(tmp_path / "run", "step")
    assert [event["step"] for event in steps] == [*range(1, BAD_STEP + 1), *range(step + 1, 11)]
    monkeypatch.undo()
    undisturbed = run_tiny(tmp_path / "other", recipe, runtime=RUNTIME)
    rates = {event["step"]: event["lr"] for event in events_of(tmp_path / "other", "step")}
    assert [event["lr"] for event in steps[BAD_STEP:]] == [0.25 * rates[number] for number in range(step + 1, 11)]
    assert result["step"] == undisturbed["step"] == 10


@pytest.mark.slow
def test_the_lower_rate_is_kept_by_a_resumed_run(tmp_path, monkeypatch):
    spoil(monkeypatch, "loss", times=1)
    recipe = tiny_recipe(on_non_finite="rollback")
    run_tiny(tmp_path, recipe, runtime=RUNTIME, max_steps=6)
    run_tiny(tmp_path, tiny_recipe(), runtime=dataclasses.replace(RUNTIME, resume=True))
    rates = [event["lr"] for event in events_of(tmp_path, "step") if event["step"] > 6]
    run_tiny(tmp_path / "other", recipe, runtime=RUNTIME)
    assert rates == [0.5 * event["lr"] for event in events_of(tmp_path / "other", "step") if event["step"] > 6]


@pytest.mark.slow
def test_a_run_that_goes_back_without_end_stops(tmp_path, monkeypatch):
    spoil(monkeypatch, "loss")
    with pytest.raises(DivergedError, match="the run went back 5 times"):
        run_tiny(tmp_path, tiny_recipe(on_non_finite="rollback"), runtime=RUNTIME)


def test_without_a_checkpoint_the_run_says_how_to_get_one(tmp_path, monkeypatch):
    spoil(monkeypatch, "loss")
    with pytest.raises(DivergedError, match="no checkpoint to go back to, --checkpoint-every 100steps"):
        run_tiny(tmp_path, tiny_recipe(on_non_finite="rollback"), runtime=Runtime(precision="fp32", micro_batch_size=8))


def workers_go_back(folder):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, "loss" if dist.get_rank() == 1 else "nothing", times=1)
        result = run_tiny(folder, tiny_recipe(on_non_finite="rollback"), runtime=RUNTIME)
    return result["step"], {name: weight.tolist() for name, weight in result["weights"].items()}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_workers_go_back_together(tmp_path):
    one, other = run_processes(2, workers_go_back, tmp_path / "run")
    assert one == other
    assert one[0] == 10
    (event,) = events_of(tmp_path / "run", "rollback")
    assert event["step"] == BAD_STEP
