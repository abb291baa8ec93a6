"""Remote shards through a bounded local cache, with fsspec's own local and in-memory file systems as the far end."""

import builtins
import io
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.shards import ShardSource
from megabatch.data.sources.tar_index import build_index, index_path, write_index
from megabatch.errors import DataError, FetchError, SettingsError

fsspec = pytest.importorskip("fsspec")

from megabatch.data.packing.shard import file_sha256  # noqa: E402
from megabatch.data.sources.file_cache import FileCache, RemoteFile, _lock  # noqa: E402
from megabatch.data.sources.remote import RemoteShards, open_remote_shards  # noqa: E402

NUM_SHARDS, PER_SHARD = 5, 12
MIB = 1 << 20


def content(i: int) -> bytes:
    return b"image %03d " % i * 900


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """Five shards of one size, with indices and checksums as `pack` leaves them."""
    folder = tmp_path / "far"
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        path = folder / f"train-{shard}.tar"
        write_tar(
            path,
            [
                member
                for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
                for member in [(f"{i:04d}.jpg", content(i)), (f"{i:04d}.cls", b"%d" % (i % 2))]
            ],
        )
        write_index(build_index(path, extra={"tar_sha256": file_sha256(path)}), index_path(path))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


@pytest.fixture
def shard_bytes(far: Path) -> int:
    return (far / "train-0.tar").stat().st_size


def remote(far: Path, cache: Path, max_bytes: int = 100 * MIB) -> RemoteShards:
    return RemoteShards(f"file://{far}", part="train", cache=cache, max_bytes=max_bytes)


def held(cache: Path) -> int:
    """Bytes of shards in the cache, finished or not."""
    return sum(path.stat().st_size for path in cache.iterdir() if path.is_file() and path.suffix != ".lock")


def test_remote_samples_are_those_of_the_shards(far, tmp_path):
    near, source = ShardSource(far), remote(far, tmp_path / "cache")
    assert isinstance(source, EncodedSource)
    assert len(source) == len(near) == NUM_SHARDS * PER_SHARD
    assert source.labels.tolist() == near.labels.tolist()
    assert source.class_names == ("cat", "dog")
    assert list(source.shard_sizes) == list(near.shard_sizes)
    for i in np.random.default_rng(0).permutation(len(near)).tolist():
        assert source.read(i) == near.read(i) == content(i)
        assert source.name(i) == near.name(i)


def test_any_fsspec_file_system_will_do(far, tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(far), "/bucket", recursive=True)
        source = RemoteShards("memory://bucket", part="train", cache=tmp_path / "cache", max_bytes=MIB)
        assert [source.read(i) for i in range(len(source))] == [content(i) for i in range(len(source))]
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_remote_extra_brings_what_fsspec_needs_for_web_servers():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (fsspec_with_extras,) = project["optional-dependencies"]["remote"]
    assert fsspec_with_extras.startswith("fsspec[http]")


def test_only_the_shard_that_is_read_is_fetched(far, tmp_path, shard_bytes):
    source = remote(far, tmp_path / "cache")
    assert held(tmp_path / "cache") == 0
    source.read(PER_SHARD + 3)
    assert held(tmp_path / "cache") == shard_bytes


def test_the_cache_never_holds_more_than_it_may_and_lets_go_of_what_was_used_longest_ago(far, tmp_path, shard_bytes):
    source = remote(far, tmp_path / "cache", max_bytes=2 * shard_bytes + 100)
    for shard in (0, 1):
        source.read(shard * PER_SHARD)
        time.sleep(0.02)
    remote(far, tmp_path / "cache", max_bytes=2 * shard_bytes + 100).read(0)  # 0 is used again, by another worker
    assert held(tmp_path / "cache") == 2 * shard_bytes
    source.read(2 * PER_SHARD)
    names = {path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("*.tar")}
    assert names == {"train-0.tar", "train-2.tar"}
    for i in np.random.default_rng(1).permutation(len(source)).tolist():
        assert source.read(i) == content(i)
        assert held(tmp_path / "cache") <= 2 * shard_bytes + 100


def test_a_file_larger_than_the_cache_is_refused(far, tmp_path, shard_bytes):
    source = remote(far, tmp_path / "cache", max_bytes=shard_bytes - 1)
    with pytest.raises(SettingsError, match=f"{shard_bytes} bytes does not fit a cache of {shard_bytes - 1}"):
        source.read(0)


def test_a_second_run_fetches_nothing_again(far, tmp_path):
    source = remote(far, tmp_path / "cache")
    everything = [source.read(i) for i in range(len(source))]
    second = remote(far, tmp_path / "cache")
    second._fs = second._cache._fs = None
    assert [second.read(i) for i in range(len(second))] == everything


