"""The config of a command: Hydra composes it, dataclasses check it. Imports no torch."""

import contextlib
import functools
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cera_train.adapters.families import check_settings
from cera_train.cli.mistakes import SCHEMAS, for_hydra, unknown_setting
from cera_train.cli.start import errors_in_one_line
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir, options
from cera_train.common.settings import (
    MISSING,
    choices_of,
    fields_at,
    flatten,
    quoted,
    require,
)
from cera_train.common.terminal import announce_import
from cera_train.distributed.processes import is_main_process, join_slurm_step
from cera_train.settings.data import as_list
from cera_train.settings.run import Config


def run_command(program: str, path: str) -> None:
    """Calls the function of a command, by its import path, or prints the command's help."""
    join_slurm_step(os.environ)
    if program in SCHEMAS and {"--help", "-h"} & set(sys.argv):
        print_help(program)
    else:
        pkgutil.resolve_name(path)()


def config_name(program: str) -> str:
    """The file of conf/ that a command composes."""
    return "config" if program == "cera-train" else program.removeprefix("cera-")


def start_hydra(
    program: str,
    command: Callable[[DictConfig], Any],
    plugins: Mapping[str, Callable[..., Plugin]] | None = None,
) -> None:
    """Composes the config of a command and calls it. The only place that changes sys.argv, which
    Hydra reads.

    Args:
        plugins: sweepers and launchers of ours by name, for the `_target_` of their files in
            conf/hydra.
    """

    @functools.wraps(command)
    def explained(composed: DictConfig) -> Any:
        # Hydra prints its own report about an error that reaches it.
        with errors_in_one_line(program):
            return command(composed)

    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # composition errors come out unchanged, for `main` to explain
    )
    sys.argv[1:] = for_hydra(program, sys.argv[1:])
    register_configs(*options("recipe"))
    # Plugins.register takes a class under the name of its module, and Hydra builds plugins only
    # from names in the package hydra_plugins, whose modules every Hydra program would import.
    names = {f"hydra_plugins.cera_train.{name}": plugin for name, plugin in (plugins or {}).items()}
    Plugins.instance().class_name_to_class.update(names)
    decorate = hydra.main(
        version_base="1.3", config_path=str(config_dir("conf")), config_name=config_name(program)
    )
    # Only sweeps of training have a folder: the multirun.yaml that Hydra writes for the others is
    # deleted.
    with (
        contextlib.nullcontext()
        if program == "cera-train"
        else tempfile.TemporaryDirectory() as folder
    ):
        if folder:  # their jobs run here, whatever launcher the file of a sweep chooses
            sys.argv += [f"hydra.sweep.dir={quoted(folder)}", "hydra/launcher=basic"]
        decorate(explained)()


def print_help(program: str) -> None:
    """Prints a command's `hydra.help.template` with its config. Hydra's own --help takes four
    seconds."""
    words = for_hydra(program, sys.argv[1:])
    overrides = [word for word in words if not word.startswith("-")]
    for folder in [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]:
        path = quoted(f"file://{Path(folder).absolute()}")
        overrides.append(f"hydra.searchpath=[{path}]")
    register_configs(*(name for name in options("recipe") if f"+recipe={name}" in overrides))
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        config = hydra.compose(config_name(program), overrides, return_hydra_config=True)
    template = config.hydra.help.template
    with open_dict(config):
        del config["hydra"]
    yaml = with_choices(OmegaConf.to_yaml(config), SCHEMAS[program])
    print(template.replace("$CONFIG", yaml))


def with_choices(yaml: str, schema: type) -> str:
    """A config's text with the words that a setting may have beside it."""
    lines = []
    path: list[str] = []
    for line in yaml.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            path[len(key[1]) // 2 :] = [key[2]]
            if choices := choices_of(schema, ".".join(path)):
                line += f"  # {' | '.join(choices)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


# --- the config of a command ----------------------------------------------------------------------


@functools.cache
def register_configs(*recipes: str) -> None:
    """Stores the schemas and these recipes with Hydra; a recipe `name` is then `+recipe=name`.
    ${options:group} in a help text lists the group's choices, and ${half:${adapter.r}} is half of a
    number."""
    OmegaConf.register_new_resolver("half", lambda number: number / 2, replace=True)
    OmegaConf.register_new_resolver("options", lambda group: " ".join(options(group)), replace=True)
    store = ConfigStore.instance()
    for program, schema in SCHEMAS.items():
        store.store(
            group="schema", name=program.removeprefix("cera-"), node=schema, package="_global_"
        )
    for name in recipes:
        node = OmegaConf.load(config_dir("recipes") / f"{name}.yaml")
        store.store(group="recipe", name=name, node=node, package="_global_")


def announce_imports() -> None:
    if is_main_process():
        announce_import("PyTorch and transformers")


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf."""
    tree = flatten(OmegaConf.to_container(composed))
    for key in sorted(tree):  # Hydra accepts any +key=value
        if tree[key] != MISSING and not fields_at(schema, key):
            raise UserError(unknown_setting(key, f"+{key}={tree[key]}", schema))
        check_line_breaks(key, tree[key])
    config = OmegaConf.to_object(composed)
    if getattr(config, "data", None) is not None:
        from cera_train.data.sources import decide_layouts  # --help needs no rows

        config = replace(config, data=decide_layouts(config.data))
    if issubclass(schema, Config):
        check_settings(config.adapter)
    return config


def check_read(config: Config, overrides: Sequence[str]) -> None:
    """Raises UserError for a setting of the command line that a single run does not read. A sweep's
    jobs may differ in what they read."""
    unread = config.unread()
    for word in overrides:
        key = word.lstrip("+").partition("=")[0]
        for place, reader in unread.items():
            require(
                not f"{key}.".startswith(f"{place}."),
                f"{word} does nothing here: it is for {reader}. Leave it out.",
            )


IN_PLACE_OF_BREAK = re.compile(r"\\[nt](?![a-z])")
"""A backslash with an n or a t that begins no LaTeX command, such as \\neq."""


def check_line_breaks(key: str, value: Any) -> None:
    """Raises UserError for a template with a backslash and a letter in place of a line break or a
    tab: neither a shell's plain quotes nor Hydra's turn them into one."""
    section, _, name = key.rpartition(".")
    if section and name in ("prompt", "completion", "rejected", "stop"):
        for text in as_list(value):
            quoted = f'["{text}"]' if isinstance(value, list) else f'"{text}"'
            require(
                not IN_PLACE_OF_BREAK.search(str(text)),
                f"{key}={text} has a backslash and a letter in place of a line break or a tab: "
                f"write $'{key}={quoted}' in the shell, and double quotes in a YAML file.",
            )


def without_hydra(composed: DictConfig, schema: type = Config) -> Any:
    """The checked config of a job, from the whole config that Hydra composed for it."""
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return to_config(composed, schema)
