"""`train` from a recipe file, with `--resume auto` and with `--steps`, in this process."""

import re

import pytest
from command_line import error_line, megabatch
from PIL import Image

from megabatch import recipes
from megabatch.observe.events import read_events
from megabatch.recipe import read
from megabatch.recipe_file import to_toml

QUICK = ["--set", "model=resnet8", "--set", "resolution=0:16", "--set", "eval_resolution=16", "--set", "bn_span=4"]
QUICK += ["--set", "global_batch_size=4", "--set", "total_epochs=2", "--precision", "fp32", "--workers", 1]


@pytest.fixture
def run(tmp_path):
    """Runs `train RECIPE` on two classes of three plain images each; returns the finished command."""
    for split in ("train", "val"):
        for name, color in (("blue", (20, 40, 200)), ("red", (200, 30, 20))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 20), color).save(folder / f"{number}.png")

    def train(recipe, *arguments):
        where = ["--data", tmp_path / "photos", "--output", tmp_path / "run"]
        return megabatch("train", recipe, *where, *QUICK, *arguments)

    return train


def steps_of(tmp_path):
    return [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]


def test_resume_auto_starts_a_run_in_a_new_folder_and_continues_it_afterwards(run, tmp_path):
    for expected in ([1], [1, 2], [1, 2, 3], [1, 2, 3]):
        done = run("photos", "--resume", "auto", "--steps", 1)
        assert done.returncode == 0, done.stderr
        assert steps_of(tmp_path) == expected
        assert "no checkpoint" not in done.stdout
    assert "already complete at step 3" in done.stdout


def test_resume_without_a_value_needs_a_run_and_off_refuses_one(run, tmp_path):
    assert "--resume auto, or no --resume, starts a new run" in error_line(run("photos", "--resume"))
    assert run("photos", "--steps", 1).returncode == 0
    assert "already holds a run" in error_line(run("photos", "--resume", "off"))
    assert run("photos", "--resume", "--steps", 1).returncode == 0
    assert steps_of(tmp_path) == [1, 2]
    assert "needed one of off, on, auto" in error_line(run("photos", "--resume=maybe"))


def test_progress_counts_to_the_last_step_of_this_command(run):
    shown = re.search(r"epoch 0\.67/(\S+)  step 1/(\d+)", run("photos", "--steps", 2).stdout)
    assert shown.groups() == ("1.33", "2")
    shown = re.search(r"epoch 2\.00/(\S+)  step 3/(\d+)", run("photos", "--resume", "--steps", 5).stdout)
    assert shown.groups() == ("2", "3")


def test_a_run_of_a_recipe_file_keeps_the_file_with_its_comments(run, tmp_path):
    text = to_toml(recipes.get("photos")).replace("peak_lr = 0.1", "peak_lr = 0.05  # mine")
    (tmp_path / "mine.toml").write_text(text)
    done = run(tmp_path / "mine.toml", "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "recipe.toml").read_text() == text
    assert read(tmp_path / "run" / "recipe.json").peak_lr == 0.05


def test_a_recipe_is_written_as_a_file_that_trains(run, tmp_path):
    written = megabatch("recipes", "photos", "--set", "momentum=0.5", "--format", "toml").stdout
    (tmp_path / "mine.toml").write_text(written)
    assert recipes.get(str(tmp_path / "mine.toml")).momentum == 0.5
    assert "momentum           0.5" in megabatch("recipes", tmp_path / "mine.toml").stdout
    (tmp_path / "mine.toml").write_text(written.replace("\nmomentum =", "\nmomentun ="))
    assert "did you mean momentum?" in error_line(run(tmp_path / "mine.toml"))
