"""`megabatch train --data URL`: training on remote shards through the cache."""

import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photographs import encode, photograph
from slow import slow_except
from typer.testing import CliRunner

from megabatch.cli.main import app
from megabatch.errors import DataError, SettingsError
from megabatch.observe.events import read_events

pytest.importorskip("fsspec")

SMALL = ["--set", "model=resnet8", "--set", "resolution=0:16", "--set", "eval_resolution=16", "--set", "bn_span=4"]
QUICK = [*SMALL, "--set", "global_batch_size=16", "--set", "total_epochs=2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def restore_torch_threads() -> Iterator[None]:
    """A run in this process changes torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training shards and two validation shards, each of two photographs."""
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
    """Trains in this process and returns the run's events."""
    arguments = ["--data", data, "--cache", cache, "--output", output, "--workers", 1, "--quiet", *QUICK, *more]
    result = CliRunner().invoke(app, ["train", "photos", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return read_events(output / "events.jsonl")


def losses(events: list[dict]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("shard_local", slow_except([False, True], True))
def test_training_on_a_url_equals_training_on_the_folder(shards, tmp_path, shard_local):
    """With shard-local order, the cache holds only what it must: the window of shards in use and the next one."""
    sizes = sorted((path.stat().st_size for path in shards.glob("train-*.tar")), reverse=True)
    room = sum(sizes[: 8 if shard_local else None])
    order = ["--set", f"shard_local={str(shard_local).lower()}", "--remote-cache-gib", repr((room + 1) / 2**30)]
    local = trained(shards, tmp_path / "cache", tmp_path / "local", *order)
    assert not (tmp_path / "cache").exists()
    remote = trained(f"file://{shards}", tmp_path / "cache", tmp_path / "remote", *order)
    assert losses(remote) == losses(local)
    assert len(losses(remote)) == 3
    assert remote[-1]["top1"] == local[-1]["top1"]
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache" / "remote").glob("*.tar")) <= room
    assert next(event for event in remote if event["event"] == "run_start")["data"] == f"file://{shards}"
    evaluated = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "remote"), "--data", f"file://{shards}", "--cache", str(tmp_path / "cache")]
    )
    assert f"top1 {remote[-1]['top1']:.4f}" in evaluated.output
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_unreadable_data_are_reported_before_anything_is_written(shards, tmp_path):
    for data, error, said in (
        (f"file://{tmp_path}/nowhere", DataError, "does not exist"),
        (f"nonsense://{shards}", DataError, "cannot be opened"),
        (f"file://{shards}", SettingsError, r"--remote-cache-gib \S+ works"),
    ):
        with pytest.raises(error, match=said):
            trained(data, tmp_path / "cache", tmp_path / "run", "--remote-cache-gib", "0.00001")
    assert not (tmp_path / "run").exists()