def test_a_damaged_copy_at_the_far_end_is_refused_and_leaves_nothing(far, tmp_path):
    source = remote(far, tmp_path / "cache")
    whole = bytearray((far / "train-1.tar").read_bytes())
    whole[700] ^= 1
    (far / "train-1.tar").write_bytes(whole)
    with pytest.raises(FetchError, match=r"train-1\.tar could not be fetched.*SHA-256"):
        source.read(PER_SHARD)
    assert held(tmp_path / "cache") == 0
    assert source.read(0) == content(0)


def test_a_far_end_that_breaks_off_is_tried_again(far, tmp_path, monkeypatch):
    source = remote(far, tmp_path / "cache")
    calls = []
    real = source._fs.open

    def flaky(path, mode):
        calls.append(path)
        if len(calls) == 1:
            raise ConnectionResetError("gone")
        return real(path, mode)

    monkeypatch.setattr(source._fs, "open", flaky)
    assert source.read(0) == content(0)
    assert len(calls) == 2
    calls.clear()
    monkeypatch.setattr(source._fs, "open", lambda *_: (_ for _ in ()).throw(ConnectionResetError("gone")))
    with pytest.raises(FetchError, match="could not be fetched: gone"):
        source.read(2 * PER_SHARD)


def test_shards_that_changed_are_fetched_anew(far, tmp_path):
    first = remote(far, tmp_path / "cache")
    assert first.read(0) == content(0)
    time.sleep(0.02)
    for name in ("train-0.tar", "train-0.tar.idx"):
        shutil.copy(far / name.replace("0", "1"), far / name)
    assert remote(far, tmp_path / "cache").read(0) == content(PER_SHARD)


def test_without_an_index_there_one_is_made_here_once(far, tmp_path):
    for path in far.glob("*.idx"):
        path.unlink()
    source = remote(far, tmp_path / "cache")
    assert [source.read(i) for i in range(len(source))] == [content(i) for i in range(len(source))]
    assert not list(far.glob("*.idx"))
    assert len(list((tmp_path / "cache" / "indices").glob("*.idx"))) == NUM_SHARDS


def test_shards_are_fetched_ahead_in_the_order_that_is_announced(far, tmp_path, monkeypatch):
    source = RemoteShards(f"file://{far}", part="train", cache=tmp_path / "cache", max_bytes=MIB, read_ahead_threads=1)
    fetched = []
    real = source._cache._fetch
    monkeypatch.setattr(source._cache, "_fetch", lambda *call: fetched.append(call[0].path[-5]) or real(*call))
    source.will_read([3 * PER_SHARD, 3 * PER_SHARD + 1, 0, 2 * PER_SHARD, 1])
    deadline = time.monotonic() + 20
    while len(fetched) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    source.close()
    assert fetched == ["3", "0", "2"]
    source.read(0)
    assert fetched == ["3", "0", "2"]


def test_no_more_is_fetched_ahead_than_the_cache_holds(far, tmp_path, shard_bytes):
    source = remote(far, tmp_path / "cache", max_bytes=2 * shard_bytes + 10)
    source.will_read([3 * PER_SHARD, 0, PER_SHARD])
    source._threads.shutdown(wait=True)
    assert {path.name[-5] for path in (tmp_path / "cache").glob("*.tar")} == {"3", "0"}


