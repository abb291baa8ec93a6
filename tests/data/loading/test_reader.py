import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import TEST_PHOTOS

from megabatch.data.loading import reader
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError

COLOR = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.25, 0.25, 0.25)}
HATS = [4, 5, 6, 7]  # indices of the class of which two files are damaged


@pytest.fixture
def damaged(tmp_path: Path) -> FolderSource:
    """The photographs, with the second hat truncated in the middle and the third empty."""
    shutil.copytree(TEST_PHOTOS / "train", tmp_path / "train")
    source = FolderSource(tmp_path / "train")
    second = Path(source.name(5))
    second.write_bytes(second.read_bytes()[:9000])
    Path(source.name(6)).write_bytes(b"")
    return source


def in_index_order(source: FolderSource, **options: object) -> TrainLoader:
    return TrainLoader(source, seed=0, shuffle=False, flip=False, **{**COLOR, "max_bad_share": 0.5, **options})


def test_a_bad_sample_is_replaced_by_the_next_good_one_of_its_class(damaged):
    images = in_index_order(damaged).load(range(24), resolution=32).images
    assert torch.equal(images[5], images[7])
    assert torch.equal(images[6], images[7])
    others = [i for i in range(24) if i not in {5, 6}]
    assert len({images[i].numpy().tobytes() for i in others}) == 22


def test_the_search_for_a_replacement_wraps_around_to_the_first_of_the_class(damaged):
    Path(damaged.name(7)).write_bytes(b"")
    images = in_index_order(damaged).load(range(24), resolution=32).images
    for bad in (5, 6, 7):
        assert torch.equal(images[bad], images[4])


def test_replacements_do_not_depend_on_threads_batches_or_earlier_loads(damaged):
    def load_all(batch_size: int, threads: int) -> list[Batch]:
        loader = TrainLoader(
            damaged,
            seed=3,
            augmentation="random_resized_crop",
            mixup_alpha=0.2,
            decode_threads=threads,
            max_bad_share=0.5,
            **COLOR,
        )
        return list(loader.batches((range(p, p + batch_size), 32) for p in range(0, 60, batch_size)))

    runs = [load_all(60, 1), load_all(5, 4), load_all(4, 2)]
    images = [torch.cat([batch.images for batch in run]) for run in runs]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert {sum(batch.num_replaced for batch in run) for run in runs} == {runs[0][0].num_replaced}
    assert 4 <= runs[0][0].num_replaced <= 6  # two bad samples, once in each of 2.5 epochs


def test_a_loader_that_met_the_damage_and_one_that_did_not_give_the_same_batch(damaged, monkeypatch):
    """A crop above the damage decodes, whether or not another crop of the same file failed before."""
    real = reader.decode_crop
    monkeypatch.setattr(reader.library, "crop_many", lambda addresses, *_, **__: np.zeros(len(addresses), dtype=bool))

    def damaged_below(data: bytes, *, box, **options):
        if data == damaged.read(7) and box[0] + box[2] > 350:
            raise DataError("damaged below row 350")
        return real(data, box=box, **options)

    monkeypatch.setattr(reader, "decode_crop", damaged_below)
    options = {"seed": 2, "augmentation": "random_resized_crop", "max_bad_share": 0.5, **COLOR}
    experienced, replaced = TrainLoader(damaged, **options), []
    for epoch in range(12):
        positions = range(24 * epoch, 24 * epoch + 24)
        batch = experienced.load(positions, resolution=32)
        fresh = TrainLoader(damaged, **options).load(positions, resolution=32)
        assert torch.equal(batch.images, fresh.images)
        replaced.append(batch.num_replaced)
    assert set(replaced) == {2, 3}  # always the truncated and the empty file; the third depending on its crop
    assert experienced.num_replaced == sum(replaced)


def test_each_bad_sample_is_reported_once_with_the_reason(damaged):
    reported = []
    loader = in_index_order(damaged, on_bad_sample=lambda name, reason: reported.append((Path(name).name, reason)))
    for _ in range(3):
        loader.load(range(24), resolution=32)
    assert [name for name, _ in sorted(reported)] == ["007.jpg", "008.jpg"]
    assert "empty" in dict(reported)["008.jpg"]
    assert {index: Path(damaged.name(index)).name for index in loader.bad_samples} == {5: "007.jpg", 6: "008.jpg"}


def test_bad_samples_of_another_worker_are_reported_once_and_count_towards_the_share(damaged):
    reported = []
    first = in_index_order(
        damaged, on_bad_sample=lambda name, _: reported.append(Path(name).name), max_bad_share=2 / 24
    )
    other = in_index_order(damaged)
    first.load(range(6), resolution=32)
    other.load(range(24), resolution=32)
    for _ in range(2):
        first.learn_bad_samples(other.bad_samples)
    first.load(range(24), resolution=32)
    assert reported == ["007.jpg", "008.jpg"]
    assert first.bad_samples == other.bad_samples
    with pytest.raises(DataError, match=r"3 of 24 samples cannot be read, more than max_bad_share=0\.0833"):
        first.learn_bad_samples({20: "cut off"})


def test_more_bad_samples_than_max_bad_share_raise(damaged):
    in_index_order(damaged, max_bad_share=2 / 24).load(range(24), resolution=32)
    loader = in_index_order(damaged, max_bad_share=0.05)
    with pytest.raises(DataError, match=r"2 of 24 samples cannot be read, more than max_bad_share=0\.05"):
        list(loader.batches((range(p, p + 4), 32) for p in range(0, 24, 4)))


def test_a_class_without_a_readable_sample_raises(damaged):
    for index in HATS:
        Path(damaged.name(index)).write_bytes(b"")
    with pytest.raises(DataError, match="no sample of class 'hat' can be read"):
        in_index_order(damaged).load(range(24), resolution=32)


def test_a_deleted_file_is_a_bad_sample(damaged):
    Path(damaged.name(0)).unlink()
    loader = in_index_order(damaged)
    assert loader.load(range(2), resolution=32).num_replaced == 1


def test_the_evaluation_loader_replaces_and_counts_bad_samples(damaged):
    loader = EvalLoader(damaged, resolution=32, max_bad_share=0.5, **COLOR)
    batches = list(loader.batches(0, 24, 7))
    assert sum(batch.count for batch in batches) == 24
    assert sum(batch.num_replaced for batch in batches) == 2


def test_other_errors_propagate(damaged, monkeypatch):
    def broken(index: int) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(damaged, "read", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        in_index_order(damaged).load(range(4), resolution=32)
