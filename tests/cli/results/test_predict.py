"""`megabatch predict`: the same predictions as evaluation; unreadable images are reported and end nothing."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from command_line import error_line, megabatch
from PIL import ExifTags, Image
from tiny_run import run_tiny, tiny_data, tiny_recipe

from megabatch.app.load import load_model
from megabatch.app.predict import Prediction
from megabatch.cli.results.predict import _csv_writer


@pytest.fixture(scope="module", params=[False, True], ids=["one view", "two views"])
def run(request, tmp_path_factory):
    """A trained run, and its evaluation images as PNG files in a folder; "two views" has eval_flip=true."""
    folder, recipe = tmp_path_factory.mktemp("predict"), tiny_recipe(eval_flip=request.param)
    trained = run_tiny(folder / "run", recipe)
    images = tiny_data(recipe).evaluation
    (folder / "images").mkdir()
    for index, pixels in enumerate(images.images):
        Image.fromarray(pixels[0].numpy()).save(folder / "images" / f"{index:03}.png")
    return folder, trained, images


def predict(run, *arguments, code=0):
    done = megabatch("predict", run / "run", *arguments, "--device", "cpu", "--precision", "fp32")
    assert done.returncode == code, done.stderr
    return done


def rows(done):
    return list(csv.DictReader(io.StringIO(done.stdout)))


def test_predictions_of_a_folder_count_as_many_correct_images_as_the_evaluation_in_training(run):
    folder, trained, data = run
    found = rows(predict(folder, folder / "images"))
    assert [row["image"] for row in found] == [str(folder / "images" / f"{index:03}.png") for index in range(100)]
    correct = [row["class"] == data.class_names[label] for row, label in zip(found, data.labels, strict=True)]
    assert sum(correct) == trained["correct"]


def test_probabilities_are_the_softmax_of_the_loaded_model_on_normalised_pixels(run):
    folder, _, data = run
    recipe, model = tiny_recipe(), load_model(folder / "run")
    pixels = data.images[:3].float() / 255
    pixels = (pixels - recipe.pixel_mean[0]) / recipe.pixel_std[0]
    logits = model(pixels)
    if json.loads((folder / "run" / "recipe.json").read_text())["eval_flip"]:
        logits = (logits + model(pixels.flip(3))) / 2
    expected = logits.double().softmax(1).sort(1, descending=True)
    paths = [folder / "images" / f"{index:03}.png" for index in range(3)]
    done = predict(folder, *paths, "--format", "jsonl", "--top", 4)
    for index, line in enumerate(map(json.loads, done.stdout.splitlines())):
        assert [c["class"] for c in line["classes"]] == [data.class_names[k] for k in expected.indices[index]]
        assert np.allclose([c["probability"] for c in line["classes"]], expected.values[index].detach(), atol=1e-5)
        assert sum(c["probability"] for c in line["classes"]) == pytest.approx(1, abs=1e-5)


def test_images_in_a_tar_have_the_predictions_of_the_same_files(run, tmp_path):
    folder, *_ = run
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for index in (7, 5):
            archive.add(folder / "images" / f"{index:03}.png", f"{index:03}.png")
    inside = rows(predict(folder, tmp_path / "some.tar"))
    files = rows(predict(folder, folder / "images" / "005.png", folder / "images" / "007.png"))
    assert [row["image"] for row in inside] == ["some.tar:005.png", "some.tar:007.png"]
    assert [row["class"] for row in inside] == [row["class"] for row in files]


@pytest.mark.parametrize("output_format", ["csv", "jsonl"])
def test_an_unreadable_image_is_reported_and_the_others_keep_their_predictions(run, tmp_path, output_format):
    folder, *_ = run
    bad, good = tmp_path / "bad.jpg", folder / "images" / "003.png"
    bad.write_bytes(b"no image")
    done = predict(folder, good, bad, good, "--format", output_format, code=1)
    alone = predict(folder, good, "--format", output_format).stdout.splitlines()
    assert [line for line in done.stdout.splitlines() if "bad.jpg" not in line] == [*alone, alone[-1]]
    assert f"{bad} cannot be read" in done.stderr
    assert "1 of 3 images cannot be read" in done.stderr
    if output_format == "jsonl":
        assert set(json.loads(done.stdout.splitlines()[1])) == {"image", "error"}


def test_errors_name_what_was_given_and_what_works(run, tmp_path):
    folder, *_ = run
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    assert "there is no" in error_line(megabatch("predict", folder / "run", tmp_path / "none.jpg"))
    assert "holds no images" in error_line(megabatch("predict", folder / "run", folder / "run"))
    assert "none of the 1 images can be read" in error_line(megabatch("predict", folder / "run", bad))
    assert "--top 4 works" in error_line(megabatch("predict", folder / "run", bad, "--top", 5))
    assert "csv, jsonl" in error_line(megabatch("predict", folder / "run", bad, "--format", "xml"))


def test_details_of_an_evaluation_sum_to_its_counts(run, tmp_path, monkeypatch):
    folder, trained, data = run
    monkeypatch.setattr("megabatch.app.data.open_evaluation_data", lambda *_, **__: tiny_data(tiny_recipe()))
    table = tmp_path / "confusion.csv"
    done = megabatch("evaluate", folder / "run", "--details", "--confusion", table, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    with table.open() as file:
        heading, *lines = list(csv.reader(file))
    matrix = torch.tensor([[int(cell) for cell in line[1:]] for line in lines])
    assert heading == ["label", "a", "b", "c", "d"] == ["label", *(line[0] for line in lines)]
    assert torch.equal(matrix.sum(1), torch.bincount(data.labels, minlength=4))
    assert int(matrix.trace()) == trained["correct"]
    by_class = [line.split() for line in done.stdout.splitlines() if line.startswith("2 c ")]
    assert by_class[0][2:5] == [
        str(int(matrix[2].sum())),
        str(int(matrix[2, 2])),
        f"{matrix[2, 2] / matrix[2].sum():.4f}",
    ]
    assert by_class[1][2:] == [str(int(cell)) if cell else "." for cell in matrix[2]]


def test_upright_predicts_a_photo_as_its_exif_orientation_shows_it(run, tmp_path):
    folder, *_ = run
    with Image.open(folder / "images" / "003.png") as image:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (plain,) = rows(predict(folder, folder / "images" / "003.png"))
    (turned,) = rows(predict(folder, tmp_path / "turned.png"))
    (upright,) = rows(predict(folder, tmp_path / "turned.png", "--upright"))
    assert turned["probability"] != plain["probability"] == upright["probability"]
    assert upright["class"] == plain["class"]


@pytest.mark.parametrize(("is_terminal", "name"), [(True, r"a\x1b[31m"), (False, "a\x1b[31m")])
def test_a_terminal_gets_no_control_characters_and_a_file_gets_names_as_they_are(monkeypatch, is_terminal, name):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", out)
    _csv_writer()(Prediction("a\x1b[31m", classes=(("a\x1b[31m", 1.0),)))
    assert out.getvalue() == f"image,rank,class,probability\n{name},1,{name},1.000000\n"
