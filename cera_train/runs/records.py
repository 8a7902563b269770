"""How a run's files are read: JSON objects as pydantic models, config.yaml as dataclasses.

A field has the name of its key, or `key("eval/perplexity")`, so that no other module spells a key.
None stands for "not measured"."""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cera_train.common.errors import UserError, error_text
from cera_train.common.files import finite, read_json, read_yaml, write_text
from cera_train.common.settings import AUTO, Changes, changes_of, flatten, require, to_plain
from cera_train.common.trust import redact_tree
from cera_train.settings.gone import without_gone
from cera_train.settings.run import Config
from cera_train.settings.values import checked

RESTORE = "Restore it, or leave its folder out."


def key(name: str) -> Any:
    """A field under another name in the file, None by default."""
    return Field(default=None, alias=name)


class Record(BaseModel):
    """One JSON object of a file. A subclass with `extra="allow"` keeps the keys of no field in
    `details`."""

    model_config = ConfigDict(
        strict=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )
    fix: ClassVar[str] = RESTORE  # what to do about a broken file

    def __init__(self, *values: Any, **others: Any) -> None:
        """Accepts values in the order of the fields, or by name, as a dataclass does."""
        names = list(type(self).model_fields)[: len(values)]
        super().__init__(**dict(zip(names, values, strict=True)), **others)

    # Reading a file then fills the fields directly: calling `__init__` takes a fifth of the time.
    __init__.__pydantic_base_init__ = True

    @property
    def details(self) -> dict[str, Any]:
        """Keys that belong to no field."""
        return self.model_extra or {}

    @classmethod
    def from_json(cls, tree: Any, where: Path | str) -> Self:
        """The record in a JSON object. `where` is its file, or FILE:LINE, for messages."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "the whole"
            got = "" if problem["type"] == "missing" else f", got {str(problem['input'])[:40]!r}"
            raise UserError(
                f"{where} is broken: {field}: {problem['msg']}{got}. {cls.fix}"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The JSON object: the keys that were given, in the order of the fields."""
        return self.model_dump(exclude_unset=True)

    def replace(self, **changes: Any) -> Self:
        return self.model_copy(update=changes)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file; raises UserError if it is missing or broken."""
        return cls.from_json(read_json(path, cls.fix), path)

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The record in a file, if there is one."""
        return cls.read(path) if path.exists() else None

    def write(self, path: Path) -> None:
        """Writes the file whole, without secrets. Infinity and NaN become null."""
        write_text(
            path, json.dumps(redact_tree(finite(self.to_json())), indent=2, allow_nan=False) + "\n"
        )


def to_lines(records: Iterable[Record]) -> str:
    """The text of a file with one record on each line."""
    return "".join(
        json.dumps(finite(record.to_json()), allow_nan=False) + "\n" for record in records
    )


def read_lines(path: Path, kind: type[Record], may_break_off: bool = False) -> list[Any]:
    """The records in a file with one on each line, read as by `read_trees`."""
    return [
        kind.from_json(tree, place) for place, tree in read_trees(path, kind.fix, may_break_off)
    ]


def read_trees(
    path: Path, fix: str = RESTORE, may_break_off: bool = False
) -> Iterator[tuple[str, Any]]:
    """The JSON value of each line, with its place FILE:LINE.

    Args:
        may_break_off: skips a partial last line: the run is still writing it, or was killed.
    """
    place = str(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                if may_break_off and not line.endswith(b"\n"):
                    return
                yield place, json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place} is broken: {error_text(error)}. {fix}") from error


# --- config.yaml ----------------------------------------------------------------------------------


def load_config(path: Path, schema: type = Config) -> Any:
    """The config in a file of a run's folder. It was resolved when it was written, so a `${` in it
    is text."""
    tree = without_gone(read_yaml(path), str(path))
    try:
        return checked(schema, tree)
    except UserError as error:
        fix = "Restore it, or use the cera-train that wrote it."
        raise UserError(f"cannot read {path}: {error} {fix}") from error


def differences(recorded: Any, config: Any) -> dict[str, str]:
    """The settings that change results and differ between two configs: key -> both values in
    words."""
    before, now = (flatten(redact_tree(to_plain(each))) for each in (recorded, config))
    return {
        key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) not in (now.get(key), AUTO) and changes_result(key, type(config))
    }


OPEN = (AUTO, None)
"""Values of a setting that a run decides and records."""

DECIDED = {
    "model": ("dtype",),
    "optimizer": ("lr",),
    "train": ("compile",),
    "adapter": ("start_digest",),
    "data": ("layout", "prompt", "completion", "rejected", "turns", "template_settings"),
}
"""Settings that may be left open, by section."""


def as_recorded(config: Config, recorded: Config) -> Config:
    """The config with what it leaves open as a run recorded it."""
    sections = {
        section: _filled(getattr(config, section), getattr(recorded, section), names)
        for section, names in DECIDED.items()
    }
    return replace(config, **sections)


def _filled(settings: Any, recorded: Any, names: Iterable[str]) -> Any:
    """The settings with the recorded values of these names, where they are left open."""
    values = {}
    for name in names:
        value = getattr(settings, name)
        known = getattr(recorded, name)
        is_part = isinstance(value, dict) and value.items() <= known.items()
        if value in OPEN or is_part:
            values[name] = known
    return replace(settings, **values)


def check_config(path: Path, config: Config) -> None:
    """Raises UserError where the run that wrote this config.yaml has another config, beside what
    this one leaves open."""
    recorded = load_config(path)
    different = differences(recorded, as_recorded(config, recorded))
    require(
        not different,
        f"{path.parent} holds a run with another config: {'; '.join(different.values())}. Set "
        "these back to resume it, or choose another name=...",
    )


@functools.cache
def changes_result(key: str, schema: type = Config) -> bool:
    """Whether a setting changes what is learned or measured, beyond its cost."""
    return changes_of(schema, key) not in (Changes.cost, Changes.nothing)
