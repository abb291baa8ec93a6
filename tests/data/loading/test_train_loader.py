from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import TEST_PHOTOS
from torch.nn import functional

from megabatch.data.augment import crops
from megabatch.data.augment.hashing import Stream, uniform
from megabatch.data.jpeg.decode import decode_crop, image_size
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.order import micro_batches, stream_samples
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError, UserError

PHOTOS = FolderSource(TEST_PHOTOS / "train")
GREY = {"pixel_mean": (0.3,), "pixel_std": (0.25,), "image_channels": 1}
COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
EVERYTHING = {"cutout_size": 3, "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "color_jitter": 0.2}


def arrays(count: int = 23, size: int = 10) -> ArraySource:
    """Grey noise; the label of sample i is i, so that a batch shows which samples it holds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(count), tuple(map(str, range(count))))


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f), getattr(other, f)) for f in ("images", "labels", "mixed_labels", "mix_weight")]
    return one.count == other.count and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def joined(batches: list[Batch]) -> Batch:
    fields = ("images", "labels", "mixed_labels", "mix_weight")
    parts = {f: [getattr(b, f) for b in batches] for f in fields}
    tensors = {f: None if values[0] is None else torch.cat(values) for f, values in parts.items()}
    return Batch(count=sum(b.count for b in batches), **tensors)


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 200), cuts=st.lists(st.integers(1, 15), min_size=1, max_size=5))
def test_any_split_into_micro_batches_gives_the_same_samples_bit_for_bit(augmentation, first, cuts):
    loader = TrainLoader(arrays(), seed=3, augmentation=augmentation, crop_padding=2, **GREY, **EVERYTHING)
    starts = np.cumsum([first, *cuts]).tolist()
    whole = loader.load(range(first, starts[-1]), resolution=10)
    parts = [loader.load(range(a, b), resolution=10) for a, b in pairwise(starts)]
    assert same(joined(parts), whole)
    loader.close()


def test_a_pad_and_crop_batch_equals_plain_loops():
    source, seed = arrays(), 5
    loader = TrainLoader(source, seed=seed, augmentation="pad_crop", crop_padding=2, **GREY)
    batch = loader.load(range(20, 30), resolution=10)
    epochs, samples = stream_samples(20, 10, num_samples=23, seed=seed)
    for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
        padded = functional.pad(source.images[sample][None].double(), (2, 2, 2, 2), mode="reflect")[0]
        top = int(uniform(seed, epoch, sample, Stream.CROP_TOP) * 5)
        left = int(uniform(seed, epoch, sample, Stream.CROP_LEFT) * 5)
        image = padded[:, top : top + 10, left : left + 10]
        image = image.flip(2) if uniform(seed, epoch, sample, Stream.FLIP) < 0.5 else image
        torch.testing.assert_close(batch.images[i].double(), (image / 255 - 0.3) / 0.25, rtol=1e-5, atol=1e-5)
        assert batch.labels[i] == sample
    assert batch.mixed_labels is None
    assert batch.mix_weight is None


@settings(deadline=None)
@given(first=st.integers(0, 100), count=st.integers(1, 30))
def test_the_partner_is_stream_position_p_xor_1(first, count):
    loader = TrainLoader(arrays(), seed=1, mixup_alpha=0.5, **GREY)
    batch = loader.load(range(first, first + count), resolution=10)
    _, samples = stream_samples(0, first + count + 1, num_samples=23, seed=1)
    positions = np.arange(first, first + count)
    assert batch.labels.tolist() == samples[positions].tolist()
    assert batch.mixed_labels.tolist() == samples[positions ^ 1].tolist()
    loader.close()


def test_a_mixed_image_is_the_weighted_sum_of_both_augmented_images():
    plain = TrainLoader(arrays(), seed=1, augmentation="pad_crop", crop_padding=2, **GREY)
    mixing = TrainLoader(arrays(), seed=1, augmentation="pad_crop", crop_padding=2, mixup_alpha=1.0, **GREY)
    images = plain.load(range(8), resolution=10).images
    mixed = mixing.load(range(3, 6), resolution=10)
    weight = mixed.mix_weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed.images, weight * images[3:6] + (1 - weight) * images[[2, 5, 4]])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_all_ranks_together_load_each_sample_once_per_epoch(world_size):
    loader = TrainLoader(arrays(), seed=0, **GREY)
    seen: Counter[int] = Counter()
    for first in range(0, 46, 12):
        for rank in range(world_size):
            split = micro_batches(
                first, min(12, 46 - first), rank=rank, world_size=world_size, micro_batch_size=4, bn_span=2
            )
            seen.update(label for positions in split for label in loader.load(positions, resolution=10).labels.tolist())
    assert seen == Counter(dict.fromkeys(range(23), 2))


def test_arrays_are_resized_to_the_requested_resolution():
    loader = TrainLoader(arrays(), seed=0, augmentation="pad_crop", **GREY)
    native, larger = loader.load(range(4), resolution=10).images, loader.load(range(4), resolution=15).images
    expected = functional.interpolate(native, (15, 15), mode="bilinear", antialias=True)
    torch.testing.assert_close(larger, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_range_is_an_empty_batch_of_the_right_shape():
    for augmentation in ("none", "pad_crop", "random_resized_crop"):
        loader = TrainLoader(arrays(), seed=0, augmentation=augmentation, **GREY, **EVERYTHING)
        batch = loader.load(range(7, 7), resolution=10)
        assert batch.images.shape == (0, 1, 10, 10)
        assert len(batch.labels) == len(batch.mixed_labels) == batch.count == 0
    photos = TrainLoader(PHOTOS, seed=0, augmentation="random_resized_crop", **COLOR)
    assert photos.load(range(7, 7), resolution=32).images.shape == (0, 3, 32, 32)


def test_augmentation_ends_at_a_fraction_of_an_epoch():
    ending = TrainLoader(arrays(), seed=0, augmentation="pad_crop", augmentation_ends_epoch=1.5, **GREY)
    never = TrainLoader(arrays(), seed=0, augmentation="pad_crop", **GREY)
    without = TrainLoader(arrays(), seed=0, **GREY)
    last_augmented = 34  # positions below 1.5 * 23 = 34.5
    before, after = range(20, last_augmented + 1), range(last_augmented + 1, 60)
    assert same(ending.load(before, resolution=10), never.load(before, resolution=10))
    assert same(ending.load(after, resolution=10), without.load(after, resolution=10))


def test_images_have_the_requested_dtype_and_memory_format():
    loader = TrainLoader(PHOTOS, seed=0, dtype=torch.bfloat16, channels_last=True, **COLOR)
    images = loader.load(range(3), resolution=24).images
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    loader = TrainLoader(PHOTOS, seed=0, **COLOR)
    assert loader.load(range(3), resolution=24).images.is_contiguous()


def test_photographs_are_decoded_at_the_drawn_crop_then_mirrored_and_normalised():
    seed = 4
    loader = TrainLoader(PHOTOS, seed=seed, augmentation="random_resized_crop", **COLOR)
    batch = loader.load(range(20, 32), resolution=40)
    epochs, samples = stream_samples(20, 12, num_samples=24, seed=seed)
    for i in range(12):
        data = PHOTOS.read(int(samples[i]))
        height, width = image_size(data)
        box = crops.random_resized_crop_boxes(
            np.array([height]), np.array([width]), seed=seed, epochs=epochs[i : i + 1], samples=samples[i : i + 1]
        )[0].tolist()
        pixels = torch.from_numpy(decode_crop(data, box=tuple(box), size=40)).permute(2, 0, 1).double()
        pixels = pixels.flip(2) if uniform(seed, epochs[i], samples[i], Stream.FLIP) < 0.5 else pixels
        mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (COLOR["pixel_mean"], COLOR["pixel_std"]))
        torch.testing.assert_close(batch.images[i].double(), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)
        assert batch.labels[i] == PHOTOS.labels[samples[i]]


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_threads_prefetching_and_batch_size_do_not_change_photographs(augmentation):
    options = {"seed": 2, "augmentation": augmentation, **COLOR, **EVERYTHING}
    one = TrainLoader(PHOTOS, decode_threads=1, prefetch_batches=1, **options)
    many = TrainLoader(PHOTOS, decode_threads=5, prefetch_batches=3, **options)
    whole = one.load(range(5, 35), resolution=32)
    requests = [(range(a, min(a + 7, 35)), 32) for a in range(5, 35, 7)]
    assert same(joined(list(many.batches(requests))), whole)
    one.close()
    many.close()


def test_load_may_be_called_from_many_threads_at_once():
    loader = TrainLoader(PHOTOS, seed=2, augmentation="random_resized_crop", **COLOR)
    ranges = [range(a, a + 5) for a in range(0, 60, 5)]
    alone = [loader.load(positions, resolution=32) for positions in ranges]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda positions: loader.load(positions, resolution=32), ranges))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_leaving_the_loop_early_cancels_prefetching_and_the_loader_stays_usable():
    loader = TrainLoader(PHOTOS, seed=2, **COLOR)
    requested = []

    def requests():
        for first in range(0, 10_000, 4):
            requested.append(first)
            yield range(first, first + 4), 16

    for number, _ in enumerate(loader.batches(requests())):
        if number == 2:
            break
    assert len(requested) <= 3 + 4 + 2
    assert loader.load(range(4), resolution=16).count == 4
    loader.close()


def test_a_wrong_number_of_channels_is_refused_with_the_right_one():
    with pytest.raises(DataError, match="image_channels=3 was given, the images have 1 channels; image_channels=1"):
        TrainLoader(arrays(), seed=0, **COLOR)
    with pytest.raises(UserError, match="one value for each of the 1 channels"):
        TrainLoader(arrays(), seed=0, pixel_mean=(0.5, 0.5), pixel_std=(1.0,), image_channels=1)


def test_shard_local_order_needs_shards():
    with pytest.raises(DataError, match="shard_local order needs a data set in shards"):
        TrainLoader(PHOTOS, seed=0, shard_local=True, **COLOR)


class Sharded:
    """The photographs, as if stored in shards of given sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.shard_sizes, self.labels, self.class_names = sizes, PHOTOS.labels, PHOTOS.class_names
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(PHOTOS)

    def read(self, index: int) -> bytes:
        self.reads.append(index)
        return PHOTOS.read(index)

    def name(self, index: int) -> str:
        return PHOTOS.name(index)


def test_shard_local_order_reads_each_sample_once_and_few_shards_at_a_time():
    source = Sharded([2] * 12)
    loader = TrainLoader(source, seed=0, shard_local=True, decode_threads=1, **COLOR)
    for first in range(0, 24, 8):
        loader.load(range(first, first + 8), resolution=16)
    assert sorted(source.reads) == list(range(24))
    for first in range(0, 24, 8):
        assert len({index // 2 for index in source.reads[first : first + 8]}) == 4
