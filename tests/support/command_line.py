"""The `megabatch` command, in this process or in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from typing import Any
from unittest.mock import patch

from limits import HANG_S

from megabatch.cli.main import main

Finished = subprocess.CompletedProcess[str]


def megabatch_process(*arguments: object, **options: Any) -> Finished:
    """Runs `megabatch ARGUMENTS` in a process of its own, which imports torch first: some seconds."""
    command = [sys.executable, "-m", "megabatch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False, **options)


def megabatch(*arguments: object) -> Finished:
    """Runs `megabatch ARGUMENTS` through its entry point, in this process; it must not start workers."""
    words = ["megabatch", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, environment = patch.object(sys, "argv", words), patch.dict(os.environ)  # main sets variables for its children
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv, environment:
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def error_line(done: Finished) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr
