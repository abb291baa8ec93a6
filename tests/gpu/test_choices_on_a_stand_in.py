"""What is measured on a GPU before it is chosen: kernels by their own time, micro-batches by the memory there is."""

import contextlib
import gc
import weakref

import torch
from stand_in_gpu import CUDA, StandInGpu
from tiny_run import tiny_recipe

from megabatch.app.measured import micro_batch, tuning
from megabatch.app.measured.micro_batch import fit_micro_batch
from megabatch.app.run_log import RunLog, announce_measuring
from megabatch.bench.synthetic_step import synthetic_step
from megabatch.comm.launch import World
from megabatch.observe.progress import Progress
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision

ON_GPU = World(device=CUDA)


def out_of_memory():
    raise torch.OutOfMemoryError("made up")


def test_a_way_that_had_no_memory_now_is_not_written_off_for_ever(tmp_path):
    seconds = {"plain": 2.0, "wide": 1.0}
    table = tuning.Table(tmp_path, timer=lambda work: seconds[work()])
    like, ways = torch.zeros(1), {"plain": lambda: "plain", "wide": out_of_memory}
    assert table.choose("product", (4,), like, ways) == "plain"
    assert not list(tmp_path.iterdir())
    assert table.choose("product", (4,), like, ways | {"wide": lambda: "wide"}) == "wide"


def test_a_first_measurement_is_told_of_and_no_later_one():
    told = []
    table = tuning.Table(timer=lambda _: 1.0)
    table.on_first = lambda: told.append(len(table._choices.get("cpu", {})))
    for size in (1, 2):
        table.choose("product", (size,), torch.zeros(1), {"plain": list, "wide": list})
    assert told == [0]


def test_a_run_says_that_it_measures_before_it_does(monkeypatch, tmp_path):
    said, table = [], tuning.Table(timer=lambda _: 1.0)
    monkeypatch.setattr(Progress, "note", lambda _, text: said.append(text))
    monkeypatch.setattr(tuning, "_table", table)
    with contextlib.ExitStack() as stack:
        announce_measuring(RunLog(tmp_path, Progress(1, 1.0), None), World(device=CUDA), stack)
        table.choose("product", (1,), torch.zeros(1), {"plain": list, "wide": list})
    assert len(said) == 1
    assert "compiling and timing kernels" in said[0]
    assert table.on_first is None


def test_kernels_are_timed_while_launches_are_hidden():
    events = []
    with StandInGpu() as gpu:
        gpu.slept = lambda: events.append("busy")
        tuning.gpu_seconds(lambda: events.append("work"))
    assert events == ["work"] * 2 + ["busy", "work"] * tuning.REPEATS


def fitted(monkeypatch, reserved):
    """The micro-batch where the allocator's peak is `reserved(size)` bytes of 1 GiB, beside what was left before."""
    tried, left = [], [15 << 26]  # cached by what ran before
    monkeypatch.setattr(micro_batch, "_forward_and_backward", lambda *given: tried.append(given[-1]))
    with StandInGpu(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "empty_cache", left.clear)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda _: sum(left) + reserved(tried[-1]))
        recipe = tiny_recipe(global_batch_size=96, num_train_images=240)
        module = torch.nn.Linear(2, 2)
        return fit_micro_batch(recipe, Runtime(), recipe.bn_span, module, Precision("bf16", CUDA), world=ON_GPU)


def test_memory_that_was_cached_before_a_trial_is_not_counted(monkeypatch):
    found = fitted(monkeypatch, lambda size: size * (1 << 23))  # 96 samples take 0.75 GiB
    assert (found.size, "by trial" in found.reason) == (96, True)


def test_a_trial_leaves_a_margin(monkeypatch):
    assert fitted(monkeypatch, lambda size: size * (1 << 24)).size == 32  # 64 samples would take all


def test_graphs_of_a_step_that_was_measured_leave_their_memory_to_the_next_though_its_run_is_kept():
    recipe = tiny_recipe()
    runtime = Runtime(precision="fp32", micro_batch_size=24, capture="on", fusion="plain")
    with StandInGpu(), without_collection():
        with synthetic_step(recipe, runtime, world=ON_GPU, global_batch_size=48) as step:
            for _ in range(5):
                step.run_step()
            assert step.run.captured.num_graphs == 1
            graphs = weakref.ref(step.run.captured)
        assert graphs() is None
        assert step.run.captured is None


@contextlib.contextmanager
def without_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
