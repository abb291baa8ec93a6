"""Remote shards through a bounded local cache, with fsspec's local and in-memory file systems as the remote end."""

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
from limits import HANG_S

from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.data.sources.tar.tar_index import build_index, index_path, write_index
from megabatch.errors import DataError, FetchError, SettingsError

fsspec = pytest.importorskip("fsspec")

from megabatch.data.sources.file_cache import FileCache, RemoteFile, _lock_of  # noqa: E402
from megabatch.data.sources.remote import RemoteShards, open_remote_shards  # noqa: E402
from megabatch.files import locked, sha256_of  # noqa: E402

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
def bucket(tmp_path: Path) -> Path:
    """Five shards of one size, with indices and checksums as `pack` writes them."""
    folder = tmp_path / "bucket"
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
        write_index(build_index(path, extra={"tar_sha256": sha256_of(path)}), index_path(path))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


@pytest.fixture
def shard_bytes(bucket: Path) -> int:
    return (bucket / "train-0.tar").stat().st_size


def remote(bucket: Path, cache: Path, max_bytes: int = 100 * MIB) -> RemoteShards:
    return RemoteShards(f"file://{bucket}", part="train", cache=cache, max_bytes=max_bytes)


def held(cache: Path) -> int:
    """Bytes of shards in the cache, including those in flight."""
    return sum(path.stat().st_size for path in cache.iterdir() if path.is_file() and path.suffix != ".lock")


def test_remote_samples_are_those_of_the_shards(bucket, tmp_path):
    local, source = ShardSource(bucket), remote(bucket, tmp_path / "cache")
    assert isinstance(source, EncodedSource)
    assert len(source) == len(local) == NUM_SHARDS * PER_SHARD
    assert source.labels.tolist() == local.labels.tolist()
    assert source.class_names == ("cat", "dog")
    assert list(source.shard_sizes) == list(local.shard_sizes)
    for i in np.random.default_rng(0).permutation(len(local)).tolist():
        assert source.read(i) == local.read(i) == content(i)
        assert source.name(i) == local.name(i)


def test_any_fsspec_file_system_works(bucket, tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(bucket), "/bucket", recursive=True)
        source = RemoteShards("memory://bucket", part="train", cache=tmp_path / "cache", max_bytes=MIB)
        assert [source.read(i) for i in range(len(source))] == [content(i) for i in range(len(source))]
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_remote_extra_installs_fsspec_s_dependencies_for_http():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (fsspec_with_extras,) = project["optional-dependencies"]["remote"]
    assert fsspec_with_extras.startswith("fsspec[http]")


def test_only_the_shard_that_is_read_is_fetched(bucket, tmp_path, shard_bytes):
    source = remote(bucket, tmp_path / "cache")
    assert held(tmp_path / "cache") == 0
    source.read(PER_SHARD + 3)
    assert held(tmp_path / "cache") == shard_bytes


def test_the_cache_never_exceeds_its_size_and_evicts_the_least_recently_used_shard(bucket, tmp_path, shard_bytes):
    source = remote(bucket, tmp_path / "cache", max_bytes=2 * shard_bytes + 100)
    for shard in (0, 1):
        source.read(shard * PER_SHARD)
        time.sleep(0.02)
    remote(bucket, tmp_path / "cache", max_bytes=2 * shard_bytes + 100).read(0)  # 0 is used again, by another worker
    assert held(tmp_path / "cache") == 2 * shard_bytes
    source.read(2 * PER_SHARD)
    names = {path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("*.tar")}
    assert names == {"train-0.tar", "train-2.tar"}
    for i in np.random.default_rng(1).permutation(len(source)).tolist():
        assert source.read(i) == content(i)
        assert held(tmp_path / "cache") <= 2 * shard_bytes + 100


def test_a_file_larger_than_the_cache_is_refused(bucket, tmp_path, shard_bytes):
    source = remote(bucket, tmp_path / "cache", max_bytes=shard_bytes - 1)
    with pytest.raises(SettingsError, match=f"{shard_bytes} bytes does not fit a cache of {shard_bytes - 1}"):
        source.read(0)


def test_a_second_run_fetches_nothing(bucket, tmp_path):
    source = remote(bucket, tmp_path / "cache")
    everything = [source.read(i) for i in range(len(source))]
    second = remote(bucket, tmp_path / "cache")
    second._fs = second._cache._fs = None
    assert [second.read(i) for i in range(len(second))] == everything


