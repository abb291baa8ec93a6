"""`--help`: commands are described by whole sentences, options have a help text with the unit."""

import re
from collections.abc import Iterator

import pytest
import typer.main
from typer.testing import CliRunner

from megabatch.cli.main import app


def verbs(command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, child in getattr(command, "commands", {}).items():
        yield (*path, name), child
        yield from verbs(child, (*path, name))


VERBS = list(verbs(typer.main.get_command(app)))
GROUPS = [(path, command) for path, command in VERBS if hasattr(command, "commands")]


@pytest.mark.parametrize("path", [(), *(path for path, _ in GROUPS)], ids=" ".join)
def test_the_list_of_commands_truncates_no_sentence(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output
    listed = re.findall(r"^  (\w+)  +(\S.*)$", shown.partition("Commands:")[2], flags=re.MULTILINE)
    assert {name for name, _ in listed} == {found[-1] for found, _ in VERBS if found[:-1] == path}
    assert all(text.endswith(".") and not text.endswith("...") for _, text in listed)


@pytest.mark.parametrize(
    ("path", "command"), VERBS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_option_has_a_help_text_with_the_unit_of_times_and_sizes(path, command):
    for parameter in command.params:
        assert parameter.help or parameter.hidden, (path, parameter.name)
        for ending, unit in (("_s", "Seconds"), ("_gib", "GiB"), ("_mib", "MiB")):
            assert not parameter.name.endswith(ending) or unit in parameter.help, (path, parameter.name)
