"""The command line: composes the config, checks it, hands it to `train()`, and turns errors into one clear line.

Nothing here imports torch: `--help` and a config error answer at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cera_train.config import Config
from cera_train.errors import UserError, explain
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
        ValueError: a value is out of range, or values contradict each other.
    """
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
        # Hydra would print its own report of an error that left this function.
        fail(error)


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
    except (HydraException, OmegaConfBaseException) as error:
        fail(UserError(explain_composition(error, sys.argv[1:])) if not debug else error)


def fail(error: Exception) -> NoReturn:
    """Prints what went wrong in one line and exits with status 2; anything unexpected keeps its traceback."""
    message = explain(error)
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if message is not None:
        print(f"cera-train: {redact(message)}", file=sys.stderr)
    sys.exit(2 if message is not None else 1)


# --- what Hydra and OmegaConf say, said for people -------------------------------------------------------------------


def explain_composition(error: Exception, arguments: list[str]) -> str:
    """One line for an error while composing: what was expected, what came, the nearest names."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(error).split())
    detail = " ".join(str(cause).split("\n")[0].split())

    if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([^/']+)'", text):
        group, name = match.groups()
        return f"unknown {group} {name!r}{nearest(name, options(group))}. There are: {', '.join(options(group))}."
    if match := re.search(r"[Cc]ould not override '([\w/@.]+)'", text) or re.search(
        r"Key '([\w.]+)' (?:is not in struct|not in '\w+')", text
    ):
        key = match[1]
        if "full_key" in text and (full := re.search(r"full_key: ([\w.]+)", text)):
            key = full[1]
        source = next((argument for argument in arguments if argument.lstrip("+~").startswith(key)), None)
        where = f" (from {source!r})" if source else ""
        known = [*config_keys(), *groups()]
        return f"unknown setting {key!r}{where}{nearest(key, known)}. `cera-train --help` lists all."
    if cause is not error or "full_key" in text:
        key = re.search(r"full_key: ([\w.\[\]]+)", str(cause) + " " + text)
        return f"{key[1] + ': ' if key else ''}{detail}."
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = name.rsplit(".", 1)[-1]
    found += [key for key in known if key.rsplit(".", 1)[-1] == last and key not in found]
    return f": did you mean {' or '.join(found[:3])}?" if found else ""


def options(group: str) -> list[str]:
    """The choices of one config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups() -> list[str]:
    return [path.name for path in sorted(config_dir("conf").iterdir()) if path.is_dir()]


def config_keys() -> list[str]:
    """Every dotted key of the schema."""

    def walk(schema: Any, prefix: str) -> Iterable[str]:
        import dataclasses
        import typing

        hints = typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            key = f"{prefix}{field.name}"
            if dataclasses.is_dataclass(hints[field.name]):
                yield from walk(hints[field.name], f"{key}.")
            else:
                yield key

    return list(walk(Config, ""))
