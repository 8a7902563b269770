"""Hydra's side of the command line: where the configs lie, the checked config of a command, and what Hydra and
OmegaConf say, said for people."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.errors import OverrideParseException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from cera_train.config import Config, EvalConfig, PlanRun, flatten

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def config_dir(name: str) -> Path:
    """conf/ or recipes/: inside the package where a wheel put it, else beside the package in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else CHECKOUT / name


def register_configs() -> None:
    """Stores the schemas and every recipe with Hydra; a recipe `name` is then `+recipe=name`. ${options:group} in a
    help text lists the group's choices."""
    OmegaConf.register_new_resolver("options", lambda group: " ".join(options(group)), replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="eval_schema", node=EvalConfig)
    store.store(name="plan_schema", node=PlanRun)
    for path in sorted(config_dir("recipes").glob("*.yaml")):
        store.store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")


# --- configs from elsewhere ------------------------------------------------------------------------------------------


class GuardedConfigLoader(ConfigLoaderImpl):
    """Hydra's loader, for files that may come from a stranger: of --config-dir, --config-path or hydra.searchpath.

    A config of Hydra's own can run code in more ways than a `_target_`: by the factories of a logging config, by the
    environment of processes, by a launcher's shell commands. So a file from elsewhere has to leave `hydra` alone, but
    for the grid of a sweep, wherever in it that section stands: it is looked for where Hydra puts the file's content,
    before Hydra uses it.
    """

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        if "hydra" in result.config and not (self._is_trusted(result) or _is_grid(result.config.hydra)):
            raise ValueError(
                f"{default.config_path}.yaml of {result.path} sets `hydra`, by which a file can run code: write what "
                "you need of it on the command line, such as hydra.launcher.partition=gpu."
            )
        return result

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        if config_name is None and not overrides:
            # Hydra's own copies every config for each of the hundred questions that its help asks: a second.
            return self.repository.get_group_options(group_name, results_filter)
        return super().get_group_options(group_name, results_filter, config_name, overrides)

    @staticmethod
    def _is_trusted(result: ConfigResult) -> bool:
        scheme, _, place = result.path.partition("://")
        if scheme == "file":
            return Path(place).resolve().is_relative_to(config_dir("conf").resolve())
        return scheme in ("structured", "pkg")  # our schemas and recipes, plugins' and Hydra's own


def _is_grid(section: DictConfig) -> bool:
    """Whether Hydra's section holds the dimensions of a sweep alone, and they are no settings that run code."""
    match OmegaConf.to_container(section, resolve=False):
        case {"sweeper": {"params": dict(params), **other_params}, **others} if not (others or other_params):
            return not any(word in str(key) for key in params for word in ("hydra", "trust_remote_code"))
    return False


def guard_composition() -> None:
    """Has Hydra compose by `GuardedConfigLoader`. It has no place to hand in a loader."""
    hydra._internal.hydra.ConfigLoaderImpl = GuardedConfigLoader


def refuse_pickled_configs(arguments: list[str]) -> None:
    """Raises ValueError for Hydra's option that takes a pickle."""
    if any("--experimental-rerun".startswith(word.split("=")[0]) for word in arguments if word.startswith("--e")):
        raise ValueError("--experimental-rerun reads a pickle, which can run code: give the run's arguments again.")


