"""Which errors end as one line, and how long it is."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from command_line import error_line
from limits import HANG_S
from run_folders import make_run

from megabatch.cli.failure import as_megabatch_error, report, shorten
from megabatch.errors import DataError, PeerError, SettingsError


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "/a/b: permission denied; choose a path that this user may read and write"),
        (errno.EROFS, "/a/b: read-only file system; choose a path on a writable file system"),
        (errno.ENOSPC, "/a/b: no space left on device; free some space there, or choose a path on another disk"),
        (errno.EMFILE, "/a/b: too many open files; `ulimit -n 4096` allows more open files"),
    ],
)
def test_an_error_of_the_system_says_which_file_and_what_helps(number, said):
    error = as_megabatch_error(OSError(number, os.strerror(number), "/a/b"))
    assert isinstance(error, SettingsError)
    assert str(error) == said


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("x"), RuntimeError("x")])
def test_an_unexpected_error_keeps_its_traceback(error):
    assert as_megabatch_error(error) is None


def test_a_home_folder_that_is_unknown_is_one_line():
    assert "a path without ~ works" in str(as_megabatch_error(RuntimeError("Could not determine home directory.")))


def test_a_long_line_keeps_its_beginning_and_its_end():
    text = shorten("start " + "name, " * 1000 + "end works")
    assert len(text) < 1100
    assert text.startswith("start name")
    assert text.endswith("end works")
    assert shorten("x" * 1000) == "x" * 1000


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({}, "megabatch: "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "megabatch: "),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "megabatch (worker 1): "),
        ({"RANK": "1"}, "megabatch: "),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "megabatch: "),
    ],
)
def test_the_line_names_the_worker_and_escapes_what_is_not_printable(environment, start, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert report(DataError("bad\nfile \x1b[1m\udce9.jpg")) == 2
    assert capsys.readouterr().err == start + "bad file \\x1b[1m\\udce9.jpg\n"
    assert report(PeerError("lost")) == 1


def run_megabatch(*arguments, before=(), **options):
    command = [*before, sys.executable, "-m", "megabatch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False, **options)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="takes root's right to write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line_and_stays_empty(tmp_path):
    run = make_run(tmp_path / "run", [])
    (tmp_path / "locked").mkdir(mode=0o555)
    ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    commands = [
        ("report", run, "--output", tmp_path / "locked" / "report.html"),
        ("recipes", "fashion_mnist", "--plot", tmp_path / "locked" / "new" / "plot.svg"),
    ]
    for command in commands:
        said = error_line(run_megabatch(*command, before=ordinary))
        assert "permission denied; choose a path that this user may" in said
        assert ".part" not in said
    assert list((tmp_path / "locked").iterdir()) == []


def test_a_file_that_does_not_fit_is_one_line_and_leaves_no_part(tmp_path):
    run = make_run(tmp_path / "run", [])

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    said = error_line(run_megabatch("report", run, preexec_fn=little_room))
    assert f"{run}/report.html: file too large; " in said
    assert sorted(path.name for path in run.iterdir()) == ["events.jsonl", "recipe.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_verb_after_it_has_removed_its_temporary_files(number, tmp_path):
    code = f"""
import os, time
import megabatch.cli.main as command
from megabatch.files import replacing
from pathlib import Path
def verb():
    with replacing(Path({str(tmp_path)!r}) / "file") as part:
        part.write_text("half")
        os.kill(os.getpid(), {int(number)})
        time.sleep({HANG_S})
command.app = verb
command.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert list(tmp_path.iterdir()) == []
