"""Settings and choices that an earlier release had, in gone.yaml: recorded configs still hold them,
and commands may still name them."""

from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.common.settings import word_of

LAST = "0.2.0"  # the last release that had them
ANY = "any"


TABLE = read_yaml(Path(__file__).with_suffix(".yaml"))
GONE = {key: row if isinstance(row, list) else [row, None] for key, row in TABLE.items()}
"""What to do instead, and the recorded value that means the same to a run as none."""


def describe_gone(setting: str) -> str | None:
    """What to do instead of a key, or KEY=VALUE, if the key or the choice is gone; else None."""
    for known, (instead, _) in GONE.items():
        if setting == known or setting.startswith((f"{known}.", f"{known}=")):
            return f"{known}: cera-train {LAST} was the last that had it: {instead}."
    return None


def without_gone(tree: Any, place: str, key: str = "") -> Any:
    """A recorded config without settings that are gone.

    Args:
        key: of the tree, in the whole config.

    Raises:
        UserError: the config used one, or made a choice that is gone.
    """
    if isinstance(tree, dict):
        kept = {}
        for name, value in tree.items():
            inner = f"{key}.{name}" if key else str(name)
            choice = f"{inner}={word_of(value)}"
            instead, unused = GONE.get(inner) or GONE.get(choice, (None, None))
            if instead is None or (unused != ANY and value not in (None, unused)):
                kept[name] = without_gone(value, place, inner)
        return kept
    if isinstance(tree, list):
        return [without_gone(each, place, key) for each in tree]
    if message := describe_gone(f"{key}={word_of(tree)}"):
        raise UserError(f"{place}: {message}")
    return tree
