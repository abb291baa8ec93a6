"""`megabatch evaluate` on a checkpoint."""

import dataclasses
import json

from command_line import megabatch
from photographs import TEST_PHOTOS
from tiny_run import run_tiny, tiny_data, tiny_recipe
from typer.testing import CliRunner

from megabatch.cli.main import app
from megabatch.data.sources.arrays import ArraySource


def test_evaluation_configures_the_allocator_as_training_does(tmp_path, monkeypatch):
    recipe, num_workers = tiny_recipe(), []
    trained = run_tiny(tmp_path, recipe)
    monkeypatch.setattr("megabatch.app.resolve.keep_freed_memory", num_workers.append)
    monkeypatch.setattr("megabatch.app.data.open_evaluation_data", lambda *_, **__: tiny_data(recipe))
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--device", "cpu", "--precision", "fp32"])
    assert num_workers == [1]
    assert f"({trained['correct']} of 100)" in result.output


def test_details_name_the_images_that_the_model_is_most_surely_wrong_about(tmp_path, monkeypatch):
    recipe = tiny_recipe()
    run_tiny(tmp_path, recipe, max_steps=1)
    monkeypatch.setattr("megabatch.app.data.open_evaluation_data", lambda *_, **__: tiny_data(recipe))
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--device", "cpu", "--details"])
    rows = [line.split() for line in result.output.partition("surest mistakes")[2].splitlines()[1:]]
    written = json.loads((tmp_path / "mistakes.json").read_text())["images"]
    assert [" ".join(row[:2]) for row in rows] == [image["name"] for image in written]
    assert all(row[2] != row[3] for row in rows)


HOSTILE = "\x1b[2J\u202ecat\x07\n"


def test_control_characters_of_a_class_name_reach_no_terminal(tmp_path, monkeypatch):
    recipe, data = tiny_recipe(), tiny_data(tiny_recipe())
    train, evaluation = (renamed(source, HOSTILE) for source in (data.train, data.evaluation))
    trained = dataclasses.replace(data, train=train, evaluation=evaluation)
    run_tiny(tmp_path, recipe, data=trained, max_steps=1)
    lacking = ArraySource(data.evaluation.images, data.evaluation.labels.clamp(max=2), ("a", "b", "c"))
    evaluated = dataclasses.replace(data, evaluation=lacking)
    monkeypatch.setattr("megabatch.app.data.open_evaluation_data", lambda *_, **__: evaluated)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--device", "cpu", "--precision", "fp32"])
    assert "no \\x1b[2J\\u202ecat\\x07\\n" in result.output
    assert result.output.replace("\n", "").isprintable()


def renamed(source, name):
    return ArraySource(source.images, source.labels, (*source.class_names[:-1], name))


def test_a_run_is_evaluated_on_the_images_that_it_held_out_unless_others_are_named(tmp_path):
    photos, run = TEST_PHOTOS / "train", tmp_path / "run"
    small = ["model=resnet8", "width=1", "resolution=16", "eval_resolution=16", "global_batch_size=8", "bn_span=8"]
    words = [word for setting in small for word in ("--set", setting)] + ["--steps", 1, "--workers", 1]
    trained = megabatch("train", "photos", "--data", photos, "--val-fraction", 0.25, "--output", run, *words)
    assert trained.returncode == 0, trained.stderr
    found = megabatch("evaluate", run, "--data", photos)
    assert "6 of 24 training images are held out" in found.stderr
    assert found.stdout.rstrip().endswith("of 6)")
    assert "may have trained on" not in found.stderr
    other = megabatch("evaluate", run, "--data", photos, "--val-fraction", 0.5)
    assert "the run trained on 18 images, and 12 are left with --val-fraction 0.5" in other.stderr
    assert megabatch("evaluate", run, "--data", TEST_PHOTOS).stdout.rstrip().endswith("of 12)")
