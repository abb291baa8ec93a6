"""Timing for comparisons: interleaved rounds, medians and quartiles, ratios, records."""

from pathlib import Path

from megabatch.bench.timing import Timing, compare, ratio, record, table, write_lines


def test_rounds_go_on_for_the_seconds_given() -> None:
    calls: list[int] = []
    timing = compare({"work": lambda: calls.append(0)}, warmup=0, repeats=1, seconds=0.05)["work"]
    assert len(timing.seconds) == len(calls) > 1
    assert compare({}, seconds=60.0) == {}


def test_compared_functions_run_equally_often_and_interleaved() -> None:
    calls: list[str] = []
    timings = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=2, repeats=5)
    assert len(calls) == 14
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(0, 14, 2))
    assert all(len(timing.seconds) == 5 and min(timing.seconds) > 0 for timing in timings.values())


def test_the_ratio_is_of_the_medians_and_its_quartiles_of_the_rounds() -> None:
    slow, fast = Timing((2.0, 6.0, 40.0)), Timing((1.0, 2.0, 4.0))
    assert ratio(slow, fast) == {
        "ratio": 3.0,
        "ratio_of_minima": 2.0,
        "ratio_quartile1": 2.5,
        "ratio_quartile3": 6.5,
    }


def test_a_record_names_versions_commit_and_hardware(tmp_path: Path) -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    values = record("b", "case", timing, parameters={"n": 3}, baseline=("case", timing), packages=["pytest"])
    assert [values[key] for key in ("median_s", "quartile1_s", "quartile3_s", "min_s")] == [3, 2, 4, 1]
    assert values["ratio"] == 1
    assert {"torch", "pytest", "git_commit", "cpu", "cores", "torch_threads"} <= values["environment"].keys()
    write_lines(tmp_path / "deep" / "lines.jsonl", [values, values])
    assert len((tmp_path / "deep" / "lines.jsonl").read_text().splitlines()) == 2
    assert "1.00 x case" in table([values])
