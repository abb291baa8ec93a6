"""The network laboratory: links have the requested rate and delay, and everything is removed afterwards."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_S

NETLAB = Path(__file__).parents[2] / "benchmarks" / "netlab"
sys.path.insert(0, str(NETLAB))

from lab import LabUnavailable, NetworkLab, remove_leftovers, require  # noqa: E402
from report import formula_bytes, median_s, predicted_s, report, with_overhead  # noqa: E402

PING = """
import os, socket, sys, time
if os.environ["RANK"] == "0":
    with socket.create_server(("", 7000)) as server:
        peer, _ = server.accept()
        while word := peer.recv(65536):
            peer.sendall(word[-1:])
else:
    while True:
        try:
            line = socket.create_connection((os.environ["MASTER_ADDR"], 7000), timeout=900)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        line.sendall(b"x")
        line.recv(1)
        times.append(time.perf_counter() - start)
    print(socket.gethostname(), min(times))
"""


def lab_or_skip(*arguments, **options):
    try:
        return NetworkLab(*arguments, **options).__enter__()
    except (LabUnavailable, subprocess.CalledProcessError, OSError) as missing:
        pytest.skip(f"the network laboratory is not available: {missing}")


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"mbl{os.getpid()}\w+", listed)


@pytest.mark.multiprocess
def test_a_message_between_hosts_takes_the_delay_and_nothing_is_left_behind(tmp_path):
    lab = lab_or_skip(2, rate_mbit=100, delay_ms=20)
    try:
        assert len(namespaces()) == 3
        command = [sys.executable, "-c", PING]
        codes = lab.run_everywhere(command, ranks_per_host=1, timeout_s=HANG_S, output=tmp_path)
    finally:
        lab.__exit__(None, None, None)
    assert codes == [0, 0]
    host, round_trip_s = (tmp_path / "rank1.txt").read_text().split()
    assert host == "host1"
    assert float(round_trip_s) >= 2 * 0.020
    assert namespaces() == []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_failing_or_hanging_rank_ends_all_ranks():
    lab = lab_or_skip(2, rate_mbit=100)
    try:
        hang = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(10000)"
        codes = lab.run_everywhere([sys.executable, "-c", hang], ranks_per_host=1, timeout_s=HANG_S)
    finally:
        lab.__exit__(None, None, None)
    assert codes == [-signal.SIGKILL, 3]


@pytest.mark.multiprocess
def test_namespaces_of_a_killed_laboratory_are_removed_later():
    lab_or_skip(1, rate_mbit=100).__exit__(None, None, None)
    killed = (
        "import os, signal; from lab import NetworkLab; NetworkLab(2, rate_mbit=9).__enter__(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", killed], cwd=NETLAB, check=False, timeout=HANG_S)
    assert done.returncode == -signal.SIGKILL
    assert len(remove_leftovers()) >= 3
    assert remove_leftovers() == []


def test_ranks_are_placed_in_blocks_or_round_robin():
    lab = NetworkLab(2, rate_mbit=1)
    assert [host.index for host, _ in lab.places(2, "block")] == [0, 0, 1, 1]
    assert [host.index for host, _ in lab.places(2, "round_robin")] == [0, 1, 0, 1]
    assert lab.environment(3, 1, lab.hosts[1], 2)["WORLD_SIZE"] == "4"


def test_without_root_the_laboratory_raises_an_error(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabUnavailable, match="needs root"):
        require()


def line_of(algorithm, seconds, *, order="block", shape=(2, 4)):
    cell = {"algorithm": algorithm, "shape": list(shape), "bucket_mib": 25.0, "wire": "fp32"}
    return {
        "hosts": 4, "ranks_per_host": 2, "order": order, "rate_mbit": 200.0, "delay_ms": 0.0, "num_bytes": 10_000_000,
        "row_step_s": 1e-4, "column_step_s": 1e-4, "column_overhead_s": 1e-4, "row_bytes_per_s": 1e9, "cell": cell,
        "seconds": [seconds] * 4, "host_bytes": [15_000_000.0] * 4, "busy": [0.2] * 4,
    }  # fmt: skip


def test_the_report_holds_ratio_bytes_and_model_of_each_condition():
    lines = [line_of(a, s) for a, s in (("flat", 0.8), ("hierarchical", 0.7), ("torus", 0.64), ("split_torus", 1.0))]
    text = report(lines)
    assert "| 4 x 2 | block | 200 | 0 | 10,000,000 | 800.00 | 700.00 | 640.00 | 1000.00 | 1.25 (torus)" in text
    assert "within 5 % of the best 1 of 1" in text


def test_a_torus_on_one_column_sends_the_ranks_own_bytes():
    assert formula_bytes(line_of("torus", 1.0)) == pytest.approx(15e6)
    assert formula_bytes(line_of("torus", 1.0, shape=(1, 8))) == pytest.approx(2 * 10e6 * 2 * 6 / 8)
    assert predicted_s(line_of("flat", 1.0, order="round_robin")) > 1.9 * predicted_s(line_of("flat", 1.0))


def test_calibrated_on_single_links_the_model_is_within_1_3_of_the_recorded_large_exchanges():
    """10 and 100 MB; smaller exchanges measure gloo's software (docs/plan.md has their shares)."""
    record = NETLAB.parent / "records" / "2026-11-20_2cores_netlab"
    lines = [json.loads(line) for path in record.glob("*_*x*_*.jsonl") for line in path.read_text().splitlines()]
    ratios = [median_s(line) / predicted_s(line) for line in with_overhead(lines) if line["num_bytes"] >= 10_000_000]
    assert len(ratios) == 350
    assert statistics.median(abs(ratio - 1) for ratio in ratios) < 0.05
    assert sum(1 / 1.3 <= ratio <= 1.3 for ratio in ratios) >= 0.94 * len(ratios)
