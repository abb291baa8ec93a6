"""Opening the data of a run: folders, shards, and shards at a URL; what is refused says what works."""

import contextlib
import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from photographs import TEST_PHOTOS

from megabatch import recipes
from megabatch.app.data import Data, build_eval_loader, build_train_loader, check_room, fit_to_data, open_data
from megabatch.comm.launch import World
from megabatch.data.packing.pack import pack
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.remote import RemoteShards
from megabatch.errors import DataError, SettingsError
from megabatch.recipe import Recipe, fields_as_json, from_json
from megabatch.runtime import Runtime

fsspec = pytest.importorskip("fsspec")

PHOTOS = TEST_PHOTOS


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(PHOTOS, folder, shard_bytes=40_000)
    return folder


def photos(**changes) -> Recipe:
    return dataclasses.replace(recipes.get("photos"), **changes)


def test_shards_at_a_url_give_the_batches_of_the_shards_here(packed, tmp_path):
    recipe, batches = photos(), []
    for where in (packed, f"file://{packed}"):
        runtime = Runtime(data=where, cache=tmp_path / "cache", decode_threads=1)
        data = open_data(recipe, runtime)
        fitted = fit_to_data(recipe, data)
        assert (fitted.num_train_images, fitted.num_classes) == (24, 6)
        train = build_train_loader(fitted, runtime, data.train, world=World())
        evaluation = build_eval_loader(fitted, runtime, data.evaluation, world=World())
        batches.append((train.load(range(20, 28), resolution=32), next(evaluation.batches(0, 4, 4))))
        train.close()
        evaluation.close()
        data.close()
    for one, other in zip(*batches, strict=True):
        assert one.images.equal(other.images)
        assert one.labels.equal(other.labels)


def test_both_parts_share_one_cache_in_the_folder_of_the_site(packed, tmp_path):
    data = open_data(photos(), Runtime(data=f"file://{packed}", cache=tmp_path))
    assert isinstance(data.train, RemoteShards)
    data.train.read(0)
    data.evaluation.read(0)
    assert {path.name[17:22] for path in (tmp_path / "remote").glob("*.tar")} == {"train", "val-0"}
    data.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        data.train.will_read([0])


