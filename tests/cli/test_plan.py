"""`megabatch plan`: its table, JSON, limits, plot and errors; nothing heavy is imported."""

import json
import subprocess
import sys

import pytest
from command_line import error_line, megabatch
from limits import HANG_S


def planned(*arguments):
    done = megabatch("plan", "mlperf_32768", "--workers", "64,512", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_has_a_row_per_number_of_workers_and_names_the_fastest():
    out = planned("--price", "2")
    assert "fastest: 512 workers" in out
    assert "cheapest: 64 workers" in out
    assert "megabatch train: --all-reduce" in out
    assert "- stragglers:" in out


def test_json_holds_what_the_table_shows_and_parts_that_add_up():
    content = json.loads(planned("--json", "--price", "2", "--what-if", "wire=fp32"))
    first, second = content["plans"]
    assert (first["workers"], second["workers"]) == (64, 512)
    for row in content["plans"]:
        step = row["step"]
        parts = ("forward_s", "backward_s", "optimizer_s", "norm_s", "exposed_s", "straggler_s", "input_s")
        assert sum(step[part] for part in parts) == pytest.approx(step["total_s"])
        assert row["total_s"] == pytest.approx(row["updates"] * step["total_s"] + row["evaluation_s"])
        assert row["cost"] == pytest.approx(2 * row["workers"] * row["total_s"] / 3600)
    assert content["what_if"]["wire=fp32"][1]["total_s"] >= second["total_s"]
    assert len(content["assumptions"]) > 5


def test_limits_select_plans_and_say_when_none_is_left():
    assert "fastest: 64 workers" in planned("--price", "2", "--budget", "6.5")
    assert "no plan is within" in planned("--deadline-min", "0.01")


def test_images_per_worker_set_the_batch_and_its_epochs():
    rows = json.loads(planned("--local-batch", "64", "--json"))["plans"]
    assert [row["phases"][0]["global_batch_size"] for row in rows] == [4096, 32_768]
    assert [row["phases"][0]["epochs"] for row in rows] == [40.0, 56.0]


def test_the_plot_is_written(tmp_path):
    path = tmp_path / "plan.svg"
    assert f"wrote the plot to {path}" in planned("--plot", str(path), "--price", "2")
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlperf_32768", "--cluster", "nowhere"], "needed one of"),
        (["mlperf_32768", "--workers", "8,x"], "8,64 works"),
        (["mlperf_32768", "--local-batch", "many"], "--local-batch 32 works"),
        (["mlperf_32768", "--all-reduce", "star"], "--all-reduce auto works"),
        (["mlperf_32768", "--budget", "5"], "--price 2.5 works"),
        (["mlperf_32768", "--local-batch", "512", "--workers", "2048"], "67,840 works"),
        (["mlperf_32768", "--plot", "plan.pdf"], "plan.svg works"),
        (["mlperf_32768", "--what-if", "speed=2"], "bandwidth=2"),
        ([], "plan needs a recipe"),
    ],
)
def test_invalid_input_prints_one_line_with_what_works(arguments, message):
    assert message in error_line(megabatch("plan", *arguments))


def test_a_plan_imports_neither_torch_nor_numpy_nor_matplotlib():
    code = (
        "import sys; from megabatch.cli.main import app\n"
        "app(['plan', 'mlperf_32768', '--workers', '8,64'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
