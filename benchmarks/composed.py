"""Configs as the commands compose them, for benchmarks that run the program in their process."""

from __future__ import annotations

from typing import Any

import hydra

from cera_train.cli.composition import register_configs, to_config
from cera_train.common.files import config_dir
from cera_train.config import PlanRun


def composed(schema: type, *overrides: str) -> Any:
    """The config of a command line: of cera-plan for PlanRun, else of cera-train."""
    register_configs()
    command = "plan" if schema is PlanRun else "config"
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        return to_config(hydra.compose(command, list(overrides)), schema)
