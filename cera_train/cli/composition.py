"""Hydra's side of a command: where the configs lie, and the checked dataclasses of a composed one. Imports no torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cera_train.adapters.family import check_settings
from cera_train.cli.mistakes import SCHEMAS, options, unknown_setting
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.common.settings import MISSING, flatten, keys_of
from cera_train.common.trust import check_remote_code
from cera_train.settings.run import Config


@functools.cache
def register_configs() -> None:
    """Stores the schemas and every recipe with Hydra; a recipe `name` is then `+recipe=name`. ${options:group} in a
    help text lists the group's choices, and ${half:${adapter.r}} is half of a number."""
    OmegaConf.register_new_resolver("half", lambda number: number / 2, replace=True)
    OmegaConf.register_new_resolver("options", lambda group: " ".join(options(group)), replace=True)
    store = ConfigStore.instance()
    for program, schema in SCHEMAS.items():
        store.store(name="schema" if schema is Config else f"{program.removeprefix('cera-')}_schema", node=schema)
    for path in sorted(config_dir("recipes").glob("*.yaml")):
        store.store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")


def register_plugins(plugins: Mapping[str, type[Plugin]]) -> None:
    """Lists sweepers and launchers of ours with Hydra by these names, as hydra_plugins.cera_train.NAME, for the
    `_target_` of their files in conf/hydra. Hydra builds plugins of that package only, and other Hydra programs would
    import a module in it."""
    names = {f"hydra_plugins.cera_train.{name}": plugin for name, plugin in plugins.items()}
    Plugins.instance().class_name_to_class.update(names)


def check_trust(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError where a file, rather than the command line, asks to run a model's Python code."""
    keys = ("model.trust_remote_code", "trust_remote_code")
    check_remote_code({key: OmegaConf.select(composed, key) for key in keys}, overrides)


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config. Below this line nothing sees OmegaConf."""
    tree, known = flatten(OmegaConf.to_container(composed)), keys_of(schema)
    for key in sorted(tree):  # Hydra lets +key=value add anything
        names = itertools.accumulate(key.split("."), "{}.{}".format)
        if tree[key] != MISSING and not any(name in known for name in names):
            raise UserError(unknown_setting(key, f"+{key}={tree[key]}", schema))
    config = OmegaConf.to_object(composed)
    if issubclass(schema, Config):
        check_settings(config.adapter)
    if getattr(config, "task", None) is not None:
        from cera_train.evaluation.tasks.task import build_task  # --help needs no task

        build_task(config.task)
    return config


def without_hydra(composed: DictConfig, schema: type = Config) -> Any:
    """The checked config of a job, from all that Hydra composed for it."""
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return to_config(composed, schema)
