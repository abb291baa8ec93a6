"""torchrun with the exit code of its workers, in processes of its own."""

import signal
import subprocess
import sys
import time

import pytest
from limits import HANG_S

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def start(script, tmp_path, *options):
    path = tmp_path / "worker.py"
    path.write_text(script)
    command = [sys.executable, "-m", "megabatch.comm.torchrun", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.Popen([*command, str(path)], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_code_of_the_workers_is_that_of_the_launcher(tmp_path, code):
    assert start(f"import sys; sys.exit({code})", tmp_path).wait(HANG_S) == code


def test_a_signal_reaches_the_workers_and_gives_the_code_of_a_stopped_run(tmp_path):
    folder = str(tmp_path)
    launcher = start(
        "import os, pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({folder!r}, 'rank' + os.environ['RANK'])\n"
        "def stop(*_):\n"
        "    mark.with_suffix('.stopped').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "mark.touch()\n"
        f"time.sleep({HANG_S})\n",
        tmp_path,
        "--shutdown-timeout=60",
    )
    while len(list(tmp_path.glob("rank?"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(HANG_S) == 75
    assert len(list(tmp_path.glob("*.stopped"))) == 2
