"""Whole runs: one, two and three workers, stops and resumes, growing batches; wired as any user's run is."""

import dataclasses
import itertools
import json
import random

import pytest
import torch
from ranks import run_processes
from slow import slow_except
from tiny_run import run_tiny, tiny_data, tiny_recipe

from megabatch.app.load import load_for_evaluation, load_model
from megabatch.comm.launch import World
from megabatch.errors import CheckpointError, DivergedError, SettingsError
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import open_checkpoint

FP32 = Runtime(precision="fp32", micro_batch_size=8)


def assert_same_weights(one, other, *, rtol=0.0, atol=0.0):
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], tensor, rtol=rtol, atol=atol, msg=name)


MUON = {"optimizer": "muon", "peak_lr": 0.05, "nesterov": True, "normalize_weights": True}
SHAMPOO = {"optimizer": "shampoo", "peak_lr": 0.1, "root_every_steps": 3}
VGG = {"model": "vgg8", "stem": "whitened", "width": 4, "resolution": ((0.0, 17.0),), "eval_resolution": 17}
DIVIDED = pytest.mark.parametrize(
    "changes", slow_except([{}, MUON, SHAMPOO, VGG], {}, SHAMPOO), ids=["lars", "muon", "shampoo", "whitened stem"]
)
"""LARS, the optimizers whose work is divided among workers, and a stem that is set from data and takes no gradient."""


def rounding(recipe):
    """Relative difference of losses that differ in the order of sums; Shampoo's roots amplify it up to 1,000 times."""
    return 1e-3 if recipe.optimizer == "shampoo" else 1e-5


def rank_runs(folder, recipe, options):
    return run_tiny(folder, recipe, **options)


def test_a_run_learns_and_leaves_its_record(tmp_path):
    recipe = tiny_recipe(total_epochs=6.0, optimizer="sgd", peak_lr=0.5)
    result = run_tiny(tmp_path, recipe)
    assert result["correct"] >= 80
    assert result["losses"][-1] < result["losses"][0] - 0.3
    events = read_events(tmp_path / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 31))
    assert {"step", "epoch", "loss", "images_per_s", "lr"} <= set(steps[0])
    assert [round(e["epoch"]) for e in events if e["event"] == "evaluation"] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "recipe.json").read_text())["name"] == "tiny"
    assert "torch" in str(json.loads((tmp_path / "environment.json").read_text()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", slow_except([2, 3], 3))
@DIVIDED
def test_workers_train_what_one_worker_trains(tmp_path, world_size, changes):
    recipe = tiny_recipe(**changes)
    alone = run_tiny(tmp_path / "alone", recipe)
    together = run_processes(world_size, rank_runs, tmp_path / "together", recipe, {})
    for rank in together:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=rounding(recipe))
        assert_same_weights(together[0], rank)
        assert rank["correct"] == together[0]["correct"]
    assert_same_weights(alone, together[0], rtol=10 * rounding(recipe), atol=rounding(recipe))


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", slow_except([2, 3], 3))
def test_class_weights_train_the_same_on_any_workers_and_micro_batches(tmp_path, world_size):
    recipe = tiny_recipe(class_weight_power=1.0)
    data = tiny_data(recipe)
    labels = data.train.labels
    uneven = torch.where(labels == 3, torch.arange(len(labels)) % 4 // 3 * 3, labels)  # most of class 3 become class 0
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=uneven))
    alone = run_tiny(tmp_path / "alone", recipe, data=data)
    whole = Runtime(precision="fp32", micro_batch_size=2 * recipe.bn_span)
    together = run_processes(world_size, rank_runs, tmp_path / "together", recipe, {"runtime": whole, "data": data})
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert_same_weights(alone, together[0], rtol=1e-4, atol=1e-5)
    unweighted = run_tiny(tmp_path / "unweighted", tiny_recipe(), data=data)
    assert unweighted["losses"] != pytest.approx(alone["losses"], rel=1e-3)


