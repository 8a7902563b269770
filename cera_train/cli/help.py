"""The first step of every command: it prints its help, which needs the settings alone, or imports
what runs it."""

import ast
import dataclasses
import functools
import inspect
import itertools
import os
import pkgutil
import sys
import textwrap
import typing
from enum import EnumType
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from cera_train.cli.mistakes import SCHEMAS, for_hydra, unknown_setting
from cera_train.common.files import config_dir, options
from cera_train.common.settings import fields_of, quoted, require, section_of, word_of
from cera_train.common.terminal import terminal_width
from cera_train.distributed.processes import join_slurm_step


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


@functools.cache
def register_configs() -> None:
    """Stores the schemas and the recipes with Hydra; a recipe `name` is then `+recipe=name`.
    ${options:group} in a help text lists the group's choices, and ${half:${adapter.r}} is half of a
    number."""
    OmegaConf.register_new_resolver("half", lambda number: number / 2, replace=True)
    OmegaConf.register_new_resolver("options", lambda group: " ".join(options(group)), replace=True)
    store = ConfigStore.instance()
    for program, schema in SCHEMAS.items():
        store.store(
            group="schema", name=program.removeprefix("cera-"), node=schema, package="_global_"
        )
    for name in options("recipe"):
        node = OmegaConf.load(config_dir("recipes") / f"{name}.yaml")
        store.store(group="recipe", name=name, node=node, package="_global_")


def print_help(program: str) -> None:
    """Prints a command's `hydra.help.template` with its config, or the settings of the sections
    that are named after --help. Hydra's own --help takes four seconds."""
    words = for_hydra(program, sys.argv[1:])
    arguments = [word for word in words if not word.startswith("-")]
    sections = [word for word in arguments if "=" not in word]
    overrides = [word for word in arguments if "=" in word]
    for folder in [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]:
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{Path(folder).absolute()}')}]")
    register_configs()
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        config = hydra.compose(config_name(program), overrides, return_hydra_config=True)
    template = config.hydra.help.template
    with open_dict(config):
        del config["hydra"]
    for section in sections:
        print_settings(SCHEMAS[program], section, config)
    if not sections:
        print(template.replace("$CONFIG", OmegaConf.to_yaml(config)))


def print_settings(schema: type, section: str, config: DictConfig) -> None:
    """Prints each setting of a section with its value, its choices and its sentence."""
    sentences = sentences_of(schema)
    fields = {
        key: field
        for key, field in fields_of(schema).items()
        if f"{key}.".startswith(f"{section}.")
    }
    require(bool(fields), unknown_setting(section, f"--help {section}", schema))
    for key, field in fields.items():
        default = None if field.default is dataclasses.MISSING else field.default
        value = OmegaConf.select(config, key, default=default)  # of a section that is null
        choices = " | ".join(choices_of(field))
        print(f"{key}={word_of(value)}" + (f"  # {choices}" if choices else ""))
        text = textwrap.wrap(sentences.get(key, ""), terminal_width() - 4)
        print(textwrap.indent("\n".join([*text, ""]), "    "))


@functools.cache
def sentences_of(schema: type, prefix: str = "") -> dict[str, str]:
    """The docstring under the field of each setting that has one, by its dotted key."""
    sentences = {}
    for kind in filter(dataclasses.is_dataclass, reversed(schema.__mro__)):
        [tree] = ast.parse(inspect.getsource(kind)).body
        for field, below in itertools.pairwise(tree.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    sentences[prefix + name] = " ".join(text.split())
    for name, hint in typing.get_type_hints(schema).items():
        if inner := section_of(hint):
            sentences |= sentences_of(inner, f"{prefix}{name}.")
    return sentences


def choices_of(field: dataclasses.Field) -> list[str]:
    """The words that a setting may have; none if it is no choice between words."""
    kinds = (field.type, *typing.get_args(field.type))
    return [word for kind in kinds if isinstance(kind, EnumType) for word in kind.__members__]
