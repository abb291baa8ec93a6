"""Writers that pass a run's events to TensorBoard, Weights & Biases or MLflow: every number, named `kind/field`."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError
from megabatch.observe.events import EventWriter
from megabatch.runtime import Track

NOT_METRICS = frozenset({"step", "time_s", "schema"})


def open_tracker(track: Track, folder: Path, config: Mapping[str, Any]) -> EventWriter | None:
    """Returns the writer of a run in `folder` with the recipe `config`; None for "none".

    "auto" is TensorBoard where its package is installed, as the extra `track` installs it, else nothing.

    Raises:
        SettingsError: the tracker's package is not installed, or the tracker refuses to start.
    """
    if track == "auto":
        track = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if track == "none":
        return None
    writers: dict[str, Callable[[Path, Mapping[str, Any]], EventWriter]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "mlflow": _Mlflow,
    }
    return writers[track](folder, config)


def metrics(event: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of an event by name, such as `step/phases_s/input`; lists and text are left out."""
    return dict(_numbers(event, {key: value for key, value in fields.items() if key not in NOT_METRICS}))


def _numbers(prefix: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _numbers(name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


class _Tracker:
    """Passes the numbers of each event to `_log`, at the event's step or the last one before it."""

    def __init__(self) -> None:
        self._step = 0

    def write(self, event: str, **fields: Any) -> None:
        self._step = fields.get("step", self._step)
        found = {} if event == "run_start" else metrics(event, fields)
        if found:
            self._log(found, self._step)

    def _log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError


class _TensorBoard(_Tracker):
    """Event files in the run folder's `tensorboard`; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: Path, _: Mapping[str, Any]) -> None:
        super().__init__()
        _require("tensorboard", "tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Tracker):
    """A run of the project "megabatch", or WANDB_PROJECT; WANDB_MODE=offline needs no network."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        wandb = _require("wandb", "wandb")
        project = os.environ.get("WANDB_PROJECT", "megabatch")
        try:
            self._run = wandb.init(project=project, name=folder.resolve().name, dir=str(folder), config=dict(config))
        except wandb.Error as error:
            raise SettingsError(
                f"wandb does not start: {error}; with WANDB_MODE=offline it needs no account"
            ) from error

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow(_Tracker):
    """A run of the experiment "megabatch", or MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        mlflow = _require("mlflow", "mlflow-skinny")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            raise SettingsError(
                "track=mlflow needs a server or a folder; MLFLOW_TRACKING_URI=http://127.0.0.1:5000 names a server, "
                "file:mlruns a folder (with MLFLOW_ALLOW_FILE_STORE=true)"
            )
        try:
            self._client, experiment = (
                mlflow.tracking.MlflowClient(),
                os.environ.get("MLFLOW_EXPERIMENT_NAME", "megabatch"),
            )
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self._client.create_experiment(experiment)
            self._id = self._client.create_run(number, run_name=folder.resolve().name).info.run_id
            for key, value in config.items():
                self._client.log_param(self._id, key, str(value)[:500])
        except mlflow.exceptions.MlflowException as error:
            raise SettingsError(f"mlflow does not start: {error}; check MLFLOW_TRACKING_URI") from error

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"the tracker needs the package {package}, which is not installed; `pip install {package}` works"
        ) from error
