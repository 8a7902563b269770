"""Hydra's side of the command line: where the configs lie, the checked config of a command, and what Hydra and
OmegaConf say, said for people."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from cera_train.common.errors import UserError
from cera_train.common.settings import flatten, keys_of, leaves
from cera_train.common.trust import check_remote_code
from cera_train.config import Config, PlanRun
from cera_train.evaluation.config import EvalConfig

PACKAGE = Path(__file__).resolve().parents[1]
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


def check_trust(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError where a file, rather than the command line, asks to run a model's Python code."""
    keys = ("model.trust_remote_code", "trust_remote_code")
    check_remote_code({key: OmegaConf.select(composed, key) for key in keys}, overrides)


# --- the checked config ----------------------------------------------------------------------------------------------


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf.

    Raises:
        ValueError: a key is unknown, a value is out of range, or values contradict each other.
    """
    known = set(keys_of(schema))
    free_form = tuple(f"{leaf.key}." for leaf in leaves(schema))  # a setting that is a dict, such as adapter.settings
    keys = flatten(OmegaConf.to_container(composed))
    unknown = [key for key in keys if key not in known and not key.startswith(free_form)]
    if unknown:  # Hydra lets +key=value add anything
        key = min(unknown)
        raise UserError(Composition(schema).unknown_setting(key, f"+{key}"))
    return OmegaConf.to_object(composed)


def options(group: str) -> list[str]:
    """The choices of one config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


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
        if "." in key and key in keys_of(self.schema) and section in self.groups():  # a section that is null
            return f"{key} needs a file for {section}: add {section}=NAME, one of {', '.join(options(section))}."
        known = keys_of(self.schema) if "." in key else [*self.groups(), *keys_of(self.schema)]
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
