"""Trackers get every number of the events, at its step; each is tested where its package is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megabatch.errors import SettingsError
from megabatch.observe.trackers import metrics, open_tracker

STEP = {"step": 3, "time_s": 1.0, "loss": 0.5, "phases_s": {"input": 0.1}, "note": "x", "flag": True, "buckets": [1]}


def written(track: Any, folder: Path) -> None:
    """Passes a step and the end of a run to the tracker."""
    tracker = open_tracker(track, folder, {"peak_lr": 0.5})
    assert tracker is not None
    tracker.write("run_start", recipe="fashion_mnist", workers=2)
    tracker.write("step", **STEP)
    tracker.write("run_end", top1=0.9)
    tracker.close()


def test_metrics_are_the_numbers_of_an_event_by_name() -> None:
    assert metrics("step", STEP) == {"step/loss": 0.5, "step/phases_s/input": 0.1}


def test_without_a_tracker_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert open_tracker("none", tmp_path, {}) is None
    assert open_tracker("auto", tmp_path, {}) is None


@pytest.mark.parametrize(("track", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named(track: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("megabatch.observe.trackers.importlib.import_module", missing)
    with pytest.raises(SettingsError, match=f"pip install {package}"):
        open_tracker(track, tmp_path, {})


@pytest.mark.filterwarnings("default")  # the trackers' own
def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written("auto", tmp_path)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (loss,), (top1,) = read.Scalars("step/loss"), read.Scalars("run_end/top1")
    assert (loss.step, loss.value) == (3, 0.5)
    assert (top1.step, top1.value) == (3, pytest.approx(0.9))


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_the_numbers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    written("mlflow", tmp_path)
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name("megabatch")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.data.metrics["step/loss"], run.data.metrics["run_end/top1"]) == (0.5, 0.9)
    assert run.data.params["peak_lr"] == "0.5"
    assert run.info.status == "FINISHED"


@pytest.mark.filterwarnings("default")
def test_mlflow_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_URI"):
        open_tracker("mlflow", tmp_path, {})


@pytest.mark.filterwarnings("default")
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    written("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"step/loss" in run.read_bytes()
