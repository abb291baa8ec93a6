"""The documentation names files, decisions and public names that exist."""

import re
from pathlib import Path

import pytest

import megabatch

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
