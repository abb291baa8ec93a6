"""The command itself: without arguments, and `--resume` with and without a value."""

import pytest
from command_line import megabatch

from megabatch.cli.main import _with_resume_value


def test_without_arguments_the_help_is_shown():
    assert "train     Trains a recipe." in megabatch().stderr


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
