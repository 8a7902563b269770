"""Hydra's side of a command: where the configs lie, the checked config, and one line for every error of Hydra and
OmegaConf. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.plugin import Plugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from cera_train.cli.names import did_you_mean
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.common.settings import flatten, keys_of, section_of
from cera_train.common.trust import check_remote_code
from cera_train.evaluation.tasks.task import check_task
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config, PlanRun
from cera_train.settings.serving import ChatConfig, ExportConfig

SCHEMAS = {
    "cera-train": Config,
    "cera-eval": EvalConfig,
    "cera-plan": PlanRun,
    "cera-chat": ChatConfig,
    "cera-export": ExportConfig,
}

PLUGINS = {
    "hydra/launcher/submitit_local": "pip install -e '.[slurm]' in the clone of cera-train",
    "hydra/launcher/submitit_slurm": "pip install -e '.[slurm]' in the clone of cera-train",
    "hydra/sweeper/optuna": "pip install hydra-optuna-sweeper",
}
"""Files of Hydra's plugins, and how to install them."""


ADDED = ("recipe", "sweep", "study")
"""Groups whose files are added with a plus sign."""

ANY = "N"
"""Stands for the number of an element in the key of a list's setting, such as data.mix.N.weight."""


@functools.cache
def register_configs() -> None:
    """Stores the schemas and every recipe with Hydra; a recipe `name` is then `+recipe=name`. ${options:group} in a
    help text lists the group's choices."""
    OmegaConf.register_new_resolver("options", lambda group: " ".join(options(group)), replace=True)
    store = ConfigStore.instance()
    for program, schema in SCHEMAS.items():
        store.store(name="schema" if schema is Config else f"{program.removeprefix('cera-')}_schema", node=schema)
    for path in sorted(config_dir("recipes").glob("*.yaml")):
        store.store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")


def register_plugins(plugins: Mapping[str, type[Plugin]]) -> None:
    """Lists sweepers and launchers of ours with Hydra by these names, as hydra_plugins.cera_train.NAME, for the
    `_target_` of their files in conf/hydra. Hydra builds plugins of that package alone, but asks for no module there:
    any installation has them, and they pickle under their real names."""
    names = {f"hydra_plugins.cera_train.{name}": plugin for name, plugin in plugins.items()}
    Plugins.instance().class_name_to_class.update(names)


