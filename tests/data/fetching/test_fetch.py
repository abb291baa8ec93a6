import dataclasses
import functools
import gzip
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from small_data_sets import (
    CIFAR,
    FASHION,
    check,
    small,
    tar_of,
    write_cifar_binary,
    write_cifar_sheets,
    write_fashion,
)

from megabatch.data.fetching import fetch as fetching
from megabatch.data.fetching.catalog import CIFAR10, FASHION_MNIST
from megabatch.data.fetching.fetch import fetch, load
from megabatch.data.fetching.unpack import Arrays
from megabatch.errors import DataError, FetchError

# Folders


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_read_from_its_published_files(replace_known, tmp_path, compress):
    folder = write_fashion(tmp_path / "mine", compress=compress)
    fetched = fetch("fashion_mnist", cache=tmp_path / "cache", folder=folder)
    assert fetched.source == f"folder {folder}"
    assert fetched.path == tmp_path / "cache" / "fashion_mnist"
    check("fashion_mnist", tmp_path / "cache", FASHION)


def test_cifar_is_read_from_png_sheets(replace_known, tmp_path):
    fetch("cifar10", cache=tmp_path / "cache", folder=write_cifar_sheets(tmp_path / "mine"))
    check("cifar10", tmp_path / "cache", CIFAR)


@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_from_the_binary_version_with_and_without_its_archive(replace_known, tmp_path, packed):
    order = np.concatenate([np.arange(50)[k::5] for k in range(5)])
    splits = Arrays(CIFAR[0].images[order], CIFAR[0].labels[order]), CIFAR[1]
    replace_known(small(CIFAR10, splits))
    folder = write_cifar_binary(tmp_path / "mine" / "cifar-10-batches-bin")
    if packed:
        (tmp_path / "mine" / "cifar-10-binary.tar.gz").write_bytes(tar_of(folder, "cifar-10-batches-bin/", "w:gz"))
        shutil.rmtree(folder)
    fetch("cifar10", cache=tmp_path / "cache", folder=tmp_path / "mine")
    check("cifar10", tmp_path / "cache", splits)


def test_the_folder_may_be_another_cache(replace_known, tmp_path):
    fetch("fashion_mnist", cache=tmp_path / "one", folder=write_fashion(tmp_path / "mine"))
    fetch("fashion_mnist", cache=tmp_path / "two", folder=tmp_path / "one")
    check("fashion_mnist", tmp_path / "two", FASHION)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "this folder does not exist"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte.gz").unlink(), "does not hold the files of fashion_mnist"),
        (lambda folder: truncate(folder / "train-images-idx3-ubyte.gz"), "are damaged: Compressed file ended"),
        (lambda folder: (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>"), "are damaged: Not a gzipped"),
        (lambda folder: flip_a_pixel(folder / "train-images-idx3-ubyte.gz"), "the train split has sha256 [0-9a-f]{64}"),
        (
            lambda folder: write_fashion(folder, (FASHION[1], FASHION[1])),
            r"the train split has images \(10, 1, 28, 28\)",
        ),
        (
            lambda folder: write_fashion(folder, (unequal(FASHION[0]), FASHION[1])),
            "images per class; they should be equal",
        ),
    ],
)
def test_data_that_differ_from_the_published_ones_are_rejected_with_the_reason(replace_known, tmp_path, damage, reason):
    folder = write_fashion(tmp_path / "mine")
    damage(folder)
    with pytest.raises(FetchError, match=rf"could not fetch fashion_mnist from any source: folder .*{reason}"):
        fetch("fashion_mnist", cache=tmp_path / "cache", folder=folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".fashion_mnist.lock"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_pixel(path: Path) -> None:
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[5000] ^= 1
    path.write_bytes(gzip.compress(bytes(data)))


def unequal(part: Arrays) -> Arrays:
    labels = part.labels.copy()
    labels[0] = labels[1]
    return Arrays(part.images, labels)


def test_an_archive_cannot_write_outside_the_working_folder(replace_known, tmp_path):
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:gz") as tar:
        member = tarfile.TarInfo("../../../train-images-idx3-ubyte")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("train-labels-idx1-ubyte")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    (tmp_path / "a" / "b" / "mine").mkdir(parents=True)
    (tmp_path / "a" / "b" / "mine" / "x.tgz").write_bytes(evil.getvalue())
    with pytest.raises(FetchError, match="does not hold the files"):
        fetch("fashion_mnist", cache=tmp_path / "a" / "b" / "cache", folder=tmp_path / "a" / "b" / "mine")
    assert not list(tmp_path.rglob("train-*"))


# The cache


def test_the_second_fetch_uses_the_cache_without_writing_to_it(replace_known, tmp_path):
    cache = tmp_path / "cache"
    fetch("fashion_mnist", cache=cache, folder=write_fashion(tmp_path / "mine"))
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    assert fetch("fashion_mnist", cache=cache).source == "cache"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == files
    assert json.loads((cache / "fashion_mnist" / "about.json").read_text())["train_shape"] == [20, 1, 28, 28]


@pytest.mark.parametrize("fault", ["cut", "changed", "missing"])
def test_a_damaged_cache_is_reported_and_replaced_from_the_next_source(replace_known, tmp_path, fault):
    cache, folder = tmp_path / "cache", write_fashion(tmp_path / "mine")
    fetch("fashion_mnist", cache=cache, folder=folder)
    file = cache / "fashion_mnist" / "train_images.bin"
    data = file.read_bytes()
    file.unlink()
    if fault != "missing":
        file.write_bytes(data[:-1] if fault == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FetchError, match=r"cache: .*(bytes, not|sha256|No such file)"):
        fetch("fashion_mnist", cache=cache)
    assert fetch("fashion_mnist", cache=cache, folder=folder).source.startswith("folder")
    check("fashion_mnist", cache, FASHION)


def test_the_folder_is_tried_before_the_cache_and_its_failure_is_reported(replace_known, tmp_path):
    cache = tmp_path / "cache"
    fetch("fashion_mnist", cache=cache, folder=write_fashion(tmp_path / "mine"))
    assert fetch("fashion_mnist", cache=cache, folder=tmp_path / "mine").source.startswith("folder")
    said = []
    fetched = fetch("fashion_mnist", cache=cache, folder=tmp_path / "nothing", on_progress=said.append)
    assert fetched.source == "cache"
    assert said == [f"not used: folder {tmp_path / 'nothing'}: this folder does not exist"]


def test_writing_to_the_images_does_not_change_the_cache(replace_known, tmp_path):
    fetch("fashion_mnist", cache=tmp_path, folder=write_fashion(tmp_path / "mine"))
    train, _ = load("fashion_mnist", cache=tmp_path)
    train.images.zero_()
    check("fashion_mnist", tmp_path, FASHION)


def test_temporary_folders_of_killed_processes_are_removed(replace_known, tmp_path):
    leftover = tmp_path / "cache" / ".fashion_mnist-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.bin").write_bytes(b"x")
    fetch("fashion_mnist", cache=tmp_path / "cache", folder=write_fashion(tmp_path / "mine"))
    assert not leftover.exists()


