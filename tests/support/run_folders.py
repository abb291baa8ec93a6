"""Run folders for tests of the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megabatch import recipes
from megabatch.observe.events import EventLog
from megabatch.recipe import Recipe, fields_as_json


def step_event(step: int, **fields: Any) -> dict[str, Any]:
    """Returns a step event as training writes it."""
    return {
        "event": "step",
        "step": step,
        "epoch": step / 10,
        "loss": 2.0 / step,
        "lr": 0.1 * step,
        "momentum": 0.9,
        "global_batch_size": 1024,
        "images_per_s": 5000.0,
    } | fields


def evaluation_event(step: int, top1: float | None, **fields: Any) -> dict[str, Any]:
    """Returns an evaluation event as training writes it."""
    return {"event": "evaluation", "step": step, "epoch": step / 10, "top1": top1, "top5": 0.9, "loss": 0.5} | fields


def make_run(
    folder: Path,
    events: Iterable[dict[str, Any]],
    *,
    recipe: Recipe | None = None,
    start: dict[str, Any] | None = None,
) -> Path:
    """Creates a run folder with these events; the default recipe is fashion_mnist."""
    folder.mkdir(parents=True)
    chosen = recipe or recipes.get("fashion_mnist")
    (folder / "recipe.json").write_text(json.dumps(fields_as_json(chosen)))
    with EventLog(folder / "events.jsonl") as log:
        log.write("run_start", recipe=chosen.name, **({"workers": 2} | (start or {})))
        for event in events:
            log.write(event["event"], **{key: value for key, value in event.items() if key != "event"})
    return folder
