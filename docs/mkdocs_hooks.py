"""Hooks of the documentation site (mkdocs.yml).

README.md, CHANGELOG.md and CONTRIBUTING.md of the repository become pages of the site, the README as its first page.
Links to files outside docs/ lead to the repository's web pages if `repo_url` is set, and become plain text otherwise.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)#:]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages whose source is in the root of the repository."""
    for source, page in ROOT_PAGES.items():
        text = _rewrite((ROOT / source).read_text(encoding="utf-8"), folder="", repo_url=config.repo_url)
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Rewrites the links of the pages in docs/."""
    if page.file.generated_by:
        return markdown
    return _rewrite(
        markdown, folder=posixpath.join("docs", posixpath.dirname(page.file.src_uri)), repo_url=config.repo_url
    )


def _rewrite(markdown: str, *, folder: str, repo_url: str | None) -> str:
    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        anchor = match["anchor"] or ""
        if path in ROOT_PAGES:
            return (
                f"[{match['text']}]({posixpath.relpath(ROOT_PAGES[path], folder.removeprefix('docs') or '.')}{anchor})"
            )
        if path == "docs/decisions":
            return f"[{match['text']}](docs/decisions/index.md)"
        if path.startswith("docs/") or not (ROOT / path).exists():
            return match[0]
        return f"[{match['text']}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})" if repo_url else match["text"]

    return LINK.sub(replace, markdown)
