"""Decoding on a GPU runs ahead of the batches in use, at a bounded depth, with the results of the serial path."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import HANG_S
from photographs import encode, photograph
from stand_in_gpu import CUDA, StandInGpu
from torch import Tensor

from megabatch.data.jpeg.decode import decode
from megabatch.data.jpeg.gpu import GpuDecoder
from megabatch.data.loading.base_loader import CROPPED_AHEAD
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError

SIZE, BATCH, NUM_BATCHES = 24, 4, 7
REQUESTS = [(range(first, first + BATCH), SIZE) for first in range(0, NUM_BATCHES * BATCH, BATCH)]
BROKEN = 17  # of the source, in batch 4 of samples in index order


class Decoder:
    """Stands in for nvJPEG, on a CPU or a stand-in GPU; keeps the files and the thread of each call."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.calls: list[list[bytes]] = []
        self.threads: set[str] = set()
        self.streams: set[object] = set()

    def __call__(self, files: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append([file.numpy().tobytes() for file in files])
        self.threads.add(threading.current_thread().name)
        if self.device == CUDA:
            self.streams.add(torch.cuda.current_stream())
        try:
            pixels = [np.ascontiguousarray(decode(file).transpose(2, 0, 1)) for file in self.calls[-1]]
        except DataError as error:
            raise RuntimeError("bad JPEG") from error
        return [torch.from_numpy(image).to(self.device) for image in pixels]


def loader(
    source: FolderSource, decode: Callable, *, device: object = "cpu", max_held: int = 2, **options
) -> TrainLoader:
    made = GpuDecoder(device, decode=decode, max_held=max_held, record_event=options.pop("record_event", None))
    color = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3), "channels_last": True}
    augmented = {"augmentation": "random_resized_crop", "seed": 3}
    return TrainLoader(source, device=device, gpu_decoder=made, **color, **(augmented | options))


@pytest.fixture
def photos(tmp_path: Path) -> FolderSource:
    for index in range(48):
        path = tmp_path / f"class-{index // 12}" / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photograph(40 + index % 7, 60 - index % 5, index), quality=90))
    return FolderSource(tmp_path)


def damage(source: FolderSource, index: int) -> None:
    path = Path(source.name(index))
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + b"\xff\xd3" * 100 + data[middle + 200 :])


@pytest.fixture(params=["cpu", "stand-in GPU"])
def device(request: pytest.FixtureRequest) -> Iterator[object]:
    if request.param == "cpu":
        yield "cpu"
        return
    pytest.importorskip("triton")
    with StandInGpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megabatch.kernels.dispatch.has_triton", lambda: False)
        yield CUDA


@pytest.mark.parametrize("more", [{}, {"color_jitter": 0.2, "mixup_alpha": 0.4}])
def test_batches_decoded_ahead_are_those_of_the_serial_path_bit_for_bit_in_order(photos, device, more):
    serial = loader(photos, Decoder(device), device=device, max_held=1, **more)
    expected = [serial._finish(serial._crop(serial._read(request))).wait_on_current_stream() for request in REQUESTS]
    ahead = loader(photos, Decoder(device), device=device, **more)
    for one, other in zip(ahead.batches(REQUESTS), expected, strict=True):
        assert torch.equal(one.images.cpu(), other.images.cpu())
        assert torch.equal(one.labels.cpu(), other.labels.cpu())
    serial.close()
    ahead.close()


def test_one_thread_and_one_stream_of_their_own_decode_everything(photos, device):
    decoder = Decoder(device)
    ahead = loader(photos, decoder, device=device)
    ahead.load(*REQUESTS[0][:1], resolution=SIZE)
    list(ahead.batches(REQUESTS))
    ahead.close()
    assert decoder.threads == {"megabatch-gpu-decode_0"}
    assert len(decoder.streams) == (1 if device == CUDA else 0)
    assert all(stream not in {torch.cuda.current_stream()} for stream in decoder.streams)


def test_the_next_batches_are_decoded_while_a_batch_is_in_use_and_no_more_of_them(photos):
    decoder = Decoder()
    ahead = loader(photos, decoder)
    batches = ahead.batches(REQUESTS)
    next(batches)  # in use from here on: nothing asks for the next batch
    deadline = time.monotonic() + HANG_S
    while len(decoder.calls) < CROPPED_AHEAD and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(decoder.calls) == CROPPED_AHEAD
    batches.close()
    ahead.close()


def test_a_batch_is_decoded_before_the_device_has_read_the_one_before_and_after_it_has_read_an_earlier_one(photos):
    log: list[str] = []
    numbers = itertools.count()

    class Event:
        def __init__(self) -> None:
            self.number = next(numbers)

        def synchronize(self) -> None:
            log.append(f"waits for {self.number}")

    decoder = Decoder()

    def decode(files: Sequence[Tensor]) -> list[Tensor]:
        log.append(f"decodes {len(decoder.calls)}")
        return decoder(files)

    ahead = loader(photos, decode, record_event=Event)
    list(ahead.batches(REQUESTS[:4]))
    ahead.close()
    assert log == [
        *("decodes 0", "decodes 1", "waits for 0", "decodes 2", "waits for 1", "decodes 3"),
        *("waits for 2", "waits for 3"),
    ]


def test_a_broken_image_is_reported_by_name_at_its_batch_after_all_batches_before_it(photos, device):
    damage(photos, BROKEN)
    ahead = loader(photos, Decoder(device), device=device, shuffle=False, augmentation="none", max_bad_share=0.0)
    batches = ahead.batches(REQUESTS)
    assert [next(batches).count for _ in range(BROKEN // BATCH)] == [BATCH] * (BROKEN // BATCH)
    with pytest.raises(DataError, match=rf"class-{BROKEN // 12}/{BROKEN}.jpg"):
        next(batches)
    assert next(batches, None) is None
    ahead.close()


def test_no_thread_is_left_however_the_iteration_ends(photos):
    before = set(threading.enumerate())
    for take in (0, 1, NUM_BATCHES):
        ahead = loader(photos, Decoder())
        batches = ahead.batches(REQUESTS)
        assert len(list(itertools.islice(batches, take))) == take
        if take:
            batches.close()
        ahead.close()
        batches.close()
    assert set(threading.enumerate()) <= before


def test_closing_frees_the_images_that_were_decoded_ahead(photos):
    waited: list[object] = []

    class Event:
        def synchronize(self) -> None:
            waited.append(self)

    ahead = loader(photos, Decoder(), record_event=Event)
    batches = ahead.batches(REQUESTS)
    next(batches)
    ahead.close()
    batches.close()
    assert not ahead._gpu_reader._decoder._held
    assert len(waited) == len(set(map(id, waited))) >= 1
