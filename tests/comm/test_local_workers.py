"""Local workers: their errors in one line, their signals, and an environment of their own."""

import os
import signal
import subprocess
import sys

import pytest
from limits import HANG_S

from megabatch.comm import local_workers
from megabatch.comm.local_workers import Recovery, _killed, common_code, handling, run_local_workers
from megabatch.comm.worker_errors import FOLDER_VARIABLE, find_cause, hand_to_parent, read_errors
from megabatch.errors import STOPPED, DataError, DivergedError, MegabatchError, PeerError


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


@pytest.mark.parametrize("is_local", [True, False])
def test_a_stuck_process_ends_with_its_error_handed_over_or_on_stderr(tmp_path, is_local):
    code = "from megabatch.comm.worker_errors import end_process as end; from megabatch.errors import PeerError\n"
    code += (
        "import threading; threading.Timer(0.1, end, [PeerError('rank 3 is silent')]).start(); threading.Event().wait()"
    )
    environment = os.environ | {"RANK": "2", FOLDER_VARIABLE: str(tmp_path) if is_local else ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1
    assert done.stderr == ("" if is_local else "megabatch (worker 2): rank 3 is silent\n")
    assert [str(error) for error in read_errors(tmp_path)] == ["rank 3 is silent"] * is_local


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


LOST = (1, PeerError("worker 1 was killed by SIGKILL"), True)
CRASHED = (1, None, False)
STOP = (STOPPED, None, False)
DONE = (0, None, False)


@pytest.mark.parametrize(
    ("outcomes", "new_checkpoints", "code", "workers"),
    [
        ([LOST, DONE], 0, 0, [4, 4]),
        ([LOST, LOST, LOST, DONE], 0, 0, [4, 4, 3, 2]),
        ([LOST, LOST, LOST, LOST], 0, PeerError, [4, 4, 3, 2]),
        ([LOST] * 7 + [DONE], 7, 0, [4] * 8),
        ([CRASHED], 0, 1, [4]),
        ([CRASHED, DONE], 1, 0, [4, 4]),
        ([LOST, STOP], 0, STOPPED, [4, 4]),
        ([(1, DivergedError("not finite"), False)], 1, DivergedError, [4]),
        ([(2, DataError("no images"), False)], 1, DataError, [4]),
    ],
)
def test_a_lost_worker_restarts_all_until_restarts_without_a_checkpoint_are_used_up(
    monkeypatch, outcomes, new_checkpoints, code, workers
):
    started, lines, waiting = [], [], list(outcomes)

    def run_once(num_workers, arguments, **_):
        started.append((num_workers, arguments.count("--resume")))
        return waiting.pop(0)

    monkeypatch.setattr(local_workers, "_run_once", run_once)
    recovery = Recovery(
        max_restarts=3, min_workers=2, progress=lambda: min(len(started), new_checkpoints), announce=lines.append
    )
    if isinstance(code, int):
        assert run_local_workers(4, ["train", "photos"], recovery=recovery) == code
    else:
        with pytest.raises(code):
            run_local_workers(4, ["train", "photos"], recovery=recovery)
    assert [number for number, _ in started] == workers
    assert [resumes for _, resumes in started] == [0, *[1] * (len(workers) - 1)]
    assert len(lines) == len(workers) - 1


@pytest.mark.parametrize(
    ("exit_codes", "code"),
    [([1, 2, -15], 2), ([-9, 1], 1), ([-9, -15], 1), ([75, -15], STOPPED), ([-15, -1], STOPPED), ([-11], 1)],
)
def test_the_exit_code_of_workers_is_that_of_their_cause(exit_codes, code):
    assert common_code(exit_codes) == code


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
