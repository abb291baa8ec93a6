"""The command itself: without arguments, and `--resume` with and without a value."""

import pytest
from command_line import error_line, megabatch

from megabatch.cli.main import _with_resume_value


def test_without_arguments_the_help_is_shown():
    assert "train     Trains a recipe." in megabatch().stderr


@pytest.mark.parametrize(
    ("option", "works"),
    [
        ("--epochs=3", "--set total_epochs=3 works"),
        ("--batch-size", "--set global_batch_size=VALUE works"),
        ("--lr", "--set peak_lr=VALUE works"),
        ("--peak-lr=0.5", "--set peak_lr=0.5 works"),
    ],
)
def test_a_key_of_the_recipe_as_an_option_is_refused_with_the_option_that_works(option, works):
    assert works in error_line(megabatch("train", "photos", option, "3"))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], []),
        (["--resume"], ["--resume=on"]),
        (["--resume", "auto"], ["--resume", "auto"]),
        (["--resume=auto"], ["--resume=auto"]),
        (["--resume", "--steps", "1"], ["--resume=on", "--steps", "1"]),
        (["--resume", "photos"], ["--resume=on", "photos"]),
    ],
)
def test_resume_alone_means_on(given, read):
    assert _with_resume_value(given) == read
