"""However a step is taken, replayed from a graph, read late, compiled, in fp16, it trains what it trains as written."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from ranks import run_processes
from tiny_run import run_tiny, tiny_data, tiny_recipe
from torch.utils import _pytree as pytree

from megabatch.app.model import build_model, build_optimizer
from megabatch.app.resolve import check, choose_capture
from megabatch.app.run import open_run
from megabatch.app.state import build_state
from megabatch.comm.launch import World
from megabatch.errors import DivergedError, SettingsError
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train import step as update
from megabatch.train.cuda_graph import CapturedStep, Readback
from megabatch.train.loop import train
from megabatch.train.precision import LossScale, Precision
from megabatch.train.schedule import apply_settings, settings_at
from megabatch.train.step import captured_work

FP32 = Runtime(precision="fp32", micro_batch_size=24)
CUDA = World(device=torch.device("cuda", 0))
TWO = dataclasses.replace(CUDA, world_size=2)


class StandIn:
    """A graph whose replay does the work again; recording leaves all of `state` as it was."""

    def __init__(self, state):
        self.state, self.num_replays = state, 0

    def run(self, work):
        return work()

    def record(self, work):
        before = [tensor.clone() for tensor in self.state()]
        own = pytree.tree_map(torch.clone, work())
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)

        def replay():
            self.num_replays += 1
            for target, value in zip(pytree.tree_leaves(own), pytree.tree_leaves(work()), strict=True):
                target.copy_(value)

        return own, replay


def tensors_of(run):
    optimizer = [value for state in run.state.optimizer.state.values() for value in state.values()]
    optimizer += [value for group in run.state.optimizer.param_groups for value in group.values()]
    model = [*run.state.module.parameters(), *run.state.module.buffers()]
    copies = run.state.copies.tensors.values()
    scale = vars(run.state.precision.loss_scale).values() if run.state.precision.loss_scale else ()
    return [t.detach() for t in (*model, *optimizer, *copies, *scale) if isinstance(t, torch.Tensor)]


def run_captured(folder, recipe, runtime):
    """As `run_tiny`, but steps are replayed where a graph would be."""
    losses = []
    with open_run(
        recipe,
        runtime,
        tiny_data(recipe),
        world=World(),
        folder=Path(folder),
        stop_requested=lambda: False,
        quiet=True,
    ) as run:
        recorder = StandIn(lambda: tensors_of(run))
        run.captured = CapturedStep(functools.partial(captured_work, run), recorder=recorder)
        inner = run.log
        run.log = lambda event: (inner(event), losses.append(event["loss"]) if event["event"] == "step" else None)
        evaluation = train(run)
        weights = {name: tensor.clone() for name, tensor in run.state.module.state_dict().items()}
    return {"losses": losses, "weights": weights, "correct": evaluation.correct1, "replays": recorder.num_replays}


@pytest.mark.parametrize(
    ("changes", "runtime"),
    [
        ({"optimizer": "lars"}, FP32),
        pytest.param({"optimizer": "sgd", "peak_lr": 0.1, "mixup_alpha": 0.2}, FP32, marks=pytest.mark.slow),
        pytest.param({"optimizer": "lamb", "peak_lr": 0.01}, FP32, marks=pytest.mark.slow),
        ({"optimizer": "muon", "peak_lr": 0.05, "nesterov": True, "normalize_weights": True}, FP32),
        pytest.param(
            {"momentum_form": "inside_corrected", "weight_decay_follows_lr": True}, FP32, marks=pytest.mark.slow
        ),
        ({"resolution": ((0.0, 8.0), (1.5, 12.0)), "ema_half_life_epochs": 0.3}, FP32),
        ({"batch_sizes": ((0.0, 48.0), (1.5, 24.0))}, FP32),
        ({}, Runtime(precision="fp16", micro_batch_size=24)),
        ({}, Runtime(precision="bf16", micro_batch_size=24)),
    ],
    ids=["lars", "sgd, mixed labels", "lamb", "muon", "corrected momentum", "resolutions", "batches", "fp16", "bf16"],
)
def test_replayed_steps_train_what_steps_as_written_train(tmp_path, monkeypatch, changes, runtime):
    recipe = tiny_recipe(total_epochs=3.0, **changes)
    plain = run_tiny(tmp_path / "plain", recipe, runtime=runtime)
    with_tensors = lambda *args, **options: build_optimizer(*args, **(options | {"capturable": True}))  # noqa: E731
    monkeypatch.setattr("megabatch.app.state.build_optimizer", with_tensors)
    replayed = run_captured(tmp_path / "replayed", recipe, runtime)
    assert replayed["replays"] >= 5
    assert replayed["losses"] == pytest.approx(plain["losses"], rel=1e-4 if runtime.precision == "fp32" else 1e-2)
    assert replayed["correct"] == pytest.approx(plain["correct"], abs=1)
    tolerance = 1e-3 if runtime.precision == "fp32" else 2e-2
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(replayed["weights"][name], tensor, rtol=tolerance, atol=0.1 * tolerance, msg=name)


def test_a_rate_in_a_tensor_is_overwritten_and_not_replaced():
    recipe = tiny_recipe(optimizer="sgd", weight_decay_follows_lr=True, weight_decay=0.01)
    module = build_model(recipe, FP32, world=World(), micro_batch_size=8)
    optimizer = build_optimizer(recipe, module, capturable=True)
    tensors = [group[name] for group in optimizer.param_groups for name in ("lr", "momentum", "weight_decay")]
    settings = settings_at(recipe, 3, 3 * 48)
    apply_settings(optimizer.param_groups, settings)
    found = [group[name] for group in optimizer.param_groups for name in ("lr", "momentum", "weight_decay")]
    assert all(one is other for one, other in zip(tensors, found, strict=True))
    assert float(found[0]) == pytest.approx(settings.lr)
    decays = sorted(float(group["weight_decay"]) for group in optimizer.param_groups)
    assert decays == pytest.approx([0.0, 0.01 * settings.weight_decay_factor])


@pytest.mark.parametrize(
    ("recipe", "runtime", "world", "chosen"),
    [
        ({}, Runtime(), World(), False),
        ({}, Runtime(), CUDA, True),
        ({}, Runtime(capture="on"), CUDA, True),
        ({}, Runtime(capture="off"), CUDA, False),
        ({}, Runtime(), TWO, False),
        ({}, Runtime(capture="on"), TWO, True),
        ({"max_global_batch_size": 96}, Runtime(), CUDA, False),
        ({"optimizer": "muon"}, Runtime(), CUDA, True),
        ({"optimizer": "shampoo"}, Runtime(), CUDA, False),
    ],
)
def test_auto_captures_on_one_gpu_where_nothing_looks_into_the_step(recipe, runtime, world, chosen):
    assert choose_capture(tiny_recipe(**recipe), runtime, world).chosen is chosen


@pytest.mark.parametrize(
    ("recipe", "runtime", "world", "reason"),
    [
        ({}, {}, World(), "there is no GPU"),
        ({"optimizer": "muon"}, {}, TWO, "Muon divides its iterations among workers"),
        ({}, {"micro_batch_size": 4}, TWO, "workers share batch-norm spans"),
    ],
)
def test_capture_that_cannot_be_is_refused_with_the_reason(recipe, runtime, world, reason):
    with pytest.raises(SettingsError, match=f"{reason}; capture=auto works"):
        choose_capture(tiny_recipe(**recipe), Runtime(**runtime, capture="on"), world)
    assert f"not captured ({reason})" in choose_capture(tiny_recipe(**recipe), Runtime(**runtime), world).reason


class LateReadback(Readback):
    """As on a GPU: nobody may look before the next step was started."""

    is_late = True


def test_losses_that_are_read_a_step_late_change_nothing(tmp_path, monkeypatch):
    recipe = tiny_recipe()
    runtime = dataclasses.replace(FP32, checkpoint_every="3steps")
    prompt = run_tiny(tmp_path / "prompt", recipe, runtime=runtime)
    monkeypatch.setattr(update, "Readback", LateReadback)
    late = run_tiny(tmp_path / "late", recipe, runtime=runtime)
    assert late["losses"] == prompt["losses"]
    assert all(torch.equal(late["weights"][name], tensor) for name, tensor in prompt["weights"].items())
    kinds = [
        [(e["event"], e.get("step")) for e in read_events(tmp_path / name / "events.jsonl")]
        for name in ("prompt", "late")
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("late", [False, True])
def test_a_diverged_run_names_step_and_layer_and_every_checkpoint_is_finite(tmp_path, monkeypatch, late):
    if late:
        monkeypatch.setattr(update, "Readback", LateReadback)
    recipe = tiny_recipe(optimizer="sgd", peak_lr=1e20, warmup="none", decay="constant")
    runtime = dataclasses.replace(FP32, checkpoint_every="1steps")
    with pytest.raises(DivergedError, match=r"at step \d+ .*(the output|the weight|the bias) of \S+ is not finite"):
        run_tiny(tmp_path, recipe, runtime=runtime)
    saved = sorted((tmp_path / "checkpoints").glob("*.pt"))
    assert saved
    for path in saved:
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(t).all() for t in state["module"].values())


def test_a_stop_that_is_read_late_still_ends_with_a_checkpoint_of_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "Readback", LateReadback)
    recipe = tiny_recipe()
    stopped = run_tiny(tmp_path, recipe, stop_at=4)
    events = read_events(tmp_path / "events.jsonl")
    last_step = [e["step"] for e in events if e["event"] == "step"][-1]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [last_step] == [stopped["step"]]


@pytest.mark.parametrize("scale", [3.0, 0.5, 2.0**25, 0.0, float("inf")])
def test_a_loss_scale_that_would_round_or_overflow_is_refused(scale):
    with pytest.raises(SettingsError, match="power of two"):
        check(tiny_recipe(), Runtime(precision="fp16", loss_scale=scale), world_size=1, device=torch.device("cpu"))


def test_a_fixed_loss_scale_trains_and_stays(tmp_path):
    recipe = tiny_recipe(total_epochs=1.0)
    runtime = Runtime(precision="fp16", micro_batch_size=24, loss_scale=256.0)
    run_tiny(tmp_path, recipe, runtime=runtime)
    steps = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "step"]
    assert {(e["loss_scale"], e["skipped_steps"]) for e in steps} == {(256.0, 0)}


def test_skipped_steps_keep_the_schedule_and_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    def too_large(runtime, device):
        return Precision("fp16", device, loss_scale=2.0**40)

    monkeypatch.setattr("megabatch.app.measured.precision.choose_precision", too_large)
    recipe = tiny_recipe(total_epochs=20.0)
    with pytest.raises(DivergedError, match="25 steps in a row"):
        run_tiny(tmp_path, recipe, runtime=Runtime(precision="fp16", micro_batch_size=24))
    steps = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "step"]
    assert len(steps) == 24
    for number, event in enumerate(steps):
        assert event["lr"] == settings_at(recipe, number, 48 * number).lr
        assert event["skipped_steps"] == number + 1


@pytest.mark.usefixtures("interpreter")
def test_a_captured_step_in_fp16_skips_an_overflow_without_the_host(tmp_path, monkeypatch):
    """The first scale is too large by 2^14 for some gradients, so the first steps are skipped."""
    recipe = tiny_recipe(num_train_images=480, total_epochs=1.0, ema_half_life_epochs=0.3)
    runtime = Runtime(precision="fp16", micro_batch_size=24)
    monkeypatch.setattr(
        "megabatch.app.measured.precision.choose_precision",
        lambda _, device: Precision("fp16", device, init_scale=2.0**24),
    )
    plain = run_tiny(tmp_path / "plain", recipe, runtime=runtime)
    monkeypatch.setattr("megabatch.app.run.build_state", functools.partial(build_state_fused, build_state))
    monkeypatch.setattr(LossScale, "overflowed", lambda _: pytest.fail("the host waits for the device"))
    captured = run_captured(tmp_path / "captured", recipe, runtime)
    steps = [[e for e in read_events(tmp_path / name / "events.jsonl") if e["event"] == "step"] for name in PLACES]
    assert captured["replays"] == 7
    assert 0 < steps[0][-1]["skipped_steps"] < 10
    for one, other in zip(*steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert (one["loss_scale"], one["skipped_steps"]) == (other["loss_scale"], other["skipped_steps"])
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(captured["weights"][name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("global_batch_size", "remark"), [(64, "hide and 32 do not"), (512, "")])
def test_several_gpus_are_told_when_their_share_is_too_small_to_hide_launches(global_batch_size, remark):
    recipe = tiny_recipe(global_batch_size=global_batch_size, num_train_images=512)
    reason = choose_capture(recipe, Runtime(), TWO).reason
    assert "several workers are captured with --capture on alone" in reason
    assert remark in reason
    assert ("hide" in reason) is bool(remark)


PLACES = ("plain", "captured")


def build_state_fused(build, *args, capturable, **options):
    """A state whose optimizer uses its kernels, interpreted."""
    state = build(*args, capturable=True, **options)
    for group in state.optimizer.param_groups:
        group["fused"] = True
    return state


def has_compiler():
    with contextlib.suppress(Exception):
        compiled = torch.compile(lambda x: x.sin().square())
        return bool(compiled(torch.zeros(4)).sum() == 0)
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_trains_what_the_plain_one_trains(tmp_path, precision):
    if not has_compiler():
        pytest.skip("torch.compile finds no compiler here")
    recipe = tiny_recipe(total_epochs=1.0)
    runtime = Runtime(precision=precision, micro_batch_size=16)
    plain = run_tiny(tmp_path / "plain", recipe, runtime=runtime)
    compiled = run_tiny(tmp_path / "compiled", recipe, runtime=dataclasses.replace(runtime, compile=True))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    assert list(compiled["weights"]) == list(plain["weights"])
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(compiled["weights"][name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def wire_run(folder, recipe, options):
    return run_tiny(folder, recipe, **options)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_resumed_run_goes_on_with_the_scales_of_gradients_in_fp16_on_the_wire(tmp_path):
    recipe = tiny_recipe()
    runtime = Runtime(precision="fp32", micro_batch_size=8, wire="fp16")
    whole = run_processes(2, wire_run, tmp_path / "whole", recipe, {"runtime": runtime})
    run_processes(2, wire_run, tmp_path / "cut", recipe, {"runtime": runtime, "stop_at": 6})
    saved = torch.load(sorted((tmp_path / "cut" / "checkpoints").glob("*.pt"))[-1], weights_only=True)
    assert saved["wire_scales"]
    assert max(saved["wire_scales"].values()) > 1
    resuming = dataclasses.replace(runtime, resume=True)
    resumed = run_processes(2, wire_run, tmp_path / "cut", recipe, {"runtime": resuming})
    assert resumed[0]["losses"] == whole[0]["losses"][-len(resumed[0]["losses"]) :]
    for name, tensor in whole[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], tensor), name
