"""Configs as the commands compose them, for benchmarks and tests that run the program in their
process."""

from __future__ import annotations

from typing import Any

import hydra

from cera_train.cli.mistakes import SCHEMAS, with_implied_files
from cera_train.cli.start import register_configs, to_config
from cera_train.common.files import config_dir, options


def composed(*overrides: str, command: str = "train") -> Any:
    """The config of a command line: of cera-train, or of another command, as `plan`."""
    register_configs(*options("recipe"))
    name = "config" if command == "train" else command
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        settings = with_implied_files(f"cera-{command}", overrides)
        return to_config(hydra.compose(name, settings), settings, SCHEMAS[f"cera-{command}"])
