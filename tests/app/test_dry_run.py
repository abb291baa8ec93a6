"""A dry run measures a few steps and says what the whole recipe would take."""

import dataclasses
import json

import pytest

from megabatch import recipes
from megabatch.app.dry_run import NUM_EVAL_IMAGES, check_dry_run, estimate, open_dry_data
from megabatch.data.sources.made import MadePhotos
from megabatch.errors import DataError, SettingsError
from megabatch.runtime import Runtime

RECIPE = dataclasses.replace(
    recipes.get("goyal2017_8k"), num_train_images=8000, total_epochs=10.0, eval_every_epochs=4.0, eval_offset_epochs=0.0
)


def events(folder, *, images_per_s, resolution=224, num_samples=500):
    """Two slow first steps, then one for each of `images_per_s`; an evaluation of 2 s."""
    lines = [
        {"event": "step", "images_per_s": speed, "global_batch_size": 100, "resolution": resolution}
        for speed in (1.0, 2.0, *images_per_s)
    ]
    lines.append({"event": "evaluation", "seconds": 2.0, "num_samples": num_samples})
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_steps_are_left_out_and_the_median_counts(tmp_path):
    events(tmp_path, images_per_s=(10.0, 20.0, 25.0))
    said = estimate(RECIPE, tmp_path, is_made=False)
    assert "3 steps of 100 images, median 5.000 s a step, 20 images/s; one evaluation 2.0 s" in said
    # 80,000 images at 20 a second, and evaluations after 4, 8 and 10 epochs
    assert "a whole run of 10 epochs: 1 h 06 min of training and 3 evaluations, 1 h 06 min in all" in said


def test_made_evaluation_images_stand_for_imagenets(tmp_path):
    events(tmp_path, images_per_s=(80_000.0,))
    assert f"one evaluation {2.0 * NUM_EVAL_IMAGES / 500:.1f} s" in estimate(RECIPE, tmp_path, is_made=True)


def test_later_resolutions_take_time_in_proportion_to_their_pixels(tmp_path):
    events(tmp_path, images_per_s=(800.0,), resolution=112)
    growing = dataclasses.replace(RECIPE, resolution=((0.0, 112.0), (5.0, 224.0)))
    # five epochs of 10 s and five of 40 s; without an evaluation's time that is 4 min 10 s
    assert "4 min 10 s of training" in estimate(growing, tmp_path, is_made=False)


@pytest.mark.parametrize(
    ("total", "every", "offset", "number"),
    [(18, 1, 0, 18), (90, 4, 0, 23), (44, 4, 3, 12), (42, 4, 2, 11), (10, 1000, 0, 1), (16.5, 1, 0, 17)],
)
def test_evaluations_are_counted_as_the_loop_makes_them(total, every, offset, number):
    changed = dataclasses.replace(
        RECIPE, total_epochs=float(total), eval_every_epochs=float(every), eval_offset_epochs=float(offset)
    )
    assert changed.num_evaluations == number


def test_only_recipes_without_data_of_their_own_get_made_photographs(tmp_path):
    data = open_dry_data(recipes.get("goyal2017_8k"), Runtime())
    assert isinstance(data.train, MadePhotos)
    assert (len(data.train), len(data.train.class_names)) == (1_281_167, 1000)
    with pytest.raises(DataError, match=r"there is no .*missing"):
        open_dry_data(recipes.get("goyal2017_8k"), Runtime(data=tmp_path / "missing"))


@pytest.mark.parametrize(("steps", "resume", "words"), [(2, False, "more than 2 steps"), (9, True, "--resume")])
def test_what_cannot_be_a_dry_run_is_refused(steps, resume, words):
    with pytest.raises(SettingsError, match=words):
        check_dry_run(steps, Runtime(resume=resume))