def test_a_failure_while_storing_leaves_no_incomplete_data_set(replace_known, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.json, "dumps", full)
    with pytest.raises(FetchError, match="No space left on device"):
        fetch("fashion_mnist", cache=tmp_path / "cache", folder=write_fashion(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".fashion_mnist.lock"]


def test_the_error_for_a_read_only_cache_names_it(replace_known, tmp_path):
    (tmp_path / "file").write_text("a file where the cache's parent folder should be")
    with pytest.raises(FetchError, match=r"cannot write to the cache folder .*file/cache \(.*\); choose another"):
        fetch("fashion_mnist", cache=tmp_path / "file" / "cache")


# The official URL, on a loopback server


class Counting(SimpleHTTPRequestHandler):
    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(replace_known, tmp_path) -> Iterator[type[Counting]]:
    """Serves Fashion-MNIST at its "official" URL; yields the handler, whose `hits` lists the requested paths."""
    folder = write_fashion(tmp_path / "web")
    handler = type("Handler", (Counting,), {"hits": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{path.name}" for path in sorted(folder.iterdir()))
        replace_known(dataclasses.replace(small(FASHION_MNIST, FASHION), urls=urls))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


def test_fetching_from_the_official_url_leaves_no_downloads_behind(web, tmp_path):
    fetched = fetch("fashion_mnist", cache=tmp_path / "cache")
    assert fetched.source.startswith("http://127.0.0.1:")
    assert len(web.hits) == 4
    check("fashion_mnist", tmp_path / "cache", FASHION)
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_concurrent_workers_download_only_once(web, tmp_path):
    with ThreadPoolExecutor(6) as threads:
        fetched = list(threads.map(lambda _: fetch("fashion_mnist", cache=tmp_path / "cache"), range(6)))
    assert len(web.hits) == 4
    assert sorted(one.source == "cache" for one in fetched) == [False] + [True] * 5


def test_a_corrupt_download_is_rejected_and_deleted(web, tmp_path):
    flip_a_pixel(tmp_path / "web" / "train-images-idx3-ubyte.gz")
    with pytest.raises(FetchError, match=r"http://127\.0\.0\.1.*sha256.*damaged, or another version"):
        fetch("fashion_mnist", cache=tmp_path / "cache")
    write_fashion(tmp_path / "web")
    fetch("fashion_mnist", cache=tmp_path / "cache")
    check("fashion_mnist", tmp_path / "cache", FASHION)


def test_completed_downloads_are_kept_if_a_later_one_fails(web, tmp_path):
    missing = tmp_path / "web" / "train-images-idx3-ubyte.gz"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(FetchError, match="404"):
        fetch("fashion_mnist", cache=tmp_path / "cache")
    missing.write_bytes(content)
    web.hits.clear()
    fetch("fashion_mnist", cache=tmp_path / "cache")
    assert "/t10k-images-idx3-ubyte.gz" not in web.hits
    assert "/train-images-idx3-ubyte.gz" in web.hits


# Names


def test_imagenet_and_unknown_names_say_what_to_do():
    with pytest.raises(DataError, match=r"ILSVRC 2012 from image-net\.org and pass --data PATH"):
        load("imagenet")
    with pytest.raises(DataError, match="unknown data set 'mnist'; known: fashion_mnist, cifar10;"):
        fetch("mnist")


# Entries of the catalog, as far as they can be checked without a download


@pytest.mark.parametrize("known", [FASHION_MNIST, CIFAR10])
def test_catalog_entries_are_complete(known):
    assert len(known.class_names) == len(set(known.class_names)) == 10
    assert (known.train.num_images, known.test.num_images) in {(60_000, 10_000), (50_000, 10_000)}
    assert {len(part.sha256) for part in (known.train, known.test)} == {64}
    assert all(url.startswith("https://") for url in known.urls)
    assert bool(known.apt_package) != bool(known.npm_package)
