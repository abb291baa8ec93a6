"""`megabatch train --data URL`: shards elsewhere, through the cache, to a trained run."""

import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photographs import encode, photograph
from typer.testing import CliRunner

from megabatch.cli.main import app
from megabatch.errors import DataError, SettingsError
from megabatch.observe.events import read_events

pytest.importorskip("fsspec")

SMALL = ["--set", "model=resnet8", "--set", "resolution=0:16", "--set", "eval_resolution=16", "--set", "bn_span=4"]
QUICK = [*SMALL, "--set", "global_batch_size=16", "--set", "total_epochs=2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def threads_come_back() -> Iterator[None]:
    """A run sets how many threads torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of two photographs each for training, two for validation."""
    folder = tmp_path_factory.mktemp("shards")
    for part, num_shards in (("train", 12), ("val", 2)):
        for number in range(num_shards):
            with tarfile.open(folder / f"{part}-{number:02d}.tar", "w") as tar:
                for label in (0, 1):
                    pixels = photograph(40, 50, seed=2 * number + label + 100 * (part == "val"))
                    for ending, data in (("jpg", encode(pixels)), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{label}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return folder


def trained(data: object, cache: Path, output: Path, *more: str) -> list[dict]:
    """Events of a run in this process."""
    arguments = ["--data", data, "--cache", cache, "--output", output, "--workers", 1, "--quiet", *QUICK, *more]
    result = CliRunner().invoke(app, ["train", "photos", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return read_events(output / "events.jsonl")


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("shard_local", [False, True])
def test_a_run_on_a_url_is_the_run_on_the_folder(shards, tmp_path, shard_local):
    """In shard-local order with a cache that holds no more than it must: the window that is read and the next."""
    sizes = sorted((path.stat().st_size for path in shards.glob("train-*.tar")), reverse=True)
    room = sum(sizes[: 8 if shard_local else None])
    order = ["--set", f"shard_local={str(shard_local).lower()}", "--remote-cache-gib", repr((room + 1) / 2**30)]
    near = trained(shards, tmp_path / "cache", tmp_path / "near", *order)
    assert not (tmp_path / "cache").exists()
    far = trained(f"file://{shards}", tmp_path / "cache", tmp_path / "far", *order)
    assert losses(far) == losses(near)
    assert len(losses(far)) == 3
    assert far[-1]["top1"] == near[-1]["top1"]
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache" / "remote").glob("*.tar")) <= room
    assert next(event for event in far if event["event"] == "run_start")["data"] == f"file://{shards}"
    counted = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "far"), "--data", f"file://{shards}", "--cache", str(tmp_path / "cache")]
    )
    assert f"top1 {far[-1]['top1']:.4f}" in counted.output
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_what_cannot_be_read_is_said_before_anything_is_written(shards, tmp_path):
    for data, error, said in (
        (f"file://{tmp_path}/nowhere", DataError, "does not exist"),
        (f"nonsense://{shards}", DataError, "cannot be opened"),
        (f"file://{shards}", SettingsError, r"--remote-cache-gib \S+ works"),
    ):
        with pytest.raises(error, match=said):
            trained(data, tmp_path / "cache", tmp_path / "run", "--remote-cache-gib", "0.00001")
    assert not (tmp_path / "run").exists()
