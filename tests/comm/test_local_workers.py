"""Local workers: their errors in one line, their signals, and an environment of their own."""

import os
import signal
import subprocess
import sys

import pytest
from limits import HANG_S

from megabatch.comm.local_workers import _killed, handling, parent_has_died, run_local_workers
from megabatch.comm.worker_errors import FOLDER_VARIABLE, find_cause, hand_to_parent, read_errors
from megabatch.errors import DataError, DivergedError, MegabatchError, PeerError


def test_an_error_reaches_the_parent_with_its_type_and_any_text(tmp_path, monkeypatch):
    assert not hand_to_parent(DataError("nobody reads it"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert hand_to_parent(DataError("line 1\nline 2: \udce9 日本"))
    (error,) = read_errors(tmp_path)
    assert type(error) is DataError
    assert str(error) == "line 1\nline 2: \udce9 日本"


def test_an_error_that_cannot_be_left_is_printed_by_the_worker(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    assert not hand_to_parent(DataError("x"))


def test_the_cause_is_invalid_input_else_the_first_that_names_no_other_worker():
    lost, diverged, data = PeerError("rank 1 is lost"), DivergedError("not finite"), DataError("no images")
    assert find_cause([lost, diverged, data]) is data
    assert find_cause([lost, diverged]) is diverged
    assert find_cause([lost, PeerError("later")]) is lost
    assert find_cause([]) is None


def test_workers_that_a_signal_killed_are_named_but_not_those_that_were_stopped():
    killed = _killed({0: -signal.SIGTERM, 1: -signal.SIGKILL, 2: 1, 3: -signal.SIGSEGV})
    assert killed == "worker 1 was killed by SIGKILL, worker 3 was killed by SIGSEGV"


def test_ignored_signals_stay_ignored_and_others_are_restored():
    received = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(lambda number, _: received.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_knows_that_its_parent_has_died(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"megabatch-{os.getppid()}")
    assert not parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "megabatch-1000000000")
    assert parent_has_died()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run of torchrun")
    assert not parent_has_died()


@pytest.mark.multiprocess
def test_an_error_of_all_workers_is_raised_once(capfd):
    with pytest.raises(MegabatchError, match="did you mean fashion_mnist"):
        run_local_workers(2, ["train", "fashion_mnst"])
    assert capfd.readouterr().err == ""


@pytest.mark.multiprocess
def test_a_file_in_the_current_folder_shadows_no_module_of_workers(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')\n")
    command = [sys.executable, "-P", "-c", "from megabatch.comm.local_workers import run_local_workers as run\n"]
    command[-1] += "raise SystemExit(run(2, ['recipes', 'fashion_mnist']))"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "shadowed" not in done.stderr
