"""A run folder belongs to one run."""

import contextlib
import threading

import pytest

from megabatch.errors import SettingsError
from megabatch.observe import run_folder
from megabatch.observe.run_folder import claimed, holds_run


def test_a_folder_is_reserved_while_a_run_writes_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "RELEASE_S", 0.3)
    folder = tmp_path / "runs" / "one"
    with claimed(folder, resume=False) as events:
        events.write_text('{"event": "run_start"}\n')
        with pytest.raises(SettingsError, match="another process is writing"), claimed(folder, resume=True):
            pass
    with claimed(folder, resume=True):
        pass
    assert holds_run(folder)


def test_a_resumed_run_waits_for_workers_that_still_write(tmp_path):
    earlier = contextlib.ExitStack()
    earlier.enter_context(claimed(tmp_path, resume=False)).write_text('{"event": "run_start"}\n')
    released = threading.Event()
    earlier.callback(released.set)  # runs before the lock is given up
    threading.Timer(0.5, earlier.close).start()
    with claimed(tmp_path, resume=True):
        assert released.is_set()


def test_a_folder_that_holds_a_run_needs_resume(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "run_start"}\n')
    with pytest.raises(SettingsError, match="--resume continues it"), claimed(tmp_path, resume=False):
        pass
    assert (tmp_path / "events.jsonl").read_text() == '{"event": "run_start"}\n'


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path, existed):
    folder = tmp_path / "run"
    if existed:
        folder.mkdir()
    with pytest.raises(ArithmeticError), claimed(folder, resume=False):
        raise ArithmeticError
    assert folder.exists() == existed
    assert not (folder / "events.jsonl").exists()
