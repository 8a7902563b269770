"""Adds pages from outside docs/ to the site, and shows a setting with its default and its help.

GitHub shows the same files, so their links lead from file to file; on the site they lead from page
to page.
"""

from __future__ import annotations

import json
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
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/README.md": "paper.md",
    "docs/notebook.ipynb": "notebook.md",
}
"""Files of the project -> pages of the site. A Markdown file of docs/ is a page by itself."""
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[([^][]*)\]\((?![a-z]+:)([^)\s#]+)")
TABLE_ROW = re.compile(r"^\|.*$", flags=re.MULTILINE)
CODE = re.compile(r"`[^`]+`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds these pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(
            File.generated(
                config, page, content=notebook_page(text) if source.endswith(".ipynb") else text
            )
        )
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turns links between files into links between pages, and unescapes | in a table's code."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))
    titles = titles_of(config.nav)

    def to_page(link: re.Match) -> str:
        text, target = link.groups()
        target = posixpath.normpath(posixpath.join(folder, target))
        target = (
            "LICENSE.txt"
            if target == "LICENSE"
            else PAGES.get(target, target.removeprefix("docs/"))
        )
        text = titles.get(target, text) if text.endswith(".md") else text
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    def unescape(row: re.Match) -> str:
        return CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0])

    return TABLE_ROW.sub(unescape, LINK.sub(to_page, markdown))


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its cells, each followed by the text and the picture it printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(
                    f"![the figure of this "
                    f"cell](data:image/png;base64,{output['data']['image/png'].strip()})"
                )
    return "\n\n".join([*parts, '<a href="notebook.ipynb" download>This page as a notebook</a>'])


def titles_of(nav: list[dict[str, list[dict[str, str]]]]) -> dict[str, str]:
    """Pages -> their names in the navigation."""
    entries = (entry for group in nav for pages in group.values() for entry in pages)
    return {page: title for entry in entries for title, page in entry.items()}


class Fields(griffe.Extension):
    """Shows a field by its default, and the help in its metadata as its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) in (
            "setting",
            "section",
        ):
            attr.value = next(iter(attr.value.arguments), attr.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.name != "CeraConfig":
            return
        from cera_train.cera import CeraConfig

        for field in fields(CeraConfig):
            if field.name in cls.members and "help" in field.metadata:
                cls.members[field.name].docstring = griffe.Docstring(field.metadata["help"])
