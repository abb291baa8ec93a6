"""benchmarks/large_batch.py: equal budgets, draws that can be repeated, and runs that are not repeated."""

import json
import sys
from pathlib import Path

import pytest
import torch

from megabatch import recipes
from megabatch.app import data as app_data
from megabatch.data.sources.arrays import ArraySource
from megabatch.recipe import override

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def large_batch(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import large_batch

    yield large_batch
    sys.modules.pop("large_batch")


@pytest.mark.parametrize("batch", [256, 8192])
def test_every_draw_is_a_valid_recipe_and_a_function_of_its_arguments(large_batch, batch):
    for method, (_, ranges) in large_batch.METHODS.items():
        assert len(ranges) == 2, "each method tunes as many numbers"
        for trial in range(20):
            settings = large_batch.draw(method, batch, 10.0, trial)
            assert settings == large_batch.draw(method, batch, 10.0, trial)
            recipe = override(recipes.get("fashion_mnist"), settings)
            assert recipe.global_batch_size == batch
            low, high = ranges["peak_lr"]
            assert low <= recipe.peak_lr <= high


def test_the_best_draw_on_held_out_images_is_trained_with_every_seed_and_nothing_twice(
    large_batch, tmp_path, monkeypatch
):
    calls = []

    class Done:
        returncode, stderr = 0, ""

        def __init__(self, request):
            calls.append(request)
            rate = float(request["settings"]["peak_lr"])
            self.stdout = "warning: x\n" + json.dumps({"top1": 1 / (1 + rate), "updates": 74, "seconds": 1.0})

    monkeypatch.setattr(large_batch.subprocess, "run", lambda command, **_: Done(json.loads(command[-1])))
    budget = {"trials": 6, "seeds": 3, "parallel": 2, "changed": {}}
    row = large_batch.study(large_batch.Runs(tmp_path / "runs.jsonl"), "LARS", 8192, 10.0, **budget)
    rates = [float(large_batch.draw("LARS", 8192, 10.0, trial)["peak_lr"]) for trial in range(6)]
    assert float(row["settings"]["peak_lr"]) == min(rates)
    assert [call["held_out"] for call in calls] == [True] * 6 + [False] * 3
    assert sorted(call["settings"].get("seed") for call in calls[6:]) == ["0", "1", "2"]
    again = large_batch.study(large_batch.Runs(tmp_path / "runs.jsonl"), "LARS", 8192, 10.0, **budget)
    assert again == row
    assert len(calls) == 9
    ablations = large_batch.ablate(large_batch.Runs(tmp_path / "runs.jsonl"), row, seeds=3, parallel=2)
    assert len(calls) == 9 + 3 * len(large_batch.ABLATIONS)
    for ablation, changes in zip(ablations, large_batch.ABLATIONS.values(), strict=True):
        changed = {key for key, value in ablation["settings"].items() if row["settings"].get(key) != value}
        assert changed <= changes.keys()
        override(recipes.get("fashion_mnist"), ablation["settings"])
    assert "| LARS | 8,192 | 10 | 74 |" in large_batch.table([row])
    pooled = large_batch.study(
        large_batch.Runs(tmp_path / "pooled"), "LARS", 8192, 10.0, **budget | {"changed": {"stem": "pooled"}}
    )
    assert pooled["method"] == "LARS, stem=pooled"
    assert {call["settings"]["stem"] for call in calls[-9:]} == {"pooled"}
    large_batch.plot([row], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_divergence_is_a_result_and_any_other_failure_stops_the_benchmark(large_batch, tmp_path, monkeypatch):
    class Failed:
        returncode, stdout = 1, ""

        def __init__(self, stderr):
            self.stderr = stderr

    monkeypatch.setattr(
        large_batch.subprocess,
        "run",
        lambda *_, **__: Failed("megabatch.errors.DivergedError: the loss is nan at step 3"),
    )
    runs = large_batch.Runs(tmp_path / "runs.jsonl")
    assert runs.get({"seed": "0"}, held_out=True)["top1"] == 0.0
    monkeypatch.setattr(large_batch.subprocess, "run", lambda *_, **__: Failed("ImportError: gone"))
    with pytest.raises(RuntimeError, match="a run failed: ImportError"):
        runs.get({"seed": "1"}, held_out=True)


def test_a_run_trains_on_the_images_that_are_not_held_out(large_batch, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (160, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(160) % 10
    names = tuple("abcdefghij")
    test = ArraySource(images[:10], labels[:10], names)
    data = app_data.Data(ArraySource(images, labels, names), test, "made here")
    monkeypatch.setattr(app_data, "open_data", lambda *_: data)
    monkeypatch.setattr(large_batch, "HELD_OUT", 32)
    settings = {"total_epochs": "2", "warmup_epochs": "1", "global_batch_size": "64", "bn_span": "64"}
    assert large_batch.train(settings, held_out=True)["updates"] == 4
    whole = large_batch.train(settings, held_out=False)
    assert whole["updates"] == 5
    assert whole["top1"] * 10 == pytest.approx(round(whole["top1"] * 10))