def options(group: str) -> list[str]:
    """The choices of one config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def check_trust(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError where a file, rather than the command line, asks to run a model's Python code."""
    keys = ("model.trust_remote_code", "trust_remote_code")
    check_remote_code({key: OmegaConf.select(composed, key) for key in keys}, overrides)


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf."""
    composition, tree = Composition(schema), flatten(OmegaConf.to_container(composed))
    if unknown := [key for key in tree if not composition.takes(key)]:  # Hydra lets +key=value add anything
        key = min(unknown)
        raise UserError(composition.unknown_setting(key, f"+{key}={tree[key]}"))
    config = OmegaConf.to_object(composed)
    if isinstance(config, EvalConfig | ExportConfig) and config.task is not None:
        check_task(config.task)
    return config


def without_hydra(composed: DictConfig, schema: type = Config) -> Any:
    """The checked config of a job, from all that Hydra composed for it."""
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return to_config(composed, schema)


# --- mistakes --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Composition:
    """The settings of one command, and one line for what goes wrong while they are composed."""

    schema: type
    program: str = "cera-train"

    @property
    def has_recipes(self) -> bool:
        return self.program in ("cera-train", "cera-plan")

    @cached_property
    def keys(self) -> list[str]:
        return keys_of(self.schema)

    @cached_property
    def names(self) -> list[str]:
        """What can stand before an equals sign."""
        return [*self.groups(), *self.keys]

    def groups(self) -> list[str]:
        """The config groups of this command."""
        fields = _fields(self.schema)
        return [path.name for path in sorted(config_dir("conf").iterdir()) if path.is_dir() and path.name in fields]

    def takes(self, key: str) -> bool:
        """Whether a key is a setting, or lies in one that takes any key, such as adapter.settings."""
        if element := self.element_keys(key):
            return key in element
        return key in self.keys or any(key.startswith(f"{name}.") and not self.expected(name) for name in self.keys)

    def expected(self, key: str) -> str | None:
        """The kind of value that a setting takes, such as `a whole number`; None for any kind, or an unknown key."""
        return _kind(self.hint(re.sub(r"\[.*", "", re.sub(r"\[(\d+)\]\.", r".\1.", key))))

    def hint(self, key: str) -> Any:
        """The type of a setting; None of an unknown key."""
        hint: Any = self.schema
        for name in key.split("."):
            inner = section_of(hint)
            if name.isdigit() or name == ANY:
                hint = element_of(hint)
            else:
                hint = typing.get_type_hints(inner).get(name) if inner is not None else None
        return hint

    def element_keys(self, key: str) -> list[str]:
        """The keys beside one in an element of a list of sections, such as data.mix.0.weight; none of another key."""
        element = re.match(rf"(.*\.(?:\d+|{ANY}))\.", key)
        kind = section_of(self.hint(element[1])) if element else None
        return [] if kind is None else [f"{element[1]}.{field.name}" for field in dataclasses.fields(kind)]

    def unknown_setting(self, key: str, place: str) -> str:
        """The line about a key that no setting has, in an argument or a file."""
        section = key.split(".", 1)[0]
        if key in ADDED and self.has_recipes:
            return f"{place}: a {key} is added with a plus sign: write +{place}."
        for program, schema in SCHEMAS.items():
            is_other = section in _fields(schema) - _fields(self.schema)
            if is_other or (key in ADDED and program == "cera-train"):
                return f"{place}: {section} is a setting of {program}, not of {self.program}. Leave it out."
        known = self.element_keys(key) or (self.keys if "." in key else self.names)
        near = did_you_mean(key, known) or did_you_mean(key, self.names)
        return f"{place}: unknown setting {key}. {near}`{self.program} --help` lists all."

    # --- errors of Hydra ---------------------------------------------------------------------------------------------

    def explain(self, error: Exception, arguments: list[str]) -> str | None:
        """One line for an error of Hydra, OmegaConf or PyYAML; None for another error."""
        match error:
            case OverrideParseException():
                return _unreadable(error.override)
            case MissingConfigException():
                return self._missing_file(error, arguments)
            case yaml.MarkedYAMLError() if error.problem_mark is not None:
                return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: broken YAML: {error.problem}."
            case yaml.YAMLError():
                return f"broken YAML: {_one_line(error)}."
            case HydraException() | OmegaConfBaseException():
                return self._bad_value(error, arguments)
            # OmegaConf reports a value in a null section as a failed assertion, which has no attributes.
            case AssertionError() if "Unexpected type for root: NoneType" in str(error):
                return self._value_in_null(arguments)
        return None

    def _missing_file(self, error: MissingConfigException, arguments: list[str]) -> str:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name={name}: there is no such file. Leave it out."
        place = _argument(arguments, group) or f"{group}={name}"
        if error.missing_cfg_file in PLUGINS:
            return f"{place}: it needs a plugin that is not installed: {PLUGINS[error.missing_cfg_file]}."
        choices, called = sorted(error.options or options(group)), group.rpartition("/")[2]
        return f"{place}: unknown {called} {name!r}. {did_you_mean(name, choices)}There are: {', '.join(choices)}."

    def _bad_value(self, error: Exception, arguments: list[str]) -> str:
        chain = (error, error.__cause__, error.__context__)
        cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
        # No attribute of Hydra's exception holds the file in which a key or value stands.
        file = re.search(r"In '([\w./-]+)': \w+ raised while composing", str(error))
        place = f"{file[1]}.yaml: " if file else ""
        key = getattr(cause, "full_key", None)
        if not key:
            return f"{place}{_one_line(cause or error)}."
        if "." not in key:  # of an element, OmegaConf names the key alone
            owner = getattr(cause, "object_type", None)
            lists = [name for name in self.keys if owner and section_of(element_of(self.hint(name))) is owner]
            key = f"{lists[0]}.{ANY}.{key}" if lists else key
        argument = _argument(arguments, re.split(rf"\[|\.{ANY}\.", key)[0])
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return self.unknown_setting(key, argument or place.removesuffix(": ") or key)
        value = getattr(cause, "value", None)
        place += argument or (key if value is None else f"{key}={value}")
        expected = self.expected(key)
        if isinstance(cause, ValidationError) and expected is not None:
            near = did_you_mean(str(value), expected.removeprefix("one of ").split(", ")) if value else ""
            return f"{place}: expected {expected}. {near}".rstrip()
        return f"{place}: {_one_line(cause)}."

    def _value_in_null(self, arguments: list[str]) -> str | None:
        """The line about a value in a section that is null, such as data.facts.train_rows=5 with data=jsonl."""
        for argument in arguments:
            key = argument.lstrip("+").partition("=")[0]
            if section := next((name for name in self.keys if key.startswith(f"{name}.")), None):
                return f"{argument}: {section} is null here. Set the whole section in your file, by --config-dir."
        return None


def _fields(schema: type) -> set[str]:
    return {field.name for field in dataclasses.fields(schema)}


def _unreadable(argument: str) -> str:
    """The line about an argument that Hydra cannot parse."""
    key, _, value = argument.partition("=")
    inner = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"{argument}: cannot read the value: brackets, quotes or braces are not closed, or a text lacks its quotes. "
        f"Inside the shell's quotes, Hydra needs its own: '{key}=\"{inner}\"'."
    )


def _kind(hint: Any) -> str | None:
    """A type in words."""
    if isinstance(hint, types.UnionType):
        return f"{_kind(next(part for part in typing.get_args(hint) if part is not types.NoneType))}, or null"
    if typing.get_origin(hint) is list:
        if (inner := section_of(element_of(hint))) is not None:
            return f"a list of {{{', '.join(field.name for field in dataclasses.fields(inner))}}}"
        return "a list of whole numbers, such as [1,2]" if typing.get_args(hint) == (int,) else "a list, such as [a,b]"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return f"one of {', '.join(hint)}"
    if section_of(hint) is not None:
        return "single values, by section.key=value"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint)


def element_of(hint: Any) -> Any:
    """The type of a list's elements; None of another type."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is list]
    return typing.get_args(lists[0])[0] if lists else None


def _argument(arguments: list[str], key: str) -> str | None:
    """The argument that sets a key to a single value; of a sweep's values the exception knows the one."""
    found = (word for word in arguments if word.lstrip("+~").partition("=")[0] == key)
    return next((word for word in found if "," not in word or "[" in word), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).strip().split("\n")[0].split()).rstrip(".") or type(error).__name__
