"""Dataclasses that are JSON objects of a file. pydantic checks what is read, and is imported only then.

A field stands for one key of the file: its name, or `key("eval/perplexity")` where the two differ, so that no other
module spells a key. None means "not measured": a missing key reads as None, and None is not written unless the field
has no default. A field whose type is a record has its keys in the same object; one with the metadata `REST` takes all
keys that are left.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from cera_train.common.errors import UserError, words_of
from cera_train.common.files import read_json, write_text
from cera_train.common.trust import redact_tree

RESTORE = "Restore it, or leave its folder out."

REST = {"is_rest": True}
"""Metadata of a field that takes the keys that no other field takes."""


def key(name: str, *, write_null: bool = False) -> Any:
    """A field under another name in the file. `write_null` writes None as null instead of leaving the key out."""
    return dataclasses.field(default=None, metadata={"key": name, "write_null": write_null})


class Record:
    """A dataclass that is one JSON object of a file."""

    mend: ClassVar[str] = RESTORE  # what to do about a broken file

    @classmethod
    def from_json(cls, tree: Any, where: Path | str) -> Self:
        """The record in a JSON object. `where` is its file, or FILE:LINE, for messages."""
        if not isinstance(tree, dict):
            raise UserError(f"{where} is broken: expected names and values, got {str(tree)[:40]!r}. {cls.mend}")
        keys, values = cls.all_keys(), {}
        for field in dataclasses.fields(cls):
            hint, name = _hints(cls)[field.name], cls.key_of(field.name)
            if _is_record(hint):
                values[field.name] = hint.from_json(tree, where)
            elif "is_rest" in field.metadata:
                values[field.name] = {other: value for other, value in tree.items() if other not in keys}
                for other, value in values[field.name].items():
                    cls._check(other, value, typing.get_args(hint)[1], where)
            elif name in tree:
                cls._check(name, tree[name], hint, where)
                values[field.name] = tree[name]
            elif field.default is dataclasses.MISSING:
                raise UserError(f"{where} is broken: it has no {name}. {cls.mend}")
        return cls(**values)

    @classmethod
    def _check(cls, name: str, value: Any, hint: Any, where: Path | str) -> None:
        if not fits(value, hint):
            raise UserError(f"{where} is broken: its {name} is {str(value)[:40]!r}. {cls.mend}")

    def to_json(self) -> dict[str, Any]:
        """The JSON object, in the order of the fields."""
        tree: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Record):
                tree |= value.to_json()
            elif "is_rest" in field.metadata:
                tree |= value
            elif value is not None or field.default is dataclasses.MISSING or field.metadata.get("write_null"):
                tree[self.key_of(field.name)] = value
        return tree

    @classmethod
    @functools.cache
    def all_keys(cls) -> frozenset[str]:
        """The keys of the file that belong to a field without `REST`."""
        keys: set[str] = set()
        for field in dataclasses.fields(cls):
            hint = _hints(cls)[field.name]
            keys |= hint.all_keys() if _is_record(hint) else {cls.key_of(field.name)} - {"is_rest" in field.metadata}
        return frozenset(keys)

    @classmethod
    def key_of(cls, attribute: str) -> str:
        """The key of a field in the file."""
        return cls.__dataclass_fields__[attribute].metadata.get("key", attribute)

    @classmethod
    def read(cls, path: Path, needs: Sequence[str] = ()) -> Self:
        """The record in a file; raises UserError where it is missing or broken, or lacks a field of `needs`."""
        record = cls.from_json(read_json(path, cls.mend), path)
        if absent := [cls.key_of(name) for name in needs if getattr(record, name) is None]:
            raise UserError(f"{path} has no {', '.join(absent)}. {cls.mend}")
        return record

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The record in a file; None where there is none."""
        return cls.read(path) if path.exists() else None

    def write(self, path: Path) -> None:
        """Writes the file whole, without secrets."""
        write_text(path, json.dumps(redact_tree(self.to_json()), indent=2) + "\n")


def read_lines(path: Path, kind: type[Record]) -> list[Any]:
    """The records in a file with one JSON object on each line."""
    return [kind.from_json(tree, place) for place, tree in read_trees(path, kind.mend)]


def read_trees(path: Path, mend: str = RESTORE, may_break_off: bool = False) -> list[tuple[str, Any]]:
    """The JSON values in a file, one on each line, each with its place.

    Args:
        may_break_off: skips half a line at the end, which a run that still writes, or was cut, may leave.
    """
    number, trees = 0, []
    try:
        lines = path.read_text().splitlines()
        if may_break_off and lines and not lines[-1].endswith("}"):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            trees.append((f"{path}:{number}", json.loads(line)))
    except (OSError, ValueError, RecursionError) as error:
        line = f":{number}" * bool(number)
        raise UserError(f"{path}{line} is broken: {words_of(error)}. {mend}") from error
    return trees


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type, strictly: true is no number, and "1" is none."""
    from pydantic import ValidationError

    try:
        _type_adapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@functools.cache
def _type_adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)