@pytest.mark.multiprocess
def test_a_span_shared_by_workers_trains_what_one_worker_trains(tmp_path):
    recipe = tiny_recipe(bn_span=16)
    alone = run_tiny(tmp_path / "alone", recipe)
    shared = {"runtime": Runtime(precision="fp32", micro_batch_size=8)}
    together = run_processes(2, rank_runs, tmp_path / "together", recipe, shared)
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert_same_weights(together[0], together[1])


def stop_and_resume_cases(folder, recipe, stops):
    """Every case in one set of workers: run to `stop`, then resume to the end."""
    results = []
    for number, stop in enumerate(stops):
        run_tiny(folder / f"{number}", recipe, stop_at=stop)
        runtime = dataclasses.replace(FP32, resume=True)
        results.append(run_tiny(folder / f"{number}", recipe, runtime=runtime))
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", slow_except([1, 2, 3], 2))
@DIVIDED
def test_a_resumed_run_ends_bitwise_as_one_that_was_never_stopped(tmp_path, world_size, changes):
    recipe = tiny_recipe(**changes)
    stops = random.Random(world_size).sample(range(1, 10), 7)
    whole = run_processes(world_size, rank_runs, tmp_path / "whole", recipe, {})
    resumed = run_processes(world_size, stop_and_resume_cases, tmp_path, recipe, stops)
    for case in resumed[0]:
        assert_same_weights(whole[0], case)
        assert case["losses"] == whole[0]["losses"][-len(case["losses"]) :]
        assert case["correct"] == whole[0]["correct"]


@pytest.mark.parametrize(("stop", "last"), [(4, None), (5, None), (10, "evaluation")])
def test_a_stop_gives_no_evaluation_even_at_a_step_that_evaluates_unless_the_run_is_complete(tmp_path, stop, last):
    """The command's exit code follows from it: 75 makes a scheduler continue the run, 0 does not."""
    result = run_tiny(tmp_path, tiny_recipe(), stop_at=stop)
    assert result["step"] == stop
    assert (result["correct"] is None) == (last is None)
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "evaluation"] == [
        step for step in (5, 10) if step <= stop
    ]


def resume_only(folder, recipe):
    return run_tiny(folder, recipe, runtime=dataclasses.replace(FP32, resume=True))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("before", "after"), [(3, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 3), (2, 1)))]
)
@DIVIDED
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, before, after, changes):
    recipe = tiny_recipe(**changes)
    whole = run_tiny(tmp_path / "whole", recipe)
    run_processes(before, rank_runs, tmp_path / "cut", recipe, {"stop_at": 4})
    resumed = run_processes(after, resume_only, tmp_path / "cut", recipe)
    assert resumed[0]["losses"] == pytest.approx(whole["losses"][4:], rel=rounding(recipe))
    assert_same_weights(whole, resumed[0], rtol=10 * rounding(recipe), atol=rounding(recipe))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_batch_that_grows_in_mid_epoch_with_a_stop_inside_loses_and_repeats_no_sample(tmp_path, monkeypatch, stop):
    from megabatch.data.loading.order import stream_samples
    from megabatch.data.loading.train_loader import TrainLoader

    recipe = tiny_recipe(batch_sizes=((0.0, 48.0), (0.7, 96.0), (1.45, 24.0)), total_epochs=3.0)
    drawn = []
    original = TrainLoader.batches

    def spy(self, requests):
        positions = []
        for batch in original(self, (positions.append(r[0]) or r for r in requests)):
            drawn.append(positions.pop(0))
            yield batch

    monkeypatch.setattr(TrainLoader, "batches", spy)
    run_tiny(tmp_path, recipe, stop_at=stop)
    result = run_tiny(tmp_path, recipe, runtime=dataclasses.replace(FP32, resume=True))
    assert result["samples_seen"] == 720
    consumed = sorted(itertools.chain.from_iterable(drawn))
    assert consumed == list(range(720))
    epochs, indices = stream_samples(0, 720, num_samples=240, seed=recipe.seed)
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(240))
    sizes = [e["global_batch_size"] for e in read_events(tmp_path / "events.jsonl") if e["event"] == "step"]
    assert sizes[:4] == [48, 48, 48, 48]
    assert {48, 96, 24} <= set(sizes)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_sizes", slow_except([(2, 3), (5, 7)], (2, 3)))
