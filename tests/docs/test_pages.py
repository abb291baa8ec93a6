"""The documentation names files, decisions and public names that exist."""

import re
import shlex
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import megabatch
from megabatch.cli.main import _with_resume_value, app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "megabatch"
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:[\w*.-]+/)*[\w*-]+\.(?:py|c|html|md)|(?:[\w.-]+/)+)`")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    assert [target for target in LINK.findall(text) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_in_backticks_exists(name):
    for path in PATH.findall((ROOT / name).read_text(encoding="utf-8").split("## A run folder", maxsplit=1)[0]):
        if "NAME" in path or path == "site/":
            continue
        found = any(next(root.glob(path), None) for root in (ROOT, PACKAGE)) or next(PACKAGE.rglob(path), None)
        assert found, path


def test_the_api_reference_shows_every_public_name_once():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: megabatch\.(\w+)$", text, re.M)) == megabatch.__all__


def test_the_site_lists_every_decision():
    text, index = (ROOT / "mkdocs.yml").read_text(), (DOCS / "decisions" / "index.md").read_text()
    for page in (DOCS / "decisions").glob("0*.md"):
        assert f"decisions/{page.name}" in text
        assert f"({page.name})" in index


def commands(page):
    """The `megabatch` commands of a page, word by word: lines of blocks, and last cells of tables."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for found in re.findall(r"^ *(megabatch [a-z].*)$|\| `(megabatch [a-z][^`]*)` \|$", text, re.M):
        yield shlex.split(re.split(r" +# | > | \| ", "".join(found))[0])[1:]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else value[0]
)
def test_the_command_line_parses_a_command_of_the_documentation(page, words):
    command = get_command(app)
    arguments = _with_resume_value(words)
    while isinstance(command, TyperGroup):
        command = command.commands[arguments.pop(0)]
    command.make_context("megabatch", arguments)
