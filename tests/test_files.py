"""Atomic writes, locks and the cache folder."""

import hashlib
import threading
import time

import pytest

from megabatch.comm.autotune.choose import tuning_file
from megabatch.files import cache_folder, locked, replacing, sha256_of, write_text
from megabatch.kernels.tuning import table, use_table


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "megabatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "megabatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "megabatch"


def test_tables_of_measurements_are_kept_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_file() == tmp_path / "megabatch" / "allreduce.json"
    use_table(None)
    assert table().folder == tmp_path / "megabatch" / "kernels"
    use_table(None)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_and_keeps_the_usual_permissions(tmp_path, durable):
    path = tmp_path / "file.json"
    path.write_text("old")
    usual = path.stat().st_mode
    with replacing(path, durable=durable) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode == usual
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(OSError, match="no-such-folder"), replacing(path) as part:
        part.write_text(f"half {(tmp_path / 'no-such-folder' / 'file').read_text()}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_with_undecodable_names_keeps_its_bytes(tmp_path):
    write_text(tmp_path / "names", b"caf\xe9".decode(errors="surrogateescape"))
    assert (tmp_path / "names").read_bytes() == b"caf\xe9"
    assert sha256_of(tmp_path / "names") == hashlib.sha256(b"caf\xe9").hexdigest()


def test_a_lock_excludes_another_thread(tmp_path):
    entered = []

    def enter():
        with locked(tmp_path / "lock"):
            entered.append(True)

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=enter)
        thread.start()
        time.sleep(0.05)
        assert not entered
    thread.join()
    assert entered
