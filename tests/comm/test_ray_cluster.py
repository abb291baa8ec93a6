"""Workers on a local Ray cluster, in a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from limits import HANG_S

from megabatch.comm.ray_cluster import Placement, run_on_ray
from megabatch.errors import SettingsError
from megabatch.observe.events import read_events

SIZE = Placement(nodes=2, workers_per_node=1, gpus_per_node=0, cpus_per_worker=1)
DRIVER = """
import sys
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv.pop(1))
from megabatch.cli.main import main
main()
"""


@pytest.fixture
def launch(tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    started = []
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # a short path for sockets

        def start(*options):
            settings = ["--set", "total_epochs=1", "--set", "global_batch_size=128", "--set", "bn_span=64"]
            size = ["--nodes=2", "--workers-per-node=1", "--cpus-per-worker=1", "--", "fashion_mnist", *settings]
            command = [sys.executable, "-c", DRIVER, folder, "launch", "ray", *size, "--output", str(tmp_path / "run")]
            environment = os.environ | {"RAY_raylet_start_wait_time_s": "200", "RAY_AUTH_MODE": "disabled"}
            started.append(subprocess.Popen([*command, *options], env=environment, stderr=subprocess.PIPE, text=True))
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate(timeout=HANG_S)


def events(tmp_path, kind):
    path = tmp_path / "run" / "events.jsonl"
    return [event for event in read_events(path) if event["event"] == kind] if path.is_file() else []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_nodes_train_one_run_and_an_interrupt_leaves_a_checkpoint(launch, tmp_path):
    driver = launch()
    while not events(tmp_path, "step"):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(HANG_S) == 75
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_invalid_input_of_a_worker_is_the_exit_code_of_the_command(launch):
    assert launch("--init-from", "missing.pth").wait(HANG_S) == 2


def test_a_missing_ray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match="megabatch\\[ray\\]"):
        run_on_ray(["train", "photos"], SIZE, wait_s=1.0, grace_s=1)
