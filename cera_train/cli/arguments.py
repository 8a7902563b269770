"""The arguments of a command that Hydra composes, checked before Hydra sees them: flags may stand anywhere, and every
mistake that shows in an argument alone gets its line here. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from cera_train.cli.composition import ADDED, Composition, options
from cera_train.common.errors import UserError
from cera_train.common.trust import refuse_pickled_configs

SWEEPS = ("-m", "--multirun")
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
ALONE = (
    *SWEEPS,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--shell-completion", "-sc"),
    *("--info", "-i", "--debug"),
)
"""Hydra's flags, and ours: --debug."""

KINDS = ("job", "hydra", "all")  # values of --cfg
SHOWS = ("--cfg", "-c", "--info", "-i")  # which Hydra refuses beside -m
ELSEWHERE = ("--shell-completion", "-sc", "--hydra-help", "--info", "-i")  # beside these, no word is a setting


def for_hydra(composition: Composition, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra should read them; a UserError where one is a mistake or makes Hydra read a pickle."""
    refuse_pickled_configs(arguments)
    flags, rest = _split(composition, arguments)
    if not rest and not flags and composition.program == "cera-train":
        rest = ["+recipe=quickstart"]
    rest = list(dict.fromkeys(map(with_folder_quoted, reversed(rest))))[::-1]  # of the same argument, the last
    is_sweep = any(flag in SWEEPS for flag in flags)
    for shown in (flag.partition("=")[0] for flag in flags):
        if is_sweep and shown in SHOWS:
            raise UserError(f"{shown} shows one config: leave -m out.")
    if not any(flag in ELSEWHERE for flag in flags):
        _check(composition, rest, is_sweep or "hydra.mode=MULTIRUN" in rest)
    return [*flags, *rest]


def with_folder_quoted(argument: str) -> str:
    """Lets run=outputs/rank_lr/adapter=cera,adapter.r=64 be a folder: Hydra would read its commas and signs."""
    key, _, value = argument.partition("=")
    is_folder = any(sign in value for sign in ",=") and "'" not in value and os.path.isdir(value)
    return f"{key}='{value}'" if is_folder else argument


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
            raise UserError(_unknown_flag(composition, word, next(words, "")))
    return flags, rest


def _unknown_flag(composition: Composition, flag: str, following: str) -> str:
    key, equals, value = flag.lstrip("-").partition("=")
    if equals or "." in key or key in composition.names:
        has_value = following and not following.startswith("-") and "=" not in following
        value = value or (following if has_value else "VALUE")
        return f"{flag}: settings take no dashes: write {key}={value}."
    near = difflib.get_close_matches(flag, [*ALONE, *WITH_VALUE], n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{flag}: unknown option. {hint}Settings are written key=value; `{composition.program} --help` lists all."


def _check(composition: Composition, arguments: Sequence[str], is_sweep: bool) -> None:
    """Raises UserError for the first argument that is a mistake by itself, or contradicts another."""
    parser = OverridesParser.create()
    seen: dict[str, str] = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if mistake := _mistake_in_form(composition, argument, following):
            raise UserError(mistake)
        (override,) = parser.parse_overrides([argument])
        key = override.key_or_group
        if key in composition.groups() and seen.setdefault(key, argument) != argument:  # of a setting, the last holds
            raise UserError(f"{argument}: {key} is chosen twice, by {seen[key]} too: keep one.")
        if override.is_sweep_override() and not is_sweep:
            raise UserError(_several_values(composition, override))
        is_ours = override.package is None and not key.startswith(("hydra.", "hydra/"))
        if is_ours and (mistake := _mistake_in_key(composition, override, arguments)):
            raise UserError(mistake)


def _mistake_in_form(composition: Composition, argument: str, following: str) -> str | None:
    """What is wrong with an argument that is neither key=value nor ~key; the next one may be its value."""
    key, equals, value = argument.partition("=")
    if not argument:
        return "'': an empty argument. Leave it out, or check the shell's variable."
    if argument.startswith("~") or (value and key.strip("+")):
        return None
    if not key.strip("+"):
        return f"{argument}: the key is missing: expected key=value."
    is_known, next_value = key in composition.names, following.removeprefix("=")
    if not equals and not is_known:
        return _no_setting(composition, argument)
    if next_value and "=" not in next_value:
        return f"{argument} {following}: expected key=value without spaces: write {key}={next_value}."
    is_text = equals and "text" in (composition.expected(key) or "")
    empty = f", or \"{key}=''\" for an empty text" if is_text else ""
    return f"{argument}: the value is missing: write {key}=VALUE{empty}."


def _no_setting(composition: Composition, word: str) -> str:
    """The line about an argument without an equals sign that names no setting."""
    for group, more in (("recipe", ""), ("sweep", "-m "), ("study", "-m ")) if composition.has_recipes else ():
        if word in options(group):
            return f"{word}: a {group} is added with a plus sign: write {more}+{group}={word}."
    if "run" in composition.names and os.path.isdir(word):
        return f"{word}: expected key=value: write run={word}."
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


def _mistake_in_key(composition: Composition, override: Override, arguments: Sequence[str]) -> str | None:
    key, argument = override.key_or_group, override.input_line
    without_plus = argument.lstrip("+")
    if key in ADDED and composition.has_recipes:
        is_added = override.is_add() or override.is_force_add()
        return None if is_added else composition.unknown_setting(key, argument)
    if key in composition.groups():
        if override.is_add():
            return f"{argument}: a file of {key} is chosen without a plus sign: write {without_plus}."
        if override.is_delete():
            return f"{argument}: {key} cannot be left out: choose a file of it, {key}=NAME."
        if override.value() is None:
            return f"{argument}: expected the name of a file in conf/{key}: {', '.join(options(key))}."
        return None
    if not composition.takes(key):
        if example := next((other for other in composition.keys if other.startswith(f"{key}.")), None):
            return f"{argument}: {key} is a section: set its values one by one, such as {example}=VALUE."
        return composition.unknown_setting(key, argument)
    if override.is_add() and key in composition.keys:
        return f"{argument}: the setting exists, so it takes no plus sign: write {without_plus}."
    section = key.partition(".")[0]
    can_be_null = section != key and section in composition.groups() and section in composition.keys
    if can_be_null and not any(word.lstrip("+").partition("=")[0] == section for word in arguments):
        return (
            f"{argument}: {key} needs a file for {section}: add {section}=NAME, one of {', '.join(options(section))}."
        )
    return None