def test_evaluation_counts_the_same_on_any_number_of_workers(tmp_path, world_sizes):
    recipe = tiny_recipe(total_epochs=1.0)
    run_tiny(tmp_path, recipe)
    counts = {n: run_processes(n, evaluate_saved, tmp_path, recipe)[0] for n in (1, *world_sizes)}
    assert counts[1][0] == 10_000
    assert len(set(counts.values())) == 1


def evaluate_saved(folder, recipe):
    from tiny_run import here

    from megabatch.app.data import build_eval_loader
    from megabatch.app.resolve import choose_precision
    from megabatch.train.evaluate import eval_block_size, evaluate

    world = here()
    data = tiny_data(recipe, num_test=10_000)
    module = load_for_evaluation(recipe, FP32, open_checkpoint(folder)[1], world=world)
    result = evaluate(
        module,
        build_eval_loader(recipe, FP32, data.evaluation, world=world),
        world=world,
        precision=choose_precision(FP32, world.device),
        block_size=eval_block_size(recipe),
    )
    return result.num_samples, result.correct1, result.correct5


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lamb", "peak_lr": 0.01},
        pytest.param({"optimizer": "sgd", "peak_lr": 0.1, "nesterov": True}, marks=pytest.mark.slow),
        {"optimizer": "rmsprop_warmup", "peak_lr": 0.1, "warmup": "none", "rmsprop_center_epoch": 0.5},
        MUON,
        SHAMPOO,
        VGG | MUON | {"alternate_flip": True, "eval_flip": True},
        pytest.param({"optimizer": "shampoo", "graft": "lars"}, marks=pytest.mark.slow),
        {"ema_half_life_epochs": 0.2},
        {"eval_stats": "precise", "precise_batches": 2},
        pytest.param({"eval_stats": "last_batch"}, marks=pytest.mark.slow),
        pytest.param({"eval_stats": "running"}, marks=pytest.mark.slow),
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "cutout_size": 3, "color_jitter": 0.2},
        pytest.param({"weight_decay_follows_lr": True, "momentum_form": "inside_corrected"}, marks=pytest.mark.slow),
        {"resolution": ((0.0, 8.0), (1.0, 12.0))},
    ],
    ids=",".join,
)
def test_every_choice_of_a_recipe_trains_stops_and_resumes(tmp_path, changes):
    recipe = tiny_recipe(total_epochs=2.0, **changes)
    whole = run_tiny(tmp_path / "whole", recipe)
    run_tiny(tmp_path / "cut", recipe, stop_at=7)
    resumed = run_tiny(tmp_path / "cut", recipe, runtime=dataclasses.replace(FP32, resume=True))
    assert_same_weights(whole, resumed)
    assert resumed["correct"] == whole["correct"]


@pytest.mark.slow
@pytest.mark.multiprocess
@DIVIDED
def test_growth_by_noise_scale_does_not_depend_on_the_workers(tmp_path, changes):
    recipe = tiny_recipe(max_global_batch_size=96, total_epochs=3.0, **changes)
    alone = run_tiny(tmp_path / "alone", recipe)
    together = run_processes(2, rank_runs, tmp_path / "together", recipe, {})
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=rounding(recipe))


