"""The input benchmark: every stage runs and is reported. The times themselves are not tested."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import encode, photograph

from megabatch.bench import input_stages as stages
from megabatch.bench.input_stages import Stage, measure_input
from megabatch.data.jpeg import library as jpeg_library
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.jpg").write_bytes(encode(photograph(90, 120, i)))
    return FolderSource(tmp_path)


def test_every_stage_is_timed_and_the_slowest_is_the_bottleneck(source):
    named = []
    report = measure_input(source, resolution=32, seconds=0.01, threads=1, on_progress=named.append)
    assert [stage.name for stage in report.stages] == ["read", "decode at the crop", "augment", "copy"]
    assert named == ["read", "decode at the crop", "decode whole", "crop and resize", "augment", "copy", "loader"]
    assert all(stage.cpu_s > 0 for stage in report.stages)
    assert all(stage.cpu_s_quartiles[0] <= stage.cpu_s <= stage.cpu_s_quartiles[1] for stage in report.stages)
    slowest = max(report.stages, key=lambda stage: stage.wall_s if stage.name == "read" else stage.cpu_s)
    assert report.bottleneck == slowest.name
    assert report.loader_images_per_s > 0
    assert report.image_pixels == 90 * 120
    assert report.compiled_share == (1.0 if jpeg_library.is_available() else None)


def test_stages_run_with_one_torch_thread_and_the_number_is_restored(source):
    threads = torch.get_num_threads()
    seen = []
    torch.set_num_threads(3)
    try:
        measure_input(source, resolution=16, seconds=0.01, on_progress=lambda _: seen.append(torch.get_num_threads()))
        assert seen == [1] * 6 + [3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_unreadable_samples_are_not_timed(source, tmp_path):
    (tmp_path / "cat" / "0.jpg").write_bytes(b"")
    assert measure_input(source, resolution=16, seconds=0.01, threads=1).image_pixels == 90 * 120
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 8 samples.*megabatch data check"):
        measure_input(source, resolution=16, seconds=0.01)


def advice(source, bottleneck: str, data: bytes, height: int = 100, width: int = 100, **read) -> str:
    stage = dataclasses.replace(Stage("read", 1.0, (1.0, 1.0), 1.0), **read)
    samples = [stages._Sample(data, height, width)] * 3
    return " / ".join(stages._advice(bottleneck, stage, samples, source, 224))


def test_advice_depends_on_the_bottleneck_and_the_images(source, monkeypatch):
    baseline, progressive = encode(photograph(40, 40)), encode(photograph(40, 40), progressive=True)
    assert "max-side 500" in advice(source, "decode at the crop", baseline, 1500, 2000)
    assert "max-side" not in advice(source, "decode at the crop", baseline)
    assert "100% of the images are progressive" in advice(source, "decode at the crop", progressive)
    assert "progressive" not in advice(source, "decode at the crop", baseline)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--decode gpu" not in advice(source, "decode at the crop", baseline)
    for installed, ending in ((False, "once torchvision is installed"), (True, "decodes on the GPU")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(stages, "has_torchvision", lambda installed=installed: installed)
        assert advice(source, "decode at the crop", baseline).endswith(ending)
    assert "data pack" in advice(source, "read", baseline)
    assert "disk" in advice(source, "read", baseline, wall_s=9.0)
    assert "disk" not in advice(source, "read", baseline)
    assert "GPU" in advice(source, "augment", baseline)
    assert "bandwidth" in advice(source, "copy", baseline)
    monkeypatch.setattr(jpeg_library, "is_available", lambda: False)
    assert "compiled decoder" in advice(source, "decode at the crop", baseline)
    monkeypatch.setattr(jpeg_library, "is_available", lambda: True)
    assert "compiled decoder" not in advice(source, "decode at the crop", baseline)


def test_the_share_of_images_that_the_compiled_decoder_supports_is_reported(source, tmp_path, monkeypatch):
    (tmp_path / "cat" / "0.jpg").write_bytes(encode(photograph(90, 120), progressive=True))
    if jpeg_library.is_available():
        assert measure_input(source, resolution=16, seconds=0.01, threads=1).compiled_share == 7 / 8
    monkeypatch.setattr(jpeg_library, "is_available", lambda: False)
    assert measure_input(source, resolution=16, seconds=0.01, threads=1).compiled_share is None


def test_crops_lie_inside_every_image():
    samples = [stages._Sample(b"", height, width) for height, width in [(1, 1), (7, 300), (500, 375)]]
    boxes = np.array(stages._boxes(samples))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= [1, 7, 500]).all()
    assert (boxes[:, 1] + boxes[:, 3] <= [1, 300, 375]).all()
