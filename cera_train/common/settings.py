"""A setting is a dataclass field with a default and a mark that says what changing it changes.
Resuming, the token cache, sweeps, reports and recipes read the mark, so there is no other list of
names."""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from cera_train.common.errors import UserError

MISSING: Any = "???"  # OmegaConf's mark for a value that has to be given

# value of a setting that a run decides and records. A folder with this value agrees with every
# choice.
AUTO = "auto"


T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The value chosen for a setting that was left open, and the reason."""

    value: T
    why: str


class Changes(StrEnum):
    """What changing a setting changes, the strongest effect first."""

    result = "result"  # what a run learns, or what an evaluation measures
    tokens = "tokens"  # the same, through the token ids and loss masks of a row: they are cached
    answers = "answers"  # what a model generates: answers on disk belong to the old value
    cost = "cost"  # time and memory only
    nothing = (
        "nothing"  # nothing measured: where a run computes, what it is called, how it is shown
    )


def setting(default: Any, changes: str) -> Any:
    """A field of a settings dataclass. A callable `default` is a factory; `changes` is one of
    `Changes`."""
    return _field(default, {"changes": Changes(changes)})


def section(default: Any = MISSING) -> Any:
    """A field that holds another settings dataclass, or None. Its fields carry the marks."""
    return _field(default, {})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata=metadata)


@functools.cache
def fields_of(schema: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """The field of every setting of a schema, by its dotted key, such as optimizer.lr."""
    fields = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = section_of(hints[field.name])
        fields |= (
            {prefix + field.name: field}
            if inner is None
            else fields_of(inner, f"{prefix}{field.name}.")
        )
    return fields


def section_of(hint: Any) -> type | None:
    """The settings dataclass of a field's type; None for a plain value."""
    return next(
        (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None
    )


def changes_of(schema: type, key: str) -> Changes:
    """What a key changes: for a section, the strongest change of its settings; for an unknown key,
    `result`. A key below a free-form setting, such as train.task_settings.gsm8k.limit, changes what
    the setting does."""
    changes = [field.metadata["changes"] for field in fields_at(schema, key)]
    return min(changes, key=list(Changes).index, default=Changes.result)


def fields_at(schema: type, key: str) -> list[dataclasses.Field]:
    """The setting of a key, those of a section, or the free-form one that the key lies in."""
    return [
        field
        for name, field in fields_of(schema).items()
        if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict with dotted keys; lists of dicts too: data.mix.0.weight."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = {str(number): each for number, each in enumerate(value)}
        key = f"{prefix}{key}"
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def map_values(function: Callable[[Any], Any], tree: Any, kind: type) -> Any:
    """Applies a function to every value of a type in nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: map_values(function, value, kind) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_values(function, value, kind) for value in tree]
    return function(tree) if isinstance(tree, kind) else tree


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values, for YAML, JSON and trackers."""
    return map_values(lambda choice: choice.value, dataclasses.asdict(config), StrEnum)


def word_of(value: Any) -> str:
    """A value as one writes it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(word_of, value))}]" if isinstance(value, list) else str(value)


def key_of(override: str) -> str:
    """The key of an argument, such as +adapter.r=16."""
    return override.lstrip("+~").partition("=")[0]


def quoted(text: str) -> str:
    """A text as one writes it on a command line, whatever its signs: in Hydra's quotes, where a
    backslash means more than itself only before a quote."""
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"'{text}'"


def require(condition: bool, message: str) -> None:
    """Raises UserError: `message` names the key and its value, what was expected, and the fix."""
    if not condition:
        raise UserError(message)
