"""`megabatch bench allreduce`: its measurements, its table, and invalid options."""

import os
import subprocess
import sys

import pytest
from limits import HANG_S

from megabatch.cli.bench.allreduce import parse_shape
from megabatch.comm.autotune.choose import choose, read_table
from megabatch.errors import SettingsError

MAIN = "import typer; from megabatch.cli.bench.allreduce import bench_allreduce; typer.run(bench_allreduce)"


def run_under_torchrun(folder, *arguments):
    (folder / "bench.py").write_text(MAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, str(folder / "bench.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.multiprocess
def test_tuning_prints_its_measurements_and_saves_them_for_auto(tmp_path):
    table = tmp_path / "allreduce.json"
    done = run_under_torchrun(tmp_path, "--mib", "0.01,1", "--repeats", "2", "--tune", "--table", str(table))
    assert done.returncode == 0, done.stderr
    assert "2 workers as 1 x 2" in done.stdout
    assert done.stdout.count("MiB: median ms") == 2
    rows = read_table(table, "gloo, ranks per host 2")
    assert {row.cell.wire for row in rows} == {"fp32", "fp16", "bf16"}
    assert {row.cell.algorithm for row in rows} == {"flat", "hierarchical", "torus", "split_torus"}
    choice = choose(num_bytes=2**20, hosts=["a", "a"], backend="gloo", shape=(1, 2), path=table)
    assert choice.cell.wire == "fp32"
    assert "fastest of" in choice.why


def test_a_shape_is_row_times_column():
    assert parse_shape("4x2") == (4, 2)
    assert parse_shape(None) is None


@pytest.mark.parametrize("text", ["4", "x", "4x", "ax2", "4x2x1", "-1x2"])
def test_an_invalid_shape_is_an_error_with_an_example(text):
    with pytest.raises(SettingsError, match="--shape 4x2"):
        parse_shape(text)
