"""Keeps keys and passwords out of everything a run writes or prints."""

from __future__ import annotations

import os
import re
from typing import Any

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
SHORTEST_SECRET = 8
"""Characters. Shorter values ("1", "true") are settings, and would blot out ordinary words."""


def redact(text: str) -> str:
    """The text with `***` for every secret of the environment and the credentials of every URL in it."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return URL_CREDENTIALS.sub("***", text)


def redact_tree(tree: Any) -> Any:
    """`redact` for every string in nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree
