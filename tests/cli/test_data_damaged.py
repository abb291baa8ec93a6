"""A folder with every kind of damage: `data check` reports each file, and training on it is deterministic."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from command_line import megabatch_process
from damaged_files import FILES, bomb_jpeg, jpeg
from typer.testing import CliRunner

from megabatch.cli.main import app
from megabatch.data.checking.check_file import BAD_KINDS
from megabatch.data.jpeg.decode import decode
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError
from megabatch.observe.events import read_events

SMALL = ["--set", "model=resnet8", "--set", "resolution=0:16", "--set", "eval_resolution=16", "--set", "bn_span=4"]
QUICK = [*SMALL, "--set", "global_batch_size=16", "--set", "total_epochs=2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose class train/cat holds all damaged and odd files; the rest is intact."""
    root = tmp_path_factory.mktemp("damaged")
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                (root / part / name / f"good-{number}.jpg").write_bytes(jpeg())
    for name, content, _ in FILES:
        (root / "train" / "cat" / name).write_bytes(content())
    return root


def arguments(data: Path, output: Path, workers: int, *more: object) -> list[str]:
    words = ["--data", data, "--output", output, "--workers", workers, "--quiet", *QUICK, *more]
    return ["train", "photos", *map(str, words)]


def events_of(data: Path, output: Path, workers: int) -> list[dict]:
    done = megabatch_process(*arguments(data, output, workers, "--max-bad-share", 0.6))
    assert done.returncode == 0, done.stderr
    return read_events(output / "events.jsonl")


def named_in(run: list[dict]) -> list[str]:
    """Names of the files that a run's log reports as replaced, one entry per report."""
    texts = [event["text"].partition(" was replaced") for event in run if event["event"] == "warning"]
    return [Path(name).name for name, replaced, _ in texts if replaced]


def test_check_reports_each_damaged_file_with_its_kind(damaged):
    assert len(FILES) >= 30
    lines = CliRunner().invoke(app, ["data", "check", str(damaged)]).output.splitlines()
    for name, _, kinds in FILES:
        shown = name if name.isprintable() else ascii(name)[1:-1]
        for kind in kinds:
            line = f"{'bad' if kind in BAD_KINDS else 'odd'}  {kind:18} "
            assert any(each.startswith(line) and f"train/cat/{shown}" in each for each in lines), (name, kind)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_replaces_the_same_number_of_samples_on_one_worker_and_on_two(damaged, tmp_path):
    source = FolderSource(damaged / "train")
    bad = set()
    for index in range(len(source)):
        try:
            decode(source.read(index))
        except DataError:
            bad.add(Path(source.name(index)).name)
    runs = [events_of(damaged, tmp_path / f"run-{workers}", workers) for workers in (1, 2)]
    counts = [run[-1]["num_replaced_samples"] for run in runs]
    assert counts[0] == counts[1]
    # Each epoch reads every bad sample once; the file that is damaged in the middle may still decode within a crop.
    assert 2 * (len(bad) - 1) <= counts[0] <= 2 * len(bad)
    for run in runs:
        assert len(named_in(run)) == len(set(named_in(run)))
        assert set(named_in(run)) <= bad
        assert len(named_in(run)) >= len(bad) - 1
        last = [event for event in run if event["event"] == "bad_samples"][-1]
        assert last["num_replaced_samples"] == run[-1]["num_replaced_samples"]
        assert last["num_bad_samples"] == len(named_in(run))
    losses = [[event["loss"] for event in run if event["event"] == "step"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def rejection(data: Path, tmp_path: Path) -> str:
    """Error message of `train` for data that it rejects before it writes anything."""
    result = CliRunner().invoke(app, arguments(data, tmp_path / "run", 1, "--max-bad-share", 1))
    assert isinstance(result.exception, DataError)
    assert not (tmp_path / "run").exists()
    return str(result.exception)


def test_a_link_out_of_the_folder_is_rejected(damaged, tmp_path):
    shutil.copytree(damaged, tmp_path / "set")
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "set" / "train" / "cat" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    assert "out.jpg is a symbolic link out of the data set" in rejection(tmp_path / "set", tmp_path)


def test_a_name_in_a_tar_that_leaves_its_folder_is_rejected(tmp_path):
    (tmp_path / "set").mkdir()
    for part, name in (("train", "../../up"), ("val", "fine")):
        with tarfile.open(tmp_path / "set" / f"{part}-0.tar", "w") as tar:
            for ending, data in (("jpg", jpeg()), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert "leaves the archive's folder" in rejection(tmp_path / "set", tmp_path)


def test_a_decompression_bomb_is_rejected_when_bad_images_are_not_allowed(damaged, tmp_path):
    shutil.copytree(damaged / "val", tmp_path / "set" / "train")
    shutil.copytree(damaged / "val", tmp_path / "set" / "val")
    (tmp_path / "set" / "train" / "cat" / "bomb.jpg").write_bytes(bomb_jpeg())
    result = CliRunner().invoke(app, arguments(tmp_path / "set", tmp_path / "run", 1))
    assert "bomb.jpg: the image is absurdly large" in str(result.exception)
