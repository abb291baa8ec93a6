"""Signs of life between local workers and their parent: a frozen worker is killed, an orphan ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from limits import HANG_S

from megabatch.comm.worker_errors import FOLDER_VARIABLE
from megabatch.comm.worker_watch import WorkerWatch, parent_has_died
from megabatch.errors import STOPPED

WORKER = "import time; from megabatch.comm import worker_watch as w; w.start_beating(); time.sleep(900)"
# Its parent ends at once, as one that SIGKILL ends; the worker, which never looks itself, has half a second.
ORPHAN = """
import os, time
os.environ["TORCHELASTIC_RUN_ID"] = f"megabatch-{os.getpid()}"
if os.fork() == 0:
    from megabatch.comm import worker_watch
    worker_watch.ORPHAN_GRACE_S = 0.5
    worker_watch.start_beating()
    time.sleep(900)
"""


def test_a_worker_knows_that_its_parent_has_died(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"megabatch-{os.getppid()}")
    assert not parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "megabatch-1000000000")
    assert parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run of torchrun")
    assert not parent_has_died()


def start_worker(folder, rank):
    return subprocess.Popen([sys.executable, "-c", WORKER], env=os.environ | {FOLDER_VARIABLE: folder, "RANK": rank})


def wait_for(is_done):
    deadline = time.monotonic() + HANG_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_frozen_worker_is_killed_and_named_and_a_running_one_is_not(tmp_path):
    with start_worker(str(tmp_path), "0") as frozen, start_worker(str(tmp_path), "1") as running:
        wait_for(lambda: len([path for path in tmp_path.glob("*.beat") if path.read_text()]) == 2)
        with WorkerWatch(tmp_path, timeout_s=4.0) as watch:
            frozen.send_signal(signal.SIGSTOP)
            assert frozen.wait(HANG_S) == -signal.SIGKILL
            assert [text.startswith("worker 0 was silent for ") for text in watch.silent] == [True]
            assert running.poll() is None
            watch.kill_all()
            assert running.wait(HANG_S) == -signal.SIGKILL


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads CPU time from /proc")
def test_a_worker_without_time_stamps_that_uses_cpu_time_is_not_killed_until_it_is_frozen(tmp_path):
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\nwhile True: pass"
    path = tmp_path / "0.beat"
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as busy:
        wait_for(lambda: path.exists() and path.read_text())
        with WorkerWatch(tmp_path, timeout_s=2.0) as watch:
            with pytest.raises(subprocess.TimeoutExpired):
                busy.wait(5.0)
            busy.send_signal(signal.SIGSTOP)
            assert busy.wait(HANG_S) == -signal.SIGKILL
        assert len(watch.silent) == 1


def test_a_worker_that_ended_is_watched_no_longer(tmp_path):
    code = WORKER.replace("900", "0.5")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {FOLDER_VARIABLE: str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_orphan_ends_in_time_and_removes_the_folder_of_its_parent(tmp_path):
    folder = tmp_path / "errors"
    folder.mkdir()
    environment = os.environ | {FOLDER_VARIABLE: str(folder)}
    # The pipe is closed when the orphan, which has inherited it, has ended.
    subprocess.run([sys.executable, "-c", ORPHAN], env=environment, capture_output=True, check=True, timeout=HANG_S)
    assert not folder.exists()
    assert STOPPED == os.EX_TEMPFAIL