def test_a_corrupt_remote_copy_is_refused_and_leaves_no_file(bucket, tmp_path):
    source = remote(bucket, tmp_path / "cache")
    whole = bytearray((bucket / "train-1.tar").read_bytes())
    whole[700] ^= 1
    (bucket / "train-1.tar").write_bytes(whole)
    with pytest.raises(FetchError, match=r"train-1\.tar could not be fetched.*SHA-256"):
        source.read(PER_SHARD)
    assert held(tmp_path / "cache") == 0
    assert source.read(0) == content(0)


def test_a_broken_connection_is_tried_again(bucket, tmp_path, monkeypatch):
    source = remote(bucket, tmp_path / "cache")
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


def test_shards_that_changed_are_fetched_again(bucket, tmp_path):
    first = remote(bucket, tmp_path / "cache")
    assert first.read(0) == content(0)
    time.sleep(0.02)
    for name in ("train-0.tar", "train-0.tar.idx"):
        shutil.copy(bucket / name.replace("0", "1"), bucket / name)
    assert remote(bucket, tmp_path / "cache").read(0) == content(PER_SHARD)


def test_a_missing_remote_index_is_built_locally_once(bucket, tmp_path):
    for path in bucket.glob("*.idx"):
        path.unlink()
    source = remote(bucket, tmp_path / "cache")
    assert [source.read(i) for i in range(len(source))] == [content(i) for i in range(len(source))]
    assert not list(bucket.glob("*.idx"))
    assert len(list((tmp_path / "cache" / "indices").glob("*.idx"))) == NUM_SHARDS


def test_shards_are_prefetched_in_the_announced_order(bucket, tmp_path, monkeypatch):
    source = RemoteShards(
        f"file://{bucket}", part="train", cache=tmp_path / "cache", max_bytes=MIB, read_ahead_threads=1
    )
    fetched = []
    real = source._cache._fetch
    monkeypatch.setattr(source._cache, "_fetch", lambda *call: fetched.append(call[0].path[-5]) or real(*call))
    source.will_read([3 * PER_SHARD, 3 * PER_SHARD + 1, 0, 2 * PER_SHARD, 1])
    deadline = time.monotonic() + HANG_S
    while len(fetched) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    source.close()
    assert fetched == ["3", "0", "2"]
    source.read(0)
    assert fetched == ["3", "0", "2"]


def test_no_more_shards_are_prefetched_than_the_cache_holds(bucket, tmp_path, shard_bytes):
    source = remote(bucket, tmp_path / "cache", max_bytes=2 * shard_bytes + 10)
    source.will_read([3 * PER_SHARD, 0, PER_SHARD])
    source._threads.shutdown(wait=True)
    assert {path.name[-5] for path in (tmp_path / "cache").glob("*.tar")} == {"3", "0"}


def test_a_network_failure_raises_and_is_not_a_bad_sample(bucket, tmp_path, monkeypatch):
    """A sample that could not be fetched is not replaced: the next run would then train on other images."""
    source = remote(bucket, tmp_path / "cache")
    monkeypatch.setattr(
        source._fs, "open", lambda *_: (_ for _ in ()).throw(RuntimeError("an error of the file system"))
    )
    loader = TrainLoader(source, seed=0, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, max_bad_share=1.0)
    with pytest.raises(FetchError, match="an error of the file system"):
        loader.load(range(4), resolution=8)
    loader.close()
    source.close()


