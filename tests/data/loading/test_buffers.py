import gc
import mmap
import threading
import time

import pytest
import torch
from photographs import TEST_PHOTOS

from megabatch.data.loading import buffers
from megabatch.data.loading.batch import Staging
from megabatch.data.loading.buffers import BufferPool
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.folder import FolderSource

PHOTOS = FolderSource(TEST_PHOTOS / "train")

LARGE = (3, 1 << 20)  # bytes: above the pool's minimum


def test_a_buffer_is_reused_once_nothing_refers_to_it():
    pool = BufferPool(4)
    first = pool.empty(LARGE, torch.uint8)
    address = first.data_ptr()
    assert pool.empty(LARGE, torch.uint8).data_ptr() != address
    del first
    assert pool.empty(LARGE, torch.uint8).data_ptr() == address


def test_a_view_keeps_its_buffer_in_use():
    pool = BufferPool(4)
    whole = pool.empty(LARGE, torch.uint8)
    address, view = whole.data_ptr(), whole[1:, ::2].view(torch.int8)
    del whole
    assert pool.empty(LARGE, torch.uint8).data_ptr() != address
    del view
    assert pool.empty(LARGE, torch.uint8).data_ptr() == address


def test_a_tensor_saved_for_backward_keeps_its_buffer_in_use():
    pool = BufferPool(4)
    images, weight = pool.empty((1 << 20,), torch.float32), torch.ones(1, requires_grad=True)
    images.fill_(2.0)
    loss = (images * weight).sum()
    del images
    pool.empty((1 << 20,), torch.float32).fill_(7.0)
    loss.backward()
    assert float(weight.grad) == 2.0 * (1 << 20)


def test_a_buffer_is_reused_for_a_smaller_request_but_not_for_less_than_half():
    pool = BufferPool(4)
    address = pool.empty((10 << 20,), torch.uint8).data_ptr()
    smaller = pool.empty((2, 3 << 20), torch.uint8)
    assert smaller.data_ptr() == address
    del smaller
    assert pool.empty((3 << 20,), torch.uint8).data_ptr() != address


def test_the_pool_keeps_at_most_its_capacity():
    pool = BufferPool(2)
    tensors = [pool.empty(LARGE, torch.uint8) for _ in range(5)]
    tensors.clear()
    gc.collect()
    assert len(pool._free) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3, 1 << 20)])
def test_tensors_have_the_requested_shape_and_dtype_are_aligned_and_writable(shape, dtype):
    tensor = BufferPool(2).empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_threads_never_share_a_buffer():
    pool, wrong = BufferPool(4), []

    def work(value: int) -> None:
        for _ in range(15):
            tensor = pool.empty(LARGE, torch.uint8).fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_loader_prefetches_bytes_and_normalises_few_batches_early(monkeypatch):
    """A float32 batch takes four times the memory of a decoded one, so only decoded batches are prefetched."""
    allocated = []
    real = mmap.mmap
    monkeypatch.setattr(buffers.mmap, "mmap", lambda *arguments: allocated.append(arguments[1]) or real(*arguments))
    prefetch, batch, size = 6, 64, 128
    loader = TrainLoader(PHOTOS, seed=0, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, prefetch_batches=prefetch)
    for number, _ in enumerate(loader.batches((range(p, p + batch), size) for p in range(0, 14 * batch, batch))):
        if number == 3:
            time.sleep(0.3)  # let the prefetched batches accumulate
    loader.close()
    decoded = batch * size * size * 3
    assert sum(decoded <= num_bytes < 2 * decoded for num_bytes in allocated) <= prefetch + 2
    assert sum(num_bytes >= 4 * decoded for num_bytes in allocated) <= 2
    assert len(allocated) > 4


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_on_the_device_whatever_its_type(channels_last):
    """An Apple GPU, for example; here the device without memory stands for it."""
    staging, shape = Staging(torch.device("meta"), num_buffers=1), torch.Size((2, 3, 4, 5))
    images = staging.device_images(shape, torch.float32, channels_last=channels_last)
    assert images.device.type == "meta"
    assert images.shape == shape
    assert staging.to_device(torch.zeros(2)).device.type == "meta"
