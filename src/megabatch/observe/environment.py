"""What a run ran on: versions, hardware and commit, without names of users or paths of the machine."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("megabatch", "torch", "numpy")


def describe() -> dict[str, Any]:
    """Versions, commit, processor, cores, GPU names and platform, as JSON values.

    Holds no user name, host name or path, so that it may be published with the run.
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


def git_commit(folder: Path) -> str | None:
    """The commit of megabatch's source at `folder`, marked `-dirty` where files differ; None outside its checkout."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or not (Path(root) / "src" / "megabatch").is_dir():
        return None  # installed somewhere inside another project's checkout: that commit would mislead
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees; empty without torch or without a GPU."""
    torch = sys.modules.get("torch")  # not imported for this alone: it takes seconds
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    """The output of a git command in `folder`; None without git, outside a checkout, or on any failure."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
