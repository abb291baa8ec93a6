"""Describes the environment of a run: versions, hardware and commit, without user names or paths."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from megabatch.cores import cpu_model, usable_cores

PACKAGES = ("megabatch", "torch", "numpy")


def describe() -> dict[str, Any]:
    """Returns versions, commit, processor, cores, GPU names and platform, as JSON values.

    The result has no user name, host name or path, so it can be published with the run.
    """
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "git_commit": git_commit(Path(__file__).parent),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "gpus": gpu_names(),
    }


def command_line() -> str | None:
    """Returns the `megabatch` command of this process, with the last part of absolute paths only; None in others."""
    program = Path(sys.argv[0])
    is_local_worker = sys.argv[:2] == ["-c", "train"]  # as comm/local_workers.py starts it
    if "megabatch" not in (program.name, program.parent.name) and not is_local_worker:
        return None
    return shlex.join(["megabatch", *(re.sub(r"(^|=)/.*/(?=[^/])", r"\1", word) for word in sys.argv[1:])])


def git_commit(folder: Path) -> str | None:
    """Returns the commit of the megabatch checkout at `folder`, with `-dirty` if files differ; None elsewhere."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or not (Path(root) / "src" / "megabatch").is_dir():
        return None  # installed inside another project's checkout, whose commit says nothing about megabatch
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def gpu_names() -> list[str]:
    """Returns the names of the GPUs that torch sees; empty if torch is not imported or there is no GPU."""
    torch = sys.modules.get("torch")  # importing torch only for this would take seconds
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of a git command in `folder`; None if it fails, outside a checkout, or without git."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(result.stdout).strip()