def test_a_url_is_shown_without_what_may_be_secret(packed, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket", recursive=True)
    try:
        data = open_data(photos(), Runtime(data="memory://bucket", cache=tmp_path))
        assert data.origin == "memory://bucket"
        data.close()
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megabatch.app.data.open_remote_shards", lambda *_, **__: (data.train, data.evaluation, []))
        hidden = open_data(photos(), Runtime(data="https://me:secret@host/set?token=secret", cache=tmp_path))
    assert hidden.origin == "https://host/set"


def test_too_small_a_cache_is_refused_with_a_size_that_works(packed, tmp_path):
    in_any_order, shard_local = photos(), photos(shard_local=True)
    sizes = sorted((path.stat().st_size for path in packed.glob("train-*.tar")), reverse=True)
    assert len(sizes) > 8
    for recipe, needed in ((in_any_order, sum(sizes)), (shard_local, sum(sizes[:8]))):
        runtime = Runtime(data=f"file://{packed}", cache=tmp_path, remote_cache_gib=(needed - 1) / 2**30)
        with contextlib.closing(open_data(recipe, runtime)) as data:
            with pytest.raises(SettingsError, match=r"--remote-cache-gib \S+ works") as refused:
                check_room(recipe, runtime, data, world=World())
            assert ("shard_local=true" in str(refused.value)) == (recipe is in_any_order)
            works = float(re.search(r"--remote-cache-gib (\S+) works", str(refused.value))[1])
            check_room(recipe, dataclasses.replace(runtime, remote_cache_gib=works), data, world=World())


@pytest.mark.parametrize("field", ["global_batch_size", "batch_sizes", "max_global_batch_size"])
def test_a_machines_share_of_a_batch_beyond_a_window_needs_two_windows_for_each_worker(monkeypatch, field):
    """20 shards of 3 samples and 1 GiB, so that a window holds 12 samples and takes 4 GiB."""
    monkeypatch.setattr(RemoteShards, "bytes_at_once", lambda _, num_shards: min(20, num_shards or 20) << 30)
    source = RemoteShards.__new__(RemoteShards)
    source.shard_sizes = [3] * 20

    def needed(batch: int, workers: int, machines: int = 1) -> int:
        sizes = {"global_batch_size": 8, field: ((0.0, 8.0), (1.0, batch)) if field == "batch_sizes" else batch}
        recipe, world = (
            photos(shard_local=True, **sizes),
            World(world_size=workers * machines, local_world_size=workers),
        )
        for gib in range(1, 21):
            with contextlib.suppress(SettingsError):
                check_room(recipe, Runtime(remote_cache_gib=gib), Data(source, source, "shards"), world=world)
                return gib
        raise AssertionError("no room is enough")

    assert [needed(batch, 2) for batch in (11, 12, 13, 48)] == [8, 8, 16, 16]
    assert [needed(batch, 1) for batch in (12, 13, 48)] == [8, 8, 8]
    assert needed(13, 4) == 20  # all there are
    assert [needed(batch, 2, machines=2) for batch in (24, 26)] == [8, 16]


def test_evaluation_needs_no_room_for_the_training_shards(packed, tmp_path):
    recipe, runtime = photos(), Runtime(data=f"file://{packed}", cache=tmp_path, decode_threads=1)
    runtime = dataclasses.replace(
        runtime, remote_cache_gib=2 * max(path.stat().st_size for path in packed.glob("*.tar")) / 2**30
    )
    with contextlib.closing(open_data(recipe, runtime)) as data:
        loader = build_eval_loader(recipe, runtime, data.evaluation, world=World())
        assert sum(batch.count for batch in loader.batches(0, len(data.evaluation), 4)) == len(data.evaluation)
        loader.close()
        with pytest.raises(SettingsError):
            check_room(recipe, runtime, data, world=World())


def test_shard_local_order_of_a_folder_is_refused_before_the_start():
    with pytest.raises(
        DataError, match=r"needs a data set in shards \(`megabatch data pack`\); shard_local=False works"
    ):
        open_data(photos(shard_local=True), Runtime(data=PHOTOS))


def test_shard_local_reaches_the_order_of_the_samples(packed):
    runtime = Runtime(data=packed, decode_threads=1)
    labels = []
    for shard_local in (False, True):
        recipe = photos(shard_local=shard_local)
        data = open_data(recipe, runtime)
        loader = build_train_loader(recipe, runtime, data.train, world=World())
        labels.append(loader.load(range(24), resolution=8).labels.tolist())
        loader.close()
    assert labels[0] != labels[1]
    assert sorted(labels[0]) == sorted(labels[1])


def test_a_recipe_saved_before_there_was_a_shard_local_order_is_read_as_one_without():
    saved = fields_as_json(photos())
    del saved["shard_local"]
    assert from_json(saved) == photos()


def test_a_share_of_bad_images_is_borne_only_where_the_site_says_so(tmp_path):
    shutil.copytree(PHOTOS, tmp_path / "photos")
    victim = next((tmp_path / "photos" / "train" / "hat").iterdir())
    victim.write_bytes(victim.read_bytes()[:2000])
    with pytest.raises(DataError, match=victim.name):
        open_data(photos(), Runtime(data=tmp_path / "photos"), probe=True)
    for share, stops in ((0.01, True), (0.05, False)):
        runtime = Runtime(data=tmp_path / "photos", max_bad_share=share)
        loader = build_train_loader(photos(), runtime, open_data(photos(), runtime, probe=True).train, world=World())
        if stops:
            with pytest.raises(DataError, match=r"max_bad_share=0\.01"):
                loader.load(range(24), resolution=8)
        else:
            assert loader.load(range(24), resolution=8).num_replaced == 1
        loader.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decode": "gpu"}, r"--decode gpu was given, needed: a GPU to train on; --decode cpu .* works"),
        ({"decoded_cache_gib": 2.0}, r"--decoded-cache-gib 2 was given, needed: a GPU"),
        ({"decode": "cpu", "decoded_cache_gib": 2.0}, r"--decoded-cache-gib 0 works"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(monkeypatch, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SettingsError, match=said):
        open_data(photos(), Runtime(data=PHOTOS, **options))


def test_decoding_on_a_gpu_is_refused_without_torchvision_and_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("megabatch.app.data.has_torchvision", lambda: False)
    with pytest.raises(SettingsError, match="needed: a torchvision built for this torch; --decode cpu"):
        open_data(photos(), Runtime(data=PHOTOS, decode="gpu"))
    with pytest.raises(SettingsError, match="needed: a GPU to train on"):
        open_data(photos(), Runtime(data=PHOTOS, decode="gpu", device="cpu"))


@pytest.mark.parametrize(
    ("decode", "device", "threads", "torchvision", "cache_gib", "by_gpu"),
    [
        ("auto", "cpu", 2, True, 0, False),
        ("auto", "cuda", 2, False, 0, False),
        ("auto", "cuda", 2, True, 0, True),
        ("auto", "cuda", 16, True, 0, False),
        ("auto", "cuda", 16, True, 3, True),
        ("cpu", "cuda", 2, True, 0, False),
        ("gpu", "cuda", 16, True, 0, True),
    ],
)
def test_a_gpu_decodes_where_it_is_asked_to_or_where_cores_are_few(
    monkeypatch, decode, device, threads, torchvision, cache_gib, by_gpu
):
    made = []
    monkeypatch.setattr(
        "megabatch.app.data.GpuDecoder", lambda device, **options: made.append((device.type, options)) or "decoder"
    )
    monkeypatch.setattr("megabatch.app.data.has_torchvision", lambda: torchvision)
    for loader in ("TrainLoader", "EvalLoader"):
        monkeypatch.setattr(f"megabatch.app.data.{loader}", lambda *_, **options: options["gpu_decoder"])
    world, runtime = World(device=torch.device(device)), Runtime(decode=decode, decode_threads=threads)
    runtime = dataclasses.replace(runtime, decoded_cache_gib=cache_gib)
    source = FolderSource(PHOTOS / "train")
    train = build_train_loader(photos(), runtime, source, world=world)
    evaluation = build_eval_loader(photos(), runtime, source, world=world)
    assert train == evaluation == ("decoder" if by_gpu else None)
    expected = [{"channels": 3, "cache_bytes": int(gib * 2**30)} for gib in (cache_gib, 0)]
    assert made == ([(device, options) for options in expected] if by_gpu else [])
    pixels = ArraySource(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    assert build_train_loader(photos(), runtime, pixels, world=world) is None
