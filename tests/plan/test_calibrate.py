"""Calibration: links and steps that made the measurements are found again, and plans of the new entries work."""

import itertools
import json

import pytest
from command_line import error_line, megabatch

from megabatch.comm.autotune.choose import Cell, Measured, write_table
from megabatch.comm.autotune.cost import Link, Network, cost
from megabatch.errors import SettingsError
from megabatch.plan.calibrate import as_toml, fit_links, step_row
from megabatch.plan.hardware import load_hardware
from megabatch.plan.step_time import speed_of

ROW, COLUMN = Link(20e-6, 4e9), Link(200e-6, 1e8)
NETWORK = Network(ROW, COLUMN, direct=True)
SIZES = (10_000, 1_000_000, 20_000_000)


def measured(algorithm, shape, num_bytes, network=NETWORK):
    seconds = cost(algorithm, num_bytes, shape, network).seconds()
    return Measured(Cell(algorithm, shape, 25.0, "fp32"), num_bytes, seconds, seconds, seconds, 5)


def test_links_inside_and_between_hosts_are_recovered():
    cells = itertools.product(("flat", "torus", "hierarchical", "split_torus"), SIZES)
    fitted = fit_links("gloo, ranks per host 2+2+2+2", [measured(name, (2, 4), size) for name, size in cells])
    assert fitted.error == pytest.approx(0, abs=1e-6)
    assert fitted.ranks_per_host == 2
    assert vars(fitted.row) == pytest.approx(vars(ROW))
    assert vars(fitted.column) == pytest.approx(vars(COLUMN))


def test_on_one_host_both_axes_of_a_torus_are_its_own_link():
    alone = Network(ROW, Link(ROW.latency_s, 2 * ROW.bytes_per_s), direct=True)
    rows = [measured("flat", (4, 1), size, alone) for size in SIZES]
    rows += [measured("torus", (2, 2), size, alone) for size in SIZES]
    fitted = fit_links("gloo, ranks per host 4", rows)
    assert fitted.column is None
    assert vars(fitted.row) == pytest.approx(vars(ROW))


def test_what_tells_no_link_is_refused():
    with pytest.raises(SettingsError, match="equally many ranks"):
        fit_links("gloo, ranks per host 4+2", [])
    with pytest.raises(SettingsError, match="two sizes"):
        fit_links("gloo, ranks per host 4", [measured("flat", (4, 1), 1000)])


def step_file(path, seconds):
    variants = [{"variant": "fp32", "seconds": [seconds, 2 * seconds, seconds]}, {"variant": "bf16", "seconds": []}]
    path.write_text(json.dumps({"recipe": "fashion_mnist", "model": "resnet8", "images": 128, "variants": variants}))


def test_a_calibrated_cluster_predicts_the_measured_step(tmp_path):
    step, table, mine = (tmp_path / name for name in ("step.json", "allreduce.json", "mine.toml"))
    step_file(step, 0.05)
    alone = Network(ROW, ROW, direct=True)
    write_table(table, "gloo, ranks per host 2", [measured("flat", (2, 1), size, alone) for size in SIZES])
    done = megabatch("plan", "--calibrate", step, "--calibrate", table)
    assert done.returncode == 0, done.stderr
    mine.write_text(done.stdout)
    hardware = load_hardware(mine)
    assert hardware.link["mine_row"].latency_us == pytest.approx(20, rel=1e-3)
    assert speed_of("mine", hardware).overhead_s == 0
    options = ("--hardware", mine, "--cluster", "mine", "--set", "global_batch_size=128", "--json")
    planned = json.loads(megabatch("plan", "fashion_mnist", "--workers", "1", *options).stdout)["plans"][0]
    assert planned["step"]["total_s"] == pytest.approx(0.05, rel=1e-3)


def test_files_that_are_no_measurements_are_refused(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("{}")
    assert "not a file of `megabatch bench step" in error_line(megabatch("plan", "--calibrate", path))
    for text in ("no json", "[" * 100_000, "[]", '{"tables": [1]}'):
        path.write_text(text)
        assert "--calibrate" in error_line(megabatch("plan", "--calibrate", path))
    with pytest.raises(SettingsError, match="no measured variant"):
        step_row({"variants": [{"seconds": []}], "images": 8, "model": "resnet8", "recipe": "x"})


def test_without_links_a_cluster_is_single_devices():
    assert "devices_per_host = 1" in as_toml("mine", [], None)
