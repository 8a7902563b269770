"""Values that a setting may have, and the check of a whole config. OmegaConf reads the plain type
of an `Annotated` one, pydantic its constraint."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
)
from pydantic_core.core_schema import CoreSchema, custom_error_schema

from cera_train.common.errors import UserError
from cera_train.common.settings import word_of

T = TypeVar("T")


class Settings:
    """Base of the dataclasses that hold settings."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", coerce_numbers_to_str=True, validate_default=True
    )


def checked(schema: type[T], tree: Mapping[str, Any], section: str = "") -> T:
    """The settings in a tree of plain values.

    Args:
        section: that these settings are, for messages; empty for a whole config.

    Raises:
        UserError: with the key, the value and the reason.
    """
    try:
        return _adapter(schema).validate_python(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, UserError):  # two settings do not fit each other
            raise cause from error
        reason = str(cause) if cause else problem["msg"][:1].lower() + problem["msg"][1:]
        key = ".".join(map(str, (section, *problem["loc"]))).removeprefix(".")
        raise UserError(f"{key}={word_of(problem['input'])[:80]}: {reason}.") from error


@functools.cache
def _adapter(schema: type) -> TypeAdapter:
    return TypeAdapter(schema)


# --- types ----------------------------------------------------------------------------------------


def read_as(kind: Any, expected: str = "") -> Any:
    """A type that OmegaConf takes any value for, such as a dict with new names.

    Args:
        expected: the reason for which any other value is refused; by default pydantic's.
    """

    def schema(_: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler.generate_schema(kind)
        if not expected:
            return inner
        return custom_error_schema(inner, "unexpected", custom_error_message=expected)

    return Annotated[Any, GetPydanticSchema(schema)]


def check_pattern(targets: list[str] | str | None) -> list[str] | str | None:
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return targets


def check_folder_name(name: str) -> str:
    """A name that breaks no line and controls no terminal when it is printed."""
    if not name.isprintable() or set(name) & set("/\\") or not name.strip("."):
        raise ValueError("expected the name of one folder, without a slash or a line break")
    return name


Filled = Field(min_length=1)

Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Rate = read_as(
    Annotated[float, Field(strict=True, gt=0, lt=math.inf)] | Literal["auto"],
    "expected a positive number, or auto",
)
Growth = Annotated[float, Field(strict=True, gt=0, le=4)]
"""r of x' = r x (1 - x), which leaves [0, 1] above 4."""
Growths = read_as(Growth | list[Growth], "expected numbers above 0 and up to 4")
Targets = Annotated[
    read_as(
        list[str] | str | None,
        "expected a list of module names, a regular expression or all-linear",
    ),
    AfterValidator(check_pattern),
]
Address = Annotated[str, Field(pattern=r"^https?://[\w.:\[\]-]+(/\S*)?$")]
# A file system takes names of 255 bytes, and a folder is written under a longer name first.
FolderName = Annotated[str, Field(max_length=200), AfterValidator(check_folder_name)]
Processes = Annotated[str, Field(pattern="^(auto|[1-9][0-9]*)$")]
Repository = Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]{1,96}$")]
Number = read_as(int | float)
NamedValues = read_as(dict[str, Any] | None)
NamedSections = read_as(dict[str, dict[str, Any] | None] | None)
