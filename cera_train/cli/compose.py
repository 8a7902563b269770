"""The config that a command line composes, for programs that run a command in their own process."""

from __future__ import annotations

from typing import Any

import hydra

from cera_train.cli.config import to_config
from cera_train.cli.help import config_name, register_configs
from cera_train.cli.mistakes import SCHEMAS, with_implied_files, with_texts_quoted
from cera_train.common.files import config_dir


def compose(*overrides: str, command: str = "train") -> Any:
    """The checked config of `cera-train OVERRIDES`, or of another command, such as `plan`."""
    program = f"cera-{command}"
    register_configs()
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        settings = with_texts_quoted(program, with_implied_files(program, overrides))
        return to_config(hydra.compose(config_name(program), settings), SCHEMAS[program])
