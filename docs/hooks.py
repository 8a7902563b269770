"""The site's pages that lie outside docs/, and the help of CeraConfig's fields.

GitHub shows the same files, so their links lead from file to file of the project; here they lead from page to page.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "recipes/README.md": "recipes.md"}
"""Files of the project -> pages of the site. A file of docs/ is its page."""
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[([^][]*)\]\((?![a-z]+:)([^)\s#]+)")
TABLE_ROW = re.compile(r"^\|.*$", flags=re.MULTILINE)
CODE = re.compile(r"`[^`]+`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turns links between files into links between pages, and the escaped | of code in a table into |."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))
    titles = titles_of(config.nav)

    def to_page(link: re.Match) -> str:
        text, target = link.groups()
        target = posixpath.normpath(posixpath.join(folder, target))
        target = "LICENSE.txt" if target == "LICENSE" else PAGES.get(target, target.removeprefix("docs/"))
        text = titles.get(target, text) if text.endswith(".md") else text
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    def unescape(row: re.Match) -> str:
        return CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0])

    return TABLE_ROW.sub(unescape, LINK.sub(to_page, markdown))


def titles_of(nav: list[dict[str, list[dict[str, str]]]]) -> dict[str, str]:
    """Pages -> their names in the navigation."""
    entries = (entry for group in nav for pages in group.values() for entry in pages)
    return {page: title for entry in entries for title, page in entry.items()}


class FieldHelp(griffe.Extension):
    """Makes the help in a field's metadata its docstring."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.name != "CeraConfig":
            return
        from cera_train.cera import CeraConfig

        for field in fields(CeraConfig):
            if field.name in cls.members and "help" in field.metadata:
                cls.members[field.name].docstring = griffe.Docstring(field.metadata["help"])
