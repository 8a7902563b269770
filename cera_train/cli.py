"""The command line: composes the config, checks it, hands it to `train()`, and turns errors into one clear line.

Nothing here imports torch: `--help` and a config error answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cera_train.config import Config, flatten
from cera_train.errors import explain
from cera_train.secrets import redact

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def config_dir(name: str) -> Path:
    """conf/ or recipes/: inside the package where a wheel put it, else beside the package in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else CHECKOUT / name


def register_configs() -> None:
    """Stores the schema and every recipe with Hydra; a recipe `name` is then `+recipe=name`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for path in sorted(config_dir("recipes").glob("*.yaml")):
        store.store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")


def to_config(composed: DictConfig) -> Config:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf.

    Raises:
        ValueError: a key is unknown, a value is out of range, or values contradict each other.
    """
    unknown = flatten(OmegaConf.to_container(composed)).keys() - set(config_keys())
    if unknown:  # Hydra lets +key=value add anything
        key = min(unknown)
        raise ValueError(unknown_setting(key, f"+{key}"))
    return OmegaConf.to_object(composed)


@hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name="config")
def run(composed: DictConfig) -> float | None:
    """One training run. Returns its perplexity, for sweepers that minimise."""
    try:
        config = to_config(composed)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
        from cera_train.train import train

        return train(config)["eval/perplexity"]
    except Exception as error:
        fail(error)  # Hydra would print a report of its own about an error that left this function


def main() -> None:
    """The console script `cera-train`."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    os.environ["CERA_TRAIN_DEBUG"] = "1" if debug else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # composition errors come out whole, to be explained here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    register_configs()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Prints what went wrong in one line and exits with status 2; anything unexpected keeps its traceback."""
    is_composition = isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError))
    message = explain_composition(error, sys.argv[1:]) if is_composition else explain(error)
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    if message is not None:
        print(f"cera-train: {redact(message)}", file=sys.stderr)
    sys.exit(1 if message is None else 2)


# --- what Hydra and OmegaConf say, said for people -------------------------------------------------------------------


def explain_composition(error: Exception, arguments: list[str]) -> str:
    """One line for an error while composing: what was expected, what came, the nearest names."""
    if isinstance(error, OverrideParseException):
        return f"cannot read the argument {error.override!r}: quote values that hold brackets, commas, = or spaces."
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([^/']+)'", text):
        group, name = match.groups()
        return f"unknown {group} {name!r}. {did_you_mean(name, options(group))}There are: {', '.join(options(group))}."
    if isinstance(error, yaml.YAMLError):
        return f"broken YAML: {text}."
    if match := re.search(r"Multiple values for ([\w/]+)", text):
        return f"{match[1]} is chosen twice: write {match[1]}=NAME once, without a plus sign."
    full_key = re.search(r"full_key: ([\w.\[\]]+)", text)
    in_file = re.search(r"In '([\w./-]+)': \w+ raised while composing", text)
    if match := re.search(r"Could not override '([\w/@.]+)'|Key '([\w.]+)' (?:is )?not in", text):
        key = full_key[1] if full_key else match[1] or match[2]
        argument = next((argument for argument in arguments if argument.lstrip("+~").startswith(key)), None)
        return unknown_setting(key, argument or (f"{in_file[1]}.yaml" if in_file else key))
    detail = str(error.__cause__ or error).split("\n")[0].rstrip(".")
    if in_file:
        detail = f"{str(error).splitlines()[1].rstrip('.')} (in {in_file[1]}.yaml)"
    if "is not a ListConfig" in detail:
        detail = "expected a list, such as [a,b]"
    return f"{full_key[1] + ': ' if full_key else ''}{detail}."


def unknown_setting(key: str, source: str) -> str:
    """The message about a key that no setting has, and the argument or file it came from."""
    if key == "recipe":
        return f"a recipe is added with a plus sign: write +{source}."
    known = config_keys() if "." in key else [*groups(), *config_keys()]
    return f"unknown setting {key!r} (from {source!r}). {did_you_mean(key, known)}`cera-train --help` lists all."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == last]
    near += [key for key in difflib.get_close_matches(name, known, n=3, cutoff=0.7) if key not in near]
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""


def options(group: str) -> list[str]:
    """The choices of one config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups() -> list[str]:
    return [path.name for path in sorted(config_dir("conf").iterdir()) if path.is_dir()]


def config_keys() -> list[str]:
    """Every dotted key of the schema."""

    def walk(schema: type, prefix: str) -> Iterator[str]:
        types = typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(types[field.name]):
                yield from walk(types[field.name], f"{prefix}{field.name}.")
            else:
                yield prefix + field.name

    return list(walk(Config, ""))
