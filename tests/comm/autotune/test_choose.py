"""The choice of the exchange: by the measurements of such a world, else by rule; corrupt tables are errors."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes, run_threads

from megabatch.comm.autotune.choose import Cell, Measured, choose, describe_world, read_table, write_table
from megabatch.comm.autotune.measure import Bench, cells_to_measure
from megabatch.comm.exchange.wrap import wrap
from megabatch.errors import SettingsError

HOSTS = ["a", "a", "b", "b"]
WORLD = describe_world("gloo", HOSTS)
MIB = 2**20


def row(algorithm, median_s, *, num_bytes=MIB, wire="fp32", bucket_mib=25.0):
    return Measured(Cell(algorithm, (2, 2), bucket_mib, wire), num_bytes, median_s, median_s, median_s, 5)


def chosen(path, **changes):
    arguments = {"num_bytes": MIB, "hosts": HOSTS, "backend": "gloo", "shape": (2, 2), "path": path}
    return choose(**arguments | changes)


def test_the_fastest_measured_cell_of_the_allowed_wire_is_chosen(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, WORLD, [row("flat", 3.0), row("torus", 2.0), row("hierarchical", 1.0, wire="bf16")])
    assert chosen(path).cell.algorithm == "torus"
    assert chosen(path, wires=("fp32", "bf16")).cell == Cell("hierarchical", (2, 2), 25.0, "bf16")
    assert "fastest of 2 cells" in chosen(path).why


def test_the_nearest_measured_size_decides(tmp_path):
    path = tmp_path / "table.json"
    small = [row("torus", 1.0), row("flat", 2.0)]
    large = [row("torus", 2.0, num_bytes=100 * MIB), row("flat", 1.0, num_bytes=100 * MIB)]
    write_table(path, WORLD, small + large)
    assert [chosen(path, num_bytes=size * MIB).cell.algorithm for size in (1, 9, 11, 500)] == ["torus"] * 2 + [
        "flat"
    ] * 2


def test_within_five_percent_the_backends_own_algorithm_is_kept(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, WORLD, [row("flat", 1.04), row("torus", 1.0)])
    assert chosen(path).cell.algorithm == "flat"
    write_table(path, WORLD, [row("flat", 1.06), row("torus", 1.0)])
    assert chosen(path).cell.algorithm == "torus"


def test_tables_of_several_worlds_share_a_file_and_are_read_back_as_written(tmp_path):
    path = tmp_path / "folder" / "table.json"
    write_table(path, WORLD, [row("torus", 0.5)])
    write_table(path, "nccl, ranks per host 8", [row("flat", 0.1)], torch="2.13.0")
    assert read_table(path, WORLD) == [row("torus", 0.5)]
    assert read_table(path, "gloo, ranks per host 3") == []


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[" * 100_000, '{"format": 1, "tables": 3}', '{"format": 9, "tables": {}}', "\xff"],
)
def test_a_corrupt_table_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError, match=r"table\.json.*delete it"):
        chosen(path)


@pytest.mark.parametrize(
    ("changes", "algorithm"),
    [
        ({}, "torus"),
        ({"hosts": ["a", "b", "a", "b"]}, "torus"),
        ({"hosts": ["a", "a", "b", "b", "b", "b"], "shape": (2, 3)}, "torus"),
        ({"hosts": ["a", "a", "a", "b", "b"], "shape": (1, 5)}, "flat"),  # 3 and 2 ranks: no common rows
        ({"hosts": ["a", "b", "c", "d"], "shape": (2, 2)}, "flat"),
        ({"hosts": ["a"] * 4}, "flat"),
        ({"hosts": ["a"] * 4, "wires": ("bf16",)}, "torus"),  # gloo's own all-reduce is slow on 16-bit values
        ({"backend": "nccl"}, "flat"),
        ({"backend": "nccl", "wires": ("fp16",)}, "flat"),
    ],
)
def test_without_a_table_a_torus_runs_on_rows_of_hosts_or_a_16_bit_wire_and_flat_elsewhere(changes, algorithm):
    choice = chosen(None, bucket_mib=4.0, **changes)
    shape, (wire,) = changes.get("shape", (2, 2)), changes.get("wires", ("fp32",))
    assert choice.cell == Cell(algorithm, shape, 4.0, wire)
    assert "has not measured it" in choice.why


def test_a_choice_names_algorithm_grid_bucket_wire_and_reason(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, WORLD, [row("torus", 1.0), row("flat", 2.0)])
    assert str(chosen(path)) == (
        "all-reduce torus 2 x 2, bucket 25 MiB, wire fp32 "
        "(fastest of 2 cells measured at 1 MiB on gloo, ranks per host 2+2)"
    )
    assert str(chosen(None, hosts=["a"] * 2, shape=(1, 2))) == (
        "all-reduce flat, bucket 25 MiB, wire fp32 "
        "(default for gloo, ranks per host 2, as `megabatch bench allreduce --tune` has not measured it)"
    )


def wrapped_as_given():
    return str(
        wrap(torch.nn.Linear(1, 1), algorithm="torus", shape=(1, 2), wire="bf16", bucket_mib=5.0).exchange_choice
    )


def test_a_given_algorithm_is_named_as_given():
    assert run_threads(2, wrapped_as_given)[1] == "all-reduce torus 1 x 2, bucket 5 MiB, wire bf16 (as given)"


def measured_cells():
    cells = cells_to_measure((2, 2), algorithms=["flat", "torus"], buckets_mib=[0.01], wires=["bf16"])
    return Bench(None, torch.device("cpu")).measure(cells, 40_000, repeats=2)


def test_the_bench_returns_the_same_measurements_on_all_ranks():
    results = run_threads(4, measured_cells)
    assert all(result == results[0] for result in results)
    assert [r.cell.shape for r in results[0]] == [(2, 2), (2, 2), (1, 4)]
    assert all(0 < r.q1_s <= r.median_s <= r.q3_s and r.repeats == 2 for r in results[0])


def wrapped_by_auto(path):
    model = wrap(torch.nn.Linear(4, 2), algorithm="auto", hosts=["a", "b", "a", "b"], tuning=path)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    model(torch.ones(1, 4) * dist.get_rank()).sum().backward()
    state = model.exchange_state
    return model.exchange_choice, state.grid.rows, model.module.weight.grad


@pytest.mark.multiprocess
def test_auto_sets_up_the_chosen_exchange_on_every_rank(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, describe_world("gloo", ["a", "b", "a", "b"]), [row("split_torus", 1.0, bucket_mib=1.0)])
    for choice, rows, gradient in run_processes(4, wrapped_by_auto, path):
        assert choice.cell == Cell("split_torus", (2, 2), 1.0, "fp32")
        assert "fastest of 1 cells" in choice.why
        assert rows == ((0, 2), (1, 3))
        assert torch.equal(gradient, torch.full((2, 4), 1.5))


def wrap_with_a_shape_of_three():
    with pytest.raises(SettingsError, match="3 x 1 does not hold 4 ranks"):
        wrap(torch.nn.Linear(4, 2), algorithm="auto", shape=(3, 1))


def test_a_wrong_shape_is_an_error_on_every_rank():
    run_threads(4, wrap_with_a_shape_of_three)


def wrapped_with(path):
    with pytest.raises(SettingsError, match="delete it"):
        wrapped_by_auto(path)


def test_a_corrupt_table_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "table.json").write_text("no")
    run_threads(4, wrapped_with, tmp_path / "table.json")
