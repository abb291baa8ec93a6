"""MLPerf log of a finished run, written from its events by MLCommons' logging package, for ResNet's rules."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megabatch.errors import SettingsError, UserError
from megabatch.observe.events import Event
from megabatch.observe.run_folder import RunRecord
from megabatch.recipe import Recipe

Division = Literal["closed", "open"]
Status = Literal["cloud", "onprem", "preview", "research"]
Write = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a log says about the submitter, and cannot be known from the run."""

    organization: str
    platform: str
    division: Division = "open"
    status: Status = "research"


def write_mllog(run: RunRecord, submission: Submission, output: Path) -> Path:
    """Writes the log of `run` to `output` and returns `output`; times are those of the events.

    The events do not have the start of the initialisation and say nothing about caches: `init_start` has the time of
    `init_stop`, and `cache_clear` is false. A submission needs both from the script that starts the run.

    Raises:
        SettingsError: the package mlperf-logging is not installed.
        UserError: the run has no recipe, no evaluation or no end, or the division is closed and its optimizer not LARS.
    """
    recipe = _require_complete(run, submission)
    logger = logging.Logger("megabatch.mllog")  # not registered: other logs do not get its lines
    output.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(output, mode="w", encoding="utf-8")
    logger.addHandler(handler)
    try:
        write = _mllogger(logger)
        _write_start(write, run, recipe, submission)
        evaluations = _until_target(run.evaluations, recipe)
        _write_evaluations(write, run, evaluations)
        status = "success" if _reaches(evaluations[-1], recipe) else "aborted"
        write("end", "run_stop", evaluations[-1]["time_s"], status=status, epoch_num=evaluations[-1]["epoch"])
    finally:
        handler.close()
    return output


def _mllogger(logger: logging.Logger) -> Write:
    """Returns a function that writes one line: kind of event, key, time in seconds, value, metadata."""
    try:
        from mlperf_logging import mllog
    except ImportError as error:
        text = "an MLPerf log needs the package mlperf-logging; `pip install mlperf-logging` works"
        raise SettingsError(text) from error
    made = mllog.mllog.MLLogger(logger=logger, root_dir=str(Path(__file__).parents[2]))

    def write(kind: str, key: str, time_s: float, value: Any = None, **metadata: Any) -> None:
        getattr(made, kind)(key, value=value, metadata=metadata, time_ms=round(1000 * time_s))

    return write


def _require_complete(run: RunRecord, submission: Submission) -> Recipe:
    if run.recipe is None or run.end is None or not run.evaluations:
        raise UserError(f"{run.label} has no recipe, no evaluation or no end; a log needs a run that has ended")
    if submission.division == "closed" and run.recipe.optimizer != "lars":
        raise UserError(
            f"optimizer={run.recipe.optimizer} was run; the closed division works with LARS, the open with any"
        )
    return run.recipe


def _write_start(write: Write, run: RunRecord, recipe: Recipe, submission: Submission) -> None:
    start_s = run.start["time_s"]
    facts: dict[str, Any] = {
        "cache_clear": False,
        "submission_benchmark": "resnet",
        "submission_org": submission.organization,
        "submission_platform": submission.platform,
        "submission_division": submission.division,
        "submission_status": submission.status,
    }
    for key, value in facts.items():
        write("event", key, start_s, value)
    write("start", "init_start", start_s)
    for key, value in _settings(run, recipe).items():
        write("event", key, start_s, value)
    write("end", "init_stop", start_s)
    write("start", "run_start", start_s)


def _settings(run: RunRecord, recipe: Recipe) -> dict[str, Any]:
    steps_per_epoch = recipe.num_train_images / recipe.global_batch_size
    decay_epochs = recipe.total_epochs - recipe.warmup_epochs if recipe.decay_epochs is None else recipe.decay_epochs
    own = recipe.global_batch_size / run.start["workers"]
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "global_batch_size": recipe.global_batch_size,
        "gradient_accumulation_steps": max(1, math.ceil(own / run.start["micro_batch_size"])),
        "train_samples": recipe.num_train_images,
        "eval_samples": run.evaluations[-1]["num_samples"],
        "opt_name": recipe.optimizer,
    }
    if recipe.optimizer != "lars":
        return settings
    return settings | {
        "lars_opt_base_learning_rate": recipe.peak_lr,
        "lars_opt_end_learning_rate": recipe.end_lr,
        "lars_opt_learning_rate_decay_poly_power": recipe.poly_power,
        "lars_opt_learning_rate_decay_steps": round(decay_epochs * steps_per_epoch),
        "lars_epsilon": recipe.trust_eps,
        "lars_opt_learning_rate_warmup_epochs": recipe.warmup_epochs,
        "lars_opt_momentum": recipe.momentum,
        "lars_opt_weight_decay": recipe.weight_decay,
    }


def _until_target(evaluations: list[Event], recipe: Recipe) -> list[Event]:
    """Returns the evaluations up to the first that reaches the target: the run of the log ends there."""
    first = next((number for number, event in enumerate(evaluations, 1) if _reaches(event, recipe)), None)
    return evaluations[:first]


def _write_evaluations(write: Write, run: RunRecord, evaluations: list[Event]) -> None:
    """A block of training from each evaluation to the next, and the evaluation after it."""
    epoch, time_s = 0.0, run.start["time_s"]
    for event in evaluations:
        block = {"first_epoch_num": epoch, "epoch_count": event["epoch"] - epoch}
        evaluated_s = event["time_s"] - event["seconds"]
        write("start", "block_start", time_s, **block)
        write("end", "block_stop", evaluated_s, first_epoch_num=epoch)
        write("start", "eval_start", evaluated_s, epoch_num=event["epoch"])
        write("event", "eval_accuracy", event["time_s"], event["top1"], epoch_num=event["epoch"])
        write("end", "eval_stop", event["time_s"], epoch_num=event["epoch"])
        epoch, time_s = event["epoch"], event["time_s"]


def _reaches(event: Event, recipe: Recipe) -> bool:
    return recipe.target_top1 is not None and (event["top1"] or 0.0) >= recipe.target_top1