def test_another_recipes_checkpoint_is_refused_with_the_differing_fields(tmp_path):
    run_tiny(tmp_path, tiny_recipe(), max_steps=2)
    with pytest.raises(CheckpointError, match=r"peak_lr was 1\.0, now 2\.0"):
        run_tiny(tmp_path, tiny_recipe(peak_lr=2.0), runtime=dataclasses.replace(FP32, resume=True))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    recipe = tiny_recipe()
    whole = run_tiny(tmp_path / "whole", recipe)
    runtime = dataclasses.replace(FP32, checkpoint_every="2steps")
    run_tiny(tmp_path / "cut", recipe, runtime=runtime, stop_at=6)
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = run_tiny(tmp_path / "cut", recipe, runtime=dataclasses.replace(FP32, resume=True))
    assert_same_weights(whole, resumed)
    warnings = [e["text"] for e in read_events(tmp_path / "cut" / "events.jsonl") if e["event"] == "warning"]
    assert any(newest.name in text for text in warnings)


@pytest.mark.parametrize(
    ("every", "saved_at"),
    [("4steps", [4, 5, 8, 10]), ("0.5epochs", [3, 5, 8, 10]), ("0.000001s", [*range(1, 11)]), ("never", [5, 10])],
)
def test_checkpoints_are_written_at_the_interval_and_at_evaluations(tmp_path, every, saved_at):
    run_tiny(tmp_path, tiny_recipe(), runtime=dataclasses.replace(FP32, checkpoint_every=every))
    assert [e["step"] for e in read_events(tmp_path / "events.jsonl") if e["event"] == "checkpoint"] == saved_at


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    recipe = tiny_recipe(optimizer="sgd", peak_lr=1e20, warmup="none", decay="constant")
    runtime = dataclasses.replace(FP32, checkpoint_every="1steps")
    with pytest.raises(DivergedError, match="peak_lr"):
        run_tiny(tmp_path, recipe, runtime=runtime)
    assert list((tmp_path / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        (Runtime(micro_batch_size=12), "bn_span=8"),
        (Runtime(micro_batch_size=3), "divide"),
        (Runtime(micro_batch_size=4), "groups of 2"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, runtime, said):
    with pytest.raises(SettingsError, match=said):
        run_tiny(tmp_path / "run", tiny_recipe(), runtime=runtime)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", slow_except(["bf16", "fp16"], "fp16"))
def test_half_precisions_follow_full_precision(tmp_path, precision):
    recipe = tiny_recipe()
    full = run_tiny(tmp_path / "full", recipe)
    half = run_tiny(tmp_path / "half", recipe, runtime=Runtime(precision=precision, micro_batch_size=8))
    assert half["losses"] == pytest.approx(full["losses"], abs=0.1)
    assert half["losses"] != full["losses"]
    events = read_events(tmp_path / "half" / "events.jsonl")
    assert ("loss_scale" in events[1]) == (precision == "fp16")


def test_an_overflowing_loss_scale_skips_the_step_and_shrinks(tmp_path, monkeypatch):
    from megabatch.train.precision import Precision

    def too_large(runtime, device):
        return Precision("fp16", device, init_scale=2.0**40)

    monkeypatch.setattr("megabatch.app.measured.precision.choose_precision", too_large)
    result = run_tiny(tmp_path, tiny_recipe(), runtime=Runtime(precision="fp16", micro_batch_size=8), max_steps=3)
    steps = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "step"]
    assert steps[0]["skipped_steps"] == 1
    assert steps[0]["loss_scale"] == 2.0**39
    assert all(torch.isfinite(tensor).all() for tensor in result["weights"].values())


@pytest.mark.parametrize("half_life", [0.0, 0.5])
def test_a_loaded_model_has_the_weights_that_were_evaluated(tmp_path, half_life):
    recipe = tiny_recipe(ema_half_life_epochs=half_life, total_epochs=1.0)
    run_tiny(tmp_path, recipe, runtime=FP32)
    expected = load_for_evaluation(recipe, FP32, open_checkpoint(tmp_path)[1], world=World())
    model = load_model(tmp_path)
    assert not model.training
    assert model.class_names == ("a", "b", "c", "d")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    with torch.inference_mode():
        assert model(torch.zeros(2, 1, 12, 12)).shape == (2, 4)


def test_loading_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(tmp_path)
