"""Memory layout and kernels on a CPU are those that a trial on this processor found fastest."""

import dataclasses
import json

import pytest
import torch
from tiny_run import run_tiny, tiny_recipe

from megabatch.app.measured import layout, tuning
from megabatch.app.measured.choices import CHOICES_FILE
from megabatch.app.measured.layout import WAYS, measured_layout
from megabatch.app.measured.trial import GradientTrial
from megabatch.comm.launch import World
from megabatch.errors import CheckpointError
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision

CPU = torch.device("cpu")
RECIPE = tiny_recipe()
FUSED, TORCH_LAST, NCHW = WAYS
needs_kernels = pytest.mark.skipif(not cpu_batch_norm.is_available(), reason="compiled CPU kernels are missing")


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGABATCH_MEASURE", "1")
    tuning.use_table(tuning.Table(tmp_path / "kernels"))
    yield
    tuning.use_table(None)


def choose(runtime=None, *, precision="fp32", world=None, warn=pytest.fail, recipe=RECIPE):
    world = world or World()
    found = measured_layout(recipe, runtime or Runtime(), Precision(precision, CPU), world=world, warn=warn)
    return found.channels_last, found.fusion


def takes(monkeypatch, seconds):
    """Lets trials take `seconds` by way; returns the ways that were timed."""
    asked = []

    def timer(trial, **_):
        trial()
        runtime = trial._runtime
        (name,) = [name for name, way in WAYS.items() if way == (runtime.channels_last, runtime.fusion)]
        asked.append(name)
        return seconds[name]

    monkeypatch.setattr(layout, "cpu_seconds", timer)
    return asked


@needs_kernels
def test_measuring_that_takes_too_long_ends_with_the_default_and_is_repeated_in_the_next_run(monkeypatch):
    """The other workers wait for rank 0, and give up after a time."""
    asked, warnings = takes(monkeypatch, {FUSED: 3.0, TORCH_LAST: 2.0, NCHW: 1.0}), []
    clock = iter(range(0, 1000, 60))
    with monkeypatch.context() as patched:
        patched.setattr(layout.time, "monotonic", lambda: next(clock))
        assert choose(warn=warnings.append) == WAYS[FUSED]
    assert asked == [NCHW]
    assert len(warnings) == 1
    assert "timing kernels took over 100 s" in warnings[0]
    assert choose() == WAYS[NCHW]


@needs_kernels
@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({FUSED: 1.0, TORCH_LAST: 1.3, NCHW: 1.2}, FUSED),
        ({FUSED: 1.0, TORCH_LAST: 0.9, NCHW: 1.2}, TORCH_LAST),
        ({FUSED: 1.0, TORCH_LAST: 0.9, NCHW: 0.8}, NCHW),
        ({FUSED: 1.0, TORCH_LAST: 0.97, NCHW: 0.96}, FUSED),  # within noise: the default
    ],
)
def test_the_fastest_way_is_taken_and_measured_once(monkeypatch, seconds, fastest):
    asked = takes(monkeypatch, seconds)
    assert choose() == WAYS[fastest]
    tuning.use_table(tuning.Table(tuning.table().folder))  # as in the next process
    assert choose() == WAYS[fastest]
    assert asked == [NCHW, TORCH_LAST, FUSED]
    choose(precision="bf16")
    choose(recipe=dataclasses.replace(RECIPE, width=16))
    assert len(asked) == 9


@needs_kernels
def test_only_ways_that_the_runtime_allows_are_timed(monkeypatch):
    asked = takes(monkeypatch, {FUSED: 3.0, TORCH_LAST: 2.0, NCHW: 1.0})
    assert choose(Runtime(channels_last=False)) == (False, "auto")
    assert choose(Runtime(compile=True)) == (True, "auto")
    assert choose(Runtime(channels_last=True, fusion="plain")) == (True, "plain")
    assert not asked
    assert choose(Runtime(channels_last=True)) == (True, "plain")
    assert asked == [TORCH_LAST, FUSED]
    assert choose(Runtime(fusion="plain")) == (False, "plain")


@needs_kernels
def test_nothing_is_timed_when_the_environment_forbids_it(monkeypatch):
    monkeypatch.setenv("MEGABATCH_MEASURE", "0")
    monkeypatch.setattr(layout, "cpu_seconds", lambda *_, **__: pytest.fail("measures"))
    assert choose() == WAYS[FUSED]


def test_another_worker_takes_what_the_first_one_measured(monkeypatch):
    monkeypatch.setattr(layout, "cpu_seconds", lambda *_, **__: pytest.fail("measures"))
    monkeypatch.setattr(layout, "broadcast_from_rank0", lambda *_: NCHW)
    assert choose(world=World(rank=1, world_size=2)) == WAYS[NCHW]


@needs_kernels
def test_a_way_with_other_gradients_is_not_used_and_a_warning_names_it(monkeypatch):
    takes(monkeypatch, {FUSED: 1.0, TORCH_LAST: 2.0, NCHW: 3.0})
    gradient = GradientTrial.gradient
    monkeypatch.setattr(
        GradientTrial, "gradient", lambda trial: gradient(trial) * (1.1 if trial._runtime.fusion == "auto" else 1.0)
    )
    warnings = []
    assert choose(warn=warnings.append) == WAYS[TORCH_LAST]
    assert len(warnings) == 1
    assert FUSED in warnings[0]
    assert "differ by 0.1 " in warnings[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_ways_compute_the_same_gradients_and_leave_the_generator_alone(precision):
    drawn = torch.get_rng_state()
    assert choose(precision=precision) in WAYS.values()
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_shortest_run_after_the_first_counts_and_a_slow_first_run_ends_the_trial(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 10.5, 20.0, 20.4, 30.0, 31.5, 40.0, 45.0])
    monkeypatch.setattr(layout.time, "perf_counter", lambda: next(clock))
    assert layout.cpu_seconds(lambda: None) == pytest.approx(0.4)
    assert layout.cpu_seconds(lambda: None, at_most_s=4.0) == 5.0


@needs_kernels
def test_a_resumed_run_keeps_the_choices_of_its_first_part(monkeypatch, tmp_path):
    takes(monkeypatch, {FUSED: 2.0, TORCH_LAST: 2.0, NCHW: 1.0})
    recipe = tiny_recipe(total_epochs=1.0)
    run_tiny(tmp_path / "run", recipe, max_steps=2)
    chosen = json.loads((tmp_path / "run" / CHOICES_FILE).read_text())
    assert chosen == {"precision": chosen["precision"], "channels_last": False, "fusion": "plain", "device": "cpu"}
    tuning.table().clear()
    asked = takes(monkeypatch, {FUSED: 1.0, TORCH_LAST: 2.0, NCHW: 3.0})
    run_tiny(tmp_path / "run", recipe, runtime=Runtime(resume=True))
    assert not asked
    assert json.loads((tmp_path / "run" / CHOICES_FILE).read_text()) == chosen


@pytest.mark.parametrize("text", ["{", "[]", '{"precision": "fp8", "channels_last": true, "fusion": "auto"}', '"auto"'])
def test_a_damaged_file_of_choices_is_an_error_that_says_what_to_do(tmp_path, text):
    recipe = tiny_recipe(total_epochs=1.0)
    run_tiny(tmp_path, recipe, max_steps=1)
    (tmp_path / CHOICES_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="delete it to choose again"):
        run_tiny(tmp_path, recipe, runtime=Runtime(resume=True))
