"""The blocks of a Markdown page: fenced or indented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one."""

    page: Path
    line: int
    language: str | None
    """None: indented."""
    text: str
    comment: str
    """The line above it, where that is a comment."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        start = number
        if fence := re.fullmatch(r"```(\w*)", lines[number]):
            end = lines.index("```", number + 1)
            above = lines[start - 1] if start and lines[start - 1].startswith("<!--") else ""
            yield Block(page, start + 1, fence[1], "\n".join(lines[start + 1 : end]), above)
            number = end
        elif lines[number].startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            yield Block(page, start + 1, None, "\n".join(lines[start : number + 1]), "")
        number += 1