def check_trust(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError where a file, rather than who started the command, asks to run a model's own Python code."""
    for key in ("model.trust_remote_code", "trust_remote_code"):
        if OmegaConf.select(composed, key) and not any(word.lstrip("+").startswith(f"{key}=") for word in overrides):
            raise ValueError(
                f"a config file sets {key}, to run Python code that comes with the model. If you trust that code, say "
                f"so on the command line: {key}=true."
            )


# --- the checked config ----------------------------------------------------------------------------------------------


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf.

    Raises:
        ValueError: a key is unknown, a value is out of range, or values contradict each other.
    """
    known = set(config_keys(schema))
    keys = flatten(OmegaConf.to_container(composed))
    unknown = [key for key in keys if key not in known and not key.startswith("published.")]
    if unknown:  # Hydra lets +key=value add anything
        key = min(unknown)
        raise ValueError(Composition(schema).unknown_setting(key, f"+{key}"))
    return OmegaConf.to_object(composed)


def options(group: str) -> list[str]:
    """The choices of one config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def config_keys(schema: type = Config) -> list[str]:
    """Every dotted key of a schema."""

    def walk(schema: type, prefix: str) -> Iterator[str]:
        types = typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            inner = (types[field.name], *typing.get_args(types[field.name]))
            section = next((kind for kind in inner if dataclasses.is_dataclass(kind)), None)
            if section is not None:
                yield from walk(section, f"{prefix}{field.name}.")
            if section is None or section is not types[field.name]:  # an optional section can be null
                yield prefix + field.name

    return list(walk(schema, ""))


@dataclasses.dataclass(frozen=True)
class Composition:
    """Explains what went wrong while the config of a command was composed."""

    schema: type
    program: str = "cera-train"

    def explain(self, error: Exception, arguments: list[str]) -> str:
        """One line: what was expected, what came, the nearest names."""
        if isinstance(error, OverrideParseException):
            return f"cannot read the argument {error.override!r}: quote values that hold brackets, commas, = or spaces."
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        if is_about_a_null_section(error):
            chosen = {argument.split("=")[0] for argument in arguments}
            keys = [argument.split("=")[0] for argument in arguments if "." in argument.split("=")[0]]
            key = next(key for key in keys if key.split(".")[0] not in chosen)
            return self.unknown_setting(key, key)
        if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([^/']+)'", text):
            group, name = match.groups()
            if name.startswith("submitit_") and importlib.util.find_spec("submitit") is None:
                return "jobs by submitit need an extra: pip install 'cera-train[slurm]'."
            return (
                f"unknown {group} {name!r}. {did_you_mean(name, options(group))}There are: {', '.join(options(group))}."
            )
        if isinstance(error, yaml.YAMLError):
            return f"broken YAML: {text}."
        if match := re.search(r"Multiple values for ([\w/]+)", text):
            return f"{match[1]} is chosen twice: write {match[1]}=NAME once, without a plus sign."
        full_key = re.search(r"full_key: ([\w.\[\]]+)", text)
        in_file = re.search(r"In '([\w./-]+)': \w+ raised while composing", text)
        if match := re.search(r"Could not override '([\w/@.]+)'|Key '([\w.]+)' (?:is )?not in", text):
            key = full_key[1] if full_key else match[1] or match[2]
            argument = next((argument for argument in arguments if argument.lstrip("+~").startswith(key)), None)
            return self.unknown_setting(key, argument or (f"{in_file[1]}.yaml" if in_file else key))
        detail = str(error.__cause__ or error).split("\n")[0].rstrip(".")
        if in_file:
            detail = f"{str(error).splitlines()[1].rstrip('.')} (in {in_file[1]}.yaml)"
        if "is not a ListConfig" in detail:
            detail = "expected a list, such as [a,b]"
        return f"{full_key[1] + ': ' if full_key else ''}{detail}."

    def unknown_setting(self, key: str, source: str) -> str:
        """The message about a key that no setting has, and the argument or file it came from."""
        if key in ("recipe", "sweep"):
            return f"a {key} is added with a plus sign: write +{source}."
        section = key.split(".", 1)[0]
        if "." in key and key in config_keys(self.schema) and section in self.groups():  # a section that is null
            return f"{key} needs a file for {section}: add {section}=NAME, one of {', '.join(options(section))}."
        known = config_keys(self.schema) if "." in key else [*self.groups(), *config_keys(self.schema)]
        return (
            f"unknown setting {key!r} (from {source!r}). {did_you_mean(key, known)}`{self.program} --help` lists all."
        )

    def groups(self) -> list[str]:
        """The config groups of this command."""
        fields = {field.name for field in dataclasses.fields(self.schema)}
        return [path.name for path in sorted(config_dir("conf").iterdir()) if path.is_dir() and path.name in fields]


def is_about_a_null_section(error: Exception) -> bool:
    """Whether a value was set in a section that is null, which OmegaConf takes for a bug of its own."""
    return isinstance(error, AssertionError) and "Unexpected type for root: NoneType" in str(error)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    last = name.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == last]
    near += [key for key in difflib.get_close_matches(name, known, n=3, cutoff=0.7) if key not in near]
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""
