"""Dataclasses that are JSON objects of a file: each reads, checks and writes itself.

A field stands for one key of the file: its name, or `key("eval/perplexity")` where the two differ, so that no other
module spells a key. None means "not measured": a missing key reads as None, and None is not written unless the field
has no default.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from cera_train.common.errors import UserError, words_of
from cera_train.common.files import read_json, write_text
from cera_train.common.trust import redact_tree

RESTORE = "Restore it, or leave its folder out."


def key(name: str, *, write_null: bool = False) -> Any:
    """A field under another name in the file. `write_null` writes None as null instead of leaving the key out."""
    return dataclasses.field(default=None, metadata={"key": name, "write_null": write_null})


class Record:
    """A dataclass that is one JSON object of a file. A field whose type is a record has its keys in the same object. A
    field `details` takes all keys that no other field takes."""

    mend: ClassVar[str] = RESTORE  # what to do about a broken file

    @classmethod
    def from_json(cls, tree: Any, where: Path | str) -> Self:
        """The record in a JSON object. `where` is its file, or FILE:LINE, for messages."""
        if not isinstance(tree, dict):
            raise UserError(f"{where} is broken: expected names and values, got {str(tree)[:40]!r}. {cls.mend}")
        values = {}
        for name, (file_key, hint) in _fields(cls).items():
            if name == "details":
                values[name] = {other: value for other, value in tree.items() if not cls.takes(other)}
            elif _is_record(hint):
                values[name] = hint.from_json(tree, where)
            elif file_key in tree:
                if not fits(tree[file_key], hint):
                    raise UserError(f"{where} is broken: its {file_key} is {str(tree[file_key])[:40]!r}. {cls.mend}")
                values[name] = tree[file_key]
            elif cls.__dataclass_fields__[name].default is dataclasses.MISSING:
                raise UserError(f"{where} is broken: it has no {file_key}. {cls.mend}")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, in the order of the fields."""
        tree: dict[str, Any] = {}
        for name, (file_key, hint) in _fields(type(self)).items():
            value, field = getattr(self, name), self.__dataclass_fields__[name]
            if name == "details":
                tree |= value
            elif _is_record(hint):
                tree |= value.to_json()
            elif value is not None or field.default is dataclasses.MISSING or field.metadata.get("write_null"):
                tree[file_key] = value
        return tree

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether a key of the file belongs to a field other than `details`."""
        return any(
            hint.takes(name) if _is_record(hint) else file_key == name
            for field_name, (file_key, hint) in _fields(cls).items()
            if field_name != "details"
        )

    @classmethod
    def key_of(cls, attribute: str) -> str:
        """The key of a field in the file."""
        return _fields(cls)[attribute][0]

    @classmethod
    def read(cls, path: Path, needs: Sequence[str] = ()) -> Self:
        """The record in a file; raises UserError where it is missing or broken, or lacks a field of `needs`."""
        made = cls.from_json(read_json(path, cls.mend), path)
        if absent := [cls.key_of(name) for name in needs if getattr(made, name) is None]:
            raise UserError(f"{path} has no {', '.join(absent)}. {cls.mend}")
        return made

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The record in a file; None where there is none."""
        return cls.read(path) if path.exists() else None

    def write(self, path: Path) -> None:
        """Writes the file whole, without secrets."""
        write_text(path, json.dumps(redact_tree(self.to_json()), indent=2) + "\n")


def read_lines(path: Path, kind: type[Record], may_break_off: bool = False) -> list[Any]:
    """The records in a file with one JSON object on each line.

    Args:
        may_break_off: skips half a line at the end, which a run that still writes, or was cut, may leave.
    """
    number, trees = 0, []
    try:
        lines = path.read_text().splitlines()
        if may_break_off and lines and not lines[-1].endswith("}"):
            lines.pop()
        for number, line in enumerate(lines, start=1):  # noqa: B007 - the error names it
            trees.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        line = f":{number}" * bool(number)
        raise UserError(f"{path}{line} is broken: {words_of(error)}. {kind.mend}") from error
    return [kind.from_json(tree, f"{path}:{number}") for number, tree in enumerate(trees, start=1)]


@functools.cache
def _fields(kind: type) -> dict[str, tuple[str, Any]]:
    """The key in the file and the type of each field."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (field.metadata.get("key", field.name), hints[field.name]) for field in dataclasses.fields(kind)
    }


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a field's type. JSON writes some floats as integers; true is no number."""
    choices = typing.get_args(hint)
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(fits(value, choice) for choice in choices)
    if hint is float:
        return isinstance(value, float) or (fits(value, int) and abs(value) < 10**300)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = typing.get_origin(hint) or hint
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(choices) and all(map(fits, value, choices))
    inside = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(fits(one, choices[-1]) for one in (inside if choices else ()))