def test_shards_are_found_in_train_and_val_folders_with_one_list_of_classes(bucket, tmp_path):
    for part, names in (("train", "012"), ("val", "34")):
        (bucket / part).mkdir()
        for name in names:
            (bucket / f"train-{name}.tar").rename(bucket / part / f"{part}-{name}.tar")
    (bucket / "train-9.tar.gz").write_bytes(b"of another data set")
    train, val, _ = open_remote_shards(f"file://{bucket}", cache=tmp_path / "cache", max_bytes=MIB)
    assert [len(train), len(val)] == [3 * PER_SHARD, 2 * PER_SHARD]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert val.read(0) == content(3 * PER_SHARD)
    (bucket / "train" / "more.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"more\.tar\.gz is compressed.*plain \.tar works"):
        remote(bucket, tmp_path / "cache")


def test_parts_without_a_list_of_classes_use_the_larger_number_of_classes(bucket, tmp_path):
    (bucket / "classes.txt").unlink()
    write_tar(bucket / "val-0.tar", [("a.jpg", b"image"), ("a.cls", b"6")])
    train, val, _ = open_remote_shards(f"file://{bucket}", cache=tmp_path / "cache", max_bytes=MIB)
    assert train.class_names == val.class_names == tuple("0123456")
    write_tar(bucket / "val-0.tar", [("a.jpg", b"image"), ("a.cls", b"cat")])
    with pytest.raises(DataError, match="classes of train and val differ"):
        open_remote_shards(f"file://{bucket}", cache=tmp_path / "cache", max_bytes=MIB)


def test_sizes_that_the_listing_lacks_are_requested_per_file_and_must_be_known(bucket, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    listing, info = LocalFileSystem.ls, LocalFileSystem.info
    monkeypatch.setattr(
        LocalFileSystem,
        "ls",
        lambda self, path, detail: [{"name": entry["name"], "size": None} for entry in listing(self, path, detail)],
    )
    assert remote(bucket, tmp_path / "cache").read(0) == content(0)
    monkeypatch.setattr(LocalFileSystem, "info", lambda self, path: info(self, path) | {"size": None})
    with pytest.raises(DataError, match="does not report the size"):
        remote(bucket, tmp_path / "cache")


def test_threads_that_need_one_shard_fetch_it_once(bucket, tmp_path, monkeypatch):
    source = remote(bucket, tmp_path / "cache")
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


def test_a_copy_is_not_renamed_while_the_cache_is_counted(tmp_path):
    """A count that lists the folder before the rename and reads sizes after it would miss the copy under both names."""
    fetching, go_on = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, size=-1):
            fetching.set()
            go_on.wait(HANG_S)
            return super().read(size)

    class FileSystem:
        def open(self, *_):
            return Slow(b"12345")

    cache = FileCache(tmp_path, fs=FileSystem(), max_bytes=9)
    file = RemoteFile("far/a.tar", 5, "")
    thread = threading.Thread(target=cache.fetch, args=[file], kwargs={"then": lambda _: None})
    thread.start()
    fetching.wait(HANG_S)
    with locked(_lock_of(tmp_path / "cache")):
        go_on.set()
        thread.join(0.3)
        assert held(tmp_path) == 5
        assert not cache.path(file).exists()
    thread.join(HANG_S)
    assert cache.path(file).read_bytes() == b"12345"


def test_processes_share_a_small_cache_without_damage(bucket, tmp_path, shard_bytes):
    """Four processes read all samples, in different orders, through a cache of two shards."""
    script = """
import sys
from pathlib import Path
import numpy as np
from megabatch.data.sources.remote import RemoteShards
bucket, cache, max_bytes, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
source = RemoteShards(f"file://{bucket}", part="train", cache=cache, max_bytes=max_bytes)
def held():  # a consistent snapshot: lists again if another process changed the folder meanwhile
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
    arguments = [str(bucket), str(tmp_path / "cache"), str(2 * shard_bytes + 100)]
    processes = [
        subprocess.Popen([sys.executable, "-c", script, *arguments, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, errors[-2000:]
    assert held(tmp_path / "cache") <= 2 * shard_bytes + 100


def test_the_partial_file_of_a_killed_process_is_evicted(bucket, tmp_path, shard_bytes):
    cache = tmp_path / "cache"
    source = remote(bucket, cache, max_bytes=shard_bytes + 10)
    stale = source._cache.path(source._remote[4])
    stale.with_name(stale.name + ".part").write_bytes(bytes(shard_bytes))
    assert source.read(0) == content(0)
    assert held(cache) == shard_bytes


def test_a_fetch_waits_for_space_that_files_in_flight_use(tmp_path):
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


def test_missing_shards_are_an_error_that_states_what_is_needed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no shards for 'train'.*train-000000\.tar"):
        remote(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(DataError, match=r"missing does not exist"):
        remote(tmp_path / "missing", tmp_path / "cache")
    with pytest.raises(DataError, match="cannot be opened"):
        RemoteShards("nonsense://x", part="train", cache=tmp_path / "cache", max_bytes=MIB)


def test_without_fsspec_the_error_states_what_to_install(bucket, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_fsspec(name, *args, **kwargs):
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_fsspec)
    with pytest.raises(DataError, match=r"megabatch\[remote\]"):
        remote(bucket, tmp_path / "cache")
