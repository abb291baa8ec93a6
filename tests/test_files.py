"""Atomic writes, locks and the cache folder."""

import hashlib
import os
import pwd
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from limits import HANG_S

from megabatch.app.measured.tuning import table, use_table
from megabatch.comm.autotune.choose import tuning_file
from megabatch.errors import SettingsError
from megabatch.files import cache_folder, create_unused, locked, printable, replacing, sha256_of, write_text


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


def test_a_user_without_a_home_folder_has_a_cache_folder_of_their_own(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"megabatch-{os.getuid()}"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"megabatch-{os.getuid()}").symlink_to(tmp_path)
    assert cache_folder().parent == tmp_path
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    (tmp_path / f"megabatch-{real + 1}").mkdir()
    with pytest.raises(SettingsError, match="belongs to another user; XDG_CACHE_HOME="):
        cache_folder()


def test_folders_created_at_the_same_time_differ(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create_unused, [tmp_path / "runs" / "a.b"] * 16))
    assert sorted(made) == sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert {path.name for path in made} == {"a.b", *(f"a.b-{number}" for number in range(2, 17))}


def test_a_lock_that_is_held_is_an_error_without_waiting(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    with locked(tmp_path / "lock", wait=False):
        pass


def test_names_are_printable_and_keep_every_letter():
    assert printable("日本é a") == "日本é a"
    assert printable("a\nb\x1b[0m\udce9") == "a\\nb\\x1b[0m\\udce9"


def test_a_failed_write_names_the_file_and_not_its_temporary_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "missing" / "file.json", "text")
    assert raised.value.filename == str(tmp_path / "missing" / "file.json")


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes():
    code = """
import resource
from megabatch.data.sources.tar.shards import OpenFiles
from megabatch.files import max_open_files, raise_open_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))
assert max_open_files() == 64
assert OpenFiles(128)._limit == 8
raise_open_file_limit()
assert max_open_files() == 256
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
