"""The arguments of a command that Hydra composes, checked before Hydra sees them: flags may stand anywhere, and every
mistake that shows in an argument alone gets its line here. Nothing here imports torch."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from cera_train.cli.composition import Composition, options
from cera_train.common.errors import UserError
from cera_train.common.settings import keys_of, section_of
from cera_train.common.trust import refuse_pickled_configs

SWEEPS = ("-m", "--multirun")
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
ALONE = (
    *SWEEPS,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--shell-completion", "-sc"),
    *("--info", "-i", "--debug"),
)
"""Hydra's flags, and ours: --debug."""

KINDS = ("job", "hydra", "all")
"""Values of --cfg."""

ELSEWHERE = ("--shell-completion", "-sc", "--hydra-help", "--info", "-i")
"""With these, what is no flag is not a setting."""

QUICKSTART = "+recipe=quickstart"


def for_hydra(composition: Composition, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra should read them.

    Raises:
        UserError: one of them is a mistake, or would make Hydra read a pickle.
    """
    refuse_pickled_configs(arguments)
    flags, rest = _split(composition, arguments)
    if not rest and not flags and composition.program == "cera-train":
        rest = [QUICKSTART]
    rest = list(dict.fromkeys(map(with_folder_quoted, reversed(rest))))[::-1]  # of the same argument, the last
    if not any(flag in ELSEWHERE for flag in flags):
        check(composition, rest, is_sweep=any(flag in SWEEPS for flag in flags) or "hydra.mode=MULTIRUN" in rest)
    return [*flags, *rest]


def with_folder_quoted(argument: str) -> str:
    """Lets run=outputs/rank_lr/adapter=cera,adapter.r=64 be a folder: Hydra would read its commas and signs."""
    key, _, value = argument.partition("=")
    is_folder = any(sign in value for sign in ",=") and "'" not in value and os.path.isdir(value)
    return f"{key}='{value}'" if is_folder else argument


def check(composition: Composition, arguments: Sequence[str], is_sweep: bool) -> None:
    """Raises UserError for the first argument that is a mistake by itself, or contradicts another."""
    parser = OverridesParser.create()
    seen: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        _check_form(composition, argument, following)
        (override,) = parser.parse_overrides([argument])
        key = override.key_or_group
        if key in composition.groups() and seen.setdefault(key, argument) != argument:  # of a setting, the last holds
            raise UserError(f"{argument}: {key} is chosen twice, by {seen[key]} too: keep one.")
        if override.is_sweep_override() and not is_sweep:
            raise UserError(_several_values(composition, override))
        if override.package is None and not key.startswith(("hydra.", "hydra/")):
            _check_key(composition, override, arguments)


def _split(composition: Composition, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags, with their values, and the rest. --debug is ours: Hydra does not get it."""
    flags, rest = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            rest.append(word)
        elif word in WITH_VALUE:
            value = next(words, None)
            if value is None:
                raise UserError(f"{word}: the value after it is missing.")
            if word in ("--cfg", "-c") and value not in KINDS:
                raise UserError(f"{word} {value}: expected one of {', '.join(KINDS)}.")
            flags += [word, value]
        elif word in ALONE or word.partition("=")[0] in WITH_VALUE:
            flags += [word] * (word != "--debug")
        else:
            raise UserError(_unknown_flag(composition, word, next(words, None)))
    return flags, rest


def _unknown_flag(composition: Composition, flag: str, following: str | None) -> str:
    key, equals, value = flag.lstrip("-").partition("=")
    if equals or key in keys_of(composition.schema) or "." in key or key in composition.groups():
        has_value = following and not following.startswith("-") and "=" not in following
        value = value or (following if has_value else "VALUE")
        return f"{flag}: settings take no dashes: write {key}={value}."
    near = difflib.get_close_matches(flag, [*ALONE, *WITH_VALUE], n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{flag}: unknown option. {hint}Settings are written key=value; `{composition.program} --help` lists all."


def _check_form(composition: Composition, argument: str, following: str) -> None:
    """Raises UserError for what is neither key=value nor ~key.

    Args:
        following: the next argument, which may be the value.
    """
    key, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return
    if not argument:
        raise UserError("'': an empty argument. Leave it out, or check the shell's variable.")
    if not key.strip("+"):
        raise UserError(f"{argument}: the key is missing: expected key=value.")
    if not equals:
        raise UserError(_no_value(composition, argument, following))
    if not value and following and "=" not in following:
        raise UserError(f"{argument} {following}: expected key=value without spaces: write {key}={following}.")
    if not value:
        empty = f", or \"{key}=''\" for an empty text" if "text" in (composition.expected(key) or "") else ""
        raise UserError(f"{argument}: the value is missing: write {key}=VALUE{empty}.")


def _no_value(composition: Composition, word: str, following: str) -> str:
    """The line about an argument without an equals sign."""
    for group, more in (("recipe", ""), ("sweep", "-m ")) if composition.program != "cera-eval" else ():
        if word in options(group):
            return f"{word}: a {group} is added with a plus sign: write {more}+{group}={word}."
    if "run" in keys_of(composition.schema) and os.path.isdir(word):
        return f"{word}: expected key=value: write run={word}."
    value = following.lstrip("=")
    if word in keys_of(composition.schema) or word in composition.groups():
        if value and "=" not in value:
            return f"{word} {following}: expected key=value without spaces: write {word}={value}."
        return f"{word}: the value is missing: write {word}=VALUE."
    return (
        f"{word}: expected key=value. If it belongs to the value before it, quote the whole argument, such as "
        "'data.prompt=\"Question: {question}\"'."
    )


def _several_values(composition: Composition, override: Override) -> str:
    key, value = override.key_or_group, override.input_line.partition("=")[2]
    expected = composition.expected(key)
    if expected is None or "list" in expected:
        return f"{override.input_line}: several values: write '{key}=[{value}]' for a list, or add -m for a run each."
    quoted = f", or quote a text with a comma: '{key}=\"{value}\"'" if expected.startswith("a text") else ""
    return f"{override.input_line}: several values for one run: add -m for a run each{quoted}."


def _check_key(composition: Composition, override: Override, arguments: Sequence[str]) -> None:
    key, argument = override.key_or_group, override.input_line
    section, _, inner = key.partition(".")
    groups = composition.groups()
    if key in ("recipe", "sweep") and composition.program != "cera-eval":
        if not override.is_add() and not override.is_force_add():
            raise UserError(composition.unknown_setting(key, argument))
        return
    if key in groups:
        if override.is_add():
            raise UserError(f"{argument}: a file of {key} is chosen without a plus sign: write {argument.lstrip('+')}.")
        if override.is_delete():
            raise UserError(f"{argument}: {key} cannot be left out: choose a file of it, {key}=NAME.")
        if override.value() is None:
            raise UserError(f"{argument}: expected the name of a file in conf/{key}: {', '.join(options(key))}.")
        return
    known = keys_of(composition.schema)
    if key not in known and not any(key.startswith(f"{free}.") for free in _free_form(composition.schema)):
        if any(other.startswith(f"{key}.") for other in known):
            example = next(other for other in known if other.startswith(f"{key}."))
            raise UserError(f"{argument}: {key} is a section: set its values one by one, such as {example}=VALUE.")
        raise UserError(composition.unknown_setting(key, argument))
    if override.is_add() and key in known:
        raise UserError(f"{argument}: the setting exists, so it takes no plus sign: write {argument.lstrip('+')}.")
    is_chosen = any(word.lstrip("+").partition("=")[0] == section for word in arguments)
    if inner and section in groups and not is_chosen and _can_be_null(composition.schema, section):
        raise UserError(
            f"{argument}: {key} needs a file for {section}: add {section}=NAME, one of {', '.join(options(section))}."
        )


def _free_form(schema: type) -> list[str]:
    """The settings that take any key, such as published.KEY."""
    hints = typing.get_type_hints(schema)
    return [name for name, hint in hints.items() if typing.get_origin(hint) is dict]


def _can_be_null(schema: type, section: str) -> bool:
    hint = typing.get_type_hints(schema)[section]
    return isinstance(hint, types.UnionType) and section_of(hint) is not None
