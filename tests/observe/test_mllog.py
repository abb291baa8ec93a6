"""The MLPerf log of a run passes the checker of MLCommons, and says no more than the events do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANG_S
from run_folders import evaluation_event, make_run, step_event

from megabatch import recipes
from megabatch.errors import UserError
from megabatch.observe.mllog import Submission, write_mllog
from megabatch.observe.run_folder import load_runs

SETUP = {"workers": 4, "micro_batch_size": 1024}


def logged(folder: Path, top1: list[float], **submission: Any) -> Path:
    """The log of a run of an MLPerf row whose evaluations, every 4 epochs, have these accuracies."""
    evaluations = [
        evaluation_event(40 * n, value, epoch=4.0 * n, num_samples=50_000, seconds=0.01)
        for n, value in enumerate(top1, start=1)
    ]
    events = [step_event(1), *evaluations, {"event": "run_end", "top1": top1[-1], "train_s": 9.0}]
    run = make_run(folder / "run", events, recipe=recipes.get("mlperf_32768"), start=SETUP)
    chosen = Submission(organization="org", platform="system", **submission)
    return write_mllog(load_runs([run])[0], chosen, folder / "log.txt")


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("division", ["open", "closed"])
def test_the_official_checker_accepts_the_log(tmp_path: Path, division: str) -> None:
    pytest.importorskip("mlperf_logging")
    log = logged(tmp_path, [0.70, 0.7593], division=division)
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training"]
    options = ["--ruleset", "4.0.0", "--log_output", str(tmp_path / "checked.txt"), str(log)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert "SUCCESS" in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_log_has_the_runs_values_and_ends_where_the_target_is_reached(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_logging")
    found = lines(logged(tmp_path, [0.70, 0.7593, 0.77]))
    values = {line["key"]: line["value"] for line in found}
    assert values["global_batch_size"] == 32_768
    assert values["gradient_accumulation_steps"] == 8  # 32,768 images, 4 workers, 1,024 at once
    assert (values["lars_opt_base_learning_rate"], values["cache_clear"]) == (21.2, False)
    assert [line["value"] for line in found if line["key"] == "eval_accuracy"] == [0.70, 0.7593]
    assert found[-1]["metadata"]["status"] == "success"
    assert found[-1]["metadata"]["epoch_num"] == 8.0


def test_a_run_that_misses_the_target_is_aborted(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_logging")
    assert lines(logged(tmp_path, [0.70]))[-1]["metadata"]["status"] == "aborted"


def test_unfinished_runs_and_other_optimizers_in_the_closed_division_are_refused(tmp_path: Path) -> None:
    (run,) = load_runs([make_run(tmp_path / "run", [step_event(1)], start=SETUP)])
    closed = Submission(organization="org", platform="system", division="closed")
    with pytest.raises(UserError, match="needs a run that has ended"):
        write_mllog(run, closed, tmp_path / "log.txt")
    assert run.recipe is not None
    other = dataclasses.replace(run.recipe, optimizer="sgd")
    ended = dataclasses.replace(run, recipe=other, end={}, evaluations=[evaluation_event(1, 0.5)])
    with pytest.raises(UserError, match="optimizer=sgd"):
        write_mllog(ended, closed, tmp_path / "log.txt")
