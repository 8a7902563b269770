"""`cera-chat`: asks a run a question, or talks to it."""

from __future__ import annotations

from dataclasses import replace

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cera_train.cli.composition import check_trust, to_config
from cera_train.cli.start import errors_in_one_line, start_hydra
from cera_train.common.imports import heavy_imports
from cera_train.model.folder import check_model
from cera_train.runs.subject import find_subject
from cera_train.settings.serving import ChatConfig

CHAT = "cera-chat"


def check_places(config: ChatConfig) -> None:
    """Raises UserError for a mistake in the folders, before torch takes its seconds to import."""
    for place in (config.run, config.compare):
        if place is not None:
            check_model(find_subject(replace(config, run=place)).model.path)


def main() -> None:
    start_hydra(CHAT, "chat", chat)


def chat(composed: DictConfig) -> None:
    """Checks the config and the folders, then asks."""
    with errors_in_one_line(CHAT):
        config = to_config(composed, ChatConfig)
        check_trust(composed, HydraConfig.get().overrides.task)
        check_places(config)
        with heavy_imports():
            from cera_train.serving.chat import chat

        chat(config)
