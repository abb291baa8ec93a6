"""Shell completion: the words that fit, and what bash makes of them with its real script."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
from limits import HANG_S

from megabatch.cli.completion import complete_recipe, complete_setting, join_bash_words
from megabatch.cli.main import app
from megabatch.runtime import Runtime

START = "import sys; sys.argv[0] = 'megabatch'; from megabatch.cli.main import main; main()"


@pytest.mark.parametrize(
    ("incomplete", "found"),
    [
        ("optimizer=l", ["optimizer=lars", "optimizer=lamb"]),
        ("optimiz", ["optimizer=" + name for name in ("lars", "lamb", "sgd", "rmsprop_warmup", "muon", "shampoo")]),
        ("model=resnet1", ["model=resnet18"]),
        ("model=timm", ["model=timm:"]),
        ("nesterov=t", ["nesterov=true"]),
        ("peak_l", ["peak_lr=", "peak_lr=VALUE"]),
        ("warmup", ["warmup=", "warmup_start_lr=", "warmup_epochs="]),
        ("no_such", []),
        ("no_such=", []),
    ],
)
def test_keys_and_values_of_settings_are_completed(incomplete, found):
    assert sorted(complete_setting(incomplete)) == sorted(found)


@pytest.mark.parametrize(
    ("words", "last", "joined", "key"),
    [
        (
            ["megabatch", "train", "--set", "optimizer", "=", "la"],
            5,
            ["megabatch", "train", "--set", "la"],
            "optimizer",
        ),
        (["megabatch", "train", "--set", "optimizer", "="], 4, ["megabatch", "train", "--set", ""], "optimizer"),
        (["m", "--set", "lr", "=", "1", "--set", "op"], 6, ["m", "--set", "lr=1", "--set", "op"], None),
        (["m", "--precision", "=", "b"], 3, ["m", "--precision", "b"], None),
        (["m", "train", "fash"], 2, ["m", "train", "fash"], None),
    ],
)
def test_words_that_bash_has_cut_at_the_equals_sign_are_joined(words, last, joined, key):
    given = {"_MEGABATCH_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(last)}
    join_bash_words(given)
    assert given["COMP_WORDS"].split("\n") == joined
    assert given["COMP_CWORD"] == str(len(joined) - 1)
    assert given.get("_MEGABATCH_COMPLETED_KEY") == key


def test_recipes_and_recipe_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast_mine.toml").touch()
    assert complete_recipe("fast_") == ["fast_16", "fast_32", "fast_88", "fast_mine.toml"]


def test_every_option_that_names_its_choices_completes_them():
    context = typer.Context(typer.main.get_command(app))
    train = next(command for name, command in context.command.commands.items() if name == "train")
    for parameter in train.params:
        if "One of " in (parameter.help or ""):
            words = [item.value for item in parameter.shell_complete(context, "")]
            named = re.search(r"One of ([^.]*)\.", parameter.help)[1].split(", ")
            assert words == named, parameter.name
    (option,) = [parameter for parameter in train.params if parameter.name == "all_reduce"]
    assert [item.value for item in option.shell_complete(context, "t")] == ["torus"]
    assert Runtime().all_reduce in {item.value for item in option.shell_complete(context, "")}


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """A function that types words and a tab into an interactive bash, and returns the line that bash made of them."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    folder = tmp_path_factory.mktemp("bash")
    (folder / "megabatch").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{START}" "$@"\n')
    (folder / "megabatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TERM": "dumb",
        "PS1": "> ",
        "COLUMNS": "200",
    }
    script = subprocess.run(
        ["megabatch"],
        env=environment | {"_MEGABATCH_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    (folder / "script").write_text(script.stdout)
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], env=environment, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs
    )
    yield lambda words: _completed(ours, folder, words)
    shell.kill()
    shell.wait()
    os.close(ours)
    os.close(theirs)


def _completed(terminal: int, folder: Path, words: str) -> str:
    """The line after a tab: Ctrl-A and `echo` make a command of it, whose output bash writes to a file."""
    out = folder / "line"
    out.unlink(missing_ok=True)
    os.write(terminal, f"source {folder / 'script'}\n{words}\t".encode())
    time.sleep(0.1)
    os.write(terminal, f"|\x01echo '\x05' > {out}.part; mv {out}.part {out}\n".encode())
    end = time.monotonic() + HANG_S
    while not out.exists() and time.monotonic() < end:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    return out.read_text().rstrip("\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("megabatch doct", "megabatch doctor |"),
        ("megabatch train phot", "megabatch train photos |"),
        ("megabatch train photos --all-reduce to", "megabatch train photos --all-reduce torus |"),
        ("megabatch train photos --model resnet1", "megabatch train photos --model resnet18 |"),
        ("megabatch train photos --set optimi", "megabatch train photos --set optimizer=|"),
        ("megabatch train photos --set optimizer=sh", "megabatch train photos --set optimizer=shampoo |"),
        ("megabatch train photos --set seed=1 --set peak_l", "megabatch train photos --set seed=1 --set peak_lr=|"),
        ("megabatch train photos --precision=b", "megabatch train photos --precision=bf16 |"),
        ("megabatch bench step cifar10_", "megabatch bench step cifar10_2000 |"),
    ],
)
def test_bash_completes_the_line(bash, words, line):
    assert bash(words) == line
