"""Settings and choices that an earlier release had, in gone.yaml: recorded configs still hold them,
and commands may still name them."""

from pathlib import Path
from typing import Any, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.common.settings import word_of

LAST = "0.2.0"  # the last release that had them
ANY = "any"


class Gone(NamedTuple):
    instead: str
    unused: Any = None

    def is_unused(self, value: Any) -> bool:
        """Whether a recorded value means the same to a run as none."""
        return self.unused == ANY or value in (None, self.unused)


TABLE = read_yaml(Path(__file__).with_suffix(".yaml"))
GONE = {key: Gone(*row) if isinstance(row, list) else Gone(row) for key, row in TABLE.items()}


def describe_gone(setting: str) -> str | None:
    """What to do instead of a key, or KEY=VALUE, if the key or the choice is gone; else None."""
    for known, gone in GONE.items():
        if setting == known or setting.startswith((f"{known}.", f"{known}=")):
            return f"{known}: cera-train {LAST} was the last that had it: {gone.instead}."
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
            if inner not in GONE or not GONE[inner].is_unused(value):
                kept[name] = without_gone(value, place, inner)
        return kept
    if isinstance(tree, list):
        return [without_gone(each, place, key) for each in tree]
    if message := describe_gone(f"{key}={word_of(tree)}"):
        raise UserError(f"{place}: {message}")
    return tree
