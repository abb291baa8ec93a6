"""The command itself: without arguments, shell completion, and `--resume` with and without a value."""

import os
import subprocess
import sys

import pytest
from command_line import megabatch
from limits import HANG_S

from megabatch.cli.main import _with_resume_value


def test_without_arguments_the_help_is_shown():
    assert "train     Trains a recipe." in megabatch().stderr


@pytest.mark.parametrize(("words", "found"), [("megabatch tr", "train"), ("megabatch train fash", "fashion_mnist")])
def test_a_shell_completes_verbs_and_recipes(words, found):
    variables = {"_MEGABATCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv = ['megabatch']; from megabatch.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert found in done.stdout.split(), done.stderr


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
