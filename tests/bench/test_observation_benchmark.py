"""benchmarks/observation.py: the made-up run has what a report shows, and the page of a long run stays small."""

import sys
from pathlib import Path

import pytest

from megabatch.observe.report import write_report
from megabatch.observe.run_folder import load_runs


@pytest.fixture
def observation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import observation

    yield observation
    sys.modules.pop("observation")


@pytest.mark.parametrize("num_steps", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_page_of_a_long_run_has_all_sections_in_less_than_5_mb(observation, tmp_path, num_steps):
    folder = observation.write_long_run(tmp_path / "run", num_steps)
    (run,) = load_runs([folder])
    assert len(run.steps) == num_steps
    assert len(run.observations) >= 200
    page = write_report([folder], tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    text = page.read_text(encoding="utf-8")
    for section in ("Gradient norm", "Wait for input", "One update of", "Trust ratio", "Confusion of"):
        assert section in text


def test_observed_updates_write_their_events_and_others_none(observation, monkeypatch):
    monkeypatch.setattr(observation, "measured_batch_size", lambda *_, **__: 128)
    monkeypatch.setattr(observation, "UPDATES", 2)
    monkeypatch.setattr(observation, "EVERY_STEPS", 1)
    logged = []
    monkeypatch.setattr(observation.EventLog, "write", lambda _, event, **_fields: logged.append(event))
    rows = observation.measure_step(1)
    assert [row["case"] for row in rows] == ["without", "with"]
    assert rows[1]["ratio"] > 0
    assert logged.count("step") == 2 * 2  # warm-up and one repeat
    assert logged.count("observation") == 2 * 2
