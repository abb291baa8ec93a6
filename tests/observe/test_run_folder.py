"""A run folder belongs to one run."""

import pytest

from megabatch.errors import SettingsError
from megabatch.observe.run_folder import claimed, holds_run


def test_a_folder_is_reserved_while_a_run_writes_to_it(tmp_path):
    folder = tmp_path / "runs" / "one"
    with claimed(folder, resume=False) as events:
        events.write_text('{"event": "run_start"}\n')
        with pytest.raises(SettingsError, match="another process is writing"), claimed(folder, resume=True):
            pass
    with claimed(folder, resume=True):
        pass
    assert holds_run(folder)


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
