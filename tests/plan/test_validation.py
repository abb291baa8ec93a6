"""Predictions of published multi-node runs, all from the same code and data, with the tolerances of docs/plan.md."""

import inspect
import statistics
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from megabatch.plan import exchange, hardware, layers, predict, step_time, timeline
from megabatch.plan.convergence import REFERENCE_POINTS, epochs_to_target
from megabatch.plan.validation import arguments, compare, published_rows, table

ROWS = published_rows()
HARDWARE = hardware.load_hardware()
COMPARISONS = [compare(row, HARDWARE) for row in ROWS]
FACTS = {
    "name", "cluster", "stack", "workers", "baseline_workers", "phases", "batch", "exchange", "bn_span", "evaluations",
    "model", "resolution", "time_s", "images_per_s", "efficiency", "explanation",
}  # fmt: skip


def test_at_least_35_rows_have_a_median_error_of_at_most_10_percent():
    assert len(ROWS) >= 35
    assert statistics.median(abs(row.error) for row in COMPARISONS) <= 0.10


@pytest.mark.parametrize("row", COMPARISONS, ids=[row.name for row in COMPARISONS])
def test_a_row_is_within_20_percent_or_explained_and_within_60(row):
    assert abs(row.error) <= (0.60 if row.explanation else 0.20)


def test_at_most_four_rows_are_off_by_more_than_35_percent():
    assert sum(abs(row.error) > 0.35 for row in COMPARISONS) <= 4


def test_no_row_has_a_knob():
    """A row holds facts of the run alone: no factor, efficiency of a device, latency or bandwidth."""
    assert all(set(row) <= FACTS for row in ROWS)
    known = set(inspect.signature(exchange.Exchange).parameters)
    assert all(set(row["exchange"]) <= known for row in ROWS)


def test_no_code_of_the_model_knows_a_cluster_or_a_stack():
    sources = [inspect.getsource(module) for module in (exchange, hardware, layers, predict, step_time, timeline)]
    words = {row["cluster"] for row in ROWS} | set(HARDWARE.stack)
    assert not [word for word in words for source in sources if word in source]


@pytest.mark.parametrize("published", ["time_s", "images_per_s", "efficiency"])
def test_a_prediction_depends_neither_on_a_rows_name_nor_on_its_published_value(published):
    rows = [row for row in ROWS if published in row]
    changed = [row | {"name": "", published: 1.0, "explanation": ""} for row in rows]
    assert [compare(row, HARDWARE).predicted for row in changed] == [compare(row, HARDWARE).predicted for row in rows]


def test_the_hardware_a_row_uses_holds_no_published_multi_node_result():
    """Its stack is fitted to single-node rows, whose workers and rates are not those of any validation row."""
    text = resources.files("megabatch.plan").joinpath("hardware.toml").read_text(encoding="utf-8")
    fitted = {
        (row["workers"], row["images_per_s"])
        for it in tomllib.loads(text)["stack"].values()
        for row in it.get("rows", ())
    }
    assert (
        max(workers for workers, _ in fitted)
        == 16
        < min(row["workers"] for row in ROWS if row["cluster"] == "tpu_v3_pod")
    )
    assert all(workers <= 8 for workers, _ in fitted if workers != 16)


def test_the_documentation_shows_this_table():
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert "\n".join(table(COMPARISONS)) in page
    assert "\n".join(arguments()) in page


@pytest.mark.parametrize(("batch", "mean", "fewest", "most"), REFERENCE_POINTS)
def test_epochs_at_a_published_batch_are_the_published_ones(batch, mean, fewest, most):
    made = epochs_to_target(batch)
    assert (made.mean, made.fewest, made.most) == pytest.approx((mean, fewest, most))