def test_a_network_that_fails_stops_a_run_and_is_no_bad_sample(far, tmp_path, monkeypatch):
    """A sample that could not be fetched is not replaced by another: the next run would train on other images."""
    source = remote(far, tmp_path / "cache")
    monkeypatch.setattr(source._fs, "open", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault of its own kind")))
    loader = TrainLoader(source, seed=0, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, max_bad_share=1.0)
    with pytest.raises(FetchError, match="a fault of its own kind"):
        loader.load(range(4), resolution=8)
    loader.close()
    source.close()


def test_shards_are_found_in_folders_of_their_parts_too_with_one_list_of_classes(far, tmp_path):
    for part, names in (("train", "012"), ("val", "34")):
        (far / part).mkdir()
        for name in names:
            (far / f"train-{name}.tar").rename(far / part / f"{part}-{name}.tar")
    (far / "train-9.tar.gz").write_bytes(b"of another data set")
    train, val = open_remote_shards(f"file://{far}", cache=tmp_path / "cache", max_bytes=MIB)
    assert [len(train), len(val)] == [3 * PER_SHARD, 2 * PER_SHARD]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert val.read(0) == content(3 * PER_SHARD)
    (far / "train" / "more.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"more\.tar\.gz is compressed.*plain \.tar works"):
        remote(far, tmp_path / "cache")


def test_parts_without_a_list_of_classes_agree_on_the_larger_number(far, tmp_path):
    (far / "classes.txt").unlink()
    write_tar(far / "val-0.tar", [("a.jpg", b"image"), ("a.cls", b"6")])
    train, val = open_remote_shards(f"file://{far}", cache=tmp_path / "cache", max_bytes=MIB)
    assert train.class_names == val.class_names == tuple("0123456")
    write_tar(far / "val-0.tar", [("a.jpg", b"image"), ("a.cls", b"cat")])
    with pytest.raises(DataError, match="train and val name different classes"):
        open_remote_shards(f"file://{far}", cache=tmp_path / "cache", max_bytes=MIB)


def test_a_server_that_lists_no_sizes_is_asked_for_each_and_must_know(far, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    listing, info = LocalFileSystem.ls, LocalFileSystem.info
    monkeypatch.setattr(
        LocalFileSystem,
        "ls",
        lambda self, path, detail: [{"name": entry["name"], "size": None} for entry in listing(self, path, detail)],
    )
    assert remote(far, tmp_path / "cache").read(0) == content(0)
    monkeypatch.setattr(LocalFileSystem, "info", lambda self, path: info(self, path) | {"size": None})
    with pytest.raises(DataError, match="does not say how large"):
        remote(far, tmp_path / "cache")


def test_threads_that_want_one_shard_fetch_it_once(far, tmp_path, monkeypatch):
    source = remote(far, tmp_path / "cache")
    fetched = []
    real = source._cache._fetch

    def slow(*call):
        fetched.append(call[0].path)
        time.sleep(0.05)
        real(*call)

    monkeypatch.setattr(source._cache, "_fetch", slow)
    wrong = []
    threads = [
        threading.Thread(target=lambda i=i: wrong.extend([] if source.read(i) == content(i) else [i])) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(fetched) == 1


def test_a_copy_gets_its_name_only_while_nobody_counts_what_lies_in_the_cache(tmp_path):
    """Renamed between a count's listing and its sizes, a copy was met under neither name, and one too many stayed."""
    fetching, go_on = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, size=-1):
            fetching.set()
            go_on.wait(10.0)
            return super().read(size)

    class FileSystem:
        def open(self, *_):
            return Slow(b"12345")

    cache = FileCache(tmp_path, fs=FileSystem(), max_bytes=9)
    file = RemoteFile("far/a.tar", 5, "")
    thread = threading.Thread(target=cache.fetch, args=[file], kwargs={"then": lambda _: None})
    thread.start()
    fetching.wait(10.0)
    with _lock(tmp_path / "cache"):
        go_on.set()
        thread.join(0.3)
        assert held(tmp_path) == 5
        assert not cache.path(file).exists()
    thread.join(10.0)
    assert cache.path(file).read_bytes() == b"12345"


def test_processes_share_a_small_cache_without_damage(far, tmp_path, shard_bytes):
    """Four processes read everything in orders of their own through room for two shards."""
    script = """
import sys
from pathlib import Path
import numpy as np
from megabatch.data.sources.remote import RemoteShards
far, cache, max_bytes, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
source = RemoteShards(f"file://{far}", part="train", cache=cache, max_bytes=max_bytes)
def held():  # of one moment: a listing that another process changed while it was read is read again
    for _ in range(100):
        before = sorted(cache.glob("*.tar"))
        try:
            total = sum(path.stat().st_size for path in before)
        except FileNotFoundError:
            continue
        if sorted(cache.glob("*.tar")) == before:
            return total
    return 0
for i in np.random.default_rng(seed).permutation(len(source)).tolist():
    assert source.read(i) == b"image %03d " % i * 900
    assert held() <= max_bytes, held()
"""
    arguments = [str(far), str(tmp_path / "cache"), str(2 * shard_bytes + 100)]
    processes = [
        subprocess.Popen([sys.executable, "-c", script, *arguments, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors[-2000:]
    assert held(tmp_path / "cache") <= 2 * shard_bytes + 100


def test_what_a_killed_process_left_is_cleared_away(far, tmp_path, shard_bytes):
    cache = tmp_path / "cache"
    source = remote(far, cache, max_bytes=shard_bytes + 10)
    stale = source._cache.path(source._remote[4])
    stale.with_name(stale.name + ".part").write_bytes(bytes(shard_bytes))
    assert source.read(0) == content(0)
    assert held(cache) == shard_bytes


def test_a_file_waits_for_room_while_another_is_being_fetched(tmp_path):
    class Slow:
        def open(self, *_):
            time.sleep(0.2)
            return io.BytesIO(bytes(100))

    cache = FileCache(tmp_path, fs=Slow(), max_bytes=150)
    most = []

    def fetch(name: str) -> None:
        cache.fetch(RemoteFile(name, 100, ""), then=lambda _: most.append(held(tmp_path)))

    threads = [threading.Thread(target=fetch, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 3
    assert max(most) <= 150


def test_nothing_there_is_an_error_that_says_what_is_needed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no shards for 'train'.*train-000000\.tar"):
        remote(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(DataError, match=r"there is no .*missing"):
        remote(tmp_path / "missing", tmp_path / "cache")
    with pytest.raises(DataError, match="cannot be opened"):
        RemoteShards("nonsense://x", part="train", cache=tmp_path / "cache", max_bytes=MIB)


def test_without_fsspec_the_error_says_what_to_install(far, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_fsspec(name, *args, **kwargs):
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_fsspec)
    with pytest.raises(DataError, match=r"megabatch\[remote\]"):
        remote(far, tmp_path / "cache")
