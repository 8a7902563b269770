"""The config of a command: Hydra composes it, dataclasses check it. Imports no torch."""

import contextlib
import functools
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hydra
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from omegaconf import DictConfig, OmegaConf

from cera_train.adapters.families import check_settings
from cera_train.cli.help import config_name, register_configs
from cera_train.cli.mistakes import for_hydra
from cera_train.cli.start import errors_in_one_line
from cera_train.common.files import config_dir
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import quoted
from cera_train.common.terminal import announce_import
from cera_train.data.sources import decide_layouts
from cera_train.distributed.processes import is_main_process
from cera_train.settings.run import Config
from cera_train.settings.values import checked


def register_plugins(**plugins: type[Plugin]) -> None:
    """Lets files in conf/hydra name sweepers and launchers of ours as their `_target_`."""
    # Plugins.register takes a class under the name of its module, and Hydra builds plugins only
    # from names in the package hydra_plugins, whose modules every Hydra program would import.
    names = {f"hydra_plugins.cera_train.{name}": plugin for name, plugin in plugins.items()}
    Plugins.instance().class_name_to_class.update(names)


def start_hydra(program: str, command: Callable[[DictConfig], Any]) -> None:
    """Composes the config of a command and calls it. The only place that changes sys.argv, which
    Hydra reads."""

    @functools.wraps(command)
    def explained(composed: DictConfig) -> Any:
        # Hydra prints its own report about an error that reaches it.
        with errors_in_one_line(program):
            return command(composed)

    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # composition errors come out unchanged, for `main` to explain
    )
    sys.argv[1:] = for_hydra(program, sys.argv[1:])
    register_configs()
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


def announce_imports() -> None:
    if is_main_process():
        announce_import("PyTorch and transformers")


def call(path: str, config: Any) -> Any:
    """Calls a function, by its import path, with a checked config: importing torch takes
    seconds."""
    announce_imports()
    with heavy_imports():
        function = pkgutil.resolve_name(path)
    return function(config)


def to_config(composed: DictConfig, schema: type = Config) -> Any:
    """The checked dataclasses of a composed config, without Hydra's section. Below this line
    nothing sees OmegaConf."""
    settings = OmegaConf.masked_copy(composed, composed.keys() - {"hydra"})
    tree = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    config = checked(schema, tree)
    if getattr(config, "data", None) is not None:
        config = replace(config, data=decide_layouts(config.data))
    if issubclass(schema, Config):
        check_settings(config.adapter)
    return config
